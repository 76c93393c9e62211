"""What tables say of runs beside their numbers: which job it was, what is degenerate, why a run is not complete."""

from __future__ import annotations

from collections.abc import Iterable

from lethe.ledger import Run
from lethe.report.layout import DEGENERATE, DEGENERATE_NOTE
from lethe.runs import Entry


def job(run: Run) -> str:
    """Its job id or its own, with its status if it is not complete."""
    name = str(run.record.get("job_id") or run.id)
    return name if run.status == "complete" else f"{name} ({run.status})"


def remarks(runs: list[Run], cells: list[list[str]]) -> list[str]:
    """Notes on degenerate results and on runs that are not complete."""
    degenerate = any(cell.endswith(DEGENERATE) for row in cells for cell in row)
    return [*([DEGENERATE_NOTE] if degenerate else []), *reasons(runs)]


def reasons(runs: Iterable[Run | Entry]) -> list[str]:
    """A note for each run that failed, diverged, was cancelled or lost."""
    words = {"failed": "failed", "diverged": "diverged", "cancelled": "was cancelled", "lost": "was lost"}
    notes = []
    for each in runs:
        run, reason = (each.run, each.reason) if isinstance(each, Entry) else (each, each.record.get("reason"))
        if each.status in words:
            why = " ".join((reason or _why(run)).split())
            notes.append(f"{run.record['name']} ({run.id}) {words[each.status]}: {why}.")
    return notes


def _why(run: Run) -> str:
    lost = run.status == "lost" and run.record.get("heartbeat")
    return f"no sign of life since {run.record['heartbeat']}" if lost else "no reason recorded"
