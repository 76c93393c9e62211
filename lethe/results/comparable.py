"""Runs as a report shows them, without the numbers that cannot stand beside the others.

    Run -> Shown (a printable copy) -> set_apart() -> Apart (results that were measured in another way)

A table or chart never mixes results of a task that were measured in different ways. For each task the way that most models
were measured in stays. The results of other ways are taken out and stand in a table of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from lethe.results.format import LONGEST, setting, shown
from lethe.results.regimes import provenance
from lethe.runs.run import Run, Status

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Evals = dict[str, dict[str, Any]]
SHOWN_ELSEWHERE = {"model", "source", "out", "retain_coef", "remove_coef", "lora", "lora.r", "retain_loss", "report_to"}
SHOWN_ELSEWHERE |= {"eval.tasks", "eval.every", "eval.limit", "max_steps", "save_every", "resume"}


class Shown(Run):
    """A copy of a run that a report may show and change. Its status is the one at the time of reading."""

    def __init__(self, run: Run):
        super().__init__(run.path, clean(run.record))
        self.apart: list[Apart] = []
        self._status = run.status

    @property
    def status(self) -> Status:
        return self._status

    @cached_property
    def folder(self) -> str:
        """The folder that holds the run's folder, links resolved."""
        return os.path.realpath(self.path.parent)

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """The lines of curve.jsonl: evaluations during the run."""
        return self.rows("curve.jsonl")

    @cached_property
    def settings(self) -> dict[str, str]:
        """The run's settings as text; nested settings have dotted names."""
        flat: dict[str, str] = {}
        for key, value in self.record["config"].items():
            inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
            flat |= {name: setting(item) for name, item in inner.items()}
        return flat

    @cached_property
    def tokens(self) -> dict[int, int]:
        """The attack's training tokens up to each update."""
        seen, total = {0: 0}, 0
        for row in super().rows("metrics.jsonl"):
            total += row.get("attack_tokens", 0)
            seen[row["step"]] = total
        return seen

    def rows(self, file: str) -> list[dict[str, Any]]:
        return [clean(row) for row in super().rows(file)]

    def evaluations(self) -> Iterator[tuple[str, Evals]]:
        """Every evaluation with its place in the run. An attack's last one is in its curve and in its record."""
        for row in self.record.get("checkpoints") or []:
            yield row["name"], row["evals"]
        for line in self.curve:
            yield f"step {line['step']}", line["evals"]
        if self.record.get("evals") and self.record["kind"] != "lab":
            yield "", self.record["evals"]


@dataclass(frozen=True)
class Apart:
    """A result that stands beside no other. `usual` is a result of the usual way; None if this one is no share of 1."""

    run: Shown
    place: str
    task: str
    result: dict[str, Any]
    usual: dict[str, Any] | None


def clean(value: Any) -> Any:
    """A copy of a JSON value whose texts are single lines without control characters."""
    if isinstance(value, str):
        return shown(value) if len(value) > LONGEST or not value.isprintable() else value
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def set_apart(groups: list[list[Shown]]) -> list[Apart]:
    """Take the results out of the runs of each group that were measured in another way than the same task usually was."""
    found = []
    for group in groups:
        usual = _usual(group)
        for run in group:
            for place, evals in run.evaluations():
                for task, result in list(evals.items()):
                    is_share = _is_share(result)
                    if not is_share or str(provenance(result)) != str(provenance(usual[task])):
                        run.apart.append(Apart(run, place, task, evals.pop(task), usual[task] if is_share else None))
            found += run.apart
    return found


def _usual(group: list[Shown]) -> dict[str, dict[str, Any]]:
    """For each task a result of the way in which most models were measured; then the most questions, then the oldest."""
    ways: dict[str, dict[str, tuple[set[str], dict[str, Any]]]] = {}
    for run in group:
        parent = (run.record.get("parents") or {}).get("model") if run.record["kind"] == "evaluate" else None
        model = str(parent["sha256"] if parent else run.id)  # several evaluations of the same weights count as one model
        for _, evals in run.evaluations():
            for task, result in evals.items():
                if _is_share(result):
                    ways.setdefault(task, {}).setdefault(str(provenance(result)), (set(), result))[0].add(model)
    return {
        task: max(several.values(), key=lambda way: (len(way[0]), way[1].get("n") or 0))[1] for task, several in ways.items()
    }


def _is_share(result: dict[str, Any]) -> bool:
    """Whether a result has an interval, and all its values lie from 0 to 1."""
    values = [result[key] for key in ("acc", "correct_prob", "low", "high", "chance") if key in result]
    return "low" in result and all(-1e-9 <= value <= 1 + 1e-9 for value in values)


def varying(runs: list[Shown], *leave_out: str) -> list[str]:
    """The settings whose values differ between the runs that have them, but for those that tables show in another way."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1 and key not in {*SHOWN_ELSEWHERE, *leave_out}]


def tasks_of(every: Iterable[Evals]) -> list[str]:
    """All tasks, in the order in which they first appear."""
    return list(dict.fromkeys(task for evals in every for task in evals))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
