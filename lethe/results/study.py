"""A study: the runs of a report, joined to say which evaluation is a baseline and which model an attack was on.

    folders -> Study.load() -> targets (models that were unlearned), attacks and series, worst_cases, other_evaluations

Runs are joined by the hashes of weights that they record under `parents`, not by their names. Tables and charts both read the
study, so they agree. Imported runs stand apart, since it is not recorded how their numbers were measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lethe.errors import LetheError
from lethe.results import recovery, regimes
from lethe.results.attacks import FILTERED, Attack, Series, series_of
from lethe.results.comparable import Shown, grouped, set_apart, tasks_of
from lethe.results.listing import is_imported
from lethe.results.regimes import number
from lethe.results.targets import Row, Target
from lethe.runs.finding import find_run, find_runs
from lethe.runs.run import Run

CONTROLS = {"source": "Control: source", "model": "Control: before unlearning"}
"""The label of an attacked model that is the parent of an unlearning run."""


class Study:
    """The runs of a report, joined."""

    def __init__(self, runs: Iterable[Run]):
        every = [Shown(run) for run in runs]
        self.runs = [run for run in every if not is_imported(run)]
        self.imported = [run for run in every if is_imported(run)]
        self.apart = set_apart(self._side_by_side())

    @classmethod
    def load(cls, folders: list[str]) -> Study:
        """The runs in folders (or single runs), each once, oldest first.

        Raises:
            LetheError: a folder does not exist, or no folder has a run.
        """
        runs: dict[Path, Run] = {}
        for folder in folders:
            path = find_run(folder.removeprefix("run:")).path if folder.startswith("run:") else Path(folder)
            if not path.exists():
                raise LetheError(f"runs: '{folder}' does not exist; give a run or a folder of runs")
            runs |= {run.path.resolve(): run for run in find_runs(path)}
        if not runs:
            raise LetheError(f"runs: there are none in {', '.join(repr(f) for f in folders)}; give a run or a folder of runs")
        return cls(sorted(runs.values(), key=lambda run: (run.record.get("created") or "", run.id)))

    def of_kind(self, kind: str) -> list[Shown]:
        """The runs of one kind, oldest first."""
        return [run for run in self.runs if run.record["kind"] == kind]

    def _side_by_side(self) -> list[list[Shown]]:
        """Groups of runs whose numbers may stand side by side.

        Attacks share tables, so with attacks all runs about unlearned models are one group. Without attacks each unlearned
        model is a group. Other evaluations are a group, and every run of another kind is one by itself.
        """
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

        return list(grouped(self.runs, side).values())

    # -- models that were unlearned

    @cached_property
    def targets(self) -> list[Target]:
        """Each model that was unlearned. Without unlearning runs: each model that maps were fitted to."""
        groups = grouped(self.of_kind("unlearn") or self.of_kind("affine"), lambda run: self._parent(run, "model"))
        targets = []
        for (ref, sha), runs in groups.items():
            sources = dict.fromkeys(self._parent(run, "source") for run in runs if self._parent(run, "source")[0] != "?")
            rows = [self._evaluated(f"Source ({re.split('[:@/]', source[0])[-1]})", *source) for source in sources]
            unlearned = [run for run in runs if run.record["kind"] == "unlearn"]
            baseline = self._evaluated("Baseline", ref, sha)
            targets.append(Target(ref, unlearned, baseline, [row for row in rows if row], self._thresholds))
        return targets

    @cached_property
    def _thresholds(self) -> tuple[float, float]:
        """Those of the sweeps among the runs if they all agree, else the defaults."""
        configs = [run.record["config"] for run in self.of_kind("sweep")]
        shares = [config.get("retained_threshold", config.get("kept_threshold")) for config in configs]  # the name of old runs
        found = {(share, config.get("chance_threshold")) for share, config in zip(shares, configs, strict=True)}
        agreed = {pair for pair in found if None not in pair}
        return agreed.pop() if len(agreed) == 1 else (regimes.RETAINED_THRESHOLD, regimes.CHANCE_THRESHOLD)  # type: ignore

    def _evaluated(self, label: str, ref: str, sha: str) -> Row | None:
        """One row from all evaluations of the same weights. Of a task evaluated twice, the later result counts."""
        runs = self._evaluations(ref, sha)
        merged = {task: result for run in runs for task, result in run.record["evals"].items()}
        return Row(label, merged, runs) if merged else None

    def _evaluations(self, ref: str, sha: str) -> list[Shown]:
        """Evaluations of the same weights: those under the same reference, or else all."""
        evaluated = [run for run in self.of_kind("evaluate") if run.record.get("evals")]
        same = [run for run in evaluated if self._parent(run, "model")[1] == sha]
        return [run for run in same if self._parent(run, "model")[0] == ref] or same

    @cached_property
    def other_evaluations(self) -> list[Shown]:
        """Evaluations that are neither a baseline's nor a source's."""
        rows = [row for target in self.targets for row in (target.baseline, *target.sources) if row]
        used = {id(run) for row in rows for run in row.runs}
        return [run for run in self.of_kind("evaluate") if id(run) not in used and (run.record.get("evals") or not run.apart)]

    # -- attacks

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
        """Every attack on every model, its seeds together."""
        return series_of(self.attacks)

    @cached_property
    def has_several_attacks(self) -> bool:
        """Whether the attacks differ in more than model and seed."""
        return len({series.settings for series in self.series}) > 1

    def twin_of(self, series: Series) -> Series | None:
        """The filtered twin under the same attack; None for the twin itself, and if there are several twins."""
        return self._twins.get(series.settings) if series.control != FILTERED else None

    @cached_property
    def _twins(self) -> dict[str, Series]:
        twins = [series for series in self.series if series.control == FILTERED]
        return {twin.settings: twin for twin in reversed(twins)} if len({twin.model for twin in twins}) == 1 else {}

    @property
    def general_bound(self) -> float:
        """The general accuracy that an attack may cost, from the suite of the runs if there is exactly one bound."""
        suites = [run.record.get("suite") or {} for run in self.of_kind("tamper")]
        bounds = {suite["general_bound"] for suite in suites if "general_bound" in suite}
        return bounds.pop() if len(bounds) == 1 else recovery.GENERAL_BOUND

    @cached_property
    def worst_cases(self) -> dict[str, recovery.Worst | None]:
        """Each attacked model's worst case over all attacks of the study, including those not run on it."""
        tasks = tasks_of(line["evals"] for attack in self.attacks for line in attack.run.curve)
        forget, general = regimes.forget_task(tasks), regimes.retain_task(tasks)
        attacks = {series.settings: series.attack for series in self.series}
        found: dict[str, recovery.Worst | None] = {}
        for model, several in grouped(self.series, lambda series: series.model).items():
            own = {series.settings: series for series in several}
            curves = []
            for settings, name in attacks.items():
                missing = recovery.AttackCurves(name, [], [], "not run on this model")
                curves += self.curves_of(own[settings], forget, general) if settings in own else [missing]
            baseline = several[0].baseline
            before = baseline.evals.get(forget) if baseline and forget else None
            found[model] = recovery.worst_case(curves, self.general_bound, number(before) if before else None)
        return found

    def curves_of(self, series: Series, forget: str | None, general: str | None) -> list[recovery.AttackCurves]:
        """A series as one attack. Beside complete seeds, each seed that is not complete is an attack of its own."""
        twin = self.twin_of(series)
        control = twin.points_of(forget) if twin and forget else []
        unfinished = [attack for attack in series.attacks if attack not in series.measured]
        parts: list[tuple[str, Series | Attack, str | None]] = [(series.attack, series, None if unfinished else series.reason)]
        parts += [(f"{series.attack}, seed {attack.seed}", attack, attack.reason) for attack in unfinished]
        curves = []
        for name, part, reason in parts:
            on_forget, on_general = (part.points_of(task) if task else [] for task in (forget, general))
            curves.append(recovery.AttackCurves(name, on_forget, on_general, reason, control))
        return curves

    def _attack(self, run: Shown) -> Attack:
        before: list[Shown] = []
        ref, sha = self._parent(run, "model")
        made_by = self._maker(ref, run)
        while made_by is not None and made_by.record["kind"] == "tamper":  # ends: each was made before the run that names it
            before.insert(0, made_by)
            ref, sha = self._parent(made_by, "model")
            made_by = self._maker(ref, made_by)
        control = None if made_by else self._control(ref, sha)
        model = f"{made_by.record['name']} ({made_by.id})" if made_by else f"{control} ({ref})" if control else ref
        label = f"{model}, after {', '.join(each.record['name'] for each in before)}" if before else model
        target = self._target_of(made_by, ref)
        return Attack(run, model, label, control, made_by, target.baseline if target else None, tuple(before), sha)

    def _maker(self, ref: str, of: Shown) -> Shown | None:
        """The run of this study that made the model which run `of` names: `run:ID`, part of a name, or a run's folder.

        It was made before `of`. Of several the oldest counts, and first those in the same folder as `of`.
        """
        name = Path(ref.removeprefix("run:")).name
        if not name or ref.startswith("random:"):
            return None
        made = of.record.get("created") or ""
        in_part = (run for run in self.runs if ref.startswith("run:") and name in run.path.name and _makes_a_model(run))
        for named in (self._makers.get(name, ()), in_part):
            earlier = [run for run in named if run is not of and (run.record.get("created") or "") <= made]
            if earlier:
                return next((run for run in earlier if run.folder == of.folder), earlier[0])
        return None

    @cached_property
    def _makers(self) -> dict[str, list[Shown]]:
        named = [(name, run) for run in self.runs if _makes_a_model(run) for name in {run.id, run.path.name}]
        return {name: [run for _, run in pairs] for name, pairs in grouped(named, lambda pair: pair[0]).items()}

    def _control(self, ref: str, sha: str) -> str | None:
        """What kind of control a model is that no run of the study made; None if it is none."""
        if ref.startswith("random:"):
            return "Control: random weights"
        by_ref, by_weights = self._roles
        if role := by_ref.get(ref) or by_weights.get(sha):
            return CONTROLS[role]
        # Filtered twins are published under such names: lab:filtered, …-strong-filter. "Unfiltered" means the opposite.
        is_twin = re.search(r"(?<!un)filter", ref.rsplit("/", 1)[-1].lower()) and not ref.startswith("run:")
        return FILTERED if is_twin else None

    @cached_property
    def _roles(self) -> tuple[dict[str, str], dict[str, str]]:
        """The roles of models in unlearning runs, by reference and by weights."""
        parents = [(role, self._parent(run, role)) for run in self.of_kind("unlearn") for role in ("source", "model")]
        first = parents[::-1]
        return {ref: role for role, (ref, _) in first}, {sha: role for role, (_, sha) in first}

    def _target_of(self, unlearned: Shown | None, ref: str) -> Target | None:
        """The model that an unlearned one was made from. For a control: its own, or the only one with a baseline."""
        for target in self.targets:
            if unlearned in target.runs or (unlearned is None and ref.removeprefix("random:") == target.ref):
                return target
        measured = [target for target in self.targets if target.baseline]
        return measured[0] if len(measured) == 1 else None

    # -- what runs were made from

    def _parent(self, run: Shown, role: str) -> tuple[str, str]:
        """Reference and weight hash of what a run was made from. A run without a hash gets that of its reference."""
        if parent := (run.record.get("parents") or {}).get(role):
            return parent["ref"], parent["sha256"]
        ref = run.record["config"].get(role) or "?"
        return ref, self._weights.get((role, ref), ref)

    @cached_property
    def _weights(self) -> dict[tuple[str, str], str]:
        """Hashes by role and reference; of several hashes the oldest run's."""
        parents = [pair for run in reversed(self.runs) for pair in (run.record.get("parents") or {}).items()]
        return {(role, parent["ref"]): parent["sha256"] for role, parent in parents if parent and "ref" in parent}


def _makes_a_model(run: Run) -> bool:
    return run.record["kind"] in {"unlearn", "tamper"}
