"""A run is a directory of plain files: run.json (what it is, how it stands, what came out), metrics.jsonl (one line a
logging step), curve.jsonl (one line an evaluation) and log.txt. Everything that reads results reads these files, so
a run needs no server and no database, and works on a shared file system.

run.json is replaced whole (temporary file, fsync, rename): a reader never sees half of it. `record.py` says what it may hold.
Whoever works on a run holds the lock of its folder and renews run.json; a run that is found `running`, whose process is gone
or, on another machine, has not renewed it for two minutes, was lost. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from lethe.errors import LetheError, PlainFormatter, full_disk, printable
from lethe.files import RUN, refuse_links, refuse_name, refuse_run_folder, slug, write_atomically
from lethe.runs import garbage
from lethe.runs.locks import FolderLock, HeldError, lives, seconds_since_written, spoken
from lethe.runs.machine import environment, peak_memory, refuse_several_processes
from lethe.runs.record import last_row_of, record_of, rows_of

Status = Literal["queued", "running", "complete", "failed", "diverged", "cancelled", "lost"]
HEARTBEAT_SECONDS = 20
LOST_AFTER_SECONDS = 120
GRACE_SECONDS = 120
POLL_SECONDS = 1
STOP = "stop"
TIME_LIMIT = "time limit reached"
logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """The process was asked to stop; the run can go on later."""


class _Log(logging.FileHandler):
    """A run's log file; a line that a full disk has no room for is left out: what needs room ends the run and says so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not full_disk(sys.exc_info()[1] or Exception()):
            super().handleError(record)


class Run:
    """One run's directory. `record` is the content of run.json; `update` changes it and writes it.

    Use as a context for the work itself: status, times, heartbeat, log file and reason of failure are kept.

        run = Run.create("evaluate", "eval", config, out="runs")
        with run.running():
            run.update(evals=...)
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        self.lock = FolderLock(path, shared=record.get("kind") == "sweep")
        self.record = record
        self.stopping: str | None = None
        self._deferred = False
        self._began = self._before = 0.0
        self._made_folder = False
        self._writing = threading.Lock()

    @classmethod
    def create(cls, kind: str, name: str, config: dict[str, Any], out: str | Path) -> Run:
        """A new directory `out/<kind>-<name>-<id>/`, status `queued`.

        Raises:
            LetheError: `out` is itself a run, is a file, or cannot be written; several processes share the work.
        """
        refuse_several_processes()
        refuse_run_folder(out)
        refuse_name(name)
        run_id = secrets.token_hex(4)
        path = Path(out) / f"{kind}-{slug(name)}-{run_id}"
        run = cls(path, {"id": run_id, "kind": kind, "name": name, "status": "queued", "reason": None, "job_id": None})
        run._made_folder = not Path(out).exists()
        made = False
        try:
            path.mkdir(parents=True)
            made = True
            run.update(launcher="local", created=now(), started=None, finished=None, heartbeat=None, config=config)
        except OSError as error:
            if made:
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
        """The recorded status; `lost` for one `running` that nobody works on: see `silent`."""
        status = self.record["status"]
        return "lost" if status == "running" and self.silent else status

    @property
    def silent(self) -> bool:
        """Whether the process that the record names is gone; another machine's is after two minutes without a sign of life."""
        alive = lives(self.record.get("environment") or {}) if self.record.get("heartbeat") else False
        return self.seconds_since_heartbeat > LOST_AFTER_SECONDS if alive is None else not alive

    @property
    def seconds_since_heartbeat(self) -> float:
        """Seconds since the record was renewed: whoever works on the run does so, whatever its machine's clock shows."""
        return seconds_since_written(self.path / RUN)

    @property
    def diverged(self) -> bool:
        """Whether its training or an evaluation on the way found that it diverged; the status says so once its work is done."""
        return bool(self.record.get("divergence"))

    def hold(self, job_id: str | None = None) -> None:
        """Take the run for this process, until it has run or `lock` is released; its record is read again.

        `job_id`: the Slurm job of this process. Slurm has ended earlier processes of the same job.

        Raises:
            HeldError: another process works on it.
            LetheError: its folder cannot be written, or has links out of it.
        """
        if self.lock.held:
            return
        refuse_links(self.path)
        self.lock.acquire()
        try:
            self.record = record_of(self.path)
            if not self.lock.shared and not (job_id and self.record["job_id"] == job_id):
                self._refuse_held()
        except LetheError:
            self.lock.release()
            raise

    def _refuse_held(self) -> None:
        """Refuse a run that is in use by its record although the lock is free: by another machine, or without a lock."""
        where = self.record.get("environment") or {}
        alive = lives(where)
        ours = alive is False or (alive and where["pid"] == os.getpid())
        if self.record["status"] == "running" and not ours and not self.silent:
            raise HeldError(
                f"'{self.path}' is in use by {spoken(where)}, which wrote to it "
                f"{self.seconds_since_heartbeat:.0f} s ago; stop it there, or try again in {LOST_AFTER_SECONDS} s if it is gone"
            )

    def discard(self) -> None:
        """Remove the directory of a run that was refused before it did anything."""
        self.lock.release()
        shutil.rmtree(self.path)
        if self._made_folder:
            with contextlib.suppress(OSError):  # other runs have come into it since
                self.path.parent.rmdir()

    def update(self, **fields: Any) -> None:
        """Set fields of run.json and write it whole. A field that is a dict is merged into the dict that is there."""
        with self._writing:
            for key, value in fields.items():
                old = self.record.get(key)
                self.record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            write_atomically(self.path / RUN, json.dumps(self.record, indent=2, default=str))

    def try_to_record(self, **facts: Callable[[], Any]) -> None:
        """Record what each function returns. One that fails is a warning, with its reason under `missing`: it must not cost the
        run its result."""
        for name, fact in facts.items():
            try:
                value = fact()
            except Exception as error:
                if full_disk(error):
                    raise
                reason = printable(f"{type(error).__name__}: {error}".rstrip(": "), 300)
                logger.warning("%s could not be recorded: %s", name, reason)
                self.update(missing={name: reason})
            else:
                self.record.get("missing", {}).pop(name, None)  # of an earlier try, before the run was resumed
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
        """Append one line to `metrics.jsonl` or `curve.jsonl`. Not-a-number is written as it is."""
        with (self.path / file).open("ab+") as lines:
            if lines.seek(0, os.SEEK_END):
                lines.seek(-1, os.SEEK_END)
                if lines.read(1) != b"\n":  # a crash cut the last line short: the new one must not join it
                    lines.write(b"\n")
            lines.write(json.dumps(row, default=str).encode() + b"\n")

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` or `curve.jsonl`. Lines that are no rows are left out, and reported unless a crash cut
        the last one short."""
        rows, wrong = rows_of(self.path / file)
        if wrong:
            lines = ", ".join(map(str, wrong[:5])) + " …" * (len(wrong) > 5)
            _say_once(f"{self.path / file}: line {lines} cannot be read; left out")
        return rows

    def last_row(self, file: str) -> dict[str, Any] | None:
        """The last whole line of `metrics.jsonl` or `curve.jsonl`, read from the file's end; None if there is none."""
        return last_row_of(self.path / file)

    def artifact(self, kind: str) -> Path | None:
        """Where the artifact of that kind lies, within the run's folder; None if the run has none.

        Raises:
            LetheError: a link leads out of the folder.
        """
        facts = (self.record.get("artifacts") or {}).get(kind)
        if facts is None:
            return None
        path = self.path / facts["path"]
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise LetheError(f"'{self.path}': its {kind} is a link to '{path.resolve()}'; put the files there themselves")
        return path

    def keep_until(self, step: int) -> None:
        """Drop lines of metrics, batches and curve that come after `step`: a resumed run writes them again."""
        for file in ("metrics.jsonl", "batches.jsonl", "curve.jsonl"):
            if (self.path / file).exists():
                kept = [json.dumps(row) + "\n" for row in self.rows(file) if row["step"] <= step]
                write_atomically(self.path / file, "".join(kept))

    @contextlib.contextmanager
    def running(self) -> Iterator[Run]:
        """Run the work inside as this run: keeps status, times, heartbeat and log file; a failure is recorded and raised.

        SIGTERM, and the end of `time_limit`, raise `Terminated`; inside `deferring` they only set `stopping`.

        Raises:
            HeldError: another process works on it.
        """
        self.hold()
        try:
            with self._at_work():
                yield self
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        self._before = (self.record.get("environment") or {}).get("seconds") or 0.0
        self._began = time.monotonic()
        handler = _Log(self.path / "log.txt")
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        status, reason = "complete", None
        with self._terminable():
            try:
                facts = {"started": self.record.get("started") or now(), "finished": None, "heartbeat": now()}
                self.update(status="running", reason=None, environment=environment(), **facts)
                with garbage.frozen():
                    yield
            except KeyboardInterrupt as error:
                late = self.stopping == TIME_LIMIT
                status, reason = "failed" if late else "cancelled", str(error) or "interrupted from the keyboard"
                raise
            except BaseException as error:
                told = self._full(error) if full_disk(error) else error
                status, reason = "failed", f"{type(told).__name__}: {told}"
                if told is not error:
                    raise told from error
                if not isinstance(error, LetheError):
                    logger.error("the run failed", exc_info=error)
                raise
            finally:
                stop.set()
                beat.join()
                root.removeHandler(handler)
                with contextlib.suppress(OSError):  # of a full disk, whose error is told below
                    handler.close()
                if self.diverged:
                    status = "diverged" if status == "complete" else status
                    reason = "; then ".join(filter(None, [self.record["divergence"]["reason"], reason]))
                taken = {"peak_memory": peak_memory(), "seconds": self._seconds()}
                try:
                    self.update(status=status, reason=reason, finished=now(), heartbeat=now(), environment=taken)
                except OSError as error:
                    if full_disk(error) and status in {"complete", "diverged"}:  # otherwise what happened is being raised
                        raise self._full(error) from error
                    if status in {"complete", "diverged"}:
                        raise

    def _full(self, error: BaseException) -> LetheError:
        return LetheError(f"a disk is full ({error}); make room and go on: {self._again}")

    @property
    def _again(self) -> str:
        return "lethe lab build" if self.record["kind"] == "lab" else f"lethe resume {self.path}"

    def _seconds(self) -> float:
        return round(self._before + time.monotonic() - self._began, 3)

    def beat(self) -> None:
        """Renew the heartbeat and the seconds that the run has taken so far, before it was resumed too."""
        self.update(heartbeat=now(), environment={"seconds": self._seconds()})

    def ask_to_stop(self, reason: str) -> None:
        """Ask the process that works on this run, wherever it is, to save and stop; `reason` becomes the run's."""
        write_atomically(self.path / STOP, reason)

    def asked_to_stop(self) -> str | None:
        """The reason why the run was asked to stop; None when it was not."""
        try:
            return printable((self.path / STOP).read_text(errors="replace"), 200)
        except OSError:
            return None

    def _beat(self, stop: threading.Event) -> None:
        limit = 3600 * float((self.record.get("config") or {}).get("time_limit") or 0)
        renewed = time.monotonic()
        while not stop.wait(min(POLL_SECONDS, max(0.1, self._began + limit - time.monotonic())) if limit else POLL_SECONDS):
            if time.monotonic() - renewed >= HEARTBEAT_SECONDS:
                renewed = time.monotonic()
                with contextlib.suppress(OSError):
                    self.beat()
            late = limit and time.monotonic() - self._began >= limit
            asked = TIME_LIMIT if late else self.asked_to_stop()
            if asked and not self.stopping:
                self.stopping = asked
                os.kill(os.getpid(), signal.SIGTERM)
            if late:
                limit = 0.0
                if not stop.wait(GRACE_SECONDS):  # the process hangs outside of Python, where no signal is handled
                    self.update(status="failed", reason=f"{TIME_LIMIT}, and the process hung", finished=now())
                    os._exit(124)

    @contextlib.contextmanager
    def _terminable(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def terminate(number: int, frame: Any) -> None:
            self.stopping = self.stopping or "SIGTERM"
            if not self._deferred:
                raise Terminated(f"{self.stopping}; go on with: {self._again}")

        previous = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside, a request to stop waits: the work looks at `stopping` where it can be saved, and is ended afterwards."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.stopping:
            raise Terminated(f"{self.stopping}; go on with: {self._again}")


_said: set[str] = set()


def _say_once(what: str) -> None:
    """Log an error once: numbers are missing from what is made of these runs."""
    if what not in _said:
        logger.error("%s", what)
    _said.add(what)


def find_runs(folder: str | Path) -> list[Run]:
    """Every run in `folder` (or in its `runs/`), oldest first; `folder` may be a run itself, or a sweep, with its runs."""
    folder = Path(folder)
    if os.path.exists(folder / RUN):
        first = Run.open(folder)
        return [first, *_readable(folder.parent / name for name in first.record.get("runs") or [])]
    runs = _readable(file.parent for file in (*folder.glob(f"*/{RUN}"), *folder.glob(f"runs/*/{RUN}")))
    return sorted(runs, key=lambda run: (run.record.get("created") or "", run.id))


def _readable(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders; one that cannot be read is named, and must not take the others with it."""
    runs = []
    for folder in folders:
        try:
            runs.append(Run.open(folder))
        except LetheError as error:
            _say_once(f"{error}; left out")
    return runs


def find_run(run_id: str, out: str | Path = "runs") -> Run:
    """The run with this id, a unique part of its folder's name, or its folder; looked for in `out`, `runs/` and `*/runs/`.

    Raises:
        LetheError: there is none, or more than one.
    """
    if not run_id:
        raise LetheError("run: names no run; write run:ID")
    if os.path.exists(Path(run_id) / RUN):
        return Run.open(run_id)
    files = [*Path(out).glob("*/run.json"), *Path("runs").glob("*/run.json"), *Path().glob("*/runs/*/run.json")]
    folders = {file.parent.resolve(): file.parent for file in files}
    exact = [path for path in folders.values() if path.name.endswith(f"-{run_id}")]
    found = exact or [path for path in folders.values() if run_id in path.name]
    if len(found) == 1:
        return Run.open(found[0])
    if found:
        raise LetheError(
            f"run:{run_id} fits {len(found)} runs ({', '.join(sorted(p.name for p in found)[:4])}); give the whole id"
        )
    raise LetheError(f"run:{run_id} is not in '{out}', runs/ or */runs/; `lethe runs FOLDER` lists the runs of a folder")


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds_since(timestamp: str | None) -> float:
    """Seconds from `timestamp` (as `now` writes it) until now, by this machine's clock: to be shown, not to judge by.

    Infinity for None; 0 for a time to come; a time without a zone is in UTC.
    """
    if timestamp is None:
        return float("inf")
    then = datetime.datetime.fromisoformat(timestamp)
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds())
