"""The processes of one run watch each other, so that all of them end when one dies, fails or hangs.

    run/ranks/0.json, 1.json, …     host and number of each process; how it ended, if it failed

Each process renews its file. A process counts as lost if its file says that it failed, if it is gone, or if it has not renewed
its file for `HUNG_AFTER` seconds. The others then wait for it in vain, perhaps inside a library where no signal is handled. So
a thread of each looks at the files, the lowest rank that is left records the run as failed, and all end. With one process there
are no such files.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe import distributed
from lethe.errors import LetheError
from lethe.files import RUN, write_atomically
from lethe.runs.locks import identity, in_words, lives
from lethe.runs.record import record_of

if TYPE_CHECKING:
    from lethe.runs.run import Run

RANKS = "ranks"
DONE = {"complete", "diverged"}
BEAT_SECONDS = 5
HUNG_AFTER = 40
"""Seconds without a beat after which a process counts as hung."""
END_SECONDS = 6
"""How long a process may take to end by itself once another is lost."""
LOOK_EVERY = 0.05
"""Seconds between two looks at the other processes, for each of them."""
LOOK_SECONDS = 3
"""How long to look for another process that ended first, before an error counts as this process's own."""


class Peers:
    """The processes of a run, as this one sees them."""

    def __init__(self, run: Run):
        self.folder = run.path / RANKS
        self.path = run.path
        self.own = self.folder / f"{distributed.rank()}.json"
        self.others = [self.folder / f"{n}.json" for n in range(distributed.world()) if n != distributed.rank()]
        self._beaten = self._looked = 0.0
        self._found: tuple[str, str] | None = None
        self.attempt = ""

    def begin(self) -> None:
        """Forget the processes of an earlier attempt, and say that this one works."""

        def renew() -> str:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            return secrets.token_hex(4)

        self.attempt = distributed.from_first(renew)
        self._write({})
        distributed.gather(None)

    def _write(self, facts: dict[str, Any]) -> None:
        write_atomically(self.own, json.dumps(identity() | {"attempt": self.attempt} | facts))
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """Renew this process's file, every few seconds."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.own)

    def end(self, status: str, reason: str | None) -> None:
        """Say how this process ended; nothing is left to say when the first is done."""
        if status in DONE and distributed.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            self._write({"status": status, "reason": reason, "time": time.time()})

    def lost(self) -> tuple[str, str] | None:
        """Status and reason of a process that ended first; None if all work or are complete."""
        if time.monotonic() - self._looked >= LOOK_EVERY * len(self.others):
            self._looked, self._found = time.monotonic(), self._look()
        return self._found

    def _look(self) -> tuple[str, str] | None:
        failed: list[tuple[float, str, str]] = []
        for file in self.others:
            facts = self._facts(file)
            who = f"rank {file.stem}"
            if facts.get("status") in DONE:
                continue
            if "status" in facts:
                failed.append((facts["time"], facts["status"], f"{who}: {facts['reason']}"))
            elif facts and lives(facts) is False:
                return "failed", f"{who} ({in_words(facts)}) died"
            elif facts and (silent := self._silence(file)) > HUNG_AFTER:
                return "failed", f"{who} ({in_words(facts)}) has not answered for {silent:.0f} s"
        return min(failed)[1:] if failed else None

    def _silence(self, file: Path) -> float:
        """Seconds since another process renewed its file, by the file system's clock, which this one's own file tells."""
        with contextlib.suppress(OSError):
            return self.own.stat().st_mtime + time.monotonic() - self._beaten - file.stat().st_mtime
        return 0.0

    def _facts(self, file: Path) -> dict[str, Any]:
        """What a process of this attempt has written; nothing if its file cannot be read."""
        try:
            facts = json.loads(file.read_text())
            return facts if facts["attempt"] == self.attempt else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def ended_first(self) -> tuple[str, str] | None:
        """As `lost`, for a process that is ending itself: the others may be about to be found."""
        deadline = time.monotonic() + LOOK_SECONDS
        while (found := self.lost()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def record(self, status: str, reason: str | None) -> None:
        """Write how the run ended, if this is the lowest rank that is left: the first, whose task that is, may be gone."""
        left = [file for file in (self.own, *self.others) if lives(self._facts(file)) and "status" not in self._facts(file)]
        if min(left, key=lambda file: int(file.stem), default=self.own) == self.own:
            with contextlib.suppress(LetheError, OSError):
                record = record_of(self.path)
                if record["status"] == "running":
                    write_atomically(self.path / RUN, json.dumps(record | {"status": status, "reason": reason}, indent=2))

    def abandon(self, status: str, reason: str) -> None:
        """End this process, whatever it waits for, because another is lost."""
        self.record(status, reason)
        self.end(status, reason)
        for file in self.others:
            if lives(self._facts(file)) and self._silence(file) > HUNG_AFTER:
                os.kill(self._facts(file)["pid"], signal.SIGKILL)  # a request to stop would not reach it
        os._exit(1)
