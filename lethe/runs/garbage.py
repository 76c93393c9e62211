"""Rare garbage collections while a command imports torch and transformers.

These imports trigger hundreds of collections that find nothing, and Python runs one more when the process ends.
`benchmarks/start.py` measures their time. `Run.running` makes collections as frequent as usual.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

SELDOM = (100_000, 50, 50)
_usual = gc.get_threshold()


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """For a whole command: rare collections until a run begins, and none when the process ends."""
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.freeze()


def as_usual() -> None:
    """Inside a command: collect as often as Python does by default. Elsewhere this changes nothing."""
    if gc.get_threshold() == SELDOM:
        gc.set_threshold(*_usual)
