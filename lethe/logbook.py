"""A hand-kept experiment log (markdown) into the ledger: `import_log`, one run a row, a checkpoint sweep's table one run.

    text -> read(): tables, each under its headings with the settings that they and the lines above it state
         -> rows(): records, as run.json holds them -> written, or compared with what an earlier import wrote

Nothing is guessed. How a number was measured is unknown, so it has no count, interval or fingerprint; a count of steps keeps
the log's number without a unit unless the log names one; a cell that cannot be read, and a number in the prose that no cell
of its section holds, are listed. What headers, settings and words mean stands in the tables right below.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.errors import LetheError, nearest
from lethe.ledger import Run, find_runs, now, refuse_run_folder, write_atomically

TASKS = {
    "wmdp": "wmdp",  # which of them a log means by the bare name is not told
    "wmdp bio": "wmdp_bio",
    "wmdp robust": "wmdp_bio_robust",
    "wmdp bio robust": "wmdp_bio_robust",
    "wmdp cloze": "wmdp_bio_cloze",
    "wmdp bio cloze": "wmdp_bio_cloze",
    "mmlu": "mmlu",
    "mmlu stem": "mmlu_stem",
} | {task.replace("_", " "): task for task in c.LAB_TASKS}
SETTINGS = {
    "retain": "retain_coef",
    "remove": "remove_coef",
    "pdbs": "per_device_train_batch_size",
    "learning_rate": "lr",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "steps": "steps",
    "updates": "updates",
    "optimizer_updates": "updates",
    "forward_passes": "forward_passes",
    "kl_divergence_retain": "retain_loss",
} | {f.name: f.name for kind in (c.UnlearnConfig, c.TamperConfig) for f in dataclasses.fields(kind)}
TEXTS = {"optimizer", "schedule", "affine", "retain_loss", "forget_loss", "dtype", "model", "source", "forget", "retain"}
NOT_SETTINGS = {"name", "out", "eval", "lora", "time_limit"}
PHRASES = {
    r"(\d+) per device": "per_device_train_batch_size",
    r"grad(?:ient)?[ _]accumulation(?: steps)? (\d+)": "gradient_accumulation_steps",
    r"effective batch(?: size)?(?: of)? (\d+)": "effective_batch",
    r"(\d+) (?:\w+ )?(?:examples|documents)": "num_train_examples",
    r"eval(?:uated?)? every (\d+)": "eval.every",
    r"(\d+) steps": "steps",
    r"(\d+) (?:optimizer )?updates": "updates",
    r"(\d+) forward passes": "forward_passes",
    r"(\d+) ?ep(?:ochs?)?\b": "epochs",
}
STATUSES = {
    "diverged": "diverged",
    **dict.fromkeys(("failed", "crashed", "error", "oom", "timeout", "timed out"), "failed"),
    **dict.fromkeys(("cancelled", "canceled"), "cancelled"),
    "running": "running",
    **dict.fromkeys(("queued", "pending"), "queued"),
    **dict.fromkeys(("complete", "completed", "done", "finished"), "complete"),
}
NOTHING = {"", "-", "–", "—", "n/a", "na", "none"}
OPTIMIZERS = {"adamw", "muon", "adamw_8bit"}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_RESULT = re.compile(rf"(~)?\s*({_NUMBER})\s*(%)?(?:\s*\(step (\d+)\))?", re.IGNORECASE)
_PAIR = re.compile(r"`?([A-Za-z_]\w*)`?\s*=\s*([^\s,;()]+)")
_STATED = re.compile(r"^\s*(?:[-+*]\s+)?(?:\*\*)?`?([A-Za-z][\w ]*?)`?(?:\*\*)?\s*:(?:\*\*)?\s+(.+?)\s*$")
_SETTINGS_LINE = re.compile(r"^\s*\**\s*(?:[\w ]*\b(?:settings?|config(?:uration)?)\b|goal\b)", re.IGNORECASE)
_STARTING = re.compile(rf"start(?:ing)? ([A-Za-z][\w ]*?)\s*:\s*(~?\s*{_NUMBER}\s*%?)", re.IGNORECASE)
_PROSE_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?:\s*[-–]\s*(\d+(?:\.\d+)?))?(\s*%)?(?!\w|\.\d)")
_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")


@dataclass
class Section:
    """A heading, and what the text below it states so far."""

    level: int
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    starting: dict[str, str] = field(default_factory=dict)


@dataclass
class LogTable:
    """A table as it stands in the log. `rows` are (line number, cells); `notes` are footnotes by their mark."""

    line: int
    sections: list[Section]
    columns: list[str]
    rows: list[tuple[int, list[str]]]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The headings above the table, without the document's own title where there are others."""
        titles = [s.title for s in self.sections if s.level > 1] or [s.title for s in self.sections]
        return " › ".join(filter(None, titles))

    @property
    def starting(self) -> dict[str, str]:
        """Values at step 0, by the log's name of the task."""
        return {name: value for section in self.sections for name, value in section.starting.items()}

    def settings(self, own: bool) -> dict[str, Any]:
        """What holds for the rows; with `own`, without what the document as a whole states (about unlearning)."""
        chosen = [s for s in self.sections if s.level > 1] if own else self.sections
        return {name: value for s in chosen or self.sections for name, value in s.settings.items()}


@dataclass
class Column:
    """What a header means: its role, the field or task it names, the step it is about."""

    header: str
    role: str
    name: str = ""
    step: int | None = None
    percent: bool = False
    deprecated: bool = False


@dataclass
class Imported:
    """What an import did, and what it could not read."""

    file: str
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
        lines += [f"line {u['line']}, {u['column'] or 'row'}: cannot read '{u['cell']}' ({u['why']})" for u in self.unreadable]
        lines += [f"line {s['line']}: table left out ({s['why']}): {' | '.join(s['columns'])}" for s in self.skipped]
        for p in self.prose:
            hint = f"; {p['hint']}" if p["hint"] else ""
            lines.append(f"line {p['line']}: {p['number']} is in no cell of '{p['section']}'{hint}: {p['text']}")
        return "\n".join(lines)


def import_log(config: c.ImportConfig) -> Imported:
    """Write the log's rows as runs into `config.out`; what an earlier import of the same file wrote is updated.

    Raises:
        LetheError: the file cannot be read, has no table about runs, or `tasks` names a column that is not there; nothing
            has been written then.
    """
    file = Path(config.file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LetheError(f"file: '{file}' cannot be read ({getattr(error, 'strerror', None) or error})") from error
    refuse_run_folder(config.out)
    tables, prose = read(text)
    tasks = {_spaced(name): task for name, task in config.tasks.items()}
    _refuse_unused(tasks, tables)
    imported = Imported(file.name)
    records: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    counts: dict[str, int] = {}
    seen: dict[str, int] = {}
    cells: list[_Cell] = []
    for table in tables:
        columns = [column(header, tasks) for header in table.columns]
        kind = _kind(columns)
        if kind is None:
            imported.skipped.append({"line": table.line, "columns": table.columns, "why": "it is not about runs"})
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


def read(text: str) -> tuple[list[LogTable], list[tuple[int, str, str]]]:
    """The tables of a log, and its prose: (line number, section, what is left of the line after settings are taken)."""
    lines = text.splitlines()
    sections = [Section(0, "")]
    tables: list[LogTable] = []
    prose: list[tuple[int, str, str]] = []
    listing = fenced = False
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or not line.strip():
            continue
        if "|" in line and i < len(lines) and "|" in lines[i] and _RULE.fullmatch(lines[i]):
            table = LogTable(i, [dataclasses.replace(s, settings=dict(s.settings)) for s in sections], _cells(line), [])
            i += 1
            while i < len(lines) and "|" in lines[i]:
                table.rows.append((i + 1, _cells(lines[i])))
                i += 1
            tables.append(table)
            listing = False
            continue
        if heading := re.fullmatch(r"(#+)\s+(.*?)\s*#*\s*", line):
            level = len(heading[1])
            sections = [s for s in sections if s.level < level] + [Section(level, heading[2], _phrases(heading[2]))]
            listing = False
        elif tables and (note := re.match(r"\s*(?:\\(\*+)|([†‡§])|\[\^(\w+)\]:)\s*(.+)", line)):
            tables[-1].notes[note[1] or note[2] or note[3]] = note[4]
        is_bullet = re.match(r"\s*[-+*]\s", line) is not None
        listing = (listing and is_bullet) or (not heading and _SETTINGS_LINE.match(line) is not None and not is_bullet)
        left = line if heading else _take_settings(line, sections[-1], listing and is_bullet)
        part = next((s.title for s in sections if s.level == 2), sections[-1].title)
        prose.append((i, part, left))
    return tables, prose


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|"))
    if parts and not parts[-1].strip() and line.rstrip().endswith("|"):
        parts.pop()
    return [part.strip().replace("\\|", "|") for part in parts]


def _take_settings(line: str, section: Section, listed: bool) -> str:
    """Note the settings that a line states; what is left of the line. `listed`: it is a bullet of a list of settings."""
    if starting := _STARTING.findall(line):
        section.starting |= {_spaced(name): value for name, value in starting}
        return _STARTING.sub("", line)
    if stated := _STATED.match(line):
        found = _setting(stated[1], stated[2])
        if found is None and listed:
            found = {stated[1].strip("` "): stated[2]}  # no setting of Lethe's: kept as text
        if found is not None:
            section.settings |= found | _phrases(stated[2])
            return ""
    if _SETTINGS_LINE.match(line):
        for group in re.findall(r"\([^()]*\)", line):
            if found := _phrases(group):
                section.settings |= found
                line = line.replace(group, "")
    return line


def _phrases(text: str) -> dict[str, Any]:
    """Settings stated in passing: `(512 bio examples, lr=2e-5, eval every 100 steps)`."""
    found: dict[str, Any] = {}
    for pattern, name in PHRASES.items():
        if match := re.search(pattern, text, re.IGNORECASE):
            found[name] = int(match[1])
            text = text.replace(match[0], "")
    for key, value in _PAIR.findall(text):
        found |= _setting(key, value) or {}
    return found


def _setting(key: str, text: str) -> dict[str, Any] | None:
    """A setting with its value, such as {"lora.r": 16}; None where the key is no setting or the value cannot be one."""
    name = SETTINGS.get(re.sub(r"\s+", "_", key.strip("` ").lower()))
    text = text.strip("` ")
    if name is None or name in NOT_SETTINGS:
        return None
    if name == "affine" and (source := re.search(r"loaded from `?([\w./-]+)", text)):
        return {name: source[1]}
    if key.lower().startswith("kl divergence"):
        return {name: "kl"} if text.lower().startswith("true") else None
    if name == "layers":
        found = re.match(r"\[[\d,\s]+\]", text)
        return {name: json.loads(found[0])} if found else None
    if name in TEXTS:
        return {name: text.lower() if name == "optimizer" else text} if re.fullmatch(r"[\w./:@-]+", text) else None
    found = re.match(rf"({_NUMBER}|true|false)(?=$|\s*\()", text, re.IGNORECASE)
    return {name: _number(found[1])} if found else None


def _number(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def _spaced(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name.strip().lower())


def column(header: str, tasks: dict[str, str]) -> Column:
    """What a header means. `tasks`: the user's own names of tasks, before the usual ones."""
    clean = re.sub(r"[*`]", "", header)
    deprecated = "deprecated" in clean.lower()
    percent = bool(re.search(r"\(\s*%\s*\)|%", clean))
    clean = re.sub(r"\(\s*(?:↓|↑|%|deprecated|lower is better|higher is better)\s*\)|[↓↑%]", "", clean, flags=re.IGNORECASE)
    name = _spaced(clean)
    known = TASKS | tasks

    def made(role: str, what: str = "", step: int | None = None) -> Column:
        return Column(header, role, what, step, percent, deprecated)

    for role, pattern in {
        "job": r"(?:slurm )?job(?: ?id)?",
        "checkpoint": r"checkpoint|revision",
        "status": r"status",
        "notes": r"notes?|comments?|remarks?",
        "model": r"model",
        "label": r"tamper optimizer|attack|run|name",
    }.items():
        if re.fullmatch(pattern, name):
            return made(role)
    if name in known:
        return made("task", known[name])
    if name.endswith("loss"):
        return made("loss", name.replace(" ", "_"))
    if start := re.fullmatch(r"(?:starting|start) (.+)", name):
        return made("point", known.get(start[1], ""), 0) if start[1] in known else made("other")
    if at := re.fullmatch(r"(?:step (\d+)|after (\d+) (?:steps?|updates))(?: (.+))?", name):
        ok = at[3] is None or at[3] in known
        return made("point", known.get(at[3] or "", ""), int(at[1] or at[2])) if ok else made("other")
    if final := re.fullmatch(r"final(?: ([^(]+?))?(?: \((?:step )?(\d+)(?: steps?| updates)?\))?", name):
        ok = final[1] is None or final[1] in known
        return made("final", known.get(final[1] or "", ""), int(final[2]) if final[2] else None) if ok else made("other")
    setting = SETTINGS.get(name.replace(" ", "_"))
    return made("setting", setting) if setting and setting not in NOT_SETTINGS else made("other")


def _refuse_unused(tasks: dict[str, str], tables: list[LogTable]) -> None:
    names = {_spaced(re.sub(r"[*`]|\([^()]*\)", "", header)) for table in tables for header in table.columns}
    names |= {re.sub(r"^(starting|start|final|step \d+|after \d+ steps) ", "", name) for name in names}
    for name in tasks:
        if name not in names:
            raise LetheError(f"tasks: no column of the log is called '{name}'{nearest(name, names)}")


def _kind(columns: list[Column]) -> str | None:
    """The kind of run that a table's rows are; None when they are none."""
    roles = {col.role for col in columns}
    if not roles & {"task", "loss", "point", "final"}:
        return None
    if "checkpoint" in roles:
        return "checkpoints"
    if roles & {"point", "final"}:
        return "tamper"
    if "loss" in roles or any(col.role == "setting" for col in columns):
        return "unlearn"
    return "evaluate" if roles & {"model", "label", "job"} else None


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
        self.file, self.table, self.columns, self.number = imported.file, table, columns, number
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
            name = _plain(next(row[i] for i, col in enumerate(self.columns) if col.role == "checkpoint"))
            evals = {}
            for i, col in enumerate(self.columns):
                if col.role == "task" and (value := self._value(line, col, row[i])[0]):
                    evals[col.name] = value
            note = " ".join(_plain(row[i]) for i, col in enumerate(self.columns) if col.role == "notes")
            step = re.search(r"(\d+)$", name)
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
        text = _plain(cell)
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
        named = [_plain(cell) for col, cell in zip(self.columns, cells, strict=True) if col.role == "setting"]
        key = row.job or json.dumps([row.label, row.model, *named])
        name = _name(settings, row, kind, f"row {line}")
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
        text = _plain(cell)
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
        text = _plain(cell)
        if re.fullmatch(_NUMBER, text, re.IGNORECASE):
            losses[col.name] = float(text)
            self.cells.append(_Cell(line, self._section, col.header, text, float(text), False))
        else:
            self._cannot(line, col.header, cell, "expected a number, - or a status")

    def _given(self, line: int, col: Column, cell: str) -> dict[str, Any]:
        """A setting's cell: `5`, `full`, or `16 (muon, lr=5e-4)` with further settings."""
        text = _plain(cell)
        match = re.fullmatch(r"([^()]*?)\s*(?:\(([^()]*)\))?", text)
        main, aside = (match[1], match[2] or "") if match else (text, "")
        if col.name == "lora.r" and main.lower() == "full":
            found: dict[str, Any] | None = {"lora.r": None}
        else:
            found = _setting(col.name.replace("lora.", "lora_"), main)
        if found is None:
            self._cannot(line, col.header, cell, "the setting's value cannot be read")
            found = {}
        for word in filter(None, (part.strip() for part in aside.split(","))):
            more = {"optimizer": word.lower()} if word.lower() in OPTIMIZERS else _phrases(word)
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
        marks = {mark for cell in row for mark in _marks(cell)}
        return [text for mark, text in self.table.notes.items() if mark in marks]

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
        imported = {"file": self.file, "line": line, "group": self.table.group, "table": self.number} | extra
        record: dict[str, Any] = {"id": digest, "kind": kind, "name": name, "status": status, "reason": reason, "job_id": job}
        record |= {"launcher": "imported", "created": None, "started": None, "finished": None, "heartbeat": None}
        return record | {"config": config, "imported": imported} | ({"plan": plan} if plan else {})


def _plain(cell: str) -> str:
    """A cell's text without emphasis, addresses of links and marks of footnotes."""
    cell = re.sub(r"\[([^\]^]+)\]\([^()]*\)", r"\1", cell)
    text = re.sub(r"\*\*(.+?)\*\*|__(.+?)__|`(.+?)`", lambda m: m[1] or m[2] or m[3], cell)
    return re.sub(r"\\?\*+|[†‡§]|\[\^\w+\]", "", text).strip()


def _marks(cell: str) -> list[str]:
    """The marks of footnotes in a cell."""
    return re.findall(r"\*+|[†‡§]|(?<=\[\^)\w+(?=\])", re.sub(r"\*\*(.+?)\*\*", r"\1", cell))


def _attack_settings(label: str) -> dict[str, Any]:
    """`Muon (30ep)` says the optimizer and the epochs."""
    optimizer = next((word for word in re.findall(r"\w+", label.lower()) if word in OPTIMIZERS), None)
    return ({"optimizer": optimizer} if optimizer else {}) | _phrases(label)


def _sorted_out(kind: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings as `config`, `plan` and the rest. Steps whose unit the log does not name are neither."""
    fields = {"unlearn": c.UnlearnConfig, "tamper": c.TamperConfig, "evaluate": c.EvaluateConfig}.get(kind)
    names = {f.name for f in dataclasses.fields(fields)} if fields else set()
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
    found = []
    for line, section, text in prose:
        bare = re.sub(r"`[^`]*`", lambda m: " " * len(m[0]), text)
        for match in _PROSE_NUMBER.finditer(bare):
            for digits in filter(None, match.groups()[:2]):
                percent = bool(match[3])
                if "." not in digits and not percent:
                    continue
                holders = [cell for cell in cells if _rounds_to(cell, digits, percent)]
                if any(cell.section == section for cell in holders):
                    continue
                hint = f"line {holders[0].line} has it, under '{holders[0].section}'" if holders else ""
                before = _spaced(bare[max(0, match.start() - 16) : match.start()])
                about = [cell for cell in cells if cell.section == section and _spaced(cell.header) in before]
                close = _closest(digits, percent, about)
                if not holders and close:
                    hint = f"line {close.line} has {close.text} ({close.header})"
                around = " ".join(text[max(0, match.start() - 50) : match.end() + 30].split())
                number = digits + (" %" if percent else "")
                found.append({"line": line, "section": section, "number": number, "text": around, "hint": hint})
    return found


def _in_unit(cell: _Cell, percent: bool) -> float | None:
    return cell.value if not percent else 100 * cell.value if cell.is_share else None


def _rounds_to(cell: _Cell, digits: str, percent: bool) -> bool:
    value = _in_unit(cell, percent)
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    return value is not None and abs(value - float(digits)) <= half + 1e-9


def _closest(digits: str, percent: bool, cells: list[_Cell]) -> _Cell | None:
    """The cell nearest to a number, if it is within two per cent of it: a slip, rather than another quantity."""
    near = [(abs(value - float(digits)), i) for i, cell in enumerate(cells) if (value := _in_unit(cell, percent)) is not None]
    return cells[min(near)[1]] if near and min(near)[0] <= 0.02 * float(digits) else None


def _write(imported: Imported, records: list[tuple[dict[str, Any], list[dict[str, Any]]]], out: Path) -> None:
    """Write what is new or changed. Runs of one import are a microsecond apart, so that they stay in the log's order."""
    before = {run.id: run for run in find_runs(out)} if out.is_dir() else {}
    before = {name: run for name, run in before.items() if (run.record.get("imported") or {}).get("file") == imported.file}
    created = now()
    for number, (made, curve) in enumerate(records):
        old = before.pop(made["id"], None)
        slug = "".join(ch if ch.isalnum() or ch in "._-" else "-" for ch in made["name"])[:80]
        path = old.path if old else out / f"{made['kind']}-{slug}-{made['id']}"
        stamp = old.record["created"] if old else created.replace("+00:00", f".{number:06d}+00:00")
        run = Run(path, json.loads(json.dumps(made | {"created": stamp})))
        moved = old is not None and old.record != run.record
        same = old is not None and _content(old.record) == _content(run.record) and old.rows("curve.jsonl") == curve
        if not same or moved:
            try:
                path.mkdir(parents=True, exist_ok=True)
                if curve or (path / "curve.jsonl").exists():
                    write_atomically(path / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve))
                run.update()
            except OSError as error:
                raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error
        (imported.unchanged if same else imported.updated if old else imported.new).append(run)
    imported.gone = list(before.values())


def _content(record: dict[str, Any]) -> dict[str, Any]:
    """A record without where its row stands: a line more above a table changes no row."""
    return record | {"imported": {name: value for name, value in record["imported"].items() if name != "line"}}
