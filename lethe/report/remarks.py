"""What tables say of runs beside their numbers: which job it was, what is degenerate, why a run is not complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lethe.results.format import DEGENERATE, DEGENERATE_NOTE, MISSING
from lethe.results.listing import Entry
from lethe.runs.run import Run


def job(run: Run) -> str:
    """Its job id or its own, with its status if it is not complete."""
    name = str(run.record.get("job_id") or run.id)
    return name if run.status == "complete" else f"{name} ({run.status})"


def remarks(runs: Sequence[Run], cells: list[list[str]]) -> list[str]:
    """Notes on degenerate results, on numbers that were set apart and on runs that are not complete."""
    notes = [DEGENERATE_NOTE] if any(cell.endswith(DEGENERATE) for row in cells for cell in row) else []
    if odd := [run.record["name"] for run in runs if getattr(run, "apart", None)]:
        which = ", ".join(odd[:10]) + (f" and {len(odd) - 10} more" if len(odd) > 10 else "")
        notes.append(f"{MISSING} of {which}: measured in another way, see the table of that name.")
    return [*notes, *reasons(runs)]


def reasons(runs: Iterable[Run | Entry]) -> list[str]:
    """A note for each run that failed, diverged, was cancelled or lost."""
    words = {"failed": "failed", "diverged": "diverged", "cancelled": "was cancelled", "lost": "was lost"}
    notes = []
    for each in runs:
        run, reason = (each.run, each.reason) if isinstance(each, Entry) else (each, each.record.get("reason"))
        if each.status in words:
            notes.append(f"{run.record['name']} ({run.id}) {words[each.status]}: {reason or _why(run)}.")
    return notes


def _why(run: Run) -> str:
    lost = run.status == "lost" and run.record.get("heartbeat")
    return f"no sign of life since {run.record['heartbeat']}" if lost else "no reason recorded"
