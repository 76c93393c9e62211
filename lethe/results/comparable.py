"""Runs as a report shows them: what they say is cleaned, read once, and numbers measured in another way are set apart.

    Run -> Shown (texts that anything can show) -> set_apart(): of each task one way of measuring stays, the others are `Apart`

Numbers of a task that were measured in different ways never stand in one table or chart. One odd evaluation must not cost
the whole report either: it gets a table of its own, which says in what it differs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lethe.results.format import LONGEST, setting, shown
from lethe.results.regimes import provenance
from lethe.runs.run import Run, Status

Evals = dict[str, dict[str, Any]]


class Shown(Run):
    """A run whose record and curve a report may show and change: they are copies, and the status is that of one moment."""

    def __init__(self, run: Run):
        super().__init__(run.path, clean(run.record))
        self.apart: list[Apart] = []
        self._status = run.status

    @property
    def status(self) -> Status:
        return self._status

    @cached_property
    def folder(self) -> str:
        """The folder that the run lies in, however it was named."""
        return os.path.realpath(self.path.parent)

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """The lines of curve.jsonl: evaluations on the way."""
        return self.rows("curve.jsonl")

    @cached_property
    def settings(self) -> dict[str, str]:
        """The run's settings as text, those inside others named with a dot."""
        flat: dict[str, str] = {}
        for key, value in self.record["config"].items():
            inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
            flat |= {name: setting(item) for name, item in inner.items()}
        return flat

    @cached_property
    def tokens(self) -> dict[int, int]:
        """Tokens of an attack by the update until which it saw them."""
        seen, total = {0: 0}, 0
        for row in super().rows("metrics.jsonl"):
            total += row.get("attack_tokens", 0)
            seen[row["step"]] = total
        return seen

    def rows(self, file: str) -> list[dict[str, Any]]:
        return [clean(row) for row in super().rows(file)]

    def evaluations(self) -> Iterator[tuple[str, Evals]]:
        """Every evaluation, with its place in the run. An attack's last one stands in its curve and in its record."""
        for row in self.record.get("checkpoints") or []:
            yield row["name"], row["evals"]
        for line in self.curve:
            yield f"step {line['step']}", line["evals"]
        if self.record.get("evals") and self.record["kind"] != "lab":
            yield "", self.record["evals"]


@dataclass(frozen=True)
class Apart:
    """A task's result that stands beside no other, and how the others were measured (None: it is no share of 1)."""

    run: Shown
    place: str
    task: str
    result: dict[str, Any]
    usual: dict[str, Any] | None


def clean(value: Any) -> Any:
    """A copy of what was read from JSON, with texts on one line without control characters."""
    if isinstance(value, str):
        return shown(value) if len(value) > LONGEST or not value.isprintable() else value
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def set_apart(groups: list[list[Shown]]) -> list[Apart]:
    """Take out of the runs of each group what was measured otherwise than the same task mostly was.

    What counts is how many models were measured in a way: the same weights evaluated often are one. Of equally many the way
    with more questions stays, then the older.
    """
    found = []
    for group in groups:
        ways: dict[str, dict[str, tuple[set[str], dict[str, Any]]]] = {}
        for run in group:
            parent = (run.record.get("parents") or {}).get("model") if run.record["kind"] == "evaluate" else None
            model = str(parent["sha256"] if parent else run.id)
            for _, evals in run.evaluations():
                for task, result in evals.items():
                    if _is_share(result):
                        ways.setdefault(task, {}).setdefault(str(provenance(result)), (set(), result))[0].add(model)
        order = lambda way: (len(way[0]), way[1].get("n") or 0)  # noqa: E731
        usual = {task: max(several.values(), key=order)[1] for task, several in ways.items()}
        for run in group:
            for place, evals in run.evaluations():
                for task, result in list(evals.items()):
                    shares = _is_share(result)
                    if not shares or str(provenance(result)) != str(provenance(usual[task])):
                        run.apart.append(Apart(run, place, task, evals.pop(task), usual[task] if shares else None))
            found += run.apart
    return found


def _is_share(result: dict[str, Any]) -> bool:
    """Whether a result has a value with its interval, all of them from 0 to 1."""
    values = [result[key] for key in ("acc", "correct_prob", "low", "high", "chance") if key in result]
    return "low" in result and all(-1e-9 <= value <= 1 + 1e-9 for value in values)
