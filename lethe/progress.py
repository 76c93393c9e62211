"""Progress with rate and time left, on standard error, so that standard output holds the answer alone.

On a terminal it is a bar. Elsewhere, in a file or in a job's log, it is a line every `EVERY` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lethe import distributed
from lethe.errors import PlainFormatter, printable

console = Console(stderr=True, highlight=False)
Advance = Callable[..., None]
EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class _Rate(TextColumn):
    """Units of work per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task):  # type: ignore[no-untyped-def]
        speed = task.finished_speed or task.speed
        return f"{speed:.1f} {task.fields['unit']}/s" if speed else ""


@contextlib.contextmanager
def bar(description: str, total: float, unit: str = "steps") -> Iterator[Advance]:
    """Show progress over `total` units of work. Call what is yielded for work done: `advance(n)`, `advance(n, "note")`.

    Of several processes, the first shows it.
    """
    if not distributed.is_first():
        yield lambda work=1, note=None: None
        return
    if not console.is_terminal:
        with _lines(description, total, unit) as advance:
            yield advance
        return
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
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(printable(description), total=total, unit=unit, note="")

        def forward(work: float = 1, note: str | None = None) -> None:
            fields: dict[str, Any] = {} if note is None else {"note": printable(note)}
            progress.update(task, advance=work, **fields)

        yield forward


@contextlib.contextmanager
def _lines(description: str, total: float, unit: str) -> Iterator[Advance]:
    """As `bar`, in lines: one every `EVERY` seconds, and one at the end."""
    began = last = time.monotonic()
    before, done, note = None, 0.0, ""

    def line() -> None:
        took = time.monotonic() - began
        rate = (done - (before or 0)) / max(1e-9, took)
        left = f", {_clock((total - done) / rate)} left" if rate and done < total else ""
        said = f"{time.strftime('%H:%M:%S')} {description}: {done:,.0f} of {total:,.0f} {unit} in {_clock(took)}{left}"
        console.print(printable(f"{said}  {note}".rstrip()), soft_wrap=True, markup=False)

    def advance(work: float = 1, said: str | None = None) -> None:
        nonlocal before, last, done, note
        if before is None:  # a resumed run first reports its earlier work, which says nothing about the rate
            before = work if time.monotonic() - began < 1 else 0
        done, note = done + work, note if said is None else said
        if (now := time.monotonic()) - last >= EVERY:
            last = now
            line()

    try:
        yield advance
    finally:
        if before is not None:  # if nothing was done, an error has its own line
            line()


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def quiet() -> None:
    """Silence the progress bars and warnings of libraries, which the user cannot act on. Lethe's own are in a run's log.txt."""
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet["HF_HUB_VERBOSITY"] = "error"
    for name, value in (quiet | {"DATASETS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    console = logging.StreamHandler()
    console.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    console.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.ERROR, handlers=[console])
    logging.getLogger("lethe").setLevel(logging.INFO)
    hub = logging.getLogger("huggingface_hub.utils._http")  # waits half a minute without a network
    if hub.handlers:
        hub.handlers[0].stream = sys.stderr  # type: ignore[attr-defined]  # the stream may have changed since the last call
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("no answer from the hub. %(message)s"))
        handler.addFilter(lambda record: "etry" in record.getMessage())
        hub.addHandler(handler)
    hub.setLevel(logging.WARNING)
    hub.propagate = False
