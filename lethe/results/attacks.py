"""The attacks of a study: one run with its curve, and the runs of one attack that differ only in their seed.

    tamper run -> Attack (on which model, beside which baseline) -> Series (all seeds of an attack on a model)

Two runs are the same attack if their settings agree, whatever the model, the seed and the evaluation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lethe.results import recovery, regimes
from lethe.results.comparable import Shown, grouped, tasks_of, varying
from lethe.results.recovery import Point, Recovery
from lethe.results.regimes import number
from lethe.results.targets import Row

FILTERED = "Control: filtered twin"
NOT_THE_ATTACK = {"model", "out", "name", "seed", "eval", "save_model", "save_every", "report_to", "time_limit", "overlap"}
NOT_THE_ATTACK |= {"fast"}
DEFAULTS: list[tuple[str, Any]] = [("attack", "finetune"), ("strengths", [])]
"""Settings that old runs lack: with these values they are the same attack."""


@dataclass(frozen=True, eq=False)
class Attack:
    """One tampering run.

    `model` names the attacked model as it was before all attacks, `before` are the attacks it had already been under (oldest
    first), and `label` names both. `unlearned` is the run that made the model; None for a control, which `control` names.
    """

    run: Shown
    model: str
    label: str
    control: str | None
    unlearned: Shown | None
    baseline: Row | None
    before: tuple[Shown, ...] = ()
    weights: str = ""
    """Hash of the model's weights before all attacks."""

    @property
    def seed(self) -> Any:
        return self.run.record["config"].get("seed")

    @property
    def trains(self) -> bool:
        """Whether this is a fine-tuning attack: its curve goes over steps, not over strengths."""
        return self.run.record["config"].get("attack", "finetune") == "finetune"

    @property
    def reason(self) -> str | None:
        """Status and reason of an attack that is not complete."""
        if self.run.status == "complete":
            return None
        return ": ".join(filter(None, (self.run.status, self.run.record.get("reason"))))

    @cached_property
    def settings(self) -> str:
        """What identical attacks have in common, as text."""
        configs = [run.record["config"] for run in (*self.before, self.run)]
        own = [{k: v for k, v in config.items() if k not in NOT_THE_ATTACK and (k, v) not in DEFAULTS} for config in configs]
        return json.dumps(own, sort_keys=True)

    def results(self, task: str) -> list[tuple[int, dict[str, Any]]]:
        """Steps and results of a task along the attack."""
        return [(line["step"], line["evals"][task]) for line in self.run.curve if task in line["evals"]]

    def points_of(self, task: str) -> list[Point]:
        """The curve on a task, from the model before all attacks, with the steps and tokens of all; empty without accuracy."""
        points: list[Point] = []
        steps = tokens = 0
        for run in self.before:
            points = points or _points(run, task, steps, tokens)[:1]
            steps += max(run.tokens)
            tokens += max(run.tokens.values())
        return points + _points(self.run, task, steps, tokens)

    def recovery(self, task: str) -> Recovery | None:
        """How much of the baseline's accuracy came back; None without a baseline, or without a curve from step 0."""
        curve = self.points_of(task)
        if self.baseline is None or task not in self.baseline.evals or not curve or curve[0].step:
            return None
        return recovery.measure(curve, number(self.baseline.evals[task]))


@dataclass(frozen=True, eq=False)
class Series:
    """One attack on one model: the runs that differ only in their seed. `attack` is its name, the same for every model."""

    model: str
    control: str | None
    baseline: Row | None
    attack: str
    settings: str
    attacks: list[Attack]
    _points: dict[str, list[Point]] = field(default_factory=dict, repr=False)

    @property
    def measured(self) -> list[Attack]:
        """The complete seeds; all seeds if none is complete."""
        return [attack for attack in self.attacks if attack.run.status == "complete"] or self.attacks

    def points_of(self, task: str) -> list[Point]:
        """The mean curve on a task over `measured`."""
        if task not in self._points:
            curves = [points for attack in self.measured if (points := attack.points_of(task))]
            self._points[task] = recovery.over_seeds(curves) if curves else []
        return self._points[task]

    @property
    def reason(self) -> str | None:
        """Why the attack is not measured to its end; None if every seed is."""
        several = len(self.attacks) > 1
        parts = [(f"seed {each.seed} " if several else "") + each.reason for each in self.attacks if each.reason]
        return "; ".join(parts) or None


def series_of(attacks: list[Attack]) -> list[Series]:
    """Every attack on every model, its seeds together. Of several runs of one seed the last complete one counts."""
    by_seed: dict[tuple[str, str], dict[Any, Attack]] = {}
    for attack in attacks:
        seeds = by_seed.setdefault((attack.model, attack.settings), {})
        if attack.seed not in seeds or attack.run.status == "complete" or seeds[attack.seed].run.status != "complete":
            seeds[attack.seed] = attack
    names = _attack_names(attacks)
    made = [(model, settings, list(seeds.values())) for (model, settings), seeds in by_seed.items()]
    return [Series(m, own[0].control, own[0].baseline, names[s], s, own) for m, s, own in made]


def attack_tasks(attacks: Iterable[Attack]) -> tuple[str | None, str | None]:
    """The forget task (or else the first task) and the general task of attacks, which is their retain task."""
    tasks = tasks_of(line["evals"] for attack in attacks for line in attack.run.curve)
    return regimes.forget_task(tasks) or next(iter(tasks), None), regimes.retain_task(tasks)


def _points(run: Shown, task: str, steps: int, tokens: int) -> list[Point]:
    """A run's own curve, after `steps` and `tokens` of earlier attacks."""
    seen, total = run.tokens, max(run.tokens.values())
    points = []
    for line in run.curve:
        if "acc" in (result := line["evals"].get(task, {})):
            so_far = tokens + line.get("tokens", seen.get(line["step"], total))
            values = result["acc"], result["low"], result["high"]
            points.append(Point(steps + line["step"], so_far, *values, line.get("strength")))
    return points


def _attack_names(attacks: list[Attack]) -> dict[str, str]:
    """A name for each attack: the runs' name if no other attack has it, or else the settings that differ."""
    by_settings = {key: [each.run for each in same] for key, same in grouped(attacks, lambda each: each.settings).items()}
    own = {key: frozenset(run.record["name"] for run in same) for key, same in by_settings.items()}
    shared_by = Counter(own.values())
    differing = varying([attack.run for attack in attacks], "name", "seed", "strengths")
    names: dict[str, str] = {}
    for key, found in own.items():
        if len(found) == 1 and shared_by[found] == 1:
            names[key] = next(iter(found))
        else:
            settings = by_settings[key][0].settings
            names[key] = ", ".join(f"{name} {settings[name]}" for name in differing if name in settings) or "attack"
    times = Counter(names.values())
    twice = [key for key in names if times[names[key]] > 1]
    return names | {key: f"{names[key]} ({i + 1})" for i, key in enumerate(twice)}
