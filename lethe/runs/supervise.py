"""What accompanies a run's work: its log file, its heartbeat, and requests to stop it.

A thread renews the run's record every `HEARTBEAT_SECONDS`, and every second looks for a file `stop` in the run's folder, at its
time limit, and at the run's other processes. A request to stop becomes SIGTERM, which raises `Terminated` in the main thread.
While the run is `deferring`, it only sets `run.stopping`.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe import distributed
from lethe.errors import LetheError, PlainFormatter, full_disk
from lethe.runs.peers import END_SECONDS

if TYPE_CHECKING:
    from lethe.runs.run import Run

HEARTBEAT_SECONDS = 20
LOST_AFTER_SECONDS = 120
"""Seconds without a heartbeat after which a run counts as `lost`, where its process cannot be looked up."""
POLL_SECONDS = 1
GRACE_SECONDS = 120
TIME_LIMIT = "time limit reached"
logger = logging.getLogger(__name__)


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Terminated(KeyboardInterrupt):
    """The process received a request to stop. The run can be resumed."""


class _LogFile(logging.FileHandler):
    """A log file that leaves out lines for which a full disk has no room: the run itself reports the full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not full_disk(sys.exc_info()[1] or Exception()):
            super().handleError(record)


def log_file(folder: Path) -> Path:
    """The log of this process, in a run's folder: log.txt, or log-rankN.txt for all but the first of several processes."""
    return folder / ("log.txt" if distributed.is_first() else f"log-rank{distributed.rank()}.txt")


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Inside, messages go to log.txt in the run's folder too, and so does the traceback of an unexpected error.

    Of several processes, each but the first logs only its errors.
    """
    handler = _LogFile(log_file(folder), delay=not distributed.is_first())
    if not distributed.is_first():
        handler.setLevel(logging.ERROR)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        if not isinstance(error, LetheError) and not full_disk(error):
            logger.error("the run failed", exc_info=error)
        raise
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # of a full disk
            handler.close()


@contextlib.contextmanager
def heartbeat(run: Run) -> Iterator[None]:
    """Inside, a thread renews the run's record and looks for requests to stop."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(run: Run, done: threading.Event) -> None:
    began = renewed = time.monotonic()
    limit = 3600 * float((run.record.get("config") or {}).get("time_limit") or 0) or float("inf")
    lost_at = None
    while not done.wait(min(POLL_SECONDS, max(0.1, began + limit - time.monotonic()))):
        if run.peers:
            run.peers.beat()
            found = run.peers.lost()
            lost_at = (lost_at or time.monotonic()) if found else None
            if found and lost_at and time.monotonic() - lost_at > END_SECONDS:
                run.peers.abandon(*found)
        if time.monotonic() - renewed >= HEARTBEAT_SECONDS:
            renewed = time.monotonic()
            with contextlib.suppress(OSError):
                run.beat()
        is_late = time.monotonic() - began >= limit
        request = TIME_LIMIT if is_late else run.asked_to_stop()
        if request and not run.stopping:
            run.stopping = request
            os.kill(os.getpid(), signal.SIGTERM)
        if is_late:
            limit = float("inf")
            if not done.wait(GRACE_SECONDS):  # the process hangs outside of Python, where signals are not handled
                run.update(status="failed", reason=f"{TIME_LIMIT}, and the process hung", finished=now())
                os._exit(124)


@contextlib.contextmanager
def terminable(run: Run) -> Iterator[None]:
    """Inside, SIGTERM stops the run. Python handles signals in the main thread only; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        run.stopping = run.stopping or "SIGTERM"
        if not run.is_deferring and not run.is_ending:
            raise run.terminated()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
