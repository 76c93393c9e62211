"""$LETHE_HOME: the lab, and caches that save time, such as results of checkpoints and fitted maps.

`cache_key` names a cached result, `store` and `stored` write and read it as text, `use` and `evict` bound the folders of a
cache. You can delete any cache at any time. If $LETHE_HOME cannot be written, work is repeated and nothing else happens. A
cached text begins with the hash of the rest, so a truncated or changed file counts as absent. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
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
    """Cache `text` in a .json file, then evict the oldest .json files beside it until all have at most `most` bytes."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{_hash(text)}\n{text}")
        total = 0
        for one in sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True):
            total += one.stat().st_size
            if total > most and one != file:
                one.unlink(missing_ok=True)


def stored(file: Path) -> str | None:
    """The cached text; None if there is none, or the file was changed."""
    try:
        expected, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if expected == _hash(text) else None


def cache_key(*content: Any) -> str:
    """The name of a cached result: a hash of everything that the result depends on, in a form that JSON has."""
    return _hash(json.dumps(content, sort_keys=True))[:32]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


logger = logging.getLogger(__name__)
SHARE = 0.2
"""Share of the disk that the folders of one cache may take."""


def use(folder: Path, user: Any) -> None:
    """Record that `folder` is used now, and protect it from eviction as long as the object `user` lives."""
    handle = os.open(folder, os.O_RDONLY)
    weakref.finalize(user, os.close, handle)
    with contextlib.suppress(OSError):  # a read-only file system, or one without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(folder)


def evict(cache: Path, room: int = 0) -> list[Path]:
    """Remove the least recently used folders in `cache`, until the others and `room` bytes are within the bound.

    Folders that a process uses or builds stay. Leftovers of killed builders go.
    """
    bound, found = SHARE * shutil.disk_usage(cache).total - room, sorted(_cached_folders(cache))
    total, removed = sum(size for *_, size in found), []
    for is_complete, _, path, size in found:
        if total > bound or not is_complete:
            with _unused(path) as alone:
                if alone:
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
                    total -= size
    if removed:
        logger.info("removed the %d least recently used folders of %s", len(removed), cache)
    return removed


def _cached_folders(cache: Path) -> Iterator[tuple[bool, float, Path, int]]:
    """For each folder: whether it is complete, when it was used last, its path, and its size in bytes."""
    for path in cache.iterdir():
        with contextlib.suppress(OSError):  # another process removes it at this moment
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                yield not path.name.startswith("."), path.stat().st_mtime, path, size


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether no process builds or uses `folder`. Inside, none can begin to."""
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
    """The folder of labs and caches.

    Raises:
        LetheError: it is a file, or cannot be a folder.
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
