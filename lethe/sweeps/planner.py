"""What a sweep runs, and what its results say: what all kinds share, and the grid. `boundary` and `pareto` have a file each.

A planner plans and judges; `lethe.sweeps.controller` does the rest.

A plan is a list of stages, each a kind of run and its settings; in `model`, `@0` stands for what the first stage made. Every
kind measures the model itself first, as the baseline that regimes are told against.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import config as c
from lethe.config.parse import build, from_settings
from lethe.errors import LetheError, nearest, printable
from lethe.files import sha256
from lethe.maps.folder import WEIGHTS, find_maps
from lethe.methods.method import Method
from lethe.models import refs
from lethe.results import regimes
from lethe.results.listing import number
from lethe.runs.run import Run, find_runs
from lethe.sweeps import axes, search
from lethe.sweeps.axes import Axis, Point
from lethe.text import corpora
from lethe.unlearning.check import check

if TYPE_CHECKING:
    import optuna

    from lethe.sweeps.controller import Sweep, Task

Stage = tuple[str, dict[str, Any]]
SECTIONS: dict[str, type[Method] | type[c.TamperConfig]] = {"unlearn": Method, "tamper": c.TamperConfig}
logger = logging.getLogger(__name__)
MOST_RUNS = 10_000
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
        return self._section("unlearn", self.config.unlearn)

    @cached_property
    def attack(self) -> dict[str, Any] | None:
        """The whole recipe of the attack on every result."""
        return None if self.config.tamper is None else self._section("tamper", self.config.tamper)

    def _section(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The whole recipe of a section, with the sweep's own settings in it."""
        try:
            return c.to_dict(from_settings(SECTIONS[name], given | self._own(name)))
        except LetheError as error:
            raise LetheError(f"{name}: {error}") from error

    def _own(self, section: str) -> dict[str, Any]:
        """The settings of a section that the sweep gives itself."""
        own = {"out": self.config.out, "name": SECTIONS[section].name}
        return own | ({"model": "@0"} if section == "tamper" else {})

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
        if found[0] == found[1]:
            raise LetheError(f"retain_task: '{found[1]}' is the forget task; name another")
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
        for section, given, recipe in (
            ("unlearn", self.config.unlearn, self.recipe),
            ("tamper", self.config.tamper or {}, self.attack),
        ):
            for name, own in self._own(section).items():
                if given.get(name, own) != own:
                    raise LetheError(f"{section}: {name}: {printable(given[name], 80)} has no effect in a sweep; leave it out")
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
        where = printable(", ".join(f"{name} {value}" for name, value in plan.point.items()), 200)
        try:
            for kind, settings in plan.stages:
                made = from_settings(CONFIGS[kind], settings)  # not `build`, which leaves out what it does not know
                if kind == "unlearn":
                    check(made)
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
        """The evaluation of the model that was unlearned; None where that failed, or is gone."""
        for task in sweep.tasks(references_only=True):
            if task.get("model") == settings["model"] and task.status == "complete" and (runs := task.runs(sweep.out)):
                return runs[0].record["evals"]
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
            regimes.retained_share(result, before[name])
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


def baseline(model: str, asked: dict[str, Any], dtype: c.Dtype, out: str) -> Plan:
    """The evaluation of a model as it was before, on the tasks that runs are evaluated on."""
    how = {name: asked[name] for name in ("limit", "task_data", "num_fewshot")}
    settings = c.EvaluateConfig(model, asked["tasks"], **how, dtype=dtype, out=out, name="baseline")
    return Plan("baseline", [("evaluate", c.to_dict(settings))], reference=True, facts={"model": model})


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
    most = c.ATTACKED if run.record["kind"] == "tamper" else c.UNLEARNED
    documents = corpora.select(getattr(made, role), made.num_train_examples, end, f"{role} text", most)  # type: ignore[arg-type]
    return corpora.fingerprint(documents) == parent["sha256"]


def _number(result: dict[str, Any] | None, why: str) -> float | str:
    value = number(result) if result else None
    return why if value is None else value


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its provenance."""
    return {key: result[key] for key in ("acc", "correct_prob", "low", "high", "n", "chance", "degenerate") if key in result}
