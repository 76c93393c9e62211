"""What all kinds of sweeps share: recipe, baseline, plans, and what the results say. Each kind has a file of its own.

A planner turns the sweep's settings into plans (`references`, `begin`, `propose`) and reads results from the runs (`values`,
`finding`, `conclusions`). It starts nothing: the controller does. Every kind evaluates the original model first, as the
baseline that retained shares and regimes are relative to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import optuna

from lethe import config as c
from lethe.config.parse import from_settings
from lethe.errors import LetheError, nearest, printable
from lethe.launching.worker import SETTINGS
from lethe.results import regimes
from lethe.results.listing import is_imported, number
from lethe.runs.run import Run, find_runs
from lethe.sweeps import axes, rules_of_thumb
from lethe.sweeps.axes import Point
from lethe.sweeps.reuse import made_from_the_same
from lethe.sweeps.trials import Plan, Stage, Trial
from lethe.text import corpora
from lethe.unlearning.check import check

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

MOST_RUNS = 10_000
SHOWN = ("acc", "correct_prob", "low", "high", "n", "chance", "degenerate")


@dataclass
class Finding:
    """The finding of one complete trial: its results, their retained shares, and its regime."""

    trial: Trial
    forget: dict[str, Any]
    retain: dict[str, Any]
    forget_share: regimes.Estimate | None
    retain_share: regimes.Estimate | None
    regime: regimes.Regime | None


class Planner:
    """What the kinds have in common."""

    def __init__(self, config: c.SweepConfig):
        self.config = config
        self.title: str = config.kind
        self.axes = axes.parse(config.vary, config.tamper is not None)

    # -- what is run

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All settings of the unlearning run that is varied."""
        return self._section("unlearn", self.config.unlearn)

    @cached_property
    def attack(self) -> dict[str, Any] | None:
        """All settings of the attack on every result; None without one."""
        return None if self.config.tamper is None else self._section("tamper", self.config.tamper)

    def _section(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        try:
            return c.to_dict(from_settings(SETTINGS[name], given | self._own(name)))
        except LetheError as error:
            raise LetheError(f"{name}: {error}") from error

    def _own(self, section: str) -> dict[str, Any]:
        """The settings of a section that the sweep sets itself."""
        own = {"out": self.config.out, "name": SETTINGS[section].name}
        return own | ({"model": "@0"} if section == "tamper" else {})

    @cached_property
    def tasks(self) -> tuple[str, str]:
        """The forget and the retain task.

        Raises:
            LetheError: no evaluation task is known as one, or the named one is not evaluated.
        """
        evaluated = self.recipe["eval"]["tasks"]
        found = []
        for name, given, known in (
            ("forget_task", self.config.forget_task, regimes.forget_task(evaluated)),
            ("retain_task", self.config.retain_task, regimes.retain_task(evaluated)),
        ):
            if not (given or known):
                raise LetheError(f"{name}: none of unlearn.eval.tasks ({', '.join(evaluated)}) is known as a {name}; name it")
            if given and given not in evaluated:
                raise LetheError(
                    f"{name}: '{given}' is not among unlearn.eval.tasks ({', '.join(evaluated)}){nearest(given, evaluated)}"
                )
            found.append(given or known or "")
        if found[0] == found[1]:
            raise LetheError(f"retain_task: '{found[1]}' is the forget task; name another")
        return found[0], found[1]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of forget accuracy, of retain accuracy and, with an attack, of the highest forget accuracy during it."""
        return ["minimize", "maximize"] if self.config.tamper is None else ["minimize", "maximize", "minimize"]

    def sampler(self) -> optuna.samplers.BaseSampler:
        """How Optuna chooses points, in the kinds that let it."""
        return optuna.samplers.RandomSampler()

    @property
    def expected(self) -> int:
        """How many trials the sweep will probably run, for the progress bar."""
        raise NotImplementedError

    def checked(self) -> c.SweepConfig:
        """The sweep's configuration with its recipes written out in full, after every setting was checked.

        Raises:
            LetheError: one of the runs could not work.
        """
        self._refuse_without_effect("unlearn", self.config.unlearn, self.recipe)
        self._refuse_without_effect("tamper", self.config.tamper or {}, self.attack)
        forget, _ = self.tasks
        if self.attack and forget not in self.attack["eval"]["tasks"]:
            raise LetheError(f"tamper: eval.tasks lacks {forget}, the forget task, which shows what the attack recovers")
        if self.recipe["source"].startswith("auto"):
            raise LetheError("source: a sweep needs one source for all its runs; find it with `lethe checkpoints` and name it")
        with corpora.read_once():
            for point in self.samples():
                self._check(self.plan(point, self.config.seed_list[0]))
        return dataclasses.replace(self.config, unlearn=self.recipe, tamper=self.attack)

    def _refuse_without_effect(self, section: str, given: dict[str, Any], recipe: dict[str, Any] | None) -> None:
        for name, own in self._own(section).items():
            if given.get(name, own) != own:
                raise LetheError(f"{section}: {name}: {printable(given[name], 80)} has no effect in a sweep; leave it out")
        if recipe and recipe["seed"]:
            raise LetheError(f"{section}: seed: {recipe['seed']} has no effect in a sweep; give seeds: [{recipe['seed']}]")

    def samples(self) -> Iterable[Point]:
        """The points to check before anything runs: both ends of every range, and every listed value."""
        for axis in self.axes:
            for value in axis.values or (axis.at(0), axis.at(1)):
                others = {other.name: (other.values or (other.at(0),))[0] for other in self.axes if not other.when}
                point = others | {axis.name: value}
                if axis.applies(point, self.recipe):
                    yield point

    def _check(self, plan: Plan) -> None:
        try:
            for kind, settings in plan.stages:
                made = from_settings(SETTINGS[kind], settings)  # `build` would drop unknown settings
                if kind == "unlearn":
                    check(made)
        except LetheError as error:
            where = printable(", ".join(f"{name} {value}" for name, value in plan.point.items()), 200)
            raise LetheError(f"at {where}: {error}") from error

    def plan(self, point: Point, seed: int, number: int | None = None) -> Plan:
        """The unlearning run at a point and, if the sweep has one, the attack on its result."""
        settings = axes.settings_at(self.recipe, point) | {"seed": seed}
        seeded = seed if len(self.config.seed_list) > 1 else None
        name = axes.name_at(self.config.name, settings, point, seeded)
        stages: list[Stage] = [("unlearn", settings | {"name": name})]
        if self.attack is not None:
            attack = axes.settings_at(self.attack, point, attack=True)
            stages.append(("tamper", attack | {"seed": seed, "name": f"{name}-attack"}))
        return Plan(name, stages, point, seed, number=number, axes=self.axes)

    def plans(self, point: Point) -> list[Plan]:
        """One plan per seed."""
        return [self.plan(point, seed) for seed in self.config.seed_list]

    def references(self) -> list[Plan]:
        """The evaluation of every model that is unlearned."""
        models = next((axis.values for axis in self.axes if axis.name == "model"), (self.recipe["model"],))
        return [baseline(model, self.recipe["eval"], self.recipe["dtype"], self.config.out) for model in models]

    def begin(self, sweep: Sweep) -> None:
        """Add the plans that are known from the start."""

    def facts_of(self, trial: Trial, settings: dict[str, Any]) -> dict[str, Any]:
        """Further fields of a run's record."""
        return {}

    def watch(self, sweep: Sweep) -> None:
        """Look at the running trials, in every round."""

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        """At most `room` plans to run next, once the references are measured."""
        return []

    @cached_property
    def _complete(self) -> dict[str, list[Run]]:
        """The complete runs in `out`, by key."""
        found: dict[str, list[Run]] = {}
        for run in find_runs(self.config.out):
            kind = run.record["kind"]
            if kind in {"unlearn", "tamper", "evaluate"} and run.record["status"] == "complete" and not is_imported(run):
                found.setdefault(axes.key_of(kind, run.record["config"]), []).append(run)
        return found

    def measured(self, kind: str, settings: dict[str, Any]) -> Run | None:
        """A complete run of the same settings, weights and text; None if there is none."""
        same = self._complete.get(axes.key_of(kind, settings), [])
        return next((run for run in reversed(same) if made_from_the_same(run)), None)

    # -- what the results say

    def values(self, runs: list[Run]) -> list[float | str]:
        """A trial's objectives; in the place of a missing one, the reason."""
        evals = runs[0].record.get("evals") or {}
        found: list[float | str] = []
        for task in self.tasks:
            value = number(evals[task]) if task in evals else None
            found.append(f"{task} is missing in {runs[0].path.name}" if value is None else value)
        if self.config.tamper is not None:
            curve = [line["evals"].get(self.tasks[0]) for line in runs[-1].rows("curve.jsonl")]
            known = [value for value in (number(result) for result in curve if result) if value is not None]
            found.append(max(known) if known else f"{self.tasks[0]} is missing in {runs[-1].path.name}")
        return found

    def baseline(self, sweep: Sweep, model: str) -> dict[str, Any]:
        """The results of the model that was unlearned; empty if it was not measured."""
        for trial in sweep.trials(references_only=True):
            if trial.get("model") == model and trial.status == "complete" and (runs := trial.runs(sweep.out)):
                return runs[0].record["evals"] or {}
        return {}

    def findings(self, sweep: Sweep) -> list[Finding]:
        """The findings of all complete trials."""
        complete = [trial for trial in sweep.trials() if not trial.is_reference and trial.status == "complete"]
        found = [self.finding(sweep, trial, runs) for trial in complete if (runs := trial.runs(sweep.out))]
        return [finding for finding in found if finding]

    def finding(self, sweep: Sweep, trial: Trial, runs: list[Run]) -> Finding | None:
        """The finding of a trial; None if its accuracies are missing."""
        evals = runs[0].record.get("evals") or {}
        forget, retain = (evals.get(name) for name in self.tasks)
        if forget is None or retain is None:
            return None
        return self.judge(sweep, trial, runs[0].record["config"]["model"], forget, retain)

    def judge(self, sweep: Sweep, trial: Trial, model: str, forget: dict[str, Any], retain: dict[str, Any]) -> Finding:
        """The retained shares and the regime of two results; none if the baseline was measured in another way."""
        before = self.baseline(sweep, model)
        shares = [
            regimes.retained_share(result, before[name])
            if name in before and regimes.provenance(result) == regimes.provenance(before[name])
            else None
            for name, result in zip(self.tasks, (forget, retain), strict=True)
        ]
        thresholds = self.config.retained_threshold, self.config.chance_threshold
        regime = regimes.regime(shares[0], shares[1], *thresholds) if shares[0] and shares[1] else None
        return Finding(trial, forget, retain, shares[0], shares[1], regime)

    def results(self, sweep: Sweep, trial: Trial, runs: list[Run]) -> dict[str, Any]:
        """A trial's results for tables."""
        if trial.is_reference and runs:
            evals = runs[0].record.get("evals") or {}
            return {"evals": {name: short(evals[name]) for name in self.tasks if name in evals}}
        finding = self.finding(sweep, trial, runs) if runs and trial.status == "complete" else None
        if finding is None:
            return {"evals": {}}
        forget, retain = self.tasks
        shown: dict[str, Any] = {"evals": {forget: short(finding.forget), retain: short(finding.retain)}}
        shown["regime"] = finding.regime
        if finding.forget_share and finding.retain_share:
            shown["selectivity"] = dataclasses.asdict(regimes.selectivity(finding.forget_share, finding.retain_share))
        if self.config.tamper is not None and trial.frozen.values:
            shown["after_attack"] = trial.frozen.values[-1]
        return shown

    def conclusions(self, sweep: Sweep) -> list[str]:
        """The conclusions from all results, in sentences."""
        found = self.findings(sweep)
        if not found:
            return []
        kinds = [finding.regime for finding in found if finding.regime]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        summary = f"Regimes: {counts}." if counts else "No regimes: the baseline is at chance on a task, or was not measured."
        return [summary, *self.summary(sweep, found), f"Next: {rules_of_thumb.advice(kinds)}."]

    def summary(self, sweep: Sweep, found: list[Finding]) -> list[str]:
        """Sentences of this kind of sweep, between the regimes and the next step."""
        return []


def baseline(model: str, evaluation: dict[str, Any], dtype: c.Dtype, out: str) -> Plan:
    """The evaluation of the original model, as the runs are evaluated."""
    how = {name: evaluation[name] for name in ("limit", "task_data", "num_fewshot")}
    settings = c.EvaluateConfig(model, evaluation["tasks"], **how, dtype=dtype, out=out, name="baseline")
    return Plan("baseline", [("evaluate", c.to_dict(settings))], reference=True, facts={"model": model})


def short(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its provenance."""
    return {key: result[key] for key in SHOWN if key in result}
