"""A run is a directory of plain files: run.json (what it is, how it stands, what came out), metrics.jsonl (one line a
logging step), curve.jsonl (one line an evaluation) and log.txt. Everything that reads results reads these files, so
a run needs no server and no database, and works on a shared file system.

run.json is replaced whole (temporary file, fsync, rename): a reader never sees half of it. While a run is `running`
a heartbeat is renewed in it; one that is found `running` with an old heartbeat was lost. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from lethe import garbage
from lethe.errors import LetheError, full_disk, printable

Status = Literal["queued", "running", "complete", "failed", "diverged", "cancelled", "lost"]
HEARTBEAT_SECONDS = 20
LOST_AFTER_SECONDS = 120
GRACE_SECONDS = 120
POLL_SECONDS = 1
STOP = "stop"
TAIL_BYTES = 8192
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
        self.record = record
        self.stopping: str | None = None
        self._deferred = False
        self._began = self._before = 0.0
        self._made_folder = False
        self._lock = threading.Lock()

    @classmethod
    def create(cls, kind: str, name: str, config: dict[str, Any], out: str | Path) -> Run:
        """A new directory `out/<kind>-<name>-<id>/`, status `queued`.

        Raises:
            LetheError: `out` is itself a run, is a file, or cannot be written; several processes share the work.
        """
        refuse_several_processes()
        refuse_run_folder(out)
        run_id = secrets.token_hex(4)
        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
        path = Path(out) / f"{kind}-{slug}-{run_id}"
        run = cls(path, {"id": run_id, "kind": kind, "name": name, "status": "queued", "reason": None, "job_id": None})
        run._made_folder = not Path(out).exists()
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
            LetheError: there is no readable run.json.
        """
        file = Path(path) / "run.json"
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise LetheError(f"'{path}' is not a run: {file} cannot be read ({error})") from error
        if not isinstance(record, dict) or "status" not in record:
            raise LetheError(f"'{path}' is not a run: {file} is not a run's record")
        return cls(Path(path), record)

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def status(self) -> Status:
        """The recorded status; `lost` for one `running` whose process is gone, or whose heartbeat is older than two minutes."""
        status = self.record["status"]
        if status == "running" and (
            seconds_since(self.record.get("heartbeat")) > LOST_AFTER_SECONDS or self._process_is_gone()
        ):
            return "lost"
        return status

    @property
    def diverged(self) -> bool:
        """Whether its training or an evaluation on the way found that it diverged; the status says so once its work is done."""
        return bool(self.record.get("divergence"))

    def _process_is_gone(self) -> bool:
        """Whether the run's process, on this machine, has ended; False for another machine's."""
        where = self.record.get("environment") or {}
        if where.get("host") != socket.gethostname() or "pid" not in where:
            return False
        try:
            return psutil.Process(where["pid"]).status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True

    def discard(self) -> None:
        """Remove the directory of a run that was refused before it did anything."""
        shutil.rmtree(self.path)
        if self._made_folder:
            with contextlib.suppress(OSError):  # other runs have come into it since
                self.path.parent.rmdir()

    def update(self, **fields: Any) -> None:
        """Set fields of run.json and write it whole. A field that is a dict is merged into the dict that is there."""
        with self._lock:
            for key, value in fields.items():
                old = self.record.get(key)
                self.record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            write_atomically(self.path / "run.json", json.dumps(self.record, indent=2, default=str))

    def try_to_record(self, **facts: Callable[[], Any]) -> None:
        """Record what each function returns. One that fails is a warning, with its reason under `missing`: what a run has made
        is worth more than what is said about it."""
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
        """The lines of `metrics.jsonl` or `curve.jsonl`; a last line cut short by a crash is left out."""
        path = self.path / file
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def last_row(self, file: str) -> dict[str, Any] | None:
        """The last whole line of `metrics.jsonl` or `curve.jsonl`, read from the file's end; None if there is none."""
        try:
            with (self.path / file).open("rb") as lines:
                end = lines.seek(0, os.SEEK_END)
                size = TAIL_BYTES
                while True:
                    lines.seek(max(0, end - size))
                    tail = lines.read(size).splitlines()
                    for line in reversed(tail if size >= end else tail[1:]):  # the first of them may be cut
                        with contextlib.suppress(ValueError):
                            return json.loads(line)
                    if size >= end:
                        return None
                    size *= 8
        except OSError:
            return None

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
        """
        self._before = (self.record.get("environment") or {}).get("seconds") or 0.0
        self._began = time.monotonic()
        handler = _Log(self.path / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
                    yield self
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
            return (self.path / STOP).read_text()
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
"""Runs that cannot be read, of which this process has spoken."""


def find_runs(folder: str | Path) -> list[Run]:
    """Every run in `folder` (or in its `runs/`), oldest first; `folder` may be a run itself, or a sweep, with its runs."""
    folder = Path(folder)
    if (folder / "run.json").exists():
        first = Run.open(folder)
        return [first, *(Run.open(folder.parent / name) for name in first.record.get("runs") or [])]
    files = [*folder.glob("*/run.json"), *folder.glob("runs/*/run.json")]
    runs = []
    for file in files:
        try:
            runs.append(Run.open(file.parent))
        except LetheError as error:
            if str(error) not in _said:  # an error, since numbers are missing from what is made of these runs
                logger.error("%s; left out", error)
            _said.add(str(error))
    return sorted(runs, key=lambda run: (run.record.get("created") or "", run.id))


def find_run(run_id: str, out: str | Path = "runs") -> Run:
    """The run with this id, a unique part of its folder's name, or its folder; looked for in `out`, `runs/` and `*/runs/`.

    Raises:
        LetheError: there is none, or more than one.
    """
    if not run_id:
        raise LetheError("run: names no run; write run:ID")
    if (Path(run_id) / "run.json").exists():
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


def refuse_run_folder(out: str | Path) -> None:
    """Refuse an output folder that is itself a run, or a file: its content would be mixed up or lost."""
    if (Path(out) / "run.json").exists():
        raise LetheError(f"out: '{out}' already holds a run; give the folder that runs are to be put in")
    if Path(out).exists() and not Path(out).is_dir():
        raise LetheError(f"out: '{out}' is a file; give a folder")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Inside, no other process builds what is kept in `folder`; a killed one lets go by itself."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is building %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(*paths: Path) -> str:
    """SHA-256 over the names and contents of files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds_since(timestamp: str | None) -> float:
    """Seconds from `timestamp` (as `now` writes it) until now; infinity for None."""
    if timestamp is None:
        return float("inf")
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(timestamp)).total_seconds()


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def refuse_several_processes() -> None:
    """Refuse a process that is one of several at the same work, as under torchrun: each would write a run of its own.

    Raises:
        LetheError: there are several.
    """
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise LetheError(
            f"WORLD_SIZE is {count}: one of several processes at one run, as torchrun starts them, which Lethe does not do; "
            f"start it without torchrun (runs beside each other: --jobs, --launcher slurm)"
        )


def environment() -> dict[str, Any]:
    """Versions and machine that a run's numbers depend on."""
    packages = ["lethe-lm", "torch", "transformers", "peft", "lm_eval", "datasets", "safetensors"]
    return {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of Lethe's own checkout; None when it is installed as a package or git is missing."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None
