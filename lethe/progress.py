"""Progress bars with rate and time left, on standard error, so that standard output holds the answer alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
Advance = Callable[..., None]


class _Rate(TextColumn):
    """Work done a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task):  # type: ignore[no-untyped-def]
        speed = task.finished_speed or task.speed
        return f"{speed:.1f} {task.fields['unit']}/s" if speed else ""


@contextlib.contextmanager
def bar(description: str, total: float, unit: str = "steps") -> Iterator[Advance]:
    """A bar over `total` units of work; call what it yields with the work done: `advance(n)`, `advance(n, "a note")`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(work: float = 1, note: str | None = None) -> None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            progress.update(task, advance=work, **fields)

        yield advance
