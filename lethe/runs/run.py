"""A run is a folder of plain files, which `Run` reads and writes. Other code reads results from these files only.

    run.json        what the run is, its status, its results; replaced whole, so that no reader sees half of it
    metrics.jsonl   one line per logging step
    curve.jsonl     one line per evaluation
    log.txt         messages

So a run needs no server and no database, and works on a shared file system. Whoever works on a run holds the lock of its folder
and renews run.json. A run is `lost` if its status is `running` and its process is gone or, on another machine, has not renewed
run.json for two minutes. `record` checks what run.json may hold. If several processes work on a run together, the first writes
its files, and the others have its record in memory only (`peers`). Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lethe import distributed
from lethe.errors import LetheError, full_disk, printable
from lethe.files import RUN, refuse_links, refuse_name, refuse_run_folder, slug, write_atomically
from lethe.runs import garbage
from lethe.runs.locks import FolderLock, HeldError, in_words, lives, seconds_since_written
from lethe.runs.machine import environment, peak_memory, refuse_several_processes, say_if_busy
from lethe.runs.peers import Peers
from lethe.runs.record import Status, last_row_of, record_of, rows_of
from lethe.runs.supervise import LOST_AFTER_SECONDS, TIME_LIMIT, Terminated, heartbeat, logged, now, terminable

STOP = "stop"
ALONE = {"lab", "sweep"}
"""Kinds of runs that one process does. A sweep starts others itself."""
logger = logging.getLogger(__name__)


class Run:
    """The folder of one run. `record` is the content of run.json; `update` changes and writes it.

    Work inside `running()`: it records status, times, heartbeat, log file and the reason of a failure.

        run = Run.create("evaluate", "eval", config, out="runs")
        with run.running():
            run.update(evals=...)
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        self.lock = FolderLock(path, shared=record.get("kind") == "sweep")
        self.record = record
        self.stopping: str | None = None
        self.is_deferring = self.is_ending = False
        self._began = self._before = 0.0
        self._made_folder = False
        self._writing = threading.Lock()
        self.peers = Peers(self) if distributed.world() > 1 else None

    @classmethod
    def create(cls, kind: str, name: str, config: dict[str, Any], out: str | Path) -> Run:
        """A new folder `out/<kind>-<name>-<id>/`, status `queued`.

        Raises:
            LetheError: `out` is itself a run, is a file, or cannot be written; or several processes cannot do this kind of
            work.
        """
        if kind in ALONE:
            refuse_several_processes(kind)
        refuse_run_folder(out)
        refuse_name(name)
        made: list[Run] = []

        def make() -> tuple[Path, dict[str, Any]]:
            made.append(cls._new(kind, name, config, Path(out)))
            return made[0].path, made[0].record

        path, record = distributed.from_first(make)
        return made[0] if made else cls(path, record)

    @classmethod
    def _new(cls, kind: str, name: str, config: dict[str, Any], out: Path) -> Run:
        run_id = secrets.token_hex(4)
        path = out / f"{kind}-{slug(name)}-{run_id}"
        run = cls(path, {"id": run_id, "kind": kind, "name": name, "status": "queued", "reason": None, "job_id": None})
        run._made_folder = not out.exists()
        try:
            path.mkdir(parents=True)
            run.update(launcher="local", created=now(), started=None, finished=None, heartbeat=None, config=config)
        except OSError as error:
            if path.exists():
                run.discard()
            raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at `path`.

        Raises:
            LetheError: there is no readable run.json, or it is not a run's record.
        """
        return cls(Path(path), record_of(Path(path)))

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def status(self) -> Status:
        """The recorded status, or `lost` for a run that is `running` without a process."""
        status = self.record["status"]
        return "lost" if status == "running" and self.silent else status

    @property
    def silent(self) -> bool:
        """Whether the process in the record is gone. On another machine it is after two minutes without a heartbeat."""
        alive = lives(self.record.get("environment") or {}) if self.record.get("heartbeat") else False
        return self.seconds_since_heartbeat > LOST_AFTER_SECONDS if alive is None else not alive

    @property
    def seconds_since_heartbeat(self) -> float:
        """Seconds since the record was written, by the clock of its file system."""
        return seconds_since_written(self.path / RUN)

    @property
    def diverged(self) -> bool:
        """Whether training or an evaluation has found a divergence. The status becomes `diverged` when the run ends."""
        return bool(self.record.get("divergence"))

    def hold(self, job_id: str | None = None) -> None:
        """Take the run for this process, until `lock` is released, and read its record again.

        `job_id`: the Slurm job of this process. An earlier process of the same job counts as gone: Slurm has ended it.

        Raises:
            HeldError: another process works on it.
            LetheError: its folder cannot be written, or has links that lead out of it.
        """
        self.record = distributed.from_first(lambda: self._hold(job_id))

    def _hold(self, job_id: str | None) -> dict[str, Any]:
        if self.lock.held:
            return self.record
        refuse_links(self.path)
        self.lock.acquire()
        try:
            self.record = record_of(self.path)
            if not self.lock.shared and not (job_id and self.record["job_id"] == job_id):
                self._refuse_held()
        except LetheError:
            self.lock.release()
            raise
        return self.record

    def _refuse_held(self) -> None:
        """Refuse a run that is in use according to its record, although the lock is free: on file systems without locks."""
        where = self.record.get("environment") or {}
        alive = lives(where)
        ours = alive is False or (alive and where["pid"] == os.getpid())
        if self.record["status"] == "running" and not ours and not self.silent:
            raise HeldError(
                f"'{self.path}' is in use by {in_words(where)}, which wrote to it "
                f"{self.seconds_since_heartbeat:.0f} s ago; stop it there, or try again in {LOST_AFTER_SECONDS} s if it is gone"
            )

    def discard(self) -> None:
        """Remove the folder of a run that was refused before it did anything."""
        self.lock.release()
        if distributed.is_first():
            shutil.rmtree(self.path)
        if self._made_folder:
            with contextlib.suppress(OSError):  # there are other runs in it by now
                self.path.parent.rmdir()

    def update(self, **fields: Any) -> None:
        """Set fields of run.json and write it. A dict is merged into the dict that is there."""
        with self._writing:
            for key, value in fields.items():
                old = self.record.get(key)
                self.record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            if distributed.is_first():
                write_atomically(self.path / RUN, json.dumps(self.record, indent=2, default=str))

    def try_to_record(self, **facts: Callable[[], Any]) -> None:
        """Record what each function returns. One that fails is logged, with its reason under `missing`: the run continues.

        Of several processes, one that fails ends the run, since the others may wait for it in the same function.
        """
        for name, fact in facts.items():
            try:
                value = fact()
            except Exception as error:
                if full_disk(error) or self.peers:
                    raise
                reason = printable(f"{type(error).__name__}: {error}".rstrip(": "), 300)
                logger.warning("%s could not be recorded: %s", name, reason)
                self.update(missing={name: reason})
            else:
                self.record.get("missing", {}).pop(name, None)  # of an attempt before the run was resumed
                self.update(**{name: value})

    def set_parents(self, **parents: dict[str, Any]) -> None:
        """Record what the run is made from.

        Raises:
            LetheError: a run that is resumed was made from something else.
        """
        for role, parent in parents.items():
            before = (self.record.get("parents") or {}).get(role, parent)
            if before["sha256"] != parent["sha256"]:
                raise LetheError(
                    f"{role}: '{parent.get('ref') or parent.get('source')}' has changed since the run began; start a new run"
                )
        self.update(parents=parents)

    def append(self, file: str, row: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl` or `curve.jsonl`."""
        if not distributed.is_first():
            return
        with (self.path / file).open("ab+") as lines:
            if lines.seek(0, os.SEEK_END):
                lines.seek(-1, os.SEEK_END)
                if lines.read(1) != b"\n":  # a crash cut the last line short: the new one must not join it
                    lines.write(b"\n")
            lines.write(json.dumps(row, default=str).encode() + b"\n")

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` or `curve.jsonl`, without invalid ones, which are logged unless a crash cut the last."""
        rows, wrong = rows_of(self.path / file)
        if wrong:
            lines = ", ".join(map(str, wrong[:5])) + " …" * (len(wrong) > 5)
            say_once(f"{self.path / file}: line {lines} cannot be read; left out")
        return rows

    def last_row(self, file: str) -> dict[str, Any] | None:
        """The last valid line of `metrics.jsonl` or `curve.jsonl`; None if there is none."""
        return last_row_of(self.path / file)

    def artifact(self, kind: str) -> Path | None:
        """The path of the run's artifact of that kind; None if it has none.

        Raises:
            LetheError: a link leads out of the folder.
        """
        facts = (self.record.get("artifacts") or {}).get(kind)
        if facts is None:
            return None
        path = self.path / facts["path"]
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise LetheError(f"'{self.path}': its {kind} is a link to '{path.resolve()}'; copy the files into the run's folder")
        return path

    def keep_until(self, step: int) -> None:
        """Drop lines of metrics, batches and curve after `step`: a resumed run writes them again."""
        for file in ("metrics.jsonl", "batches.jsonl", "curve.jsonl"):
            if distributed.is_first() and (self.path / file).exists():
                lines = [json.dumps(row) + "\n" for row in self.rows(file) if row["step"] <= step]
                write_atomically(self.path / file, "".join(lines))

    @contextlib.contextmanager
    def running(self) -> Iterator[Run]:
        """Work on the run inside: its status and times are recorded, and so is a failure, which is raised.

        SIGTERM, and the end of `time_limit`, raise `Terminated`. Inside `deferring` they only set `stopping`.

        Raises:
            HeldError: another process works on it.
        """
        self.hold()
        self._before = (self.record.get("environment") or {}).get("seconds") or 0.0
        self._began = time.monotonic()
        try:
            with terminable(self), logged(self.path), self._recorded(), heartbeat(self):
                facts = {"started": self.record.get("started") or now(), "finished": None, "heartbeat": now()}
                self.update(status="running", reason=None, environment=environment(), **facts)
                garbage.as_usual()
                say_if_busy()
                yield self
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Record how the work inside ends."""
        status, reason, first = "complete", None, None
        if self.peers:
            self.peers.begin()
        try:
            yield
        except BaseException as error:
            self.is_ending = True
            if self.peers and (first := self.peers.ended_first()):
                status, reason = first
                raise self._ended_by_another(status, reason) from error
            if isinstance(error, KeyboardInterrupt):
                status = "failed" if self.stopping == TIME_LIMIT else "cancelled"
                reason = str(error) or "interrupted from the keyboard"
                raise
            shown = self._full(error) if full_disk(error) else error
            status, reason = "failed", f"{type(shown).__name__}: {shown}"
            if shown is not error:
                raise shown from error
            raise
        finally:
            if self.diverged:
                status = "diverged" if status == "complete" else status
                reason = "; then ".join(filter(None, [self.record["divergence"]["reason"], reason]))
            took = {"peak_memory": peak_memory(), "seconds": self._seconds()}
            if self.peers and first:
                self.peers.record(status, reason)
            if self.peers:
                self.peers.end("diverged" if self.diverged and status == "complete" else status, reason)
            try:
                self.update(status=status, reason=reason, finished=now(), heartbeat=now(), environment=took)
            except OSError as error:
                if status in {"complete", "diverged"}:  # otherwise, an error is being raised already
                    if full_disk(error):
                        raise self._full(error) from error
                    raise

    def _ended_by_another(self, status: str, reason: str) -> BaseException:
        """What ends this process after another one. A request to stop that one was a request to all."""
        return Terminated(reason) if status == "cancelled" else LetheError(f"{reason}; resume with: {self._resume_command}")

    def _full(self, error: BaseException) -> LetheError:
        return LetheError(f"a disk is full ({error}); make room and resume: {self._resume_command}")

    @property
    def _resume_command(self) -> str:
        return "lethe lab build" if self.record["kind"] == "lab" else f"lethe resume {self.path}"

    def _seconds(self) -> float:
        return round(self._before + time.monotonic() - self._began, 3)

    def beat(self) -> None:
        """Renew the heartbeat and the seconds that the run has taken so far, those before it was resumed included."""
        self.update(heartbeat=now(), environment={"seconds": self._seconds()})

    def ask_to_stop(self, reason: str) -> None:
        """Ask the process that works on this run, wherever it is, to save and stop. `reason` becomes the run's."""
        write_atomically(self.path / STOP, reason)

    def asked_to_stop(self) -> str | None:
        """The reason in a request to stop the run; None if there is no request."""
        try:
            return printable((self.path / STOP).read_text(errors="replace"), 200)
        except OSError:
            return None

    def terminated(self) -> Terminated:
        return Terminated(f"{self.stopping}; resume with: {self._resume_command}")

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside, a request to stop waits: the work looks at `stopping` where it can save. Afterwards it is terminated."""
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False
        if self.stopping:
            raise self.terminated()

    def agree_to_stop(self) -> bool:
        """Whether any of the run's processes has received a request to stop, which then is one to all of them."""
        if not self.peers:
            return bool(self.stopping)
        requests = distributed.gather(self.stopping)  # a request that comes after this is for the next time
        if any(requests):
            self.stopping = next(filter(None, requests))
        return any(requests)


_logged: set[str] = set()


def say_once(what: str) -> None:
    """Log an error, once a process: lists and reports lack what it names."""
    if what not in _logged:
        logger.error("%s", what)
    _logged.add(what)


def seconds_since(timestamp: str | None) -> float:
    """Seconds since `timestamp` (as `now` writes it), by this machine's clock: to show, not to decide by.

    Infinity for None; 0 for a time in the future. A time without a zone is in UTC.
    """
    if timestamp is None:
        return float("inf")
    then = datetime.datetime.fromisoformat(timestamp)
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds())
