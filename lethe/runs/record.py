"""Reads and checks the files of a run, which somebody else may have written, edited or cut short.

    record_of(folder) -> dict        run.json, or a refusal that names the file, the field and what to do
    rows_of(file) -> list of dicts   the valid lines of metrics.jsonl, batches.jsonl, curve.jsonl or samples.jsonl

`RECORD` and `ROWS` declare types of fields. Other code relies on them, and on names and paths that stay in the run's folder.
Fields that are not declared may have any value. Nothing here imports torch.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from lethe.errors import LetheError, printable
from lethe.files import RUN, UnreadableError, is_folder_name, json_of, text_of

Check = Callable[[Any], str | None]
"""Takes a value; returns what is wrong and where in it (".evals.mmlu.acc: expected a number, …"), or None."""
Status = Literal["queued", "running", "complete", "failed", "diverged", "cancelled", "lost"]
STATUSES = get_args(Status)
ABSENT = {"reason": None, "job_id": None, "started": None, "created": None}
"""Fields that records of earlier versions may lack."""
LARGEST = 2**63
DEEPEST = 40
TAIL_BYTES = 8192


def record_of(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`.

    Raises:
        LetheError: it cannot be read, or a field is not of its type.
    """
    file = folder / RUN
    advice = "restore it from a backup, or move the folder away"
    try:
        if os.path.exists(file) and not os.path.isfile(file):  # a pipe would wait for somebody to write
            raise UnreadableError("not a file")
        record = json_of(text_of(file), twice=True)
        wrong = RECORD(record) or _too_much(record)
    except UnreadableError as error:
        raise LetheError(f"'{file}' cannot be read ({error}); {advice}") from error
    if wrong:
        raise LetheError(f"'{file}' is not a run's record: {wrong.lstrip('.: ')}; {advice}")
    return ABSENT | record


def rows_of(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The valid lines of a file, and the numbers of the invalid ones. Nothing if there is no file.

    A last line without a line break was cut short by a crash, and is in neither.
    """
    try:
        lines = file.read_bytes().split(b"\n") if os.path.isfile(file) else []
    except OSError:
        return [], []
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        row = row_of(file.name, line)
        if row is not None:
            found.append(row)
        elif line.strip() and number < len(lines):
            wrong.append(number)
    return found, wrong


def last_row_of(file: Path) -> dict[str, Any] | None:
    """The last valid line, read from the end of the file where that has a whole line; None if there is none."""
    if not os.path.isfile(file):  # a pipe would wait for somebody to write
        return None
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - TAIL_BYTES))
            tail = lines.read().split(b"\n")[1:]  # the first line may be cut
    except OSError:
        return None
    whole = (row for line in reversed(tail) if (row := row_of(file.name, line)) is not None)
    return next(whole, None) or next(reversed(rows_of(file)[0]), None)


def row_of(name: str, line: bytes) -> dict[str, Any] | None:
    """A line of the file of that name; None if it is not valid."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if ROWS.get(name, _object)(row) is None and _too_much(row) is None else None


# -- how types are declared


def _is(expected: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else f": expected {expected}, got {_shown(value)}"


def _maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _map(check: Check) -> Check:
    return lambda value: _first_wrong(value.items(), check) if type(value) is dict else _object(value)


def _list(check: Check) -> Check:
    is_list = _is("a list", lambda value: type(value) is list)
    return lambda value: _first_wrong(enumerate(value), check) if type(value) is list else is_list(value)


def _first_wrong(items: Iterable[tuple[Any, Any]], check: Check) -> str | None:
    return next((f".{name}{wrong}" for name, item in items if (wrong := check(item)) is not None), None)


def _fields(*required: str, **checks: Check) -> Check:
    """Name: value pairs. A declared field may be absent unless it is required."""

    def checked(value: Any) -> str | None:
        if type(value) is not dict:
            return _object(value)
        for name in required:
            if name not in value:
                return f".{name} is missing"
        for name, check in checks.items():
            if name in value and (wrong := check(value[name])) is not None:
                return f".{name}{wrong}"
        return None

    return checked


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "name: value pairs"
    return "null" if value is None else printable(json.dumps(value, ensure_ascii=False), 60)


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else type(value) is int and -LARGEST < value < LARGEST


def _is_timestamp(value: Any) -> bool:
    try:
        return bool(datetime.datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _is_inside(value: Any) -> bool:
    """Whether a relative path stays in its folder."""
    if not isinstance(value, str) or printable(value) != value:
        return False
    path = PurePosixPath(value)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _too_much(value: Any, depth: int = DEEPEST) -> str | None:
    """What no field may hold: whole numbers from 2^63, or more than `DEEPEST` levels."""
    if depth == 0:
        return " is nested too deeply"
    for key, item in value.items() if type(value) is dict else enumerate(value):
        kind = type(item)
        if kind is int and not -LARGEST < item < LARGEST:
            return f".{key}: expected a number below 2^63 in size, got {printable(item, 20)}"
        if (kind is dict or kind is list) and (wrong := _too_much(item, depth - 1)) is not None:
            return f".{key}{wrong}"
    return None


_object = _is("name: value pairs", lambda value: type(value) is dict)
_text = _is("text", lambda value: type(value) is str)
_whole = _is("a whole number from 0", lambda value: type(value) is int and 0 <= value < LARGEST)
_number = _is("a number", _is_number)
_measured = _is("a number", lambda value: type(value) is float or _is_number(value))
"""A number, infinity or not-a-number: runs that diverge have such."""
_switch = _is("true or false", lambda value: type(value) is bool)
_status = _is(f"one of {', '.join(STATUSES)}", lambda value: value in STATUSES if type(value) is str else False)
_timestamp = _is("a time such as 2026-01-31T12:00:00+00:00", _is_timestamp)
_name = _is("a name without '/' and control characters", is_folder_name)
_inside = _is("a path within the run's folder", _is_inside)
_scores = dict.fromkeys(("acc", "correct_prob", "acc_norm", "stderr", "low", "high", "chance"), _number)
_measured_result = _fields(
    *("low", "high", "n"),
    **_scores,
    **dict.fromkeys(("fingerprint", "tokenizer"), _text),
    n=_whole,
    degenerate=_switch,
    num_fewshot=_maybe(_whole),
    version=_is("a number or text", lambda value: value is None or type(value) in (int, float, str)),
    answers=_object,
)
_imported_result = _fields(**_scores)


def _result(value: Any) -> str | None:
    """A task's result. A measured one has an interval; an imported one may have nothing but its accuracy."""
    if type(value) is dict and not {"acc", "correct_prob"} & value.keys():
        return ".acc is missing"
    if type(value) is dict and "chance" not in value and {"acc", "answers"} <= value.keys():
        return ".chance is missing"
    measured = type(value) is dict and {"n", "low", "stderr"} & value.keys()
    return (_measured_result if measured else _imported_result)(value)


def _parent(value: Any) -> str | None:
    """What a run was made from: a model or maps, by reference, or text."""
    model = type(value) is dict and "documents" not in value
    return _fields("sha256", *(["ref"] if model else []), sha256=_text, ref=_text, documents=_whole)(value)


_evals = _map(_result)
_checkpoint = _fields(
    "name", "evals", name=_text, evals=_evals, step=_whole, ref=_text, note=_text, reason=_text, tokens=_whole
)
_trial = _fields(
    *("name", "reference", "status", "point", "seed", "reason", "runs", "reused", "evals"),
    **dict.fromkeys(("name", "status"), _text),
    **dict.fromkeys(("reason", "job_id", "regime"), _maybe(_text)),
    **dict.fromkeys(("reference", "reused"), _switch),
    **dict.fromkeys(("log", "runs"), _list(_text)),
    point=_object,
    seed=_maybe(_whole),
    lost=_whole,
    evals=_evals,
)
_stage = _is(
    "a kind of run and its settings",
    lambda value: (
        type(value) is list
        and [type(part) for part in value] == [str, dict]
        and is_folder_name(value[0])
        and type(value[1].get("name")) is str
    ),
)
TRIAL = _fields(
    **dict.fromkeys(("name", "status", "reason", "key", "warm"), _text),
    **dict.fromkeys(("reference", "reused"), _switch),
    **dict.fromkeys(("lost", "retry_of"), _whole),
    seed=_maybe(_whole),
    stages=_list(_stage),
    point=_object,
    runs=_list(_name),
    log=_list(_text),
    owner=_maybe(_fields(host=_text, pid=_whole, job_id=_text)),
)
"""The user attributes of a trial in the Optuna study."""
_cost = _fields(
    tokens=_map(_whole),
    before=_map(_fields("tokens", "flops", tokens=_map(_whole), flops=_number)),
    flops=_number,
    **dict.fromkeys(("flops_by_work", "seconds", "peak_memory", "pretraining"), _map(_number)),
    missing=_map(_text),
)
_AGREEMENT = ("forget_with_source", "retain_with_reference")
_FIT = ("mse", "r2", "no_map_mse", "no_map_r2")
RECORD = _fields(
    *("id", "kind", "name", "status", "config"),
    **dict.fromkeys(("id", "kind"), _name),
    **dict.fromkeys(("name", "launcher", "goal"), _text),
    **dict.fromkeys(("reason", "job_id", "latest_ignorant"), _maybe(_text)),
    **dict.fromkeys(("created", "started", "finished", "heartbeat"), _maybe(_timestamp)),
    **dict.fromkeys(("conclusions", "not_monotone"), _list(_text)),
    **dict.fromkeys(("inputs", "teachers", "evals_missing"), _map(_text)),
    status=_status,
    config=_fields(
        **dict.fromkeys(("model", "name", "out"), _text),
        **dict.fromkeys(("retained_threshold", "kept_threshold", "chance_threshold", "retain_coef", "remove_coef"), _number),
        lora=_maybe(_object),
        seed=_whole,
    ),
    environment=_fields(
        **dict.fromkeys(("host", "python", "device", "born"), _text),
        **dict.fromkeys(("pid", "threads"), _whole),
        **dict.fromkeys(("seconds", "training_seconds", "evaluation_seconds", "budget_seconds", "peak_memory"), _number),
        versions=_object,
    ),
    plan=_fields(
        **dict.fromkeys(("steps", "runs", "tokens", "forward_passes", "effective_batch", "epochs"), _number),
        warnings=_list(_text),
    ),
    parents=_maybe(_map(_parent)),
    artifacts=_map(_fields("path", path=_inside, sha256=_text)),
    evals=_maybe(_evals),
    losses=_maybe(_map(_maybe(_measured))),
    agreement=_fields("retain_with_reference", **dict.fromkeys(_AGREEMENT, _measured)),
    scores=_maybe(_map(_fields(*_FIT, **dict.fromkeys(_FIT, _measured)))),
    rewound=_fields(
        **dict.fromkeys(("threshold", "share", "tokens", "seconds"), _measured),
        by_layer=_map(_measured),
        by_role=_map(_measured),
    ),
    update_by_layer=_map(_fields("distance", distance=_measured, stable_rank=_measured)),
    cost=_cost,
    budget=_fields(
        values=_map(_map(_measured)),
        **dict.fromkeys(("every", "kept_step"), _whole),
        stopped_at=_maybe(_whole),
        reason=_maybe(_text),
        kept_sha256=_text,
        retain_before=_measured,
    ),
    divergence=_maybe(_fields("step", "reason", step=_whole, reason=_text)),
    checkpoints=_maybe(_list(_checkpoint)),
    filtered=_checkpoint,
    trials=_maybe(_list(_trial)),
    runs=_list(_name),
    sweep=_fields(id=_text, trial=_text),
    suite=_fields(general_bound=_number),
    imported=_fields(
        *("file", "line", "group", "table"),
        **dict.fromkeys(("file", "path", "group", "notes"), _text),
        **dict.fromkeys(("inherited", "footnotes"), _list(_text)),
        line=_whole,
        table=_whole,
        **dict.fromkeys(("settings", "row"), _object),
        rows=_list(_object),
    ),
)
ROWS: dict[str, Check] = {
    "metrics.jsonl": _fields("step", step=_whole, attack_tokens=_number, passes=_map(_whole), flops=_number),
    "batches.jsonl": _fields("step", step=_whole),
    "curve.jsonl": _fields("step", "evals", step=_whole, evals=_evals, strength=_number, tokens=_number),
    "samples.jsonl": _fields("task", task=_text),
}
