"""Folders that are kept for later runs (teachers' states, fitted maps), and what of them goes when they would take too much.

$LETHE_HOME/teachers/<key>/    used last when its time says; locked (flock, shared) by each process that reads it
$LETHE_HOME/teachers/<key>.lock    held by the process that builds or removes it: `locks.building`
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def prune(shelf: Path, room: int = 0) -> list[Path]:
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
