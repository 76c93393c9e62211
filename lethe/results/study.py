"""What a set of runs says together: which evaluations are the baseline and the source, and which model an attack was on.

Runs are joined by the hashes of weights that they record (`parents`), not by their names. Tables and charts both read
from here, so that they cannot tell different stories.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lethe.errors import LetheError
from lethe.results import recovery, regimes
from lethe.results.comparable import Evals, Shown, set_apart
from lethe.results.format import MISSING
from lethe.results.listing import is_imported
from lethe.results.recovery import Point, Recovery
from lethe.runs.run import Run, find_run, find_runs

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
AFTER_STEPS = 10
FILTERED = "Control: filtered twin"
NOT_THE_ATTACK = {"model", "out", "name", "seed", "eval", "save_model", "save_every", "report_to", "time_limit", "overlap"}
NOT_THE_ATTACK |= {"fast"}
AS_BEFORE: list[tuple[str, Any]] = [("attack", "finetune"), ("strengths", [])]  # runs made before there were others
SHOWN_ELSEWHERE = {"model", "source", "out", "retain_coef", "remove_coef", "lora", "lora.r", "retain_loss", "report_to"}
SHOWN_ELSEWHERE |= {"eval.tasks", "eval.every", "eval.limit", "max_steps", "save_every", "resume"}


@dataclass(frozen=True)
class Row:
    """One model's results: what it is called, the runs that they come from by task, the results."""

    label: str
    evals: Evals
    origin: dict[str, Shown]


@dataclass(frozen=True)
class Target:
    """A model that was unlearned: its unlearning runs, and rows for itself and for each source, as far as evaluated."""

    ref: str
    runs: list[Shown]
    baseline: Row | None
    sources: list[Row]
    thresholds: tuple[float, float] = (regimes.KEPT_THRESHOLD, regimes.CHANCE_THRESHOLD)
    """The shares kept from which on, and down to which, accuracy counts as kept and as at chance."""

    @property
    def rows(self) -> list[Row]:
        """Baseline and sources, then one row a run."""
        first = [self.baseline] if self.baseline else []
        return [*first, *self.sources, *(row_of(run, run.record["name"]) for run in self.runs)]

    @cached_property
    def judged(self) -> tuple[str | None, str | None]:
        """The forget and the retain task that regimes are told by: measured on the baseline and on a run."""
        there = set(self.baseline.evals if self.baseline else ())
        there &= {task for run in self.runs for task in run.record.get("evals") or {}}
        return regimes.forget_task(there), regimes.retain_task(there)

    @cached_property
    def best(self) -> Shown | None:
        """The complete run of highest selectivity; where none can be judged, the first that was evaluated."""
        evaluated = [run for run in self.runs if run.status == "complete" and run.record.get("evals")]
        judged = [(found[1].value, run) for run in evaluated if (found := judge(run.record["evals"], self))]
        return max(judged, key=lambda pair: pair[0])[1] if judged else next(iter(evaluated), None)


@dataclass(frozen=True)
class Attack:
    """One tampering run: the model under attack, whether it is a control, and the curve.

    `before` are the attacks that the model had already been under (oldest first), and `model` names it as it was before them.
    """

    run: Shown
    label: str
    control: str | None
    baseline: Row | None
    curve: list[dict[str, Any]]
    before: tuple[Shown, ...] = ()
    model: str = ""
    weights: str = ""
    """Hash of the model's weights, before the attacks."""
    _points: dict[str, list[Point]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def settings(self) -> str:
        """What makes attacks on different models, or with different seeds, the same attack."""
        return json.dumps([_same(run.record["config"]) for run in (*self.before, self.run)], sort_keys=True)

    def points(self, task: str) -> list[tuple[int, dict[str, Any]]]:
        """Steps and results of a task along the attack."""
        return [(line["step"], line["evals"][task]) for line in self.curve if task in line["evals"]]

    def points_of(self, task: str) -> list[Point]:
        """The curve on a task with the attack's tokens so far; empty where the task is no accuracy.

        Of an attack on an attacked model it begins with the model as it was before all of them, and goes on counting.
        """
        if task not in self._points:
            points: list[Point] = []
            steps = tokens = 0
            for run in self.before:
                own = _points(run, task, steps, tokens)
                points = points or own[:1]
                steps += max(run.tokens)
                tokens += max(run.tokens.values())
            self._points[task] = points + _points(self.run, task, steps, tokens)
        return self._points[task]

    def recovery(self, task: str) -> Recovery | None:
        """What came back of the baseline's accuracy; None without a baseline, or without a curve from step 0."""
        curve = self.points_of(task)
        if self.baseline is None or task not in self.baseline.evals or not curve or curve[0].step:
            return None
        return recovery.measure(curve, value_of(self.baseline.evals[task]))


@dataclass(frozen=True)
class Series:
    """One attack on one model: its runs, equal but for the seed, and the name that it has for every model."""

    model: str
    control: str | None
    baseline: Row | None
    attack: str
    settings: str
    attacks: list[Attack]
    _points: dict[str, list[Point]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def measured(self) -> list[Attack]:
        """The seeds that are complete; all of them, where none is."""
        return [attack for attack in self.attacks if attack.run.status == "complete"] or self.attacks

    def points_of(self, task: str) -> list[Point]:
        """The curve on a task, over the seeds that are measured to their end; where none is, as far as all are."""
        if task not in self._points:
            curves = [points for attack in self.measured if (points := attack.points_of(task))]
            self._points[task] = recovery.over_seeds(curves) if curves else []
        return self._points[task]

    @property
    def reason(self) -> str | None:
        """Why it is not measured to its end; None when every seed is."""
        several = len(self.attacks) > 1
        open_ones = [attack.run for attack in self.attacks if attack.run.status != "complete"]
        seeds = {run.id: f"seed {run.record['config'].get('seed')} " if several else "" for run in open_ones}
        why = [
            seeds[run.id] + run.status + (f": {reason}" if (reason := run.record.get("reason")) else "") for run in open_ones
        ]
        return "; ".join(why) or None


class Study:
    """The runs of a report, joined. Imported ones stand apart: nobody knows how their numbers were measured."""

    def __init__(self, runs: Iterable[Run]):
        every = [Shown(run) for run in runs]
        self.runs = [run for run in every if not is_imported(run)]
        self.imported = [run for run in every if is_imported(run)]
        self.apart = set_apart(self._side_by_side())

    @classmethod
    def load(cls, folders: list[str]) -> Study:
        """The runs in folders (or runs themselves), each once, oldest first.

        Raises:
            LetheError: a folder does not exist, or no folder has a run.
        """
        runs: dict[Path, Run] = {}
        for folder in folders:
            if folder.startswith("run:"):
                folder = str(find_run(folder.removeprefix("run:")).path)  # noqa: PLW2901
            if not Path(folder).exists():
                raise LetheError(f"runs: '{folder}' does not exist; give a run or a folder of runs")
            runs |= {run.path.resolve(): run for run in find_runs(folder)}
        if not runs:
            raise LetheError(f"runs: there are none in {', '.join(repr(f) for f in folders)}; give a run or a folder of runs")
        return cls(sorted(runs.values(), key=lambda run: (run.record.get("created") or "", run.id)))

    def of_kind(self, kind: str) -> list[Shown]:
        """The runs of one kind, oldest first."""
        return self._by_kind.get(kind, [])

    @cached_property
    def _by_kind(self) -> dict[str, list[Shown]]:
        return _grouped(self.runs, lambda run: run.record["kind"])

    def _side_by_side(self) -> list[list[Shown]]:
        """The runs whose numbers may come to stand side by side: those about each model that was unlearned; with attacks, which
        share tables, those about all of them; other evaluations; each other run by itself."""
        made = self.of_kind("unlearn") + self.of_kind("affine")
        about = {self._parent(run, "source")[1]: self._parent(run, "model")[1] for run in made}
        about |= {weights: weights for weights in about.values()}
        attacks = bool(self.of_kind("tamper"))

        def side(run: Shown) -> str:
            kind = run.record["kind"]
            if kind not in {"unlearn", "affine", "tamper", "evaluate"}:
                return run.id
            of = "attacks" if kind == "tamper" else about.get(self._parent(run, "model")[1], "other")
            return of if of == "other" or not attacks else "attacks"

        return list(_grouped(self.runs, side).values())

    @cached_property
    def targets(self) -> list[Target]:
        """Each model that was unlearned. Without unlearning runs: each that maps were fitted to."""
        groups = _grouped(self.of_kind("unlearn") or self.of_kind("affine"), lambda run: self._parent(run, "model"))
        targets = []
        for (ref, sha), runs in groups.items():
            sources = dict.fromkeys(self._parent(run, "source") for run in runs)
            rows = [self._evaluated(f"Source ({re.split('[:@/]', source[0])[-1]})", *source) for source in sources]
            unlearned = [run for run in runs if run.record["kind"] == "unlearn"]
            baseline = self._evaluated("Baseline", ref, sha)
            targets.append(Target(ref, unlearned, baseline, [row for row in rows if row], self._thresholds()))
        return targets

    def _thresholds(self) -> tuple[float, float]:
        """Those of the sweeps among the runs, where they agree; else the usual ones."""
        names = ("kept_threshold", "chance_threshold")
        found = {tuple(run.record["config"].get(name) for name in names) for run in self.of_kind("sweep")}
        found = {pair for pair in found if None not in pair}
        return found.pop() if len(found) == 1 else (regimes.KEPT_THRESHOLD, regimes.CHANCE_THRESHOLD)  # type: ignore[return-value]

    @cached_property
    def other_evaluations(self) -> list[Shown]:
        """Evaluations that are neither a baseline's nor a source's."""
        used = {
            id(run)
            for target in self.targets
            for row in [target.baseline, *target.sources]
            if row
            for run in self._evaluations(*self._parent(next(iter(row.origin.values())), "model"))
        }
        return [run for run in self.of_kind("evaluate") if id(run) not in used and (run.record.get("evals") or not run.apart)]

    @cached_property
    def attacks(self) -> list[Attack]:
        """Attacks on unlearned models first, then those on controls; oldest first."""
        attacks = [self._attack(run) for run in self.of_kind("tamper")]
        weights: dict[str, set[str]] = {}
        for attack in attacks:
            weights.setdefault(attack.model, set()).add(attack.weights)
        for i, attack in enumerate(attacks):
            if len(weights[attack.model]) > 1:  # one name, several models
                own = f"{attack.model}, weights {attack.weights[:8]}"
                attacks[i] = replace(attack, model=own, label=own + attack.label.removeprefix(attack.model))
        return sorted(attacks, key=lambda attack: attack.control is not None)

    @cached_property
    def series(self) -> list[Series]:
        """Every attack on every model, seeds together; of runs equal in their seed too, the last that is complete."""
        groups: dict[tuple[str, str], dict[Any, Attack]] = {}
        for attack in self.attacks:
            runs = groups.setdefault((attack.model, attack.settings), {})
            seed = attack.run.record["config"].get("seed")
            if seed not in runs or attack.run.status == "complete" or runs[seed].run.status != "complete":
                runs[seed] = attack
        names = _attack_names({settings: None for _, settings in groups}, self.attacks)
        made = [(model, settings, list(runs.values())) for (model, settings), runs in groups.items()]
        return [Series(m, own[0].control, own[0].baseline, names[s], s, own) for m, s, own in made]

    def twin_of(self, series: Series) -> Series | None:
        """The filtered twin under the same attack; None where there are several twins, of which none is the one to choose."""
        return self._twins.get(series.settings)

    @cached_property
    def _twins(self) -> dict[str, Series]:
        twins = [series for series in self.series if series.control == FILTERED]
        return {twin.settings: twin for twin in reversed(twins)} if len({twin.model for twin in twins}) == 1 else {}

    @property
    def general_bound(self) -> float:
        """The general accuracy that attacks may cost, as the suite of the runs has it."""
        suites = [run.record.get("suite") or {} for run in self.of_kind("tamper")]
        bounds = {suite["general_bound"] for suite in suites if "general_bound" in suite}
        return bounds.pop() if len(bounds) == 1 else recovery.GENERAL_BOUND

    @cached_property
    def worst_cases(self) -> dict[str, tuple[Series, recovery.Worst | None]]:
        """Each attacked model's worst case over all attacks that any model here was put under, with one of its series."""
        tasks = tasks_of(line["evals"] for attack in self.attacks for line in attack.curve)
        forget, general = regimes.forget_task(tasks), regimes.retain_task(tasks)
        attacks = {series.settings: series.attack for series in self.series}
        missing = {settings: recovery.Trial(name, [], [], "not run on this model") for settings, name in attacks.items()}
        found: dict[str, tuple[Series, recovery.Worst | None]] = {}
        for first, *more in _grouped(self.series, lambda series: series.model).values():
            own = {series.settings: series for series in (first, *more)}
            trials = [
                trial
                for settings in attacks
                for trial in (self.trials(own[settings], forget, general) if settings in own else [missing[settings]])
            ]
            before = first.baseline.evals.get(forget) if first.baseline and forget else None
            baseline = value_of(before) if before else None
            found[first.model] = first, recovery.worst_case(trials, self.general_bound, baseline)
        return found

    def trials(self, series: Series, forget: str | None, general: str | None) -> list[recovery.Trial]:
        """A series as one attack of a set; a seed that is not measured to its end beside those that are is one by itself."""
        twin = self.twin_of(series) if series.control != FILTERED else None
        control = twin.points_of(forget) if twin and forget else []
        open_ones = [attack for attack in series.attacks if attack not in series.measured]
        parts: list[tuple[str, Series | Attack, str | None]] = [(series.attack, series, None if open_ones else series.reason)]
        for attack in open_ones:
            seed = f"{series.attack}, seed {attack.run.record['config'].get('seed')}"
            parts.append((seed, attack, replace(series, attacks=[attack]).reason))
        on = lambda part, task: part.points_of(task) if task else []  # noqa: E731
        return [recovery.Trial(name, on(part, forget), on(part, general), why, control) for name, part, why in parts]

    def run_named(self, ref: str, of: Shown) -> Shown | None:
        """The run that a model reference (`run:ID`, or a run's folder) of run `of` means: one made before it, among these."""
        name = Path(ref.removeprefix("run:")).name
        if not name:
            return None

        def first(runs: Iterable[Shown]) -> Shown | None:
            """Of those made before, the oldest, its own folder's first."""
            made, folder = of.record.get("created") or "", of.folder
            earlier = [run for run in runs if run is not of and (run.record.get("created") or "") <= made]
            return next((run for run in earlier if run.folder == folder), next(iter(earlier), None))

        return first(self._named.get(name, ())) or (
            first(run for run in self._holding if name in run.path.name) if ref.startswith("run:") else None
        )

    @cached_property
    def _holding(self) -> list[Shown]:
        """The runs that models come from, oldest first."""
        return [run for run in self.runs if run.record["kind"] in {"unlearn", "tamper"}]

    @cached_property
    def _named(self) -> dict[str, list[Shown]]:
        named = _grouped(self._holding, lambda run: run.id)
        for run in self._holding:
            if run.path.name != run.id:
                named.setdefault(run.path.name, []).append(run)
        return named

    def attacked(self, attack: Attack) -> Shown | None:
        """The run whose model an attack was on; None for a control, or when that run is not among these."""
        ref = self._parent(attack.run, "model")[0]
        return None if ref.startswith("random:") else self.run_named(ref, attack.run)

    def _attack(self, run: Shown) -> Attack:
        before: list[Shown] = []
        ref, sha = self._parent(run, "model")
        attacked = None if ref.startswith("random:") else self.run_named(ref, run)
        while attacked is not None and attacked.record["kind"] == "tamper":  # each was made before the one that names it
            before.insert(0, attacked)
            ref, sha = self._parent(attacked, "model")
            attacked = None if ref.startswith("random:") else self.run_named(ref, attacked)
        target = self._target_of(attacked, ref)
        control = None if attacked else self._control(ref, sha)
        model = f"{attacked.record['name']} ({attacked.id})" if attacked else f"{control} ({ref})" if control else ref
        label = f"{model}, after {', '.join(each.record['name'] for each in before)}" if before else model
        baseline = target.baseline if target else None
        return Attack(run, label, control, baseline, run.curve, tuple(before), model, sha)

    def _control(self, ref: str, sha: str) -> str | None:
        if ref.startswith("random:"):
            return "Control: random weights"
        by_ref, by_weights = self._roles
        if role := by_ref.get(ref) or by_weights.get(sha):
            return {"source": "Control: source", "model": "Control: before unlearning"}[role]
        # The field's names for it: lab:filtered, …-strong-filter; what was not filtered is called unfiltered.
        twin = re.search(r"(?<!un)filter", ref.rsplit("/", 1)[-1].lower()) and not ref.startswith("run:")
        return FILTERED if twin else None

    @cached_property
    def _roles(self) -> tuple[dict[str, str], dict[str, str]]:
        """What models are to unlearning runs, by reference and by weights."""
        parents = [(role, self._parent(run, role)) for run in self.of_kind("unlearn") for role in ("source", "model")]
        first = parents[::-1]
        return {ref: role for role, (ref, _) in first}, {sha: role for role, (_, sha) in first}

    def _target_of(self, attacked: Shown | None, ref: str) -> Target | None:
        """The model that an attacked one was made from; for a control, the one that the report is about."""
        if attacked and id(attacked) in self._unlearned:
            return self._unlearned[id(attacked)]
        for target in self.targets:
            if ref.removeprefix("random:") == target.ref:
                return target
        measured = [target for target in self.targets if target.baseline]
        return measured[0] if len(measured) == 1 else None

    @cached_property
    def _unlearned(self) -> dict[int, Target]:
        return {id(run): target for target in self.targets for run in target.runs}

    def _parent(self, run: Shown, role: str) -> tuple[str, str]:
        """Reference and weight hash of what a run was made from; a run that got no hash takes that of its reference."""
        parent = (run.record.get("parents") or {}).get(role)
        if parent:
            return parent["ref"], parent["sha256"]
        ref = run.record["config"].get(role) or "?"
        return ref, self._weights.get((role, ref), ref)

    @cached_property
    def _weights(self) -> dict[tuple[str, str], str]:
        """Hashes by role and reference; of several the oldest run's."""
        parents = [pair for run in reversed(self.runs) for pair in (run.record.get("parents") or {}).items()]
        return {(role, parent["ref"]): parent["sha256"] for role, parent in parents if parent and "ref" in parent}

    def _evaluations(self, ref: str, sha: str) -> list[Shown]:
        """Evaluations of the same weights; those under the same reference, if there are any."""
        same = self._evaluations_of.get(sha, [])
        return [run for run in same if self._parent(run, "model")[0] == ref] or same

    @cached_property
    def _evaluations_of(self) -> dict[str, list[Shown]]:
        evaluated = [run for run in self.of_kind("evaluate") if run.record.get("evals")]
        return _grouped(evaluated, lambda run: self._parent(run, "model")[1])

    def _evaluated(self, label: str, ref: str, sha: str) -> Row | None:
        """One row from every evaluation of the same weights; of a task measured twice, the later result."""
        rows = [row_of(run, label) for run in self._evaluations(ref, sha)]
        merged: Evals = {}
        origin: dict[str, Shown] = {}
        for row in rows:
            merged |= row.evals
            origin |= row.origin
        return Row(label, merged, origin) if merged else None


def _points(run: Shown, task: str, steps: int, tokens: int) -> list[Point]:
    """A run's own curve, its steps and tokens counted on from those that came before it."""
    seen, total = run.tokens, max(run.tokens.values())
    lines = [(line, line["evals"][task]) for line in run.curve if "acc" in line["evals"].get(task, {})]
    return [
        Point(
            steps + line["step"],
            tokens + line.get("tokens", seen.get(line["step"], total)),
            r["acc"],
            r["low"],
            r["high"],
            line.get("strength"),
        )
        for line, r in lines
    ]


def _same(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of an attack without those that leave it the same attack."""
    return {key: value for key, value in config.items() if key not in NOT_THE_ATTACK and (key, value) not in AS_BEFORE}


def _attack_names(settings: Iterable[str], attacks: list[Attack]) -> dict[str, str]:
    """A name for each attack: that of its runs, where they share one that no other has; else its settings."""
    runs: dict[str, list[Shown]] = {}
    for attack in attacks:
        runs.setdefault(attack.settings, []).append(attack.run)
    own = {key: {run.record["name"] for run in runs[key]} for key in settings}
    shared_by = Counter(map(frozenset, own.values()))
    said = varying([run for some in runs.values() for run in some], {"name", "seed", "strengths", "eval.tasks"})
    names: dict[str, str] = {}
    for key, found in own.items():
        shared = next(iter(found)) if len(found) == 1 else ""
        if shared and shared_by[frozenset(found)] == 1:
            names[key] = shared
            continue
        first = runs[key][0]
        told = ", ".join(f"{name} {text}" for name, read in said.items() if (text := read(first)) != MISSING)
        names[key] = told or "attack"
    times = Counter(names.values())
    twice = [key for key in names if times[names[key]] > 1]
    return names | {key: f"{names[key]} ({i + 1})" for i, key in enumerate(twice)}


def row_of(run: Shown, label: str) -> Row:
    """A run's own results."""
    evals = run.record.get("evals") or {}
    return Row(label, evals, dict.fromkeys(evals, run))


def value_of(result: dict[str, Any]) -> float:
    """The number that a result stands for: its accuracy, or the mean probability of the right answer."""
    return result["acc"] if "acc" in result else result["correct_prob"]


def tasks_of(every: Iterable[Evals]) -> list[str]:
    """All tasks, in the order in which they first appear."""
    return list(dict.fromkeys(task for evals in every for task in evals))


def judge(evals: Evals, target: Target) -> tuple[regimes.Regime, regimes.Estimate] | None:
    """Regime and selectivity of results against a target's baseline; None when they cannot be told."""
    forget, retain = target.judged
    if target.baseline is None or forget is None or retain is None or forget not in evals or retain not in evals:
        return None
    before = target.baseline.evals
    kept = [regimes.kept(evals[task], before[task]) for task in (forget, retain)]
    if kept[0] is None or kept[1] is None:
        return None
    return regimes.regime(kept[0], kept[1], *target.thresholds), regimes.selectivity(kept[0], kept[1])


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what they have in common, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def settings_columns(runs: list[Shown]) -> dict[str, Callable[[Shown], str]]:
    """The settings' columns of unlearning runs: the three that are always there, and those that differ between runs."""
    differing = varying(runs, set())
    name = {"name": differing.pop("name")} if "name" in differing else {}
    always = {key: _reader(key) for key in ("retain_coef", "remove_coef")}
    return {**name, **always, "lora_r": lambda run: run.settings.get("lora.r", "full"), **differing}


def varying(runs: list[Shown], leave_out: set[str]) -> dict[str, Callable[[Shown], str]]:
    """Settings that differ between the runs that have them."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(value)
    keys = [key for key, found in values.items() if len(found) > 1 and key not in SHOWN_ELSEWHERE | leave_out]
    return {key: _reader(key) for key in keys}


def _reader(key: str) -> Callable[[Shown], str]:
    return lambda run: run.settings.get(key, MISSING)


def attack_tasks(attacks: list[Attack]) -> tuple[str | None, str | None]:
    """The forget task and the general (retain) task of attacks; of other tasks, the first is the one that matters."""
    tasks = tasks_of(line["evals"] for attack in attacks for line in attack.curve)
    return regimes.forget_task(tasks) or next(iter(tasks), None), regimes.retain_task(tasks)
