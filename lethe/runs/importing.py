"""Importing an experiment log kept by hand: each row of its tables becomes a run; a table of checkpoints is one run.

    logbook.read() -> tables -> TableReader: records -> run.json and curve.jsonl, unless an earlier import wrote the same

Nothing is guessed. The log does not record how a number was measured, so it gets no count, interval or fingerprint. A count
of steps has no unit unless the log names one. Cells that cannot be read are listed, and so are numbers of the prose that no
cell has.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.errors import LetheError, nearest, printable
from lethe.files import RUN, UnreadableError, refuse_run_folder, slug, text_of, write_atomically
from lethe.runs.finding import find_runs
from lethe.runs.logbook import TASKS, Prose, joined, read
from lethe.runs.logbook_records import Cell, Record, TableReader
from lethe.runs.run import Run, now

NO_ROWS = "markdown reads no table here; below its header a table needs a line with one group of dashes per column"
_NUMBER = re.compile(r"(?<![\w.=])(\d+(?:\.\d+)?)(?:\s*[-–]\s*(\d+(?:\.\d+)?))?(\s*%)?(?!\w|\.\d)")
"""A number of the prose, or both ends of a range. What follows `=` is a setting."""


@dataclass
class Imported:
    """What an import wrote, and what it could not read."""

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
        return {
            name: [str(each.path) if isinstance(each, Run) else each for each in value] if isinstance(value, list) else value
            for name, value in vars(self).items()
        }

    def text(self) -> str:
        """As lines: the counts, then everything that could not be imported, with its line in the log."""
        lines = [f"{self.file}: {len(self.new)} new, {len(self.updated)} updated, {len(self.unchanged)} unchanged runs"]
        lines += [f"no longer in the log; the run stays: {run.path}" for run in self.gone]
        lines += [f"line {u['line']}, {u['column'] or 'row'}: cannot read '{u['cell']}' ({u['why']})" for u in self.unreadable]
        lines += [f"line {s['line']}: table left out ({s['why']}): {' | '.join(s['columns'])}" for s in self.skipped]
        for p in self.prose:
            hint = f"; {p['hint']}" if p["hint"] else ""
            lines.append(f"line {p['line']}: {p['number']} is in no cell of '{p['section']}'{hint}: {p['text']}")
        return "\n".join(printable(line, 400) for line in lines)


def import_log(config: c.ImportConfig) -> Imported:
    """Write the log's rows as runs into `config.out`, and update those that an earlier import of the file wrote.

    Raises:
        LetheError: the file cannot be read, has no table of runs, or `tasks` names a column that is not there. Nothing has
            been written then.
    """
    file = Path(config.file)
    try:
        text = text_of(file)
    except UnreadableError as error:
        raise LetheError(f"file: '{file}' cannot be read ({error})") from error
    refuse_run_folder(config.out)
    path, own = str(file.resolve()), {joined(name): task for name, task in config.tasks.items()}
    tables, prose = read(text, own)
    imported = Imported(file.name)
    records: list[Record] = []
    cells: list[Cell] = []
    numbers: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for table in tables:
        if table.kind and table.rows:
            reader = TableReader(file.name, path, table, TASKS | own, places)
            numbers[table.group] += 1
            records += reader.records(numbers[table.group])
            cells += reader.cells
            imported.unreadable += reader.unreadable
        else:
            why = NO_ROWS if table.kind else "it is not about runs"
            imported.skipped.append({"line": table.line, "columns": table.headers, "why": why})
    if not records:
        what = f"its {len(tables)} tables are about something else" if tables else "it has no table"
        raise LetheError(f"file: '{file}' has no table of runs ({what}); expected columns such as retain_coef, cb_loss, MMLU")
    words = {col.word for table in tables for col in table.columns} - {""}
    if unused := sorted(own.keys() - words):
        raise LetheError(f"tasks: no column of the log is called '{unused[0]}'{nearest(unused[0], words)}")
    imported.prose = _unmatched(prose, cells)
    _write(imported, path, records, Path(config.out))
    return imported


def _unmatched(prose: Prose, cells: list[Cell]) -> list[dict[str, Any]]:
    """The numbers of the prose, if they have a decimal point or a per cent sign, that no cell of their section rounds to.

    A hint names the first cell of another section that has the number.
    """
    found = []
    for line, section, text in prose:
        for match in _NUMBER.finditer(re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), text)):
            for digits in filter(None, match.groups()[:2]):
                scale, sign = (100, " %") if match[3] else (1, "")
                half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
                alike = [cell for cell in cells if abs(scale * cell.value - float(digits)) <= half]
                there = [cell for cell in alike if cell.is_share or not sign]
                if ("." not in digits and not sign) or any(cell.section == section for cell in there):
                    continue
                other = min(there, key=lambda cell: cell.line, default=None)
                hint = f"line {other.line} has it, under '{other.section}'" if other else ""
                around = " ".join(text[max(0, match.start() - 50) : match.end() + 30].split())
                facts = {"line": line, "section": section, "number": digits + sign, "text": around, "hint": hint}
                found.append(facts)
    return found


def _write(imported: Imported, log: str, records: list[Record], out: Path) -> None:
    """Write what is new or changed. The runs of an import are a microsecond apart, which preserves the log's order."""
    before = {run.id: run for run in find_runs(out)} if out.is_dir() else {}
    before = {name: run for name, run in before.items() if (run.record.get("imported") or {}).get("file") == imported.file}
    for path in {run.record["imported"].get("path", log) for run in before.values()} - {log}:
        if Path(path).exists():  # otherwise the same log has moved
            raise LetheError(f"out: '{out}' has the runs of another {imported.file}, {path}; choose another folder")
    created = now()
    for number, (made, curve) in enumerate(records):
        old = before.pop(made["id"], None)
        name = slug(made["name"]).encode()[:80].decode(errors="ignore")
        path = old.path if old else out / f"{made['kind']}-{name}-{made['id']}"
        stamp = old.record["created"] if old else created.replace("+00:00", f".{number:06d}+00:00")
        run = Run(path, json.loads(json.dumps(made | {"created": stamp})))
        same = old is not None and _content(old.record) == _content(run.record) and old.rows("curve.jsonl") == curve
        if not same or (old is not None and old.record != run.record):
            try:
                path.mkdir(parents=True, exist_ok=True)
                if curve or (path / "curve.jsonl").exists():
                    write_atomically(path / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve), sync=False)
                write_atomically(path / RUN, json.dumps(run.record, indent=2), sync=False)  # syncing a long log takes minutes
            except OSError as error:
                raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error
        (imported.unchanged if same else imported.updated if old else imported.new).append(run)
    imported.gone = list(before.values())


def _content(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the place of its row: a line inserted above a table changes no run."""
    return record | {"imported": {name: value for name, value in record["imported"].items() if name not in {"line", "path"}}}
