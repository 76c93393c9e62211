"""Memory that an update, or a batch of an evaluation, frees stays with the process, for the next one.

glibc hands a freed stretch of more than some MiB back to the system, and every update has its activations' pages mapped and
cleared anew: 12,000 pages of 4 KiB at 16 documents of 64 tokens on the lab, a tenth of the update's time. The peak is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
KEPT = 2**30
LARGEST = 2**25
"""Bytes; larger pieces are mapped each by itself, glibc allows no more."""
_entered: list[None] = []
"""One for each `kept_memory` that is entered: the outermost gives back."""


def give_back() -> None:
    """Give freed memory back to the system, what lies between pieces in use, too. glibc only."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, and afterwards, freed memory is kept for reuse; at the end what is free by then is given back. glibc only."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc and not _entered:
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    _entered.append(None)
    try:
        yield
    finally:
        _entered.pop()
        if not _entered:
            give_back()
