"""The rows of a log's table as records: what each cell says, which settings a row inherits, which results form a curve."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lethe import config as c
from lethe.errors import printable
from lethe.methods.method import every
from lethe.runs.logbook import NUMBER, OPTIMIZERS, TASKS, Column, LogTable, column, kind_of, marks, phrases, plain, setting
from lethe.runs.logbook_prose import Cell

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


@dataclass
class _Row:
    """What the cells of a row say."""

    settings: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    evals: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Results by step and task."""
    ends: list[tuple[Column, dict[str, Any], int | None]] = field(default_factory=list)
    """Final results, with the step that the cell or the header names."""
    statuses: list[tuple[str, str, str]] = field(default_factory=list)
    """Statuses with the word in the log and the header above it."""
    texts: dict[str, str] = field(default_factory=dict)
    """Texts by role: job, label, model, notes, checkpoint."""
    others: dict[str, str] = field(default_factory=dict)
    """Texts of unknown columns by header."""


class TableReader:
    """The rows of one table as records; the cells with numbers; and what cannot be read.

    `tasks` are the user's names of tasks. `places` counts the rows of all tables by their place in the log.
    """

    def __init__(self, file: str, path: str, table: LogTable, tasks: dict[str, str], places: Counter[str]):
        self.file, self.path, self.table, self.places = file, path, table, places
        self.known_tasks = TASKS | tasks
        self.columns = [column(header, tasks) for header in table.columns]
        self.kind = kind_of(self.columns)
        self.section = next((s.title for s in table.sections if s.level == 2), table.sections[-1].title)
        self.number = 0
        self.cells: list[Cell] = []
        self.unreadable: list[dict[str, Any]] = []

    def records(self, number: int) -> list[Record]:
        """A record for each row; one for a table of checkpoints. `number` counts the tables under the same headings."""
        self.number = number
        self._refuse_doubles()
        rows = [(line, self._fitted(line, cells)) for line, cells in self.table.rows]
        if self.kind == "checkpoints":
            return [self._checkpoints(rows)]
        return [self._run(line, cells) for line, cells in rows]

    def _refuse_doubles(self) -> None:
        """List unknown columns, and leave out the second of two columns with the same meaning."""
        meanings: set[Any] = set()
        for col in self.columns:
            meaning = (col.role, col.name, col.step) if col.name else (col.role, col.header, None)
            if meaning in meanings:
                self._cannot(self.table.line, col.header, col.header, "a second column of the same meaning; left out")
                col.role = "left out"
            meanings.add(meaning)
            if col.role == "other" and col.header:
                self._cannot(self.table.line, col.header, col.header, "an unknown column; imported as text")

    def _cannot(self, line: int, header: str, cell: str, why: str) -> None:
        self.unreadable.append({"line": line, "column": header, "cell": cell, "why": why})

    def _fitted(self, line: int, cells: list[str]) -> list[str]:
        """As many cells as the table has columns."""
        width = len(self.columns)
        if len(cells) != width:
            self._cannot(line, "", " | ".join(cells), f"{len(cells)} cells under {width} headers")
        return (cells + [""] * width)[:width]

    def _checkpoints(self, rows: list[tuple[int, list[str]]]) -> Record:
        """The table as one run: a sweep over checkpoints."""
        checkpoints: list[dict[str, Any]] = []
        for line, cells in rows:
            row = _Row()
            for col, cell in zip(self.columns, cells, strict=True):
                self._read(row, line, col, cell)
            name = row.texts.get("checkpoint", "")
            step = re.search(r"(?<!\d)(\d{1,12})$", name)
            note = row.texts.get("notes", "")
            checkpoints.append({"name": name, "step": int(step[1]) if step else None, "evals": row.evals, "note": note})
        latest = next((row["name"] for row in checkpoints if "latest viable" in row["note"]), None)
        record = self._record("checkpoints", self.table.group, "table", self.table.line, {})
        record["imported"]["rows"] = [dict(zip(self.table.columns, cells, strict=True)) for _, cells in rows]
        return record | {"status": "complete", "checkpoints": checkpoints, "latest_ignorant": latest}, []

    def _run(self, line: int, cells: list[str]) -> Record:
        row = _Row()
        for col, cell in zip(self.columns, cells, strict=True):
            self._read(row, line, col, cell)
        kind, texts = str(self.kind), row.texts
        if kind == "unlearn" and not row.settings and row.evals and not texts.get("job", "").isdigit():
            kind = "evaluate"  # the baseline, in a table of unlearning runs
            job = texts.pop("job", "")
            texts["label"] = texts.get("label") or job or "Baseline"
        above = {} if kind == "evaluate" else self.table.settings(own=kind == "tamper")
        settings = above | row.settings
        if kind == "tamper":
            heading = re.sub(r"\s*\([^()]*\)$", "", self.table.sections[-1].title)
            settings |= _attack_settings(texts.get("label", "")) | {"model": texts.get("model") or heading}
            self._place_ends(row)
            for name, text in self.table.starting.items():
                self._place_start(line, name, text, row.points)
        elif "model" in texts:
            settings["model"] = texts["model"]
        named = [plain(cell) for col, cell in zip(self.columns, cells, strict=True) if col.role == "setting"]
        key = texts.get("job") or json.dumps([texts.get("label"), texts.get("model"), *named])
        name = printable(_name(settings, texts, kind, f"row {line}"), LONGEST_NAME)
        status, reason = _status(row.statuses, bool(row.evals or row.losses or any(step > 0 for step in row.points)))
        record = self._record(kind, name, key, line, settings)
        record |= {"status": status, "reason": reason, "job_id": texts.get("job"), "losses": row.losses, "evals": row.evals}
        marked = {mark for cell in cells for mark in marks(cell)}
        more = {
            "row": dict(zip(self.table.columns, cells, strict=True)),
            "inherited": sorted(name for name in above if name not in row.settings),
            "others": row.others,
            "notes": texts.get("notes"),
            "footnotes": [text for mark, text in self.table.notes.items() if mark in marked],
        }
        record["imported"] |= {name: value for name, value in more.items() if value}
        return record, [{"step": step, "evals": row.points[step]} for step in sorted(row.points)]

    def _read(self, row: _Row, line: int, col: Column, cell: str) -> None:
        """Add what a cell says to `row`."""
        text = plain(cell)
        if col.role == "left out" or text.lower() in NOTHING:
            return
        takes_status = col.role in {"task", "point", "final", "loss", "setting", "status"}
        if takes_status and text.lower() in STATUSES:
            row.statuses.append((STATUSES[text.lower()], text, col.header))
        elif col.role in {"task", "point", "final"}:
            self._read_result(row, line, col, cell)
        elif col.role == "loss":
            if re.fullmatch(NUMBER, text, re.IGNORECASE):
                row.losses[col.name] = float(text)
                self.cells.append(Cell(line, self.section, float(text), False))
            else:
                self._cannot(line, col.header, cell, "expected a number, - or a status")
        elif col.role == "setting":
            row.settings |= self._settings_in(line, col, cell)
        elif col.role == "status":
            self._cannot(line, col.header, cell, f"expected a status: {', '.join(STATUSES)}")
        elif col.role == "other":
            row.others[col.header] = text
        else:
            row.texts[col.role] = text

    def _read_result(self, row: _Row, line: int, col: Column, cell: str) -> None:
        value, step = self._result(line, col, cell)
        if value is None:
            return
        if col.role == "task":
            row.evals[col.name] = value
        elif col.role == "final":
            row.ends.append((col, value, step or col.step))
        else:
            row.points.setdefault(step if step is not None else col.step or 0, {})[self._task_of(col)] = value

    def _result(self, line: int, col: Column, cell: str) -> tuple[dict[str, Any] | None, int | None]:
        """A task's result, and the step that the cell names."""
        text = plain(cell)
        match = _RESULT.fullmatch(text)
        if match is None:
            self._cannot(line, col.header, cell, "expected a per cent, a fraction, - or a status")
            return None, None
        value = round(float(match[2]) / 100, 12) if match[3] or col.percent else float(match[2])
        if not 0 <= value <= 1:
            self._cannot(line, col.header, cell, "neither a per cent nor a fraction of 1")
            return None, None
        self.cells.append(Cell(line, self.section, value, True))
        key = "correct_prob" if col.name.endswith("cloze") else "acc"
        return {key: value} | ({"approximate": True} if match[1] else {}), int(match[4]) if match[4] else None

    def _task_of(self, col: Column) -> str:
        """The column's task. "After 10 steps" names none: then it is that of the next such column that names one."""
        return col.name or next((other.name for other in self.columns if other.role == "point" and other.name), "unknown")

    def _settings_in(self, line: int, col: Column, cell: str) -> dict[str, Any]:
        """A setting's cell, such as `5`, `full`, or `16 (muon, lr=5e-4)` with further settings in brackets."""
        text = plain(cell)
        match = re.fullmatch(r"([^()]*?)\s*(?:\(([^()]*)\))?", text)
        main, aside = (match[1], match[2] or "") if match else (text, "")
        is_full = col.name == "lora.r" and main.lower() == "full"
        found = {"lora.r": None} if is_full else setting(col.name.replace("lora.", "lora_"), main)
        if found is None:
            self._cannot(line, col.header, cell, "the setting's value cannot be read")
            found = {}
        for word in filter(None, (part.strip() for part in aside.split(","))):
            more = {"optimizer": word.lower()} if word.lower() in OPTIMIZERS else phrases(word)
            if not more:
                self._cannot(line, col.header, cell, f"'{word}' is no setting")
            found |= more
        return found

    def _place_ends(self, row: _Row) -> None:
        """Put final results on the curve, at the step that the cell, the header or another final result of the row names."""
        known = next((step for _, _, step in row.ends if step is not None), None)
        for col, value, own in row.ends:
            row.evals[self._task_of(col)] = value
            step = own if own is not None else known
            if step is not None:
                row.points.setdefault(step, {})[self._task_of(col)] = value

    def _place_start(self, line: int, name: str, text: str, points: dict[int, dict[str, Any]]) -> None:
        """Put a value that a line above the table states for step 0 on the curve, unless the row has its own."""
        task = self.known_tasks.get(name)
        if task is None:
            if line == self.table.rows[0][0]:
                self._cannot(self.table.line, "", f"Starting {name}: {text}", "an unknown task")
            return
        before = len(self.cells)
        value = self._result(line, Column(f"Starting {name}", "point", task), text)[0]
        own = points.get(0, {}).get(task)
        if value and own and own != value:
            del self.cells[before:]
            self._cannot(line, f"Starting {name}", text, "the row's own value at step 0 is another")
        elif value:
            points.setdefault(0, {})[task] = value

    def _record(self, kind: str, name: str, key: str, line: int, settings: dict[str, Any]) -> dict[str, Any]:
        """What all records have. The id is a hash of the row's place: file, kind, headings and `key`."""
        place = json.dumps([self.file, kind, self.table.group, key])
        self.places[place] += 1
        digest = hashlib.sha256(f"{place} {self.places[place]}".encode()).hexdigest()[:8]
        config, plan, rest = _sorted_settings(kind, settings)
        facts = {"file": self.file, "path": self.path, "line": line}
        facts |= {"group": self.table.group, "table": self.number} | rest
        record: dict[str, Any] = {"id": digest, "kind": kind, "name": name, "status": None, "reason": None, "job_id": None}
        record |= {"launcher": "imported", **dict.fromkeys(("created", "started", "finished", "heartbeat"))}
        return record | {"config": config, "imported": facts} | ({"plan": plan} if plan else {})


def _attack_settings(label: str) -> dict[str, Any]:
    """The optimizer and the settings in an attack's label, such as `Muon (30ep)`."""
    optimizer = next((word for word in re.findall(r"\w+", label.lower()) if word in OPTIMIZERS), None)
    return ({"optimizer": optimizer} if optimizer else {}) | phrases(label)


def _sorted_settings(kind: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings as `config`, `plan` and the rest. Steps whose unit the log does not name are part of the rest."""
    kinds: dict[str, list[type]] = {"unlearn": [*every()], "tamper": [c.TamperConfig], "evaluate": [c.EvaluateConfig]}
    names = {f.name for each in kinds.get(kind, []) for f in dataclasses.fields(each)}
    config: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    if settings.get("lora.r", 0) is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("lora.")} | {"lora": None}
    for name, value in settings.items():
        head, _, inner = name.partition(".")
        if name == "steps":
            rest |= {"steps": value, "steps_unit": "unknown"}
        elif name in {"updates", "forward_passes", "effective_batch"}:
            plan["steps" if name == "updates" else name] = value
        elif head not in names:
            rest.setdefault("settings", {})[name] = value
        elif inner:
            config.setdefault(head, {})[inner] = value
        else:
            config[name] = value
    return config, plan, rest


def _status(statuses: list[tuple[str, str, str]], has_results: bool) -> tuple[str, str | None]:
    """The worst status that the row states. If it states none: complete with results, lost without."""
    for status in dict.fromkeys(STATUSES.values()):
        words = [f"'{word}' under {header}" for found, word, header in statuses if found == status]
        if words:
            return status, None if status == "complete" else f"the log says {', '.join(words)}"
    return ("complete", None) if has_results else ("lost", "the log has neither a result nor a status")


def _name(settings: dict[str, Any], texts: dict[str, str], kind: str, otherwise: str) -> str:
    """The row's model and label, or else a name from the settings, such as ret0_rm2000_512_full_muon."""
    if kind == "tamper" or "label" in texts or "model" in texts:
        words = [settings.get("model") if kind == "tamper" else texts.get("model"), texts.get("label")]
        return " ".join(dict.fromkeys(str(word) for word in words if word)) or otherwise
    if "retain_coef" not in settings and "remove_coef" not in settings:
        return otherwise
    parts = [f"{short}{settings[key]:g}" for key, short in (("retain_coef", "ret"), ("remove_coef", "rm")) if key in settings]
    parts += [f"{settings[key]}" for key in ("steps", "updates", "forward_passes") if key in settings]
    if "lora.r" in settings:
        parts.append("full" if settings["lora.r"] is None else f"r{settings['lora.r']}")
    return "_".join([*parts, *([settings["optimizer"]] if "optimizer" in settings else [])])
