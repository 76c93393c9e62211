"""Which process works in a folder, one at a time, and whether it is still alive.

    FolderLock(folder).acquire()    refused while another process has it; released when the process that has it dies
    lives(environment)              whether the process named in a run's record is alive, by its number and start
    seconds_since_written(file)     a file's age by the clock of its own file system

The lock is an flock on a file in the folder. The kernel releases it when the process dies. Other machines see it if the file
system shares locks between them (NFS from version 4 on, Lustre with `flock`). Elsewhere only the record says whether a process
is alive: a process at work renews it. No machine is judged by the clock of another.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from lethe import distributed
from lethe.errors import LetheError
from lethe.home import evict

LOCK = "work.lock"
T = TypeVar("T")
logger = logging.getLogger(__name__)


class HeldError(LetheError):
    """Another process works in the folder."""


class FolderLock:
    """The right to work in a folder. `shared`: several processes may have it, as the controllers of a sweep do."""

    def __init__(self, folder: Path, shared: bool = False):
        self.folder, self.shared = folder, shared
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock; does nothing if this object has it.

        Raises:
            HeldError: another process, or another object of this one, has it.
            LetheError: the folder cannot be written.
        """
        if self.held:
            return
        try:
            file = os.fdopen(os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise LetheError(f"out: cannot write in '{self.folder}' ({error.strerror}); choose another folder") from error
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read(200).strip() or in_words({})
            file.close()
            raise HeldError(f"'{self.folder}' is in use by {who}; wait until it is done, or stop it first") from error
        except OSError as error:
            logger.warning(
                "%s has no locks (%s): never start work there from two machines at once", self.folder, error.strerror
            )
        self._file = file
        with contextlib.suppress(OSError):  # of a full disk
            file.truncate(0)
            file.write(in_words(identity()))
            file.flush()

    def release(self) -> None:
        """Release the lock. Its file stays, since another process may be opening it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Inside, no other process builds what is cached in `folder`."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is building %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_once(
    folder: Path, is_whole: Callable[[], bool], build: Callable[[Path], None], load: Callable[[], T], room: int = 0
) -> T:
    """What `load` reads from the cache in `folder`, which is built first unless it is whole: by one run, while others wait.

    It is built in a folder of another name, by all processes of a run together. A damaged folder is built again. The least
    recently used folders beside it are evicted, to make `room` in bytes.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with contextlib.ExitStack() as held:

        def prepare() -> bool:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(building(folder))
            if is_whole():
                return True
            if folder.exists():
                logger.warning("the cache %s is damaged; building it again", folder)
            for rest in (folder, partial):  # left by a process that was killed: the lock is ours
                shutil.rmtree(rest, ignore_errors=True)
            evict(folder.parent, room)
            return False

        if not distributed.from_first(prepare):
            try:
                build(partial)
                distributed.from_first(lambda: partial.rename(folder))
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        found, error = None, None
        try:
            found = load()
        except OSError as own:
            error = own
        if distributed.total([error is not None])[0]:
            raise error or OSError("another process cannot read the cache; all machines must share $LETHE_HOME")
        return found  # type: ignore[return-value]


def identity(pid: int | None = None) -> dict[str, Any]:
    """What distinguishes a process (this one) from all others: its machine, its number and its start."""
    pid = os.getpid() if pid is None else pid
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid)}


def in_words(process: dict[str, Any]) -> str:
    """The process of that `identity` for a message; there may be none."""
    return f"process {process['pid']} on {process['host']}" if {"pid", "host"} <= process.keys() else "another process"


def lives(process: dict[str, Any]) -> bool | None:
    """Whether the process of that `identity` is alive; None if it is on another machine, or none is named."""
    if process.get("host") != socket.gethostname() or process.get("pid") is None:
        return None
    try:
        if psutil.Process(process["pid"]).status() == psutil.STATUS_ZOMBIE:
            return False
    except (psutil.Error, ValueError, OverflowError):
        return False
    return process.get("born") in {None, _born(process["pid"])}


def _born(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: psutil's time changes when the machine's clock is set. None if gone."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
        return f"{_boot()}:{ticks}"
    except OSError:  # not Linux, or no such process
        with contextlib.suppress(psutil.Error):
            return str(round(psutil.Process(pid).create_time(), 1))
        return None


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return ""


def seconds_since_written(file: Path) -> float:
    """Seconds since `file` was written, by the clock of its file system; infinity if there is no such file.

    A time in the future counts as one in the past: the clock was set since, and a process at work would have written again.
    """
    try:
        written = file.stat().st_mtime
    except OSError:
        return float("inf")
    try:
        with tempfile.TemporaryFile(dir=file.parent) as probe:
            return abs(os.fstat(probe.fileno()).st_mtime - written)
    except OSError:  # nothing can be written there: use this machine's clock
        return abs(time.time() - written)
