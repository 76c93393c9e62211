"""What is kept in $LETHE_HOME between processes to save time: requests, results of checkpoints, where lm-eval's tasks are.

Any of it can be removed at any time, and a home that cannot be written costs the time again, nothing else. A file begins with
the hash of the rest, so that one that is cut or was changed counts as absent. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lethe.errors import LetheError
from lethe.files import write_atomically

MOST_BYTES = 2**30


def store(file: Path, text: str, most: int = MOST_BYTES) -> None:
    """Write a .json file whole, then remove the oldest ones beside it until all take no more than `most` bytes."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{_hash(text)}\n{text}")
        total = 0
        for one in sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True):
            total += one.stat().st_size
            if total > most and one != file:
                one.unlink(missing_ok=True)


def stored(file: Path) -> str | None:
    """The text that was kept; None where there is none, or the file is not what was written."""
    try:
        expected, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if expected == _hash(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


logger = logging.getLogger(__name__)
SHARE = 0.2
"""Of the disk, what the folders of one kind may take together."""


def use(folder: Path, user: Any) -> None:
    """Note that `folder` is used now, and keep it from being removed for as long as `user`, an object, lives."""
    handle = os.open(folder, os.O_RDONLY)
    weakref.finalize(user, os.close, handle)
    with contextlib.suppress(OSError):  # a file system without locks, or that is read-only
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(folder)


def evict(shelf: Path, room: int = 0) -> list[Path]:
    """Remove the folders in `shelf` that were not used for longest, until the others and `room` bytes are within the bound.

    One that a process uses or builds stays, whatever it takes; what a killed builder left goes.
    """
    bound, found = SHARE * shutil.disk_usage(shelf).total - room, sorted(_kept(shelf))
    total, removed = sum(size for *_, size in found), []
    for is_whole, _, path, size in found:
        if total > bound or not is_whole:
            with _unused(path) as alone:
                if alone:
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
                    total -= size
    if removed:
        logger.info("removed %d folders of %s that were not used for longest", len(removed), shelf)
    return removed


def _kept(shelf: Path) -> Iterator[tuple[bool, float, Path, int]]:
    """Of each folder, whether it is whole, when it was used last, and its bytes."""
    for path in shelf.iterdir():
        with contextlib.suppress(OSError):  # another process removes it at this moment
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                yield not path.name.startswith("."), path.stat().st_mtime, path, size


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether nobody else builds or uses `folder`; inside, nobody begins to."""
    name = folder.name.removeprefix(".").removesuffix(".partial")
    with (folder.parent / f"{name}.lock").open("w") as lock, contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            alone = False
        yield alone


def lethe_home() -> Path:
    """Where labs and what saves time are kept.

    Raises:
        LetheError: it is a file, or can be no folder.
    """
    home = Path(os.environ.get("LETHE_HOME") or Path.home() / ".cache" / "lethe")
    try:
        home = home.expanduser().absolute()
        there = next(path for path in (home, *home.parents) if path.exists())
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LetheError(f"LETHE_HOME: '{home}' cannot be a folder ({why}); set it to another") from error
    if not there.is_dir():
        raise LetheError(f"LETHE_HOME: '{home}' cannot be a folder, since '{there}' is a file; set it to another")
    return home
