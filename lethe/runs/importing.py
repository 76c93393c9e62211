"""A hand-kept experiment log into the ledger: `import_log`, one run a row; a table of checkpoints is one run, a sweep.

    logbook.read() -> tables -> _Rows: records, as run.json holds them -> written, if an earlier import did not write the same

Nothing is guessed. How a number was measured is unknown, so it has no count, interval or fingerprint; a count of steps keeps
the log's number without a unit unless the log names one; a cell that cannot be read, and a number in the prose that no cell
of its section holds, are listed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.errors import LetheError, nearest, printable
from lethe.files import RUN, UnreadableError, refuse_run_folder, slug, text_of, write_atomically
from lethe.methods.method import every
from lethe.runs.logbook import NUMBER, TASKS, Column, LogTable, column, kind_of, marks, phrases, plain, read, setting, spaced
from lethe.runs.run import Run, find_runs, now

STATUSES = {
    "diverged": "diverged",
    **dict.fromkeys(("failed", "crashed", "error", "oom", "timeout", "timed out"), "failed"),
    **dict.fromkeys(("cancelled", "canceled"), "cancelled"),
    "running": "running",
    **dict.fromkeys(("queued", "pending"), "queued"),
    **dict.fromkeys(("complete", "completed", "done", "finished"), "complete"),
}
NOTHING = {"", "-", "–", "—", "n/a", "na", "none"}
NO_ROWS = (
    "markdown sees no rows of a table here: under the header stands a line with as many groups of dashes, then a line a row"
)
LONGEST_NAME = 200
OPTIMIZERS = {"adamw", "muon", "adamw_8bit"}
_RESULT = re.compile(rf"(~)?\s*({NUMBER})\s*(%)?(?:\s*\(step (\d{{1,12}})\))?", re.IGNORECASE)
_PROSE_NUMBER = re.compile(r"(?<![\w.])(\d++(?:\.\d++)?+)(?:\s*+[-–]\s*+(\d++(?:\.\d++)?+))?(\s*+%)?(?!\w|\.\d)")


@dataclass
class Imported:
    """What an import did, and what it could not read."""

    file: str
    path: str
    new: list[Run] = field(default_factory=list)
    updated: list[Run] = field(default_factory=list)
    unchanged: list[Run] = field(default_factory=list)
    gone: list[Run] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    prose: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        """As plain data."""
        lists = {name: getattr(self, name) for name in ("unreadable", "prose", "skipped")}
        runs = {name: [str(run.path) for run in getattr(self, name)] for name in ("new", "updated", "unchanged", "gone")}
        return {"file": self.file} | runs | lists

    def text(self) -> str:
        """In lines: counts, then everything that is not in the ledger, with its place in the log."""
        counts = [f"{len(getattr(self, name))} {name}" for name in ("new", "updated", "unchanged")]
        lines = [f"{self.file}: {', '.join(counts)} runs"]
        lines += [f"no longer in the log, kept in the ledger: {run.path}" for run in self.gone]
        for u in self.unreadable:
            column, cell = printable(u["column"] or "row", 80), printable(u["cell"], 200)
            lines.append(f"line {u['line']}, {column}: cannot read '{cell}' ({u['why']})")
        lines += [
            f"line {s['line']}: table left out ({s['why']}): {printable(' | '.join(s['columns']), 200)}" for s in self.skipped
        ]
        for p in self.prose:
            hint = f"; {p['hint']}" if p["hint"] else ""
            lines.append(f"line {p['line']}: {p['number']} is in no cell of '{printable(p['section'], 80)}'{hint}: {p['text']}")
        return "\n".join(lines)


def import_log(config: c.ImportConfig) -> Imported:
    """Write the log's rows as runs into `config.out`; what an earlier import of the same file wrote is updated.

    Raises:
        LetheError: the file cannot be read, has no table about runs, or `tasks` names a column that is not there; nothing
            has been written then.
    """
    file = Path(config.file)
    try:
        text = text_of(file)
    except UnreadableError as error:
        raise LetheError(f"file: '{file}' cannot be read ({error})") from error
    refuse_run_folder(config.out)
    tables, prose = read(text)
    tasks = {spaced(name): task for name, task in config.tasks.items()}
    _refuse_unused(tasks, tables)
    imported = Imported(file.name, str(file.resolve()))
    records: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    counts: dict[str, int] = {}
    seen: dict[str, int] = {}
    cells: list[_Cell] = []
    for table in tables:
        columns = [column(header, tasks) for header in table.columns]
        kind = kind_of(columns)
        if kind is None or not table.rows:
            why = "it is not about runs" if kind is None else NO_ROWS
            imported.skipped.append({"line": table.line, "columns": table.columns, "why": why})
            continue
        counts[table.group] = counts.get(table.group, 0) + 1
        reader = _Rows(imported, table, columns, counts[table.group], tasks, seen)
        records += reader.checkpoints() if kind == "checkpoints" else reader.runs(kind)
        cells += reader.cells
    if not records:
        what = f"its {len(tables)} tables are about something else" if tables else "it has no table"
        raise LetheError(f"file: '{file}' has no table of runs ({what}); expected columns such as retain_coef, cb_loss, MMLU")
    imported.prose = _unmatched(prose, cells)
    _write(imported, records, Path(config.out))
    return imported


def _refuse_unused(tasks: dict[str, str], tables: list[LogTable]) -> None:
    names = {spaced(re.sub(r"\([^()]*\)", "", plain(header))) for table in tables for header in table.columns}
    names |= {re.sub(r"^(starting|start|final|step \d+|after \d+ steps) ", "", name) for name in names}
    for name in tasks:
        if name not in names:
            raise LetheError(f"tasks: no column of the log is called '{name}'{nearest(name, names)}")


@dataclass
class _Cell:
    """A number of a table, to be looked for in the prose: a share of 1 or, for a loss, the number itself."""

    line: int
    section: str
    header: str
    text: str
    value: float
    is_share: bool


@dataclass
class _Row:
    """What the cells of a row say. `texts` by role; `said`: statuses with their words and headers."""

    given: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    evals: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    ends: list[tuple[Column, dict[str, Any], int | None]] = field(default_factory=list)
    said: list[tuple[str, str, str]] = field(default_factory=list)
    texts: dict[str, str | None] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def job(self) -> str | None:
        """The job's id."""
        return self.texts.get("job")

    @property
    def label(self) -> str | None:
        """What the row calls itself."""
        return self.texts.get("label")

    @property
    def model(self) -> str | None:
        """The model that the row is about."""
        return self.texts.get("model")


class _Rows:
    """The rows of one table as records."""

    def __init__(
        self,
        imported: Imported,
        table: LogTable,
        columns: list[Column],
        number: int,
        tasks: dict[str, str],
        seen: dict[str, int],
    ):
        self.file, self.path, self.table, self.columns, self.number = imported.file, imported.path, table, columns, number
        self.known, self.unreadable, self.seen = TASKS | tasks, imported.unreadable, seen
        self.cells: list[_Cell] = []
        meanings: set[Any] = set()
        for col in columns:
            meaning = (col.role, col.name, col.step) if col.name else (col.role, col.header, None)
            if meaning in meanings:
                self._cannot(table.line, col.header, col.header, "a second column of the same meaning; left out")
                col.role = "left out"
            meanings.add(meaning)
            if col.role == "other" and col.header:
                self._cannot(table.line, col.header, col.header, "an unknown column; its cells are kept as text")

    def runs(self, kind: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """A record and a curve for each row."""
        return [self._run(kind, line, cells) for line, cells in self.table.rows]

    def checkpoints(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """One run for the table: a sweep over checkpoints."""
        rows: list[dict[str, Any]] = []
        text = []
        for line, cells in self.table.rows:
            row = self._row(line, cells)
            name = plain(next(row[i] for i, col in enumerate(self.columns) if col.role == "checkpoint"))
            evals = {}
            for i, col in enumerate(self.columns):
                if col.role == "task" and (value := self._value(line, col, row[i])[0]):
                    evals[col.name] = value
            note = " ".join(plain(row[i]) for i, col in enumerate(self.columns) if col.role == "notes")
            step = re.search(r"(?<!\d)(\d{1,12})$", name)
            rows.append({"name": name, "step": int(step[1]) if step else None, "evals": evals, "note": note})
            text.append(dict(zip(self.table.columns, row, strict=True)))
        latest = next((row["name"] for row in rows if "latest viable" in str(row["note"])), None)
        record = self._record("checkpoints", self.table.group, "complete", None, None, "table", self.table.line, {})
        record["imported"]["rows"] = text
        return [(record | {"checkpoints": rows, "latest_ignorant": latest}, [])]

    def _cannot(self, line: int, header: str, cell: str, why: str) -> None:
        self.unreadable.append({"line": line, "column": header, "cell": cell, "why": why})

    def _row(self, line: int, cells: list[str]) -> list[str]:
        width = len(self.columns)
        if len(cells) != width:
            self._cannot(line, "", " | ".join(cells), f"{len(cells)} cells under {width} headers")
        return (cells + [""] * width)[:width]

    def _value(self, line: int, col: Column, cell: str) -> tuple[dict[str, Any] | None, int | None, str | None]:
        """A task's result, the step that the cell names, and a status that stands in a number's place."""
        text = plain(cell)
        if text.lower() in NOTHING:
            return None, None, None
        if text.lower() in STATUSES:
            return None, None, STATUSES[text.lower()]
        match = _RESULT.fullmatch(text)
        if match is None:
            self._cannot(line, col.header, cell, "expected a per cent, a fraction, - or a status")
            return None, None, None
        share = bool(match[3]) or col.percent
        value = round(float(match[2]) / 100, 12) if share else float(match[2])
        if not 0 <= value <= 1:
            self._cannot(line, col.header, cell, "neither a per cent nor a fraction of 1")
            return None, None, None
        self.cells.append(_Cell(line, self._section, col.header, text, value, True))
        key = "correct_prob" if col.name.endswith("cloze") else "acc"
        return {key: value} | ({"approximate": True} if match[1] else {}), int(match[4]) if match[4] else None, None

    @property
    def _section(self) -> str:
        return next((s.title for s in self.table.sections if s.level == 2), self.table.sections[-1].title)

    def _run(self, kind: str, line: int, cells: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        cells = self._row(line, cells)
        row = _Row()
        for col, cell in zip(self.columns, cells, strict=True):
            self._read(row, line, col, cell)
        is_baseline = kind == "unlearn" and not row.given and bool(row.evals) and not (row.job or "").isdigit()
        if is_baseline:
            kind, row.texts = "evaluate", row.texts | {"label": row.label or row.job or "Baseline", "job": None}
        settings, inherited = self._settings(kind, row.given)
        if kind == "tamper":
            heading = re.sub(r"\s*\([^()]*\)$", "", self.table.sections[-1].title)
            settings |= _attack_settings(row.label or "") | {"model": row.model or heading}
            self._ends(row)
            for name, text in self.table.starting.items():
                self._start(line, name, text, row.points)
        elif row.model:
            settings["model"] = row.model
        status, reason = _status(row.said, bool(row.evals or row.losses or any(step > 0 for step in row.points)))
        named = [plain(cell) for col, cell in zip(self.columns, cells, strict=True) if col.role == "setting"]
        key = row.job or json.dumps([row.label, row.model, *named])
        name = printable(_name(settings, row, kind, f"row {line}"), LONGEST_NAME)
        record = self._record(kind, name, status, reason, row.job, key, line, settings)
        curve = [{"step": step, "evals": row.points[step]} for step in sorted(row.points)]
        record |= {"losses": row.losses, "evals": row.evals}
        more: dict[str, Any] = {
            "row": dict(zip(self.table.columns, cells, strict=True)),
            "inherited": inherited,
            "others": row.others,
        }
        more |= {"label": row.label, "notes": row.texts.get("notes"), "footnotes": self._footnotes(cells)}
        more["deprecated"] = [col.name for col in self.columns if col.deprecated and col.name in row.evals]
        record["imported"] |= {name: value for name, value in more.items() if value}
        return record, curve

    def _read(self, row: _Row, line: int, col: Column, cell: str) -> None:
        """Put what a cell says into `row`."""
        text = plain(cell)
        if col.role == "left out":
            return
        if col.role in {"task", "point", "final"}:
            value, step, status = self._value(line, col, cell)
            row.said += [(status, text, col.header)] if status else []
            if value is None:
                return
            if col.role == "task":
                row.evals[col.name] = value
            elif col.role == "final":
                row.ends.append((col, value, step or col.step))
            else:
                row.points.setdefault(step if step is not None else col.step or 0, {})[self._task_of(col)] = value
        elif text.lower() in NOTHING:
            return
        elif col.role in {"loss", "setting", "status"} and text.lower() in STATUSES:
            row.said.append((STATUSES[text.lower()], text, col.header))
        elif col.role == "loss":
            self._loss(line, col, cell, row.losses)
        elif col.role == "setting":
            row.given |= self._given(line, col, cell)
        elif col.role == "status":
            self._cannot(line, col.header, cell, f"expected a status: {', '.join(STATUSES)}")
        elif col.role == "other":
            row.others[col.header] = text
        else:
            row.texts[col.role] = text

    def _task_of(self, col: Column) -> str:
        """The task of a column such as "After 10 steps", which leaves it to the columns beside it."""
        return col.name or next((other.name for other in self.columns if other.role == "point" and other.name), "unknown")

    def _loss(self, line: int, col: Column, cell: str, losses: dict[str, float]) -> None:
        text = plain(cell)
        if re.fullmatch(NUMBER, text, re.IGNORECASE):
            losses[col.name] = float(text)
            self.cells.append(_Cell(line, self._section, col.header, text, float(text), False))
        else:
            self._cannot(line, col.header, cell, "expected a number, - or a status")

    def _given(self, line: int, col: Column, cell: str) -> dict[str, Any]:
        """A setting's cell: `5`, `full`, or `16 (muon, lr=5e-4)` with further settings."""
        text = plain(cell)
        match = re.fullmatch(r"([^()]*?)\s*(?:\(([^()]*)\))?", text)
        main, aside = (match[1], match[2] or "") if match else (text, "")
        if col.name == "lora.r" and main.lower() == "full":
            found: dict[str, Any] | None = {"lora.r": None}
        else:
            found = setting(col.name.replace("lora.", "lora_"), main)
        if found is None:
            self._cannot(line, col.header, cell, "the setting's value cannot be read")
            found = {}
        for word in filter(None, (part.strip() for part in aside.split(","))):
            more = {"optimizer": word.lower()} if word.lower() in OPTIMIZERS else phrases(word)
            if not more:
                self._cannot(line, col.header, cell, f"'{word}' is no setting")
            found = found | more
        return found

    def _settings(self, kind: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The row's own settings over those that it inherits, and the names of the latter."""
        above = {} if kind == "evaluate" else self.table.settings(own=kind == "tamper")
        return above | given, sorted(name for name in above if name not in given)

    def _ends(self, row: _Row) -> None:
        """Final results: on the curve, at the step that the cell, the header or the row's other final result names."""
        step = next((step for _, _, step in row.ends if step is not None), None)
        for col, value, own in row.ends:
            row.evals[self._task_of(col)] = value
            at = own if own is not None else step
            if at is not None:
                row.points.setdefault(at, {})[self._task_of(col)] = value

    def _start(self, line: int, name: str, text: str, points: dict[int, dict[str, Any]]) -> None:
        """A value that a line above the table states for step 0; a cell goes before it."""
        if name not in self.known:
            if line == self.table.rows[0][0]:
                self._cannot(self.table.line, "", f"Starting {name}: {text}", "an unknown task")
            return
        kept = len(self.cells)
        value = self._value(line, Column(f"Starting {name}", "point", self.known[name]), text)[0]
        there = points.get(0, {}).get(self.known[name])
        if value and there and there != value:
            del self.cells[kept:]
            self._cannot(line, f"Starting {name}", text, "the row's own value at step 0 is another")
        elif value:
            points.setdefault(0, {})[self.known[name]] = value

    def _footnotes(self, row: list[str]) -> list[str]:
        marked = {mark for cell in row for mark in marks(cell)}
        return [text for mark, text in self.table.notes.items() if mark in marked]

    def _record(
        self,
        kind: str,
        name: str,
        status: str,
        reason: str | None,
        job: str | None,
        key: str,
        line: int,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """The record's fixed part. Its id is that of the row's place: file, headings, job id or else label and settings."""
        place = json.dumps([self.file, kind, self.table.group, key])
        self.seen[place] = self.seen.get(place, 0) + 1
        digest = hashlib.sha256(f"{place} {self.seen[place]}".encode()).hexdigest()[:8]
        config, plan, extra = _sorted_out(kind, settings)
        imported = {"file": self.file, "path": self.path, "line": line, "group": self.table.group, "table": self.number} | extra
        record: dict[str, Any] = {"id": digest, "kind": kind, "name": name, "status": status, "reason": reason, "job_id": job}
        record |= {"launcher": "imported", "created": None, "started": None, "finished": None, "heartbeat": None}
        return record | {"config": config, "imported": imported} | ({"plan": plan} if plan else {})


def _attack_settings(label: str) -> dict[str, Any]:
    """`Muon (30ep)` says the optimizer and the epochs."""
    optimizer = next((word for word in re.findall(r"\w+", label.lower()) if word in OPTIMIZERS), None)
    return ({"optimizer": optimizer} if optimizer else {}) | phrases(label)


def _sorted_out(kind: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings as `config`, `plan` and the rest. Steps whose unit the log does not name are neither."""
    kinds: dict[str, list[type]] = {"unlearn": [*every()], "tamper": [c.TamperConfig], "evaluate": [c.EvaluateConfig]}
    names = {f.name for each in kinds.get(kind, []) for f in dataclasses.fields(each)}
    config: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if settings.get("lora.r", 0) is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("lora.")} | {"lora": None}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if name == "steps":
            extra |= {"steps": value, "steps_unit": "unknown"}
        elif name in {"updates", "forward_passes", "effective_batch"}:
            plan["steps" if name == "updates" else name] = value
        elif head not in names:
            extra.setdefault("settings", {})[name] = value
        elif rest:
            config.setdefault(head, {})[rest] = value
        else:
            config[name] = value
    return config, plan, extra


def _status(said: list[tuple[str, str, str]], numbers: bool) -> tuple[str, str | None]:
    """The status that the row states, the worst if several; without one, complete if any number came out."""
    for status in dict.fromkeys(STATUSES.values()):
        words = [f"'{word}' under {header}" for found, word, header in said if found == status]
        if words:
            return status, None if status == "complete" else f"the log says {', '.join(words)}"
    return ("complete", None) if numbers else ("lost", "the log has neither a result nor a status")


def _name(settings: dict[str, Any], row: _Row, kind: str, otherwise: str) -> str:
    """As a log names its models: ret5_rm5_512, ret0_rm2000_512_full_muon."""
    if kind == "tamper" or row.label or row.model:
        words = [settings.get("model") if kind == "tamper" else row.model, row.label]
        return " ".join(dict.fromkeys(str(word) for word in words if word)) or otherwise
    if "retain_coef" not in settings and "remove_coef" not in settings:
        return otherwise
    parts = [f"{short}{settings[key]:g}" for key, short in (("retain_coef", "ret"), ("remove_coef", "rm")) if key in settings]
    parts += [f"{settings[key]}" for key in ("steps", "updates", "forward_passes") if key in settings]
    if "lora.r" in settings:
        parts.append("full" if settings["lora.r"] is None else f"r{settings['lora.r']}")
    return "_".join([*parts, *([settings["optimizer"]] if "optimizer" in settings else [])])


def _unmatched(prose: list[tuple[int, str, str]], cells: list[_Cell]) -> list[dict[str, Any]]:
    """Numbers of the prose, with a decimal point or a per cent sign, that no cell of their section rounds to."""
    found, numbers = [], _Numbers(cells)
    for line, section, text in prose:
        bare = re.sub(r"`[^`]*`", lambda m: " " * len(m[0]), text)
        for match in _PROSE_NUMBER.finditer(bare):
            for digits in filter(None, match.groups()[:2]):
                percent = bool(match[3])
                if "." not in digits and not percent:
                    continue
                holder, sections = numbers.rounding_to(digits, percent)
                if section in sections:
                    continue
                hint = f"line {holder.line} has it, under '{holder.section}'" if holder else ""
                before = spaced(bare[max(0, match.start() - 16) : match.start()])
                if not holder and (close := numbers.closest(digits, percent, section, before)):
                    hint = f"line {close.line} has {close.text} ({close.header})"
                around = " ".join(text[max(0, match.start() - 50) : match.end() + 30].split())
                number = printable(digits, 40) + (" %" if percent else "")
                found.append({"line": line, "section": section, "number": number, "text": around, "hint": hint})
    return found


class _Numbers:
    """The numbers of cells in order of size, as fractions or losses and (`percent`) in per cent, all and by their header."""

    def __init__(self, cells: list[_Cell]):
        self.cells = cells
        self.every: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        self.under: dict[tuple[str, bool], dict[str, list[tuple[float, int]]]] = {}
        for i, cell in enumerate(cells):
            for percent in (True, False) if cell.is_share else (False,):
                value = 100 * cell.value if percent else cell.value
                headers = self.under.setdefault((cell.section, percent), {})
                for numbers in (self.every[percent], headers.setdefault(spaced(cell.header), [])):
                    numbers.append((value, i))
        for numbers in (*self.every.values(), *(found for headers in self.under.values() for found in headers.values())):
            numbers.sort()
        self.rounding_to = functools.cache(self._rounding_to)

    def _rounding_to(self, digits: str, percent: bool) -> tuple[_Cell | None, set[str]]:
        """The first cell whose number rounds to these digits, and the sections of all that do."""
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
        numbers, value = self.every[percent], float(digits)
        there = [
            i for _, i in numbers[bisect_left(numbers, (value - half, -1)) : bisect_left(numbers, (value + half, math.inf))]
        ]
        return (self.cells[min(there)] if there else None), {self.cells[i].section for i in there}

    def closest(self, digits: str, percent: bool, section: str, before: str) -> _Cell | None:
        """The cell nearest to a number under a header that stands before it, within two per cent: a slip, no other quantity."""
        value, near = float(digits), []
        for header, numbers in self.under.get((section, percent), {}).items():
            if header in before:
                at = bisect_left(numbers, (value, -1))
                below = [numbers[bisect_left(numbers, (number, -1))] for number, _ in numbers[max(0, at - 1) : at]]
                near += [(abs(number - value), i) for number, i in [*below, *numbers[at : at + 1]]]
        return self.cells[min(near)[1]] if near and min(near)[0] <= 0.02 * value else None


def _write(imported: Imported, records: list[tuple[dict[str, Any], list[dict[str, Any]]]], out: Path) -> None:
    """Write what is new or changed. Runs of one import are a microsecond apart, so that they stay in the log's order."""
    before = {run.id: run for run in find_runs(out)} if out.is_dir() else {}
    before = {name: run for name, run in before.items() if (run.record.get("imported") or {}).get("file") == imported.file}
    for path in {run.record["imported"].get("path", imported.path) for run in before.values()} - {imported.path}:
        if Path(path).exists():  # otherwise it is the same log in another place
            raise LetheError(f"out: '{out}' has the runs of another {imported.file}, {path}; choose another folder")
    created = now()
    for number, (made, curve) in enumerate(records):
        old = before.pop(made["id"], None)
        name = slug(made["name"]).encode()[:80].decode(errors="ignore")
        path = old.path if old else out / f"{made['kind']}-{name}-{made['id']}"
        stamp = old.record["created"] if old else created.replace("+00:00", f".{number:06d}+00:00")
        run = Run(path, json.loads(json.dumps(made | {"created": stamp})))
        moved = old is not None and old.record != run.record
        same = old is not None and _content(old.record) == _content(run.record) and old.rows("curve.jsonl") == curve
        if not same or moved:
            try:
                path.mkdir(parents=True, exist_ok=True)
                if curve or (path / "curve.jsonl").exists():
                    write_atomically(path / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve), sync=False)
                write_atomically(path / RUN, json.dumps(run.record, indent=2), sync=False)  # a long log would take minutes
            except OSError as error:
                raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error
        (imported.unchanged if same else imported.updated if old else imported.new).append(run)
    imported.gone = list(before.values())


def _content(record: dict[str, Any]) -> dict[str, Any]:
    """A record without where its row stands: a line more above a table changes no row."""
    return record | {"imported": {name: value for name, value in record["imported"].items() if name not in {"line", "path"}}}
