"""What a sweep runs, and what its results say: one planner a kind. A planner plans and judges; `lethe.sweep` does the rest.

A plan is a list of stages, each a kind of run and its settings; in `model`, `@0` stands for what the first stage made. Every
kind measures the model itself first, as the baseline that regimes are told against.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import axes, corpora, preflight, refs, regimes, search
from lethe import config as c
from lethe.axes import Axis, Point
from lethe.errors import LetheError, nearest
from lethe.ledger import Run, find_run, find_runs, seconds_since, sha256
from lethe.maps import WEIGHTS, find_maps
from lethe.runs import is_imported, number
from lethe.settings import build, from_settings

if TYPE_CHECKING:
    import optuna

    from lethe.sweep import Sweep, Task

Stage = tuple[str, dict[str, Any]]
SECTIONS: dict[str, type] = {"unlearn": c.UnlearnConfig, "tamper": c.TamperConfig}
MOST_FILLING = 256
logger = logging.getLogger(__name__)
CONFIGS: dict[str, type] = SECTIONS | {"evaluate": c.EvaluateConfig}


@dataclass
class Plan:
    """A trial to be: its name, its place on the axes, its stages; `number`: that of a trial that Optuna was asked for."""

    name: str
    stages: list[Stage]
    point: Point = field(default_factory=dict)
    seed: int | None = None
    reference: bool = False
    number: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What tells it from other plans."""
        return "-".join(axes.key_of(kind, settings) for kind, settings in self.stages)

    @property
    def distributions(self) -> dict[str, Any]:
        """Its axes as Optuna knows them."""
        return {axis.name: distribution(axis) for axis in self.axes if axis.name in self.point}

    @property
    def params(self) -> dict[str, Any]:
        """Its point as Optuna knows it."""
        return {axis.name: optunas(axis, self.point[axis.name]) for axis in self.axes if axis.name in self.point}

    def attributes(self) -> dict[str, Any]:
        """What the study keeps of it."""
        own = {"name": self.name, "stages": self.stages, "point": self.point, "seed": self.seed, "key": self.key}
        return own | ({"reference": True} if self.reference else {}) | self.facts


@dataclass
class Finding:
    """What one complete run of a sweep says."""

    task: Task
    forget: dict[str, Any]
    retain: dict[str, Any]
    kept_forget: regimes.Estimate | None
    kept_retain: regimes.Estimate | None
    regime: regimes.Regime | None


class Planner:
    """What the kinds have in common: axes, recipe, tasks, baseline."""

    def __init__(self, config: c.SweepConfig):
        self.config = config
        self.title: str = config.kind
        self.axes = axes.parse(config.vary, config.tamper is not None)

    # -- what is run

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The whole recipe that is varied."""
        return c.to_dict(from_settings(c.UnlearnConfig, {**self.config.unlearn, "out": self.config.out}))

    @cached_property
    def attack(self) -> dict[str, Any] | None:
        """The whole recipe of the attack on every result."""
        if self.config.tamper is None:
            return None
        return c.to_dict(from_settings(c.TamperConfig, {**self.config.tamper, "model": "@0", "out": self.config.out}))

    @cached_property
    def tasks(self) -> tuple[str, str]:
        """The forget and the retain task.

        Raises:
            LetheError: they cannot be told.
        """
        asked = self.recipe["eval"]["tasks"]
        found = []
        for name, given, known in (
            ("forget_task", self.config.forget_task, regimes.forget_task(asked)),
            ("retain_task", self.config.retain_task, regimes.retain_task(asked)),
        ):
            if not (given or known):
                raise LetheError(f"{name}: none of unlearn.eval.tasks ({', '.join(asked)}) is known as one; name it")
            if given and given not in asked:
                raise LetheError(
                    f"{name}: '{given}' is not among unlearn.eval.tasks ({', '.join(asked)}){nearest(given, asked)}"
                )
            found.append(given or known or "")
        return found[0], found[1]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of forget accuracy, of retain accuracy and, with an attack, of the highest forget accuracy during it."""
        return ["minimize", "maximize"] if self.config.tamper is None else ["minimize", "maximize", "minimize"]

    def sampler(self) -> optuna.samplers.BaseSampler | None:
        """How Optuna chooses, where it does."""
        return None

    @property
    def expected(self) -> int:
        """Runs that will probably be done, for the progress bar."""
        raise NotImplementedError

    def checked(self) -> c.SweepConfig:
        """The sweep's configuration with its recipes written out in full, after every setting was looked at.

        Raises:
            LetheError: one of the runs could not work.
        """
        for section, recipe in (("unlearn", self.recipe), ("tamper", self.attack)):
            if recipe and recipe["seed"]:
                raise LetheError(f"{section}: seed: {recipe['seed']} has no effect in a sweep; give seeds: [{recipe['seed']}]")
        forget, _ = self.tasks
        if self.attack and forget not in self.attack["eval"]["tasks"]:
            raise LetheError(f"tamper: eval.tasks lacks {forget}, the forget task, so that nothing would show what comes back")
        if self.recipe["source"].startswith("auto"):
            raise LetheError("source: a sweep needs one source for all its runs; find it with `lethe checkpoints` and name it")
        with corpora.read_once():
            for point in self.samples():
                self.check(self.plan(point, self.config.seed_list[0]))
        return dataclasses.replace(self.config, unlearn=self.recipe, tamper=self.attack)

    def samples(self) -> Iterator[Point]:
        """Points to look at before anything is run: both ends, and every listed value."""
        for axis in self.axes:
            ends = axis.values or (axis.at(0), axis.at(1))
            for value in ends:
                others = {other.name: (other.values or (other.at(0),))[0] for other in self.axes if not other.when}
                point = others | {axis.name: value}
                if axis.applies(point, self.recipe):
                    yield point

    def check(self, plan: Plan) -> None:
        """Refuse a plan that cannot work."""
        where = ", ".join(f"{name} {value}" for name, value in plan.point.items())
        try:
            for kind, settings in plan.stages:
                made = build(CONFIGS[kind], settings)
                if kind == "unlearn":
                    preflight.check(made)
        except LetheError as error:
            raise LetheError(f"at {where}: {error}") from error

    def plan(self, point: Point, seed: int, number: int | None = None) -> Plan:
        """The unlearning run at a point and, where there is one, the attack on it."""
        settings = axes.settings_at(self.recipe, point) | {"seed": seed}
        seeded = seed if len(self.config.seed_list) > 1 else None
        name = axes.name_at(self.config.name, settings, point, seeded)
        stages: list[Stage] = [("unlearn", settings | {"name": name})]
        if self.attack is not None:
            stages.append(
                ("tamper", axes.settings_at(self.attack, point, attack=True) | {"seed": seed, "name": f"{name}-attack"})
            )
        return Plan(name, stages, point, seed, number=number, axes=self.axes)

    def plans(self, point: Point) -> list[Plan]:
        """A point with every seed."""
        return [self.plan(point, seed) for seed in self.config.seed_list]

    def references(self) -> list[Plan]:
        """The evaluation of every model that is unlearned."""
        models = next((axis.values for axis in self.axes if axis.name == "model"), (self.recipe["model"],))
        return [baseline(model, self.recipe["eval"], self.recipe["dtype"], self.config.out) for model in models]

    def begin(self, sweep: Sweep) -> None:
        """What is put into the study before anything runs."""

    def record_of(self, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
        """What a run's record says beside its sweep."""
        return {}

    def watch(self, sweep: Sweep) -> None:
        """Look at the runs at work, every round."""

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        """What to run next, with room for so many; once the references are known."""
        return []

    @cached_property
    def _complete(self) -> dict[str, list[Run]]:
        """Complete runs in `out`, by what tells them apart."""
        found: dict[str, list[Run]] = {}
        for run in find_runs(self.config.out):
            kind = run.record["kind"]
            if kind in CONFIGS and run.record["status"] == "complete" and run.record.get("launcher") != "imported":
                found.setdefault(axes.key_of(kind, run.record["config"]), []).append(run)
        return found

    def measured(self, kind: str, settings: dict[str, Any]) -> Run | None:
        """A complete run of the same configuration, made from the same weights and text; None if there is none."""
        same = self._complete.get(axes.key_of(kind, settings), [])
        return next((run for run in reversed(same) if made_from_the_same(run)), None)

    # -- what came out

    def values(self, runs: list[Run]) -> list[float | str]:
        """The objectives of a trial; in the place of one that is missing, why."""
        evals = runs[0].record.get("evals") or {}
        found: list[float | str] = [
            _number(evals.get(task), f"{task} is missing in {runs[0].path.name}") for task in self.tasks
        ]
        if self.config.tamper is not None:
            curve = [line["evals"].get(self.tasks[0]) for line in runs[-1].rows("curve.jsonl")]
            known = [value for value in (number(r) for r in curve if r) if value is not None]
            found.append(max(known) if known else f"{self.tasks[0]} is missing in {runs[-1].path.name}")
        return found

    def baseline(self, sweep: Sweep, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The evaluation of the model that was unlearned; None where that failed."""
        for task in sweep.tasks(references_only=True):
            if task.get("model") == settings["model"] and task.status == "complete":
                return task.runs(sweep.out)[0].record["evals"]
        return None

    def findings(self, sweep: Sweep) -> list[Finding]:
        """What every complete trial says."""
        found = []
        for task in sweep.tasks():
            if not task.is_reference and task.status == "complete":
                runs = task.runs(sweep.out)
                if runs and (finding := self.finding(sweep, task, runs)):
                    found.append(finding)
        return found

    def finding(self, sweep: Sweep, task: Task, runs: list[Run]) -> Finding | None:
        """What one trial says; None where its accuracies are missing."""
        evals = runs[0].record.get("evals") or {}
        forget, retain = (evals.get(name) for name in self.tasks)
        if forget is None or retain is None:
            return None
        return self.judge(sweep, task, runs[0].record["config"], forget, retain)

    def judge(
        self, sweep: Sweep, task: Task, settings: dict[str, Any], forget: dict[str, Any], retain: dict[str, Any]
    ) -> Finding:
        """What two results say beside the baseline; nothing, where that was measured in another way."""
        before = self.baseline(sweep, settings) or {}
        kept = [
            regimes.kept(result, before[name])
            if name in before and regimes.provenance(result) == regimes.provenance(before[name])
            else None
            for name, result in zip(self.tasks, (forget, retain), strict=True)
        ]
        thresholds = self.config.kept_threshold, self.config.chance_threshold
        regime = regimes.regime(kept[0], kept[1], *thresholds) if kept[0] and kept[1] else None
        return Finding(task, forget, retain, kept[0], kept[1], regime)

    def judged(self, sweep: Sweep, task: Task, runs: list[Run]) -> dict[str, Any]:
        """A trial's results for tables."""
        if task.is_reference or not runs or task.status != "complete":
            evals = (runs[0].record.get("evals") or {}) if runs and task.is_reference else {}
            return {"evals": {name: _short(evals[name]) for name in self.tasks if name in evals}}
        finding = self.finding(sweep, task, runs)
        if finding is None:
            return {"evals": {}}
        shown: dict[str, Any] = {
            "evals": dict(zip(self.tasks, (_short(finding.forget), _short(finding.retain)), strict=True)),
            "regime": finding.regime,
        }
        if finding.kept_forget and finding.kept_retain:
            shown["selectivity"] = dataclasses.asdict(regimes.selectivity(finding.kept_forget, finding.kept_retain))
        if self.config.tamper is not None and task.trial.values:
            shown["after_attack"] = task.trial.values[-1]
        return shown

    def conclusions(self, sweep: Sweep) -> list[str]:
        """What the results say, in sentences."""
        found = self.findings(sweep)
        kinds = [finding.regime for finding in found if finding.regime]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        said = [f"Regimes: {counts}."] if counts else []
        if found and not kinds:
            said.append("No regimes: the baseline is at chance on a task, or was not measured.")
        return [*said, *self.said(found), *([f"Next: {search.advice(kinds)}."] if found else [])]

    def said(self, found: list[Finding]) -> list[str]:
        """What this kind of sweep has to say."""
        return []


class Grid(Planner):
    """Every combination."""

    @cached_property
    def points(self) -> list[Point]:
        """The combinations."""
        return list(axes.points(self.axes, self.recipe))

    @property
    def expected(self) -> int:
        return len(self.points) * len(self.config.seed_list)

    def samples(self) -> Iterator[Point]:
        yield from self.points

    def begin(self, sweep: Sweep) -> None:
        sweep.add((plan for point in self.points for plan in self.plans(point)), sweep.study)


class Boundary(Planner):
    """Bisection along one axis."""

    def __init__(self, config: c.SweepConfig):
        super().__init__(config)
        if len(self.axes) != 1 or self.axes[0].values or self.axes[0].when:
            raise LetheError(
                f"vary: a boundary is looked for along one axis with low and high, got {', '.join(config.vary)}; "
                "a grid or pareto takes several"
            )
        if self.axes[0].steps:
            raise LetheError("vary: steps has no effect on a boundary, which chooses its own values; leave it out")
        self.axis = self.axes[0]
        if self.expected < 2 * len(config.seed_list):
            raise LetheError(
                f"max_runs: {config.max_runs} are too few for both ends of the axis with {len(config.seed_list)} seeds each"
            )

    @property
    def expected(self) -> int:
        return self.config.max_runs or 10 * len(self.config.seed_list)

    def checked(self) -> c.SweepConfig:
        if self.config.find == "keeps" and self.config.reference != "baseline":
            self._reference({})
        return super().checked()

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        trials = [task for task in sweep.tasks() if not task.is_reference and not task.retried]
        if any(task.status in {"queued", "running"} for task in trials) or room == 0:
            return []
        seeds = len(self.config.seed_list)
        left = (self.expected - len(trials)) // seeds
        values = search.next_values(self.axis, self.edges(sweep).values(), self.config.width)
        return [plan for value in values[: max(0, left)] for plan in self.plans({self.axis.name: value})]

    def edges(self, sweep: Sweep) -> dict[str, dict[float, list[bool] | None]]:
        """By what changes there: the verdicts of every measured value, one a seed; None where it failed."""
        found = {finding.task.trial.number: finding for finding in self.findings(sweep)}
        by_value: dict[float, list[Finding] | None] = {}
        for task in sweep.tasks():
            if task.is_reference or task.retried or task.status in {"queued", "running"}:
                continue
            value = task.get("point")[self.axis.name]
            finding = found.get(task.trial.number)
            seen = by_value.setdefault(value, [])
            if finding is None or seen is None or not self._tells(finding):
                by_value[value] = None
            else:
                seen.append(finding)
        judges = self._judges(sweep)
        if not judges:  # what losses count from was not measured
            return {"keeps": dict.fromkeys(by_value)}
        return {
            name: {value: [judge(f) for f in seen] if seen else None for value, seen in by_value.items()}
            for name, judge in judges.items()
        }

    def _tells(self, finding: Finding) -> bool:
        """Whether a run's results say which side of a boundary it is on: they are there, and of enough questions."""
        if self.config.find == "keeps":
            return number(finding.retain) is not None
        thresholds = self.config.kept_threshold, self.config.chance_threshold
        kept = [estimate for estimate in (finding.kept_forget, finding.kept_retain) if estimate]
        return len(kept) == 2 and all(regimes.is_decided(estimate, *thresholds) for estimate in kept)

    def _judges(self, sweep: Sweep) -> dict[str, Any]:
        if self.config.find == "boundary":
            return {
                "neither": lambda finding: finding.regime == "neither",
                "both": lambda finding: finding.regime == "both",
            }
        least = self._reference(self.baseline(sweep, self.recipe) or {})
        if least is None:
            return {}
        bound = least - (self.config.within or 0.0) - 1e-9
        return {"keeps": lambda finding: (number(finding.retain) or 0.0) >= bound}

    def _reference(self, baseline: dict[str, Any]) -> float | None:
        """The retain accuracy that losses count from.

        Raises:
            LetheError: the run that should have it has not.
        """
        given, task = self.config.reference, self.tasks[1]
        if given == "baseline":
            return number(baseline[task]) if task in baseline else None
        if given.startswith("run:"):
            evals = find_run(given.removeprefix("run:"), self.config.out).record.get("evals") or {}
            if task not in evals:
                raise LetheError(f"reference: {given} has no result on {task}; give another run, a number, or baseline")
            if task in baseline and regimes.provenance(evals[task]) != regimes.provenance(baseline[task]):
                raise LetheError(
                    f"reference: {given} was measured in another way on {task}; evaluate it as the sweep's runs are"
                )
            return number(evals[task])
        try:
            return float(given)
        except ValueError:
            raise LetheError(f"reference: expected baseline, run:ID or a number such as 0.4375, got '{given}'") from None

    def conclusions(self, sweep: Sweep) -> list[str]:
        found, edges = self.findings(sweep), self.edges(sweep)
        said: list[str] = []
        brackets = {name: search.bracket(self.axis, verdicts, self.config.width) for name, verdicts in edges.items()}
        for name, bracket in brackets.items():
            said += self._spoken(name, bracket)
        if self.config.find == "boundary" and found:
            said += self._not_bracketed(brackets, found)
        if len(self.config.seed_list) == 1 and found:
            said.append("One seed: how far repetitions spread is not known, and the boundary may be no sharper than that.")
        return [*said, *super().conclusions(sweep)] if found else []

    def _spoken(self, name: str, bracket: search.Bracket) -> list[str]:
        axis = self.axis.name
        if bracket.status == "not measured":
            also = "or what losses count from" if name == "keeps" else "or has too few questions to tell"
            return [f"{name}: an end of {axis} could not be measured, {also}."]
        if bracket.status == "undecided":
            where = ", ".join(f"{x:g}" for x in bracket.disagreeing)
            return [f"{name}: seeds disagree at {axis} {where}, an end of the axis; widen it."]
        if bracket.status == "not bracketed":
            always = {True: "everywhere", False: "nowhere", None: "with some seeds only"}[bracket.before]
            said = {"neither": "nothing has fallen", "both": "both are at chance", "keeps": f"{self._kept_words()} is kept"}[
                name
            ]
            return [f"Not bracketed: from {axis} {self.axis.at(0):g} to {self.axis.at(1):g}, {said} {always}."]
        below, above = f"{axis} {bracket.below:g}", f"{bracket.above:g}"
        holds_below = bool(bracket.before)
        words = {
            "neither": (
                "nothing has fallen up to {0}, something has from {1}",
                "something has fallen up to {0}, nothing has from {1}",
            ),
            "both": (
                "both are at chance up to {0}, and no longer at {1}",
                "both are not at chance up to {0}, and are from {1}",
            ),
            "keeps": (
                "the largest value that keeps " + self._kept_words() + " is {0}; {1} does not",
                "the smallest value that keeps " + self._kept_words() + " is {1}; {0} does not",
            ),
        }[name][0 if holds_below else 1]
        how = f"known to a factor of {bracket.factor:.2f}" if bracket.factor else "known"
        if bracket.status == "open":
            how += f", wider than the {self.config.width:g} asked for: the runs were spent, or values in between failed"
        if bracket.disagreeing:
            how += f"; seeds disagree at {', '.join(f'{x:g}' for x in bracket.disagreeing)}, so it is no sharper than that"
        if not bracket.monotone:
            how += "; further up the verdict changes again, so this is the first of several boundaries"
        sentence = words.format(below, above)
        return [f"{sentence[0].upper()}{sentence[1:]} ({how})."]

    def _kept_words(self) -> str:
        return f"{self.tasks[1]} within {100 * (self.config.within or 0):g} points of {self.config.reference}"

    def _not_bracketed(self, brackets: dict[str, search.Bracket], found: list[Finding]) -> list[str]:
        if brackets["both"].status != "not bracketed" or brackets["both"].before is not False:
            return []
        forget = {f.task.get("point")[self.axis.name]: f.kept_forget for f in found if f.kept_forget}
        retain = {f.task.get("point")[self.axis.name]: f.kept_retain for f in found if f.kept_retain}
        ends = [forget.get(self.axis.at(share)) for share in (0, 1)]
        up = ends[0] is None or ends[1] is None or ends[1].value <= ends[0].value
        level = search.plateau(forget, retain, towards_high=up)
        flat = f"; from {self.axis.name} {level:g} on nothing changes beyond the intervals" if level is not None else ""
        return [f"The axis does not reach both{flat}. Try another one: {search.next_axis(self.axis.name)}."]


class Pareto(Planner):
    """The best trade-offs between forgetting and keeping (and holding against an attack), by Optuna."""

    def __init__(self, config: c.SweepConfig):
        super().__init__(config)
        self.began = time.monotonic()

    @property
    def expected(self) -> int:
        return self.config.max_runs or 100

    def sampler(self) -> optuna.samplers.BaseSampler:
        from optuna.samplers import GPSampler, RandomSampler, TPESampler

        seed = self.config.seed_list[0]
        if self.config.sampler == "random":
            return RandomSampler(seed=seed)
        if self.config.sampler == "gp" and not any(axis.when for axis in self.axes):  # it draws such axes blindly
            return GPSampler(seed=seed, n_startup_trials=2)
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2)

    @property
    def startup(self) -> int:
        """Settings before the sampler takes over: a quarter of the budget, between 4 and 10; none for random search."""
        return 0 if self.config.sampler == "random" else min(10, max(4, self.expected // 4))

    def filling(self, begun: set[str]) -> Iterator[Plan]:
        """Settings that fill the axes evenly, less those begun: a scrambled Halton sequence (https://arxiv.org/abs/1706.02808)."""
        from scipy.stats.qmc import Halton

        seed = self.config.seed_list[0]
        for shares in Halton(len(self.axes), rng=seed).random(MOST_FILLING):
            point: Point = {}
            for axis, share in zip(self.axes, shares, strict=True):
                if axis.applies(point, self.recipe):
                    point[axis.name] = axis.choice(share)
            plan = self.plan(point, seed)
            if plan.key not in begun:
                yield plan

    def checked(self) -> c.SweepConfig:
        if self.config.warm_start and self.config.tamper is not None:
            raise LetheError("warm_start: has no effect with an attack, which earlier runs do not have; leave it out")
        return super().checked()

    def begin(self, sweep: Sweep) -> None:
        from optuna.trial import TrialState, create_trial

        if sweep.study.get_trials(deepcopy=False):
            return
        for folder in self.config.warm_start:
            for run in find_runs(folder):
                point = self.point_of(run)
                if point is None:
                    continue
                values = self.values([run])
                if any(isinstance(value, str) for value in values):
                    continue
                plan = Plan(
                    run.record["name"],
                    [("unlearn", run.record["config"])],
                    point,
                    axes=self.axes,
                    facts={"warm": True, "reused": True, "runs": [str(run.path.resolve())]},
                )
                sweep.study.add_trial(
                    create_trial(
                        state=TrialState.COMPLETE,
                        values=[float(value) for value in values],
                        params=plan.params,
                        distributions=plan.distributions,
                        user_attrs=plan.attributes(),
                    )
                )

    def point_of(self, run: Run) -> Point | None:
        """Where a complete run lies on the axes; None where it is of another recipe or outside of them."""
        usable = run.record["kind"] == "unlearn" and run.record["status"] == "complete" and not is_imported(run)
        if not usable or not made_from_the_same(run):
            return None
        point: Point = {}
        for axis in self.axes:
            if not axis.applies(point, self.recipe):
                continue
            field, _, below = axis.name.partition(axes.RATIO)
            value, unit = axes.value_at(run.record["config"], field), axes.value_at(run.record["config"], below) if below else 1
            value = value / unit if below and value is not None and unit else value
            listed = axis.values or (axis.grid() if axis.steps else ())
            inside = value in listed if listed else value is not None and axis.low <= value <= axis.high
            if not inside:
                return None
            point[axis.name] = value
        settings = axes.settings_at(self.recipe, point)
        ours, theirs = (axes.that_matter("unlearn", s) | {"seed": 0} for s in (settings, run.record["config"]))
        return point if ours == theirs else None

    def watch(self, sweep: Sweep) -> None:
        if self.config.prune and self.recipe["eval"]["every"]:  # otherwise nothing to judge by before the end
            self.stop_hopeless(sweep)

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        trials = [
            t
            for t in sweep.tasks()
            if t.get("stages") and not t.is_reference and not t.get("warm") and t.get("retry_of") is None
        ]
        spent = self.config.hours and seconds_since(sweep.run.record["started"]) >= 3600 * self.config.hours
        left = 0 if spent else self.config.max_runs - len(trials) if self.config.max_runs else room
        if any(task.status == "queued" and not task.is_reference for task in sweep.tasks()):  # Optuna would hand it out again
            return []
        begun = {task.get("key") for task in sweep.tasks()}
        warm = sum(bool(task.get("warm")) for task in sweep.tasks())
        filling = self.filling(begun)
        # A sampler knows nothing of a run without numbers, and would propose the like again: another even one in its place.
        lost = sum(task.status in {"failed", "diverged", "pruned"} for task in trials)
        even = self.startup + lost - warm - sum(task.get("number") is None for task in trials)
        plans: list[Plan] = []
        while len(plans) < min(room, left):
            asked = self.ask(sweep, begun) if len(plans) >= even else None
            plan = asked or next(filling, None)
            if plan is None:
                logger.info("every setting on the axes was run")
                break
            begun.add(plan.key)
            plans.append(plan)
        return plans

    def ask(self, sweep: Sweep, begun: set[str]) -> Plan | None:
        """A plan at the point that Optuna chooses; None when that is begun."""
        from optuna.trial import TrialState

        trial = sweep.study.ask()
        point: Point = {}
        for axis in self.axes:
            if axis.applies(point, self.recipe):
                point[axis.name] = suggested(trial, axis)
        plan = self.plan(point, self.config.seed_list[0], trial.number)
        if plan.key not in begun:
            return plan
        sweep.study.tell(trial, state=TrialState.FAIL)
        return None

    def plan(self, point: Point, seed: int, number: int | None = None) -> Plan:
        plan = super().plan(point, seed, number)
        for other in self.config.seed_list[1:]:  # a trial is a setting; its seeds are runs of that trial
            here = f"@{len(plan.stages)}"
            plan.stages += [
                (kind, made | ({"model": here} if made["model"] == "@0" else {}))
                for kind, made in super().plan(point, other).stages
            ]
        plan.name = axes.name_at(self.config.name, plan.stages[0][1], point, None)
        if number is not None:
            plan.facts["number"] = number
        return plan

    def values(self, runs: list[Run]) -> list[float | str]:
        """Means over the seeds."""
        size = 2 if self.config.tamper is not None else 1
        each = [super(Pareto, self).values(runs[i : i + size]) for i in range(0, len(runs), size)]
        missing = next((value for values in each for value in values if isinstance(value, str)), None)
        if missing:
            return [missing]
        return [search.mean(float(values[i]) for values in each) for i in range(len(each[0]))]

    def finding(self, sweep: Sweep, task: Task, runs: list[Run]) -> Finding | None:
        """Means over the seeds; the ends of intervals are means, too."""
        size = 2 if self.config.tamper is not None else 1
        each = [super(Pareto, self).finding(sweep, task, runs[i : i + size]) for i in range(0, len(runs), size)]
        found = [finding for finding in each if finding]
        if len(found) < len(each) or len(found) < 2:
            return found[0] if len(found) == len(each) and found else None
        forget, retain = _mean([f.forget for f in found]), _mean([f.retain for f in found])
        return self.judge(sweep, task, runs[0].record["config"], forget, retain)

    def stop_hopeless(self, sweep: Sweep) -> None:
        """Ask running trials to stop that finished ones were clearly better than at the same step."""
        tasks = [task for task in sweep.tasks() if not task.is_reference and task.get("runs")]
        done = [task.runs(sweep.out)[0] for task in tasks if task.status == "complete"]
        curves = [(_steps(run), {row["step"]: row["evals"] for row in run.rows("curve.jsonl")}) for run in done]
        for task in tasks:
            for run in task.runs(sweep.out) if task.status == "running" else []:
                if run.record["kind"] == "unlearn" and run.record["status"] == "running" and not run.asked_to_stop():
                    row = run.last_row("curve.jsonl")
                    if row and row["step"] != _steps(run) and self.hopeless(_steps(run), row, curves):
                        better = f"{search.DOMINATORS} finished runs were clearly better in both accuracies there"
                        run.ask_to_stop(f"pruned at step {row['step']}: {better}")

    def hopeless(self, steps: int | None, row: dict[str, Any], curves: list[tuple[int | None, dict[int, Any]]]) -> bool:
        """Whether finished runs, of as many steps, were clearly better than an evaluation at its step."""
        at = self._pair(row["evals"])
        others = [pair for n, curve in curves if n == steps and (pair := self._pair(curve.get(row["step"]) or {}))]
        return at is not None and search.clearly_worse(at, others)

    def _pair(self, evals: dict[str, Any]) -> tuple[dict, dict] | None:
        forget, retain = (evals.get(task) for task in self.tasks)
        return (forget, retain) if forget and retain and "low" in forget and "low" in retain else None

    def said(self, found: list[Finding]) -> list[str]:
        values = [
            tuple(v if d == "minimize" else -v for v, d in zip(f.task.trial.values, self.directions, strict=True))
            for f in found
        ]
        best = [found[i] for i in search.front(values)]
        best.sort(key=lambda f: f.task.trial.values[0])
        shown = "; ".join(f"{f.task.get('name')} ({', '.join(f'{100 * v:.1f}' for v in f.task.trial.values)})" for f in best)
        what = ", ".join(
            [
                f"{self.tasks[0]} down",
                f"{self.tasks[1]} up",
                *(["highest during the attack, down"] if self.config.tamper else []),
            ]
        )
        return [f"Front of {len(best)} among {len(found)} ({what}; %): {shown}."] if best else []


KINDS: dict[str, type[Planner]] = {"grid": Grid, "boundary": Boundary, "pareto": Pareto}


def baseline(model: str, asked: dict[str, Any], dtype: c.Dtype, out: str) -> Plan:
    """The evaluation of a model as it was before, on the tasks that runs are evaluated on."""
    how = {name: asked[name] for name in ("limit", "task_data", "num_fewshot")}
    settings = c.EvaluateConfig(model, asked["tasks"], **how, dtype=dtype, out=out, name="baseline")
    return Plan("baseline", [("evaluate", c.to_dict(settings))], reference=True, facts={"model": model})


def planner_of(config: Any) -> Planner:
    """The planner of a sweep's kind, or of a suite."""
    from lethe.suite import Suite

    return Suite(config) if isinstance(config, c.SuiteConfig) else KINDS[config.kind](config)


def distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    """An axis as Optuna knows it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values:
        return CategoricalDistribution([optunas(axis, value) for value in axis.values])
    if axis.steps:
        return CategoricalDistribution(axis.grid())
    if axis.whole:
        return IntDistribution(round(axis.low), round(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def optunas(axis: Axis, value: Any) -> Any:
    """A value as Optuna can keep it: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def suggested(trial: optuna.Trial, axis: Axis) -> Any:
    """The value that Optuna chooses on an axis."""
    if axis.values or axis.steps:
        values = axis.values or axis.grid()
        chosen = trial.suggest_categorical(axis.name, [optunas(axis, value) for value in values])
        return next(value for value in values if optunas(axis, value) == chosen)
    if axis.whole:
        return trial.suggest_int(axis.name, round(axis.low), round(axis.high), log=axis.log)
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def made_from_the_same(run: Run) -> bool:
    """Whether the weights, text, maps and local tasks that a run was made from are still what they were."""
    try:
        if inputs(run.record["config"], run.path.parent) != (run.record.get("inputs") or {}):
            return False
        for role, parent in (run.record.get("parents") or {}).items():
            if "documents" in parent:
                if not _same_text(run, role, parent):
                    return False
            elif role != "affine" and refs.record(refs.resolve(parent["ref"], run.path.parent))["sha256"] != parent["sha256"]:
                return False
    except (LetheError, OSError):
        return False
    return True


def inputs(settings: dict[str, Any], out: str | Path) -> dict[str, str]:
    """SHA-256 of the files that a run reads beside models and text: given maps, tasks in folders, local data of tasks."""
    asked = settings.get("eval") or settings
    files = {str(file): [Path(file)] for file in (asked.get("task_data") or {}).values()}
    for task in asked.get("tasks") or []:
        folder = next((path for path in (Path(task), Path(task).parent) if path.is_dir() and str(path) != "."), None)
        if folder is not None:
            files[task] = [file for file in folder.rglob("*") if file.is_file()]
    if settings.get("affine") not in {None, "fit", "none"}:
        files[settings["affine"]] = [find_maps(settings["affine"], str(out)) / WEIGHTS]
    return {name: sha256(*paths) for name, paths in files.items()}


def _same_text(run: Run, role: str, parent: dict[str, Any]) -> bool:
    made = build(CONFIGS[run.record["kind"]], run.record["config"])
    end = "back" if run.record["kind"] == "tamper" else "front"
    documents = corpora.select(getattr(made, role), made.num_train_examples, end, f"{role} text")  # type: ignore[arg-type]
    return corpora.fingerprint(documents) == parent["sha256"]


def _steps(run: Run) -> int | None:
    return (run.record.get("plan") or {}).get("steps")


def _number(result: dict[str, Any] | None, why: str) -> float | str:
    value = number(result) if result else None
    return why if value is None else value


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several of the same task."""
    means = {key: search.mean(r[key] for r in results) for key in ("acc", "correct_prob", "low", "high") if key in results[0]}
    return results[0] | means


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its provenance."""
    return {key: result[key] for key in ("acc", "correct_prob", "low", "high", "n", "chance", "degenerate") if key in result}
