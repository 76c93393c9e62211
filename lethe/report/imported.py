"""Tables of imported runs: each table of a log as it stands there, so that its numbers share no column with measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from lethe.report.rendering import Table, table_of
from lethe.report.table_notes import reasons
from lethe.results.comparable import grouped
from lethe.runs.logbook import plain
from lethe.runs.run import Run


def imported_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each table of a log, in the log's order."""

    def place(run: Run) -> tuple[str, str, int]:
        facts = run.record["imported"]
        return facts["file"], facts["group"], facts["table"]

    in_order = sorted(runs, key=lambda run: (run.record["imported"]["file"], run.record["imported"]["line"]))
    return [_table(*key, group) for key, group in grouped(in_order, place).items()]


def _table(file: str, group: str, number: int, runs: list[Run]) -> Table:
    """The log's own columns and cells, without their markup; a run that is not complete has its status in a note."""
    rows: list[dict[str, str]] = []
    notes = [f"Imported from {file}, which does not record how the numbers were measured, so they have no intervals."]
    for run in runs:
        facts = run.record["imported"]
        rows += facts.get("rows") or [facts.get("row") or {"Name": run.record["name"]}]
        notes += [f"{run.record['name']}: {text}" for text in facts.get("footnotes", [])]
    cells = [{plain(name): text for name, cell in row.items() if (text := plain(str(cell)))} for row in rows]
    if any("steps" in run.record["imported"] for run in runs):
        notes.append("Steps: the log's number, which may count updates or forward passes.")
    again = f" ({number})" if number > 1 else ""
    columns = [plain(name) for row in rows for name in row]
    return table_of(f"Imported: {group or file}{again}", cells, [*notes, *reasons(runs)], columns=columns)
