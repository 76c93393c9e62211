"""The list of runs that `lethe runs` shows: chosen, ordered, as data, or shown again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lethe.config import RunsConfig
from lethe.errors import LetheError, printable
from lethe.report.rendering import Table
from lethe.report.tables import runs_table
from lethe.results.listing import Entry, entries, ordered, refuse_unknown, select
from lethe.runs.finding import find_runs


def chosen(settings: RunsConfig) -> list[Entry]:
    """The runs that the settings ask for, in their order.

    Raises:
        LetheError: there is no such folder, or no run has a field that is named.
    """
    if not Path(settings.folder).is_dir():
        raise LetheError(f"folder: there is no folder '{settings.folder}'")
    every = entries(find_runs(settings.folder))
    refuse_unknown(settings.columns, every, "columns")
    found = select(every, settings.where)
    if settings.sort:
        refuse_unknown([settings.sort], every, "sort")
        return ordered(found, settings.sort, settings.reverse)
    return found[::-1] if settings.reverse else found


def as_data(entry: Entry, columns: list[str]) -> dict[str, Any]:
    """A run's record with how it stands, or only the fields that are named."""
    if columns:
        return {name: entry.value(name) for name in columns}
    facts = {"status": entry.status, "reason": entry.reason, "path": str(entry.run.path)}
    return entry.run.record | facts | {"age": entry.age, "progress": entry.value("progress"), "eta": entry.eta}


def as_table(settings: RunsConfig) -> Table | str:
    """The table of the runs, or one line if there are none."""
    if found := chosen(settings):
        return runs_table(found, settings.columns)
    return f"no{' such' if settings.where else ''} runs in '{printable(settings.folder)}'"


def watch(settings: RunsConfig, show: Callable[[Table | str], None]) -> None:
    """Show the table every so many seconds, until Ctrl-C: in place on a terminal, one after the other elsewhere."""
    if not sys.stdout.isatty():
        while True:
            show(as_table(settings))
            sys.stdout.flush()
            time.sleep(settings.every)
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)

    def fitting() -> Table | str:
        table = as_table(settings)
        room = max(1, console.height - 6)  # without title, header, rules and the note
        if isinstance(table, str) or len(table.rows) <= room:
            return table
        return replace(table, rows=table.rows[:room], notes=[f"… and {len(table.rows) - room} more"])

    with Live(fitting(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(settings.every)
            live.update(fitting(), refresh=True)
