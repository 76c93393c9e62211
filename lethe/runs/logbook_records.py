"""The rows of a log's table as records: what each cell says, which settings a row inherits, which results form a curve."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from lethe import config as c
from lethe.config.checks import types_of
from lethe.errors import printable
from lethe.methods.method import every
from lethe.runs.logbook import NUMBER, OPTIMIZERS, Column, LogTable, marks, phrases, plain, setting

STATUSES = {
    "diverged": "diverged",
    **dict.fromkeys(("failed", "crashed", "error", "oom", "timeout", "timed out"), "failed"),
    **dict.fromkeys(("cancelled", "canceled"), "cancelled"),
    "running": "running",
    **dict.fromkeys(("queued", "pending"), "queued"),
    **dict.fromkeys(("complete", "completed", "done", "finished"), "complete"),
}
"""A log's words for a status, the worst status first."""
NOTHING = {"", "-", "–", "—", "n/a", "na", "none"}
LONGEST_NAME = 200
_RESULT = re.compile(rf"(~)?\s*({NUMBER})\s*(%)?(?:\s*\(step (\d{{1,12}})\))?", re.IGNORECASE)
Record = tuple[dict[str, Any], list[dict[str, Any]]]
"""The content of run.json, and the lines of curve.jsonl."""


class Cell(NamedTuple):
    """A number in a table: a share of 1 (written as a fraction or in per cent), or a loss."""

    line: int
    section: str
    value: float
    is_share: bool


PLAN = {"updates": "steps", "forward_passes": "forward_passes", "effective_batch": "effective_batch"}
_CONFIGS: dict[str, list[type]] = {"unlearn": [*every()], "tamper": [c.TamperConfig], "evaluate": [c.EvaluateConfig]}
FIELDS = {kind: {name for each in configs for name in types_of(each)} for kind, configs in _CONFIGS.items()}
"""The settings of each kind of run."""
RESULTS = ("task", "point", "final")
Said = dict[str, list[tuple[Column, Any]]]
"""What the cells of a row say, by role: for results (value, step), for settings their values by name, else texts."""


class TableReader:
    """The rows of one table as records; the cells with numbers; and what cannot be read.

    `tasks` are all tasks by the log's name for them. `places` counts the rows of all tables by their place in the log.
    """

    def __init__(self, file: str, path: str, table: LogTable, tasks: dict[str, str], places: Counter[str]):
        self.file, self.path, self.table, self.tasks, self.places = file, path, table, tasks, places
        self.cells: list[Cell] = []
        self.unreadable = [{"line": line, "column": "", "cell": cell, "why": why} for line, cell, why in table.misfits]

    def records(self, number: int) -> list[Record]:
        """A record for each row; one for a table of checkpoints. `number` counts the tables under the same headings."""
        meanings: set[Any] = set()
        for col in self.table.columns:
            meaning = (col.role, col.name or col.header, col.step)
            if meaning in meanings or col.role == "other":
                why = "a second column of the same meaning" if meaning in meanings else "an unknown column"
                self._cannot(self.table.line, col.header, col.header, f"{why}; imported as text")
                col.role = "other"
            meanings.add(meaning)
        rows = [(line, cells, self._said(line, cells)) for line, cells in self.table.rows]
        made = [self._checkpoints(rows)] if self.table.kind == "checkpoints" else [self._run(*row) for row in rows]
        for record, _ in made:
            record["imported"]["table"] = number
        return made

    def _cannot(self, line: int, header: str, cell: str, why: str) -> Any:
        """List a cell that cannot be read, whose value is None."""
        self.unreadable.append({"line": line, "column": header, "cell": cell, "why": why})

    def _checkpoints(self, rows: list[tuple[int, list[str], Said]]) -> Record:
        """The table as one run: a sweep over checkpoints."""
        checkpoints: list[dict[str, Any]] = []
        for _, _, said in rows:
            name, note = _text(said, "checkpoint") or "", _text(said, "notes") or ""
            step = re.search(r"(?<!\d)\d{1,12}$", name)
            evals = {col.name: value for col, (value, _) in said["task"]}
            checkpoints.append({"name": name, "step": int(step[0]) if step else None, "evals": evals, "note": note})
        latest = next((row["name"] for row in checkpoints if "latest viable" in row["note"]), None)
        record = self._record("checkpoints", self.table.group, "table", self.table.line, {})
        record["imported"]["rows"] = [dict(zip(self.table.headers, cells, strict=True)) for _, cells, _ in rows]
        return record | {"status": "complete", "checkpoints": checkpoints, "latest_ignorant": latest}, []

    def _run(self, line: int, cells: list[str], said: Said) -> Record:
        kind = str(self.table.kind)
        job, label, model, notes = (_text(said, role) for role in ("job", "label", "model", "notes"))
        own = {name: value for _, more in said["setting"] for name, value in more.items()}
        results = [each for role in RESULTS for each in said[role]]
        if kind == "unlearn" and not own and results and not (job or "").isdigit():
            kind = "evaluate"  # the baseline, in a table of unlearning runs
            label, job = (label, job) if label else (job or "Baseline", None)
        inherited = {} if kind == "evaluate" else self.table.settings
        settings = inherited | own
        if kind == "tamper":
            model = model or re.sub(r"\s*\([^()]*\)$", "", self.table.titles[-1])
            settings |= _attack_settings(label or "")
        settings |= {"model": model} if model else {}
        losses = {col.name: value for col, value in said["loss"]}
        evals = {self._task_of(col): value for col, (value, _) in said["task"] + said["final"]}
        points = self._points(line, said) if kind == "tamper" else {}
        named = [plain(cell) for col, cell in zip(self.table.columns, cells, strict=True) if col.role == "setting"]
        key = job or json.dumps([label, _text(said, "model"), *named])
        name = " ".join(dict.fromkeys(filter(None, (model, label)))) or _name_of(settings) or f"row {line}"
        record = self._record(kind, name, key, line, settings)
        status, reason = _status(said["status"], bool(evals or losses or any(step > 0 for step in points)))
        record |= {"status": status, "reason": reason, "job_id": job, "losses": losses, "evals": evals}
        marked = {mark for cell in cells for mark in marks(cell)}
        more = {
            "row": dict(zip(self.table.headers, cells, strict=True)),
            "inherited": sorted(name for name in inherited if name not in own),
            "others": {col.header: text for col, text in said["other"]},
            "notes": notes,
            "footnotes": [text for mark, text in self.table.notes.items() if mark in marked],
        }
        record["imported"] |= {name: value for name, value in more.items() if value}
        return record, [{"step": step, "evals": points[step]} for step in sorted(points)]

    def _said(self, line: int, cells: list[str]) -> Said:
        said: Said = defaultdict(list)
        for col, cell in zip(self.table.columns, cells, strict=True):
            text = plain(cell)
            if text.lower() in NOTHING:
                continue
            role = "status" if text.lower() in STATUSES and col.role in {*RESULTS, "loss", "setting"} else col.role
            value: Any = text
            if role in RESULTS:
                value = self._result(line, col, text)
            elif role == "setting":
                value = self._settings_in(line, col, text)
            elif role == "loss":
                value = self._loss(line, col, text)
            elif role == "status" and text.lower() not in STATUSES:
                value = self._cannot(line, col.header, text, f"expected a status: {', '.join(STATUSES)}")
            if value is not None:
                said[role].append((col, value))
        return said

    def _loss(self, line: int, col: Column, text: str) -> float | None:
        if not re.fullmatch(NUMBER, text, re.IGNORECASE):
            return self._cannot(line, col.header, text, "expected a number, - or a status")
        self.cells.append(Cell(line, self.table.section, float(text), False))
        return float(text)

    def _result(self, line: int, col: Column, text: str) -> tuple[dict[str, Any], int | None] | None:
        """A task's result with the step that the cell or the header names; None if the text is no result."""
        match = _RESULT.fullmatch(text)
        value = float(match[2]) if match else -1.0
        if match and (match[3] or col.percent):
            value = round(value / 100, 12)
        if match is None or not 0 <= value <= 1:
            why = "neither a per cent nor a fraction of 1" if match else "expected a per cent, a fraction, - or a status"
            return self._cannot(line, col.header, text, why)
        self.cells.append(Cell(line, self.table.section, value, True))
        key = "correct_prob" if col.name.endswith("cloze") else "acc"
        return {key: value} | ({"approximate": True} if match[1] else {}), int(match[4]) if match[4] else col.step

    def _task_of(self, col: Column) -> str:
        """The column's task. "After 10 steps" names none: then it is that of the next such column that names one."""
        return col.name or next((other.name for other in self.table.columns if other.role == "point" and other.name), "unknown")

    def _settings_in(self, line: int, col: Column, text: str) -> dict[str, Any]:
        """A setting's cell, such as `5`, `full`, or `16 (muon, lr=5e-4)` with further settings in brackets."""
        match = re.fullmatch(r"([^()]*?)\s*(?:\(([^()]*)\))?", text)
        main, aside = (match[1], match[2] or "") if match else (text, "")
        is_full = col.name == "lora.r" and main.lower() == "full"
        found = {"lora.r": None} if is_full else setting(col.name.replace("lora.", "lora_"), main)
        if found is None:
            self._cannot(line, col.header, text, "the setting's value cannot be read")
            found = {}
        for word in filter(None, (part.strip() for part in aside.split(","))):
            more = {"optimizer": word.lower()} if word.lower() in OPTIMIZERS else phrases(word)
            if not more:
                self._cannot(line, col.header, text, f"'{word}' is no setting")
            found |= more
        return found

    def _points(self, line: int, said: Said) -> dict[int, dict[str, Any]]:
        """The curve of an attack: results by step and task.

        A final result lies at its own step, or else at that of another final result of the row. A value that a line above
        the table states for step 0 counts where the row has none of its own.
        """
        last = next((step for _, (_, step) in said["final"] if step is not None), None)
        points: dict[int, dict[str, Any]] = {}
        for col, (value, step) in said["point"] + said["final"]:
            at = step if step is not None else last
            if at is not None:
                points.setdefault(at, {})[self._task_of(col)] = value
        for name, text in self.table.starting.items():
            header, task = f"Starting {name}", self.tasks.get(name)
            if task is None:
                if line == self.table.rows[0][0]:
                    self._cannot(self.table.line, header, text, "an unknown task")
                continue
            result = self._result(line, Column(header, "point", task, 0), text)
            if result and points.setdefault(0, {}).setdefault(task, result[0]) != result[0]:
                self._cannot(line, header, text, "the row's own value at step 0 is another")
        return points

    def _record(self, kind: str, name: str, key: str, line: int, settings: dict[str, Any]) -> dict[str, Any]:
        """What all records have. The id is a hash of the row's place: file, kind, headings and `key`.

        Settings become `config` or `plan`. `imported` has those that Lethe does not know, and steps, whose unit is unknown.
        """
        place = json.dumps([self.file, kind, self.table.group, key])
        self.places[place] += 1
        digest = hashlib.sha256(f"{place} {self.places[place]}".encode()).hexdigest()[:8]
        config: dict[str, Any] = {}
        plan: dict[str, Any] = {}
        facts: dict[str, Any] = {"file": self.file, "path": self.path, "line": line, "group": self.table.group}
        is_full = settings.get("lora.r", 0) is None
        for setting_name, value in settings.items():
            head, _, inner = setting_name.partition(".")
            if head == "steps":
                facts |= {"steps": value, "steps_unit": "unknown"}
            elif head in PLAN:
                plan[PLAN[head]] = value
            elif head not in FIELDS.get(kind, ()):
                facts.setdefault("settings", {})[setting_name] = value
            elif inner and not (head == "lora" and is_full):
                config.setdefault(head, {})[inner] = value
            else:
                config[head] = None if inner else value
        record: dict[str, Any] = {"id": digest, "kind": kind, "name": printable(name, LONGEST_NAME)}
        record |= dict.fromkeys(("status", "reason", "job_id", "created", "started", "finished", "heartbeat"))
        return record | {"launcher": "imported", "config": config, "imported": facts} | ({"plan": plan} if plan else {})


def _attack_settings(label: str) -> dict[str, Any]:
    """The optimizer and the settings in an attack's label, such as `Muon (30ep)`."""
    optimizer = next((word for word in re.findall(r"\w+", label.lower()) if word in OPTIMIZERS), None)
    return ({"optimizer": optimizer} if optimizer else {}) | phrases(label)


def _text(said: Said, role: str) -> str | None:
    return said[role][-1][1] if said[role] else None


def _status(statuses: list[tuple[Column, str]], has_results: bool) -> tuple[str, str | None]:
    """The worst status that the row states. If it states none: complete with results, lost without."""
    for status in dict.fromkeys(STATUSES.values()):
        words = [f"'{word}' under {col.header}" for col, word in statuses if STATUSES[word.lower()] == status]
        if words:
            return status, None if status == "complete" else f"the log says {', '.join(words)}"
    return ("complete", None) if has_results else ("lost", "the log has neither a result nor a status")


def _name_of(settings: dict[str, Any]) -> str:
    """A name from the settings, such as ret0_rm2000_512_full_muon; "" without a coefficient."""
    if "retain_coef" not in settings and "remove_coef" not in settings:
        return ""
    short = {"retain_coef": "ret", "remove_coef": "rm", "steps": "", "updates": "", "forward_passes": "", "lora.r": "r"}
    parts = ["full" if settings[key] is None else f"{word}{settings[key]:g}" for key, word in short.items() if key in settings]
    return "_".join([*parts, *([settings["optimizer"]] if "optimizer" in settings else [])])
