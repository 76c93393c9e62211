"""Runs as a list: chosen, sorted and shown by any field of run.json, and asked for a boundary.

A field is named by its whole name (`config.lr`, `evals.mmlu.acc`) or by its last part where that is usual: a setting (`lr`),
a loss (`cb_loss`), a task (`mmlu`), or what is worked out here (`status`, `age`, `time`, `progress`, `eta`, `results`). Only
run.json is read, and the last line of metrics.jsonl where progress is asked for. A run that waits for Slurm or works under it
has a status that both have a say in: its heartbeat, and what Slurm says about its job.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lethe import config as c
from lethe.errors import LetheError, nearest
from lethe.methods.method import every
from lethe.results import regimes
from lethe.runs import slurm_jobs as slurm
from lethe.runs.run import Run, seconds_since

WORKED_OUT = ("status", "reason", "age", "time", "progress", "eta", "results", "path", "lora_r")
ALSO = {"job": "job_id", "seconds": "time", "steps_unit": "imported.steps_unit", "group": "imported.group"}
PLACES = ("config", "plan", "losses", "imported", "imported.settings")
SETTINGS = {f.name for kind in (*every(), c.TamperConfig, c.EvaluateConfig) for f in fields(kind)}
DEFAULT_COLUMNS = ("id", "job_id", "kind", "name", "status", "age", "time", "progress", "eta", "results")
ONLY_IF_THERE = {"job_id", "eta"}
_CONDITION = re.compile(r"([\w.-]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)", re.DOTALL)


@dataclass
class Entry:
    """A run in a list. `job`: how its job stands, if Slurm was asked about it."""

    run: Run
    job: slurm.JobState | None = None

    @cached_property
    def _judged(self) -> tuple[str, str | None]:
        run, reason = self.run, self.run.record.get("reason")
        status = str(run.status)
        job = self.job
        if job is None or job.alive is None:
            return status, reason
        if job.word == slurm.UNKNOWN:
            return "lost", f"Slurm does not know job {run.record['job_id']} any more"
        if job.alive and job.word not in slurm.WORKS:
            return "queued", f"Slurm: {job.word}, {job.reason}"
        if job.alive:
            return status, reason if status != "lost" else f"Slurm: {job.word}, but no sign of life from the run"
        ended = "cancelled" if job.word == "CANCELLED" else "lost" if job.word == "COMPLETED" else "failed"
        return ended, f"Slurm: {job.word}, {job.reason}"

    @property
    def status(self) -> str:
        """As `Run.status`, corrected by what Slurm knows of the job of a run that is not at its end."""
        return self._judged[0]

    @property
    def reason(self) -> str | None:
        """Why the run has its status."""
        return self._judged[1]

    @property
    def age(self) -> float:
        """Seconds since the run was made."""
        return seconds_since(self.run.record.get("created"))

    @property
    def time(self) -> float | None:
        """Seconds of work so far; None when it has not begun."""
        record = self.run.record
        took = (record.get("environment") or {}).get("seconds")
        if record["status"] == "running" and record.get("heartbeat") and self.status == "running":
            return took + self.run.seconds_since_heartbeat if took else seconds_since(record.get("started"))
        return took

    @cached_property
    def done(self) -> tuple[int, int] | None:
        """Work done and planned: optimizer updates, checkpoints, or runs of a sweep; None when nothing was planned."""
        record = self.run.record
        if record["kind"] == "checkpoints" and not is_imported(self.run):
            rows = record.get("checkpoints") or []
            return sum(bool(row["evals"]) for row in rows), len(rows)
        if record["kind"] == "sweep":
            trials = [trial for trial in record.get("trials") or [] if not trial["reference"]]
            waiting = sum(trial["status"] in {"queued", "running"} for trial in trials)
            return len(trials) - waiting, max(len(trials), (record.get("plan") or {}).get("runs", 0))
        planned = (record.get("plan") or {}).get("steps")
        if planned is None or is_imported(self.run):
            return None
        last = self.run.last_row("metrics.jsonl") or self.run.last_row("curve.jsonl")
        return (last or {}).get("step", 0), planned

    @property
    def eta(self) -> float | None:
        """Seconds left of a running run, at the mean speed so far (its start included); None before the first update."""
        if self.status != "running" or self.done is None or self.time is None or not self.done[0]:
            return None
        done, planned = self.done
        return self.time * max(0, planned - done) / done

    @property
    def results(self) -> dict[str, Any] | None:
        """The forget and the retain task's results, or else the first two."""
        evals = self.run.record.get("evals") or {}
        judged = [task for task in (regimes.forget_task(evals), regimes.retain_task(evals)) if task]
        tasks = [*judged, *(task for task in evals if task not in judged)][:2]
        return {task: number(evals[task]) for task in tasks} or None

    def value(self, name: str) -> Any:
        """The field's value; None when this run has none."""
        name = ALSO.get(name, name)
        if name in {"age", "time", "eta", "results", "status", "reason"}:
            return getattr(self, name)
        if name == "progress":
            return self.done[0] / self.done[1] if self.done and self.done[1] else None
        if name == "path":
            return str(self.run.path)
        record = self.run.record
        if name == "lora_r":
            lora = record["config"].get("lora", {})
            return "full" if lora is None else lora.get("r")
        evals = record.get("evals") or {}
        if name in evals:
            return number(evals[name])
        if name.removeprefix("evals.") in evals:
            return number(evals[name.removeprefix("evals.")])
        for place in ("", *PLACES):
            found = _inside(record, f"{place}.{name}" if place else name)
            if found is not _ABSENT:
                return found
        return None

    def has(self, name: str) -> bool:
        """Whether the run has such a field, be it null."""
        name = ALSO.get(name, name)
        record = self.run.record
        there = name.removeprefix("evals.") in (record.get("evals") or {})
        return there or any(_inside(record, f"{place}.{name}" if place else name) is not _ABSENT for place in ("", *PLACES))


_ABSENT = object()


def _inside(record: Any, name: str) -> Any:
    """A field by its dotted name; a key that has dots itself is found, too."""
    if not isinstance(record, dict):
        return _ABSENT
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    return _inside(record[head], rest) if dot and head in record else _ABSENT


def number(result: dict[str, Any]) -> float | None:
    """The number that a task's result stands for."""
    return result.get("acc", result.get("correct_prob"))


def is_imported(run: Run) -> bool:
    """Whether the run comes from a table: how its numbers were measured is not known."""
    return run.record.get("launcher") == "imported"


def entries(runs: Iterable[Run]) -> list[Entry]:
    """The runs as a list; Slurm is asked, once, if any of them waits for it or works under it."""
    runs = list(runs)
    jobs = slurm.states(str(run.record["job_id"]) for run in runs if waits_for_slurm(run))
    return [Entry(run, jobs.get(str(run.record["job_id"])) if waits_for_slurm(run) else None) for run in runs]


def waits_for_slurm(run: Run) -> bool:
    """Whether Slurm may know more about the run than its record."""
    record = run.record
    return bool(record.get("launcher") == "slurm" and record.get("job_id") and record["status"] in {"queued", "running"})


def refuse_unknown(names: Iterable[str], listed: Sequence[Entry], what: str) -> None:
    """Refuse a name that is no field of any of the runs and no setting of any kind.

    Raises:
        LetheError: names the nearest field.
    """
    for name in names:
        if name in WORKED_OUT or name in ALSO or name.removeprefix("config.") in SETTINGS or not listed:
            continue
        if not any(entry.has(name) for entry in listed):
            known = {*WORKED_OUT, *ALSO, *SETTINGS}
            for entry in listed:
                known |= set(_names(entry.run.record))
            raise LetheError(f"{what}: no run has a field '{name}'{nearest(name, _alike(name, known))}")


def _alike(name: str, known: Iterable[str]) -> list[str]:
    """Whole names for a name with dots; for one without, the last parts, too."""
    return [k for k in known if "." in name or "." not in k] or list(known)


def _names(record: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in record.items():
        yield f"{prefix}{key}"
        if prefix in {"config.", "plan.", "losses.", "evals."}:
            yield str(key)
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


def select(listed: list[Entry], conditions: Iterable[str]) -> list[Entry]:
    """The runs that meet every condition: `lr=1e-4`, `name=ret5*`, `status!=complete`, `mmlu>=0.42`.

    Numbers are compared as numbers; text may have the signs of file name patterns. A run that lacks the field meets only `!=`.

    Raises:
        LetheError: a condition cannot be read, or names an unknown field.
    """
    every = listed
    for condition in conditions:
        parts = _CONDITION.fullmatch(condition)
        if not parts:
            raise LetheError(f"where: expected a condition such as lr=1e-4, status!=complete or mmlu>=0.42, got '{condition}'")
        name, sign, wanted = parts.groups()
        refuse_unknown([name], every, "where")
        if sign in {"<", ">", "<=", ">="} and _float(wanted) is None:
            raise LetheError(f"where: {sign} compares numbers, got '{wanted}' for {name}")
        listed = [entry for entry in listed if _meets(entry.value(name), sign, wanted)]
    return listed


def _meets(value: Any, sign: str, wanted: str) -> bool:
    if sign in {"=", "!="}:
        return _equal(value, wanted) == (sign == "=")
    x, y = _float(value), _float(wanted)
    if x is None or y is None:
        return False
    return {"<": x < y, ">": x > y, "<=": x <= y, ">=": x >= y}[sign]


def _equal(value: Any, wanted: str) -> bool:
    x, y = _float(value), _float(wanted)
    if x is not None and y is not None:
        return math.isclose(x, y, rel_tol=1e-9)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value] == wanted
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return fnmatch.fnmatchcase(text, wanted) or text == wanted


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def ordered(listed: list[Entry], by: str, descending: bool = False) -> list[Entry]:
    """Sorted by a field: numbers, then text; runs that lack it come last, either way.

    Raises:
        LetheError: the field is unknown.
    """
    refuse_unknown([by], listed, "sort")
    values = [(entry.value(by), entry) for entry in listed]
    there = [(value, entry) for value, entry in values if value is not None]
    there.sort(key=lambda pair: _rank(pair[0]), reverse=descending)
    return [entry for _, entry in there] + [entry for value, entry in values if value is None]


def _rank(value: Any) -> tuple[bool, float, str]:
    x = _float(value)
    return (x is None, x if x is not None else 0.0, "" if x is not None else str(value))


def smallest(
    runs: Iterable[Run], field: str, task: str, reference: float, within: float, where: Iterable[str] = ()
) -> tuple[float, list[Run]] | None:
    """The smallest value of `field` whose accuracy on `task` is at least reference − within, and its runs; None if none is.

    `where` are conditions as of `select`. Runs that differ in nothing but seed and name repeat each other: a value holds when
    all its repetitions do. Runs that differ in another setting answer apart, and the smallest of their answers counts.

    Raises:
        LetheError: the task's numbers were measured in different ways.
    """
    listed = [Entry(run) for run in runs]
    refuse_unknown([field], listed, "field")
    chosen = [entry for entry in select(listed, where) if entry.value(task) is not None and entry.value(field) is not None]
    prints = {entry.run.record["evals"][task].get("fingerprint") for entry in chosen}
    if len(prints) > 1:
        raise LetheError(f"{task}: the runs' numbers were measured in different ways ({', '.join(map(str, prints))})")
    repeated: dict[tuple[float, str], list[Entry]] = {}
    for entry in chosen:
        apart = {k: v for k, v in entry.run.record["config"].items() if k not in {field, "seed", "name", "out"}}
        key = (float(entry.value(field)), json.dumps(apart, sort_keys=True, default=str))
        repeated.setdefault(key, []).append(entry)
    for (value, _), same in sorted(repeated.items(), key=lambda item: item[0]):
        if all(entry.value(task) >= reference - within - 1e-9 for entry in same):
            return value, [entry.run for entry in same]
    return None


def smallest_retain_coef(
    runs: Iterable[Run], task: str, reference: float, within: float, where: Iterable[str] = ()
) -> float | None:
    """The smallest retain_coef that keeps `task` within `within` of `reference`; None if none does. See `smallest`."""
    found = smallest(runs, "retain_coef", task, reference, within, where)
    return found[0] if found else None
