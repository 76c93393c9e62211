"""What all kinds of sweeps share: recipe, baseline, plans, and what the results say. Each kind has a file of its own.

A planner turns the sweep's settings into plans (`references`, `plans`, `propose`) and reads results from the runs (`values`,
`finding`, `conclusions`). It starts nothing: the controller does. Every kind evaluates the original model first, as the
baseline that retained shares and regimes are relative to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import optuna

from lethe import config as c
from lethe.config.parse import filled, from_settings, section_of
from lethe.errors import LetheError, nearest, printable
from lethe.launching.worker import SETTINGS
from lethe.methods.method import Method, named
from lethe.methods.user_file import is_file
from lethe.results import regimes
from lethe.results.listing import number
from lethe.runs.run import Run
from lethe.sweeps import axes
from lethe.sweeps.axes import Point
from lethe.sweeps.trials import Plan, Stage, Trial
from lethe.sweeps.trust import methods_of
from lethe.text import corpora
from lethe.unlearning.check import check

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

MOST_RUNS = 10_000
SHOWN = ("acc", "correct_prob", "low", "high", "n", "chance", "degenerate")
Result = dict[str, Any]


@dataclass
class Finding:
    """The finding of one complete trial: results on the forget and the retain task, their retained shares, and the regime.

    Results are means over the trial's seeds. There are no shares if the baseline was measured in another way.
    """

    trial: Trial
    results: list[Result]
    shares: list[regimes.Estimate]
    regime: regimes.Regime | None


class Planner:
    """What the kinds have in common."""

    def __init__(self, config: c.SweepConfig):
        self.config = config
        self.title: str = config.kind
        for method in methods_of(config):
            if is_file(method):
                named(method)  # so that its settings are known
        self.axes = axes.parse(config.vary, config.tamper is not None)

    # -- what is run

    @property
    def devices(self) -> int:
        """The largest number of devices in the settings of a run."""
        varied = [axis for axis in self.axes if axis.name.removeprefix(axes.ATTACK) == "devices"]
        given = [settings["devices"] for settings in (self.recipe, self.attack) if settings]
        return max([each or 1 for each in given] + [each for axis in varied for each in axis.values or [round(axis.high)]])

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All settings of the unlearning run that is varied; of several methods, with the first."""
        if self.methods:
            return self.recipes[self.methods[0]]
        return c.to_dict(section("unlearn", self.config.unlearn, self.config.out))

    @property
    def methods(self) -> list[str]:
        """The methods that are varied."""
        return next((axis.values for axis in self.axes if axis.name == "method"), [])

    @cached_property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """For each method that is varied, the recipe with its defaults. A setting may need a value that only a point has."""
        given = section_of(self.config.unlearn)
        refuse_seed(given.get("seed"))
        own = settings_of_sweep("unlearn", given, self.config.out)
        return {method: filled(Method, given | own | {"method": method}) for method in self.methods}

    def settings_at(self, point: Point) -> dict[str, Any]:
        """All settings of the unlearning run at a point."""
        return axes.settings_at(self.recipes[point["method"]] if "method" in point else self.recipe, point)

    @cached_property
    def attack(self) -> dict[str, Any] | None:
        """All settings of the attack on every result; None without one."""
        given = self.config.tamper
        return None if given is None else c.to_dict(section("tamper", given, self.config.out))

    @cached_property
    def tasks(self) -> tuple[str, str]:
        """The forget and the retain task.

        Raises:
            LetheError: no evaluation task is known as one, or the named one is not evaluated.
        """
        evaluated = self.recipe["eval"]["tasks"]
        forget = self.config.forget_task or regimes.forget_task(evaluated)
        retain = self.config.retain_task or regimes.retain_task(evaluated)
        for name, task in (("forget_task", forget), ("retain_task", retain)):
            among = f"unlearn.eval.tasks ({', '.join(evaluated)})"
            if not task:
                raise LetheError(f"{name}: none of {among} is known as a {name}; name it")
            if task not in evaluated:
                raise LetheError(f"{name}: '{task}' is not among {among}{nearest(task, evaluated)}")
        if forget == retain:
            raise LetheError(f"retain_task: '{retain}' is the forget task; name another")
        return forget or "", retain or ""

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of forget accuracy, of retain accuracy and, with an attack, of the highest forget accuracy during it."""
        return ["minimize", "maximize"] if self.config.tamper is None else ["minimize", "maximize", "minimize"]

    def sampler(self) -> optuna.samplers.BaseSampler | None:
        """How Optuna chooses points, in the kinds that let it."""
        return None

    @cached_property
    def plans(self) -> list[Plan]:
        """The plans that are known from the start."""
        return []

    @property
    def expected(self) -> int:
        """How many trials the sweep will probably run, for the progress bar."""
        return len(self.plans)

    def checked(self) -> c.SweepConfig:
        """The sweep's configuration with its recipes written out in full, after every setting was checked.

        Raises:
            LetheError: one of the runs could not work.
        """
        forget, _ = self.tasks
        if self.attack and forget not in self.attack["eval"]["tasks"]:
            raise LetheError(f"tamper: eval.tasks lacks {forget}, the forget task, which shows what the attack recovers")
        if self.recipe["source"].startswith("auto"):
            raise LetheError("source: a sweep needs one source for all its runs; find it with `lethe checkpoints` and name it")
        with corpora.read_once():
            for point in self.samples():
                self._check(self.plan(point, self.config.seed_list[:1]))
        recipe = section_of(self.config.unlearn) if self.methods else self.recipe  # each method has defaults of its own
        return dataclasses.replace(self.config, unlearn=recipe, tamper=self.attack)

    def samples(self) -> Iterable[Point]:
        """The points to check before anything runs: both ends of every range, and every listed value."""
        for axis in self.axes:
            for value in axis.values or (axis.at(0), axis.at(1)):
                others = {other.name: (other.values or (other.at(0),))[0] for other in self.axes if not other.when}
                wanted = {name: first_of(axis.when[name]) for name in axis.when if any(name == each.name for each in self.axes)}
                point = others | wanted | {axis.name: value}
                if axis.applies(point, self.recipe):
                    yield point

    def _check(self, plan: Plan) -> None:
        try:
            for kind, settings in plan.stages:
                made = from_settings(SETTINGS[kind], settings)  # `build` would drop unknown settings
                refuse_devices(self.config, made.devices)
                if kind == "unlearn":
                    check(made)
        except LetheError as error:
            where = printable(", ".join(f"{name} {value}" for name, value in plan.point.items()), 200)
            raise LetheError(f"at {where}: {error}") from error

    def plan(self, point: Point, seeds: list[int], **facts: Any) -> Plan:
        """For each seed, the unlearning run at a point and, if the sweep has one, the attack on its result."""
        stages: list[Stage] = []
        for seed in seeds:
            settings = self.settings_at(point) | {"seed": seed}
            name = axes.name_at(self.config.name, settings, point, seed if len(self.config.seed_list) > 1 else None)
            model = f"@{len(stages)}"
            stages.append(("unlearn", settings | {"name": name}))
            if self.attack is not None:
                attack = axes.settings_at(self.attack, point, attack=True)
                stages.append(("tamper", attack | {"model": model, "seed": seed, "name": f"{name}-attack"}))
        first = stages[0][1]
        name = first["name"] if len(seeds) == 1 else axes.name_at(self.config.name, first, point, None)
        return Plan(name, stages, point, seeds[0], facts, self.axes)

    def references(self) -> list[Plan]:
        """The evaluation of every model that is unlearned."""
        models = next((axis.values for axis in self.axes if axis.name == "model"), (self.recipe["model"],))
        return [baseline(model, self.recipe["eval"], self.recipe["dtype"], self.config.out) for model in models]

    def begin(self, sweep: Sweep) -> None:
        """Add the trials that are known from the start."""
        sweep.add(self.plans, sweep.study)

    def facts_of(self, trial: Trial, settings: dict[str, Any]) -> dict[str, Any]:
        """Further fields of a run's record."""
        return {}

    def watch(self, sweep: Sweep) -> None:
        """Look at the running trials, in every round."""

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        """At most `room` plans to run next, once the references are measured."""
        return []

    # -- what the results say

    def _by_seed(self, runs: list[Run]) -> list[list[Run]]:
        size = 1 if self.config.tamper is None else 2
        return [runs[i : i + size] for i in range(0, len(runs), size)]

    def values(self, runs: list[Run]) -> list[float]:
        """A trial's objectives, as means over its seeds.

        Raises:
            LetheError: one of them was not measured.
        """
        return [fmean(values) for values in zip(*map(self._values, self._by_seed(runs)), strict=True)]

    def _values(self, runs: list[Run]) -> list[float]:
        """The objectives of one seed."""
        evals = runs[0].record.get("evals") or {}
        if missing := [task for task in self.tasks if task not in evals]:
            raise LetheError(f"{missing[0]} is missing in {runs[0].path.name}")
        values = [number(evals[task]) for task in self.tasks]
        if self.config.tamper is not None:
            forget = self.tasks[0]
            curve = [number(line["evals"][forget]) for line in runs[-1].rows("curve.jsonl") if forget in line["evals"]]
            if not curve:
                raise LetheError(f"{forget} is missing in {runs[-1].path.name}")
            values.append(max(curve))
        return values

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
        evals = [of_seed[0].record.get("evals") or {} for of_seed in self._by_seed(runs)]
        if not all(task in each for each in evals for task in self.tasks):
            return None
        results = [_mean([each[task] for each in evals]) for task in self.tasks]
        before = self.baseline(sweep, runs[0].record["config"]["model"])
        shares = [
            share
            for task, result in zip(self.tasks, results, strict=True)
            if task in before and regimes.provenance(result) == regimes.provenance(before[task])
            if (share := regimes.retained_share(result, before[task]))
        ]
        if len(shares) < len(self.tasks):
            return Finding(trial, results, [], None)
        thresholds = self.config.retained_threshold, self.config.chance_threshold
        return Finding(trial, results, shares, regimes.regime(shares[0], shares[1], *thresholds))

    def results(self, sweep: Sweep, trial: Trial, runs: list[Run]) -> dict[str, Any]:
        """A trial's results for tables."""
        if trial.is_reference and runs:
            evals = runs[0].record.get("evals") or {}
            return {"evals": {name: short(evals[name]) for name in self.tasks if name in evals}}
        finding = self.finding(sweep, trial, runs) if runs and trial.status == "complete" else None
        if finding is None:
            return {"evals": {}}
        evals = dict(zip(self.tasks, map(short, finding.results), strict=True))
        shown: dict[str, Any] = {"evals": evals, "regime": finding.regime}
        if finding.shares:
            shown["selectivity"] = dataclasses.asdict(regimes.selectivity(*finding.shares))
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
        return [summary, *self.summary(sweep, found), f"Next: {advice(kinds)}."]

    def summary(self, sweep: Sweep, found: list[Finding]) -> list[str]:
        """Sentences of this kind of sweep, between the regimes and the next step."""
        return []


def refuse_devices(config: c.LaunchSettings, devices: int | None) -> None:
    """Refuse a run's own number of devices if Slurm starts another number of processes.

    Raises:
        LetheError: names both numbers.
    """
    if config.launcher == "slurm" and devices not in {None, max(1, config.slurm.devices)}:
        raise LetheError(
            f"devices: {devices}, but slurm.devices is {config.slurm.devices}, which determines the number; leave devices out"
        )


def section(kind: str, given: dict[str, Any], out: str, name: str = "") -> Any:
    """The settings of runs of a kind from a section of the configuration, with those that the sweep sets itself.

    Raises:
        LetheError: a setting is wrong, or is one that the sweep sets itself.
    """
    try:
        made = from_settings(SETTINGS[kind], given | settings_of_sweep(kind, given, out, name))
        refuse_seed(made.seed)
    except LetheError as error:
        raise LetheError(f"{name or kind}: {error}") from error
    return made


def settings_of_sweep(kind: str, given: dict[str, Any], out: str, name: str = "") -> dict[str, Any]:
    """The settings of runs of a kind that the sweep sets itself.

    Raises:
        LetheError: they are given other values.
    """
    own = {"out": out, "name": name or SETTINGS[kind].name} | ({"model": "@0"} if kind == "tamper" else {})
    for key, value in own.items():
        if given.get(key, value) != value:
            raise LetheError(f"{key}: {printable(given[key], 80)} has no effect in a sweep; leave it out")
    return own


def refuse_seed(seed: Any) -> None:
    """Refuse a seed in the recipe of a sweep."""
    if seed:
        raise LetheError(f"seed: {seed} has no effect in a sweep; give seeds: [{seed}]")


def baseline(model: str, evaluation: dict[str, Any], dtype: c.Dtype, out: str) -> Plan:
    """The evaluation of the original model, as the runs are evaluated."""
    how = {name: evaluation[name] for name in ("limit", "task_data", "num_fewshot")}
    settings = c.EvaluateConfig(model, evaluation["tasks"], **how, dtype=dtype, out=out, name="baseline")
    return Plan("baseline", [("evaluate", c.to_dict(settings))], facts={"reference": True, "model": model})


def first_of(value: Any) -> Any:
    """The first value of a list, or the value itself."""
    return value[0] if isinstance(value, list) else value


def short(result: Result) -> Result:
    """A result without its provenance."""
    return {key: result[key] for key in SHOWN if key in result}


def _mean(results: Sequence[Result]) -> Result:
    """The mean of several results on the same task, and of the ends of their intervals."""
    keys = [key for key in ("acc", "correct_prob", "low", "high") if key in results[0]]
    return results[0] | {key: fmean(result[key] for result in results) for key in keys}


def advice(regimes_found: Collection[regimes.Regime]) -> str:
    """The next step that rules of thumb suggest, from the regimes of a sweep's runs."""
    found = set(regimes_found)
    if not found:
        return "no run was measured: see the reasons of the failed runs"
    if "selective" in found:
        return "attack the selective runs, to see whether the topic is gone or only hidden (lethe tamper)"
    if found == {"neither"}:
        return "neither fell: raise lr or remove_coef, lower retain_coef, or train for more steps (steps matter most)"
    if found == {"both"}:
        return "both fell to chance: lower lr, raise retain_coef, or lower remove_coef"
    if "inverted" in found and "partial" not in found:
        return "retain lost more than forget: raise retain_coef, or look at what the retain text covers"
    which = "no run lies between neither and both" if found <= {"neither", "both"} else "both fell partly"
    return f"{which}: lower lr a little and raise remove_coef, or raise retain_coef"
