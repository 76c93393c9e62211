"""What is kept in $LETHE_HOME between processes to save time: requests, results of checkpoints, where lm-eval's tasks are.

Any of it can be removed at any time, and a home that cannot be written costs the time again, nothing else. A file begins with
the hash of the rest, so that one that is cut or was changed counts as absent. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from lethe.runs.run import write_atomically

MOST_BYTES = 2**30


def keep(file: Path, text: str, most: int = MOST_BYTES) -> None:
    """Write a .json file whole, then remove the oldest ones beside it until all take no more than `most` bytes."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{_hash(text)}\n{text}")
        total = 0
        for one in sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True):
            total += one.stat().st_size
            if total > most and one != file:
                one.unlink(missing_ok=True)


def kept(file: Path) -> str | None:
    """The text that was kept; None where there is none, or the file is not what was written."""
    try:
        expected, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if expected == _hash(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
