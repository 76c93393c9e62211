"""Notes under tables: a run's job, degenerate results, numbers that stand apart, and why a run is not complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lethe.results.format import DEGENERATE, DEGENERATE_NOTE, MISSING
from lethe.results.listing import Entry
from lethe.runs.run import Run

ENDED = {"failed": "failed", "diverged": "diverged", "cancelled": "was cancelled", "lost": "was lost"}


def job(run: Run) -> str:
    """The run's job id, or else its own id; with the status if the run is not complete."""
    name = str(run.record.get("job_id") or run.id)
    return name if run.status == "complete" else f"{name} ({run.status})"


def degenerate(rows: list[dict[str, str]]) -> list[str]:
    """The note on degenerate results, if a table has any."""
    return [DEGENERATE_NOTE] if any(cell.endswith(DEGENERATE) for row in rows for cell in row.values()) else []


def remarks(runs: Sequence[Run], rows: list[dict[str, str]]) -> list[str]:
    """Notes on degenerate results, on numbers that stand apart and on runs that are not complete."""
    notes = degenerate(rows)
    if apart := [run.record["name"] for run in runs if getattr(run, "apart", None)]:
        which = ", ".join(apart[:10]) + (f" and {len(apart) - 10} more" if len(apart) > 10 else "")
        notes.append(f"{MISSING} of {which}: measured in another way, see the table of that name.")
    return [*notes, *reasons(runs)]


def reasons(runs: Iterable[Run | Entry]) -> list[str]:
    """A note for each run that failed, diverged, was cancelled or was lost."""
    notes = []
    for each in runs:
        run, reason = (each.run, each.reason) if isinstance(each, Entry) else (each, each.record.get("reason"))
        if each.status not in ENDED:
            continue
        silent = each.status == "lost" and run.record.get("heartbeat")
        why = reason or (f"no heartbeat since {run.record['heartbeat']}" if silent else "no reason recorded")
        notes.append(f"{run.record['name']} ({run.id}) {ENDED[each.status]}: {why}.")
    return notes
