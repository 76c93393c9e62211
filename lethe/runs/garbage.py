"""Python's search for garbage, kept off the million objects that torch and transformers consist of.

Importing them sets off hundreds of searches that find nothing. One more at the end of the process goes over all of them, as
does every full one in between. `benchmarks/start.py` measures what that takes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_usual = gc.get_threshold()


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """In a process of Lethe's own, before it imports libraries: searches are rare until work begins, and none is last."""
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.freeze()


def freeze() -> None:
    """What there is now is passed over from here on; not what was garbage by then."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside, searches come as often as usual and pass over the objects there were before. The outermost counts."""
    own = not gc.get_freeze_count()
    before = gc.get_threshold()
    gc.set_threshold(*_usual)
    if own:
        freeze()  # a model that the caller is done with is not kept for the length of a run
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if own:
            gc.unfreeze()
