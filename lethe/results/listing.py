"""Lists of runs: selecting, sorting and showing them by any field of run.json.

    runs -> entries() -> select(), ordered() -> Entry.value(field)

You name a field in full (`config.lr`, `evals.mmlu.acc`), or by its last part: a setting (`lr`), a loss (`cb_loss`) or a task
(`mmlu`). Some fields are computed here: `status`, `age`, `time`, `progress`, `eta`, `results`. A list reads run.json, and for
progress the last line of metrics.jsonl. The status of a run under Slurm combines its heartbeat with the state of its job.
"""

from __future__ import annotations

import fnmatch
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lethe import config as c
from lethe.errors import LetheError, nearest
from lethe.methods.method import every
from lethe.results.regimes import forget_task, number, retain_task
from lethe.runs import slurm_jobs as slurm
from lethe.runs.run import Run, seconds_since

COMPUTED = ("status", "reason", "age", "time", "progress", "eta", "results", "path", "lora_r")
ALSO = {"job": "job_id", "seconds": "time", "steps_unit": "imported.steps_unit", "group": "imported.group"}
PLACES = ("config", "plan", "losses", "cost", "cost.pretraining", "imported", "imported.settings")
SETTINGS = {f.name for kind in (*every(), c.TamperConfig, c.EvaluateConfig) for f in fields(kind)}
DEFAULT_COLUMNS = ("id", "job_id", "kind", "name", "status", "age", "time", "progress", "eta", "results")
ONLY_IF_THERE = {"job_id", "eta"}
COMPARED = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
_CONDITION = re.compile(r"([\w.-]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)", re.DOTALL)


@dataclass
class Entry:
    """A run in a list, with the state of its Slurm job if the run has one and Slurm answered."""

    run: Run
    job: slurm.JobState | None = None

    def __post_init__(self) -> None:
        self.status, self.reason = _status(self.run, self.job)

    @property
    def age(self) -> float:
        """Seconds since the run was created."""
        return seconds_since(self.run.record.get("created"))

    @property
    def time(self) -> float | None:
        """Seconds of work so far; None before it starts."""
        record = self.run.record
        took = (record.get("environment") or {}).get("seconds")
        if record["status"] == "running" and record.get("heartbeat") and self.status == "running":
            return took + self.run.seconds_since_heartbeat if took else seconds_since(record.get("started"))
        return took

    @cached_property
    def done(self) -> tuple[int, int] | None:
        """Optimizer updates, checkpoints or trials of a sweep, done and planned; None without a plan."""
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
        """Seconds left at the mean speed since the start; None unless it is running and has done an update."""
        if self.status != "running" or self.done is None or self.time is None or not self.done[0]:
            return None
        done, planned = self.done
        return self.time * max(0, planned - done) / done

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of the forget task and the retain task, or else of the first two tasks."""
        evals = self.run.record.get("evals") or {}
        first = [task for task in (forget_task(evals), retain_task(evals)) if task]
        return {task: number(evals[task]) for task in list(dict.fromkeys([*first, *evals]))[:2]} or None

    def value(self, name: str) -> Any:
        """The field's value; None if the run does not have the field."""
        name = ALSO.get(name, name)
        if name in {"age", "time", "eta", "results", "status", "reason"}:
            return getattr(self, name)
        if name == "progress":
            return self.done[0] / self.done[1] if self.done and self.done[1] else None
        if name == "path":
            return str(self.run.path)
        if name == "lora_r":
            lora = self.run.record["config"].get("lora", {})
            return "full" if lora is None else lora.get("r")
        evals = self.run.record.get("evals") or {}
        if (task := name.removeprefix("evals.")) in evals:
            return number(evals[task])
        found = (self.fields.get(f"{place}.{name}".removeprefix(".")) for place in ("", *PLACES))
        return next((value for value in found if value is not None), None)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Every field of the record by its dotted name."""
        return dict(_dotted(self.run.record))

    @cached_property
    def names(self) -> set[str]:
        """The names of the record's fields, those of settings, results and the like also without their place."""
        places = tuple(f"{place}." for place in (*PLACES, "evals"))
        return {*self.fields, *(n.removeprefix(place) for place in places for n in self.fields if n.startswith(place))}


def _status(run: Run, job: slurm.JobState | None) -> tuple[str, str | None]:
    """The status of a run and its reason; of an unfinished run under Slurm, what the state of its job makes of them."""
    status, reason = str(run.status), run.record.get("reason")
    if job is None or job.alive is None:
        return status, reason
    if job.word == slurm.UNKNOWN:
        return "lost", f"Slurm no longer knows job {run.record['job_id']}"
    if job.alive and job.word not in slurm.WORKS:
        return "queued", f"Slurm: {job.word}, {job.reason}"
    if job.alive:
        return status, reason if status != "lost" else f"Slurm: {job.word}, but the run has no heartbeat"
    ended = "cancelled" if job.word == "CANCELLED" else "lost" if job.word == "COMPLETED" else "failed"
    return ended, f"Slurm: {job.word}, {job.reason}"


def _dotted(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def is_imported(run: Run) -> bool:
    """Whether the run was imported from a log, which does not record how its numbers were measured."""
    return run.record.get("launcher") == "imported"


def entries(runs: Iterable[Run]) -> list[Entry]:
    """The runs as a list. Slurm is queried once, and only if a run is queued or running under it."""
    runs = list(runs)
    jobs = slurm.states(str(run.record["job_id"]) for run in runs if waits_for_slurm(run))
    return [Entry(run, jobs.get(str(run.record["job_id"])) if waits_for_slurm(run) else None) for run in runs]


def waits_for_slurm(run: Run) -> bool:
    """Whether the run is queued or running under Slurm, which may know more than the record."""
    record = run.record
    return bool(record.get("launcher") == "slurm" and record.get("job_id") and record["status"] in {"queued", "running"})


def refuse_unknown(names: Iterable[str], listed: Sequence[Entry], what: str) -> None:
    """Refuse a name that is neither a field of any of the runs nor a setting of Lethe.

    Raises:
        LetheError: names the nearest field.
    """
    known = {*COMPUTED, *ALSO, *SETTINGS}
    for name in names:
        if name.removeprefix("config.") in known or not listed or any(name in entry.names for entry in listed):
            continue
        every = known.union(*(entry.names for entry in listed))
        alike = [other for other in every if "." in name or "." not in other]
        raise LetheError(f"{what}: no run has a field '{name}'{nearest(name, alike)}")


def select(listed: list[Entry], conditions: Iterable[str]) -> list[Entry]:
    """The runs that meet every condition, such as `lr=1e-4`, `name=ret5*`, `status!=complete` or `mmlu>=0.42`.

    Numbers are compared as numbers. Text may contain wildcards (`*`, `?`). A run without the field meets only `!=`.

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
        if sign in COMPARED and _float(wanted) is None:
            raise LetheError(f"where: {sign} compares numbers, got '{wanted}' for {name}")
        listed = [entry for entry in listed if _meets(entry.value(name), sign, wanted)]
    return listed


def _meets(value: Any, sign: str, wanted: str) -> bool:
    if sign in {"=", "!="}:
        return _equal(value, wanted) == (sign == "=")
    x, y = _float(value), _float(wanted)
    return x is not None and y is not None and COMPARED[sign](x, y)


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
    """Sorted by a field: numbers first, then text. Runs without the field come last in either direction.

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
