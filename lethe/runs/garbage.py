"""Garbage collection that skips the million objects of torch and transformers.

Importing these libraries triggers hundreds of collections that find nothing, and Python runs one more when the process ends.
`benchmarks/start.py` measures their time. So a command collects rarely until its work starts (`seldom`). The work itself
collects as often as usual, but only among objects that it made (`frozen`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_usual = gc.get_threshold()


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """For a whole command: rare collections until work starts, and none when the process ends."""
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.freeze()


def freeze() -> None:
    """Collect once. Later collections skip the objects that exist now."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside, collections are as frequent as usual and skip the objects that existed before. Nested calls change nothing."""
    own = not gc.get_freeze_count()
    before = gc.get_threshold()
    gc.set_threshold(*_usual)
    if own:
        freeze()  # collects first, so that a model that the caller no longer uses does not stay for the length of the run
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if own:
            gc.unfreeze()
