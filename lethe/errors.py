"""Errors that a user can act on.

The command line prints such an error as one line and exits with code 2; from Python it is an ordinary exception.
A message says what was given, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
import errno
import logging
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 1200
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: object, most: int | None = None) -> str:
    """Text of unknown origin as one line that is safe on a terminal: control characters and lone surrogates are escaped.

    `most`: characters at most; a longer text loses its middle.

    >>> printable("a\\x1b[31m\\nb")
    'a\\\\x1b[31m\\\\nb'
    """
    shown = str(text)
    if most is not None and len(shown) > most:
        shown = f"{shown[: most * 2 // 3]} … {shown[-(most // 3) :]}"
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), shown)


class LetheError(Exception):
    """What the user gave cannot work. The message is always one line, and says what to do."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message, LONGEST))


class PlainFormatter(logging.Formatter):
    """Log messages as one line without control characters, so that a message cannot imitate another or control a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        return "\n".join(map(printable, super().formatException(ei).splitlines()))


def full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full: an error of the system, or of safetensors, which quotes it."""
    if isinstance(error, LetheError):  # its message says what to do already
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
