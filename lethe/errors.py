"""Errors that a user can act on.

The command line prints such an error as one line and exits with code 2; from Python it is an ordinary exception.
A message says what was given, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class LetheError(Exception):
    """Something the user gave cannot work. The message is one line and says what to do."""


def full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk, or one's share of it, is full: the system's own, or safetensors' account of it."""
    if isinstance(error, LetheError):  # says itself what to do
        return False
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def nearest(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the name in `known` closest to `given`, or the list of names if none is close.

    >>> nearest("retian_coef", ["retain_coef", "remove_coef"])
    "; did you mean 'retain_coef'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 30 else ""
