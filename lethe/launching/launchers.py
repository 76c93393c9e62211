"""Where a run executes: in worker processes here, or as Slurm jobs. Either way the work is `work(folders)`.

A trial is a list of run folders that were made beforehand, `queued`, each with its configuration; working on it is going on
with each run that is not complete, in order. So whatever happened before (nothing, a kill, a preemption) the same call does
what is left, and a run that another process has at work is not touched: whoever works on it holds it (`Run.hold`).

A local worker imports once and takes trial after trial, one line of JSON each, from the controller's pipe; when the controller
is gone it finishes what it has and ends. `fates` says which trials nobody works on any more, and why.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lethe.config import SlurmSettings
from lethe.errors import LetheError, printable
from lethe.evaluation.tasks.consent import trust_task_code, trusts_task_code
from lethe.runs import garbage
from lethe.runs.locks import HeldError, identity, lives
from lethe.runs.run import LOST_AFTER_SECONDS, Run, Terminated, now

JOBS = "slurm"
"""Where in a sweep's folder its jobs' files are."""
ENDED = ("complete", "failed", "diverged", "cancelled")
SECONDS_TO_SAVE = 120
SECONDS_TO_BEGIN = 3600
SECONDS_TO_NAME_JOB = 30
Owner = dict[str, Any]


@dataclass(frozen=True)
class Fate:
    """Why nobody works on a trial any more. `cancelled`: by a user's word, so that it is not taken up again by itself."""

    reason: str
    cancelled: bool = False


class Launcher(Protocol):
    """Something that works on trials. An owner is what a trial's record says about who works on it."""

    def room(self) -> int:
        """How many more trials can be started now."""

    def start(self, name: str, folders: Sequence[Path]) -> Owner:
        """Begin to work on a trial."""

    def fates(self, owners: Sequence[tuple[Owner, Sequence[Run]]]) -> list[Fate | None]:
        """For each owner of unfinished runs: None while it is at work, or will be."""

    def cancel(self, owners: Sequence[Owner]) -> None:
        """End trials at a user's word, as far as asking their runs to stop does not reach them."""

    def wait(self, seconds: float) -> None:
        """Until something has probably changed, `seconds` at most."""

    def stop(self) -> None:
        """End the workers, each after saving what it has at work."""


def work(folders: Sequence[str | Path], job_id: str | None = None) -> None:
    """Go on with each run that is not complete, in order, until one does not complete.

    A run that is refused, or raises, is `failed` with its reason. Returns at once where another process has the work.
    """
    for folder in folders:
        run = Run.open(folder)
        if run.status == "complete":
            continue
        try:
            run.hold(job_id)
        except HeldError:
            return
        try:
            if not _done(run, job_id):
                return
        finally:
            run.lock.release()


def _done(run: Run, job_id: str | None) -> bool:
    """Go on with a run that this process holds; whether it is complete then.

    Raises:
        Terminated: this process was asked to stop, and not the run.
    """
    from lethe.launching.resuming import go_on

    if job_id is not None and run.record["job_id"] != job_id:
        run.update(job_id=job_id)
    if run.status != "complete" and (asked := run.asked_to_stop()):
        run.update(status="cancelled", reason=asked, finished=now())
    elif run.status != "complete":
        try:
            run = go_on(run)
        except Terminated:
            if not run.asked_to_stop():
                raise
        except Exception as error:  # the next trial goes on; a run that has begun has recorded it already
            ended = run.record["status"] in ENDED
            if not ended and not isinstance(error, LetheError):
                with (run.path / "log.txt").open("a") as log:
                    log.writelines(f"{printable(line)}\n" for line in traceback.format_exc().splitlines())
            # Written again, for a full disk may have kept it from being so: that ends this process, and the run is lost.
            run.update(**{} if ended else {"status": "failed", "reason": f"{type(error).__name__}: {error}", "finished": now()})
    return run.status == "complete"


class LocalLauncher:
    """Worker processes on this machine, which share its cores."""

    def __init__(self, folder: Path, jobs: int):
        self.folder, self.jobs = folder, jobs
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    def room(self) -> int:
        self._drop_ended()
        return self.jobs - sum(worker.busy is not None for worker in self.workers)

    def start(self, name: str, folders: Sequence[Path]) -> Owner:
        worker = next((w for w in self.workers if w.busy is None), None) or self._new_worker()
        worker.give(name, folders)
        return worker.identity

    def fates(self, owners: Sequence[tuple[Owner, Sequence[Run]]]) -> list[Fate | None]:
        self._drop_ended()
        return [self._fate(owner, runs) for owner, runs in owners]

    def _fate(self, owner: Owner, runs: Sequence[Run]) -> Fate | None:
        alive = lives(owner)
        if alive is None:
            # Before a run begins, its models are loaded without a heartbeat.
            begun = any(run.record["status"] == "running" for run in runs)
            heard = _seconds_since_written(runs)
            return (
                None
                if heard < (LOST_AFTER_SECONDS if begun else SECONDS_TO_BEGIN)
                else Fate(f"no sign of life from {owner['host']} for {heard:.0f} s")
            )
        if worker := next((w for w in self.workers if w.process.pid == owner["pid"]), None):
            return None if worker.busy else Fate(f"the worker (process {owner['pid']}) is done with it, and it is not complete")
        return None if alive else Fate(f"the worker (process {owner['pid']}) has ended")

    def cancel(self, owners: Sequence[Owner]) -> None:
        pass

    def wait(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            key.data.hear()
        self._drop_ended()

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.close()  # type: ignore[union-attr]  # one that has just ended its run ends, too
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for worker in self.workers:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._drop_ended()

    def _new_worker(self) -> _Worker:
        number = next(i for i in range(self.jobs) if i not in {w.number for w in self.workers})
        worker = _Worker(number, self.folder / f"worker-{number}.log", _environment(number, self.jobs))
        self.workers.append(worker)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return worker

    def _drop_ended(self) -> None:
        for worker in [w for w in self.workers if w.process.poll() is not None]:
            self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
            for pipe in (worker.process.stdin, worker.process.stdout):
                pipe.close()  # type: ignore[union-attr]
            self.workers.remove(worker)


class _Worker:
    """A worker process as its controller sees it."""

    def __init__(self, number: int, log: Path, environment: dict[str, str]):
        self.number = number
        self.busy: str | None = None
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lethe.launching.launchers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C is the controller's; it tells its workers itself
            )
        self.identity = identity(self.process.pid)

    def give(self, name: str, folders: Sequence[Path]) -> None:
        paths = [str(folder.resolve()) for folder in folders]
        order = {"name": name, "folders": paths, "cwd": os.getcwd(), "trust_task_code": trusts_task_code()}
        self.busy = name
        with contextlib.suppress(BrokenPipeError):  # it has just died: `fates` will say so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def hear(self) -> None:
        if self.process.stdout.readline():  # type: ignore[union-attr]
            self.busy = None


class SlurmLauncher:
    """One Slurm job a trial."""

    def __init__(self, folder: Path, jobs: int, settings: SlurmSettings):
        from lethe.launching import slurm

        self.folder, self.jobs, self.settings, self.slurm = folder / JOBS, jobs, settings, slurm
        self.alive: set[str] = set()

    def room(self) -> int:
        return self.jobs - len(self.alive)

    def start(self, name: str, folders: Sequence[Path]) -> Owner:
        paths = [str(folder.resolve()) for folder in folders]
        job_id = self.slurm.submit(Work(paths, trusts_task_code()), self.folder, self.settings, name)
        self.alive.add(job_id)
        for path in paths:
            run = Run.open(path)
            if run.record["status"] == "queued":
                run.update(job_id=job_id)
        return {"job_id": job_id}

    def fates(self, owners: Sequence[tuple[Owner, Sequence[Run]]]) -> list[Fate | None]:
        states = self.slurm.states([owner["job_id"] for owner, _ in owners])
        found = [self._fate(owner["job_id"], states[owner["job_id"]], runs) for owner, runs in owners]
        self.alive = {owner["job_id"] for (owner, _), fate in zip(owners, found, strict=True) if fate is None}
        return found

    def _fate(self, job_id: str, state: Any, runs: Sequence[Run]) -> Fate | None:
        if state.alive is not False:  # None: Slurm does not answer, which says nothing about the job
            return None
        if state.word == self.slurm.UNKNOWN:
            young = _seconds_since_written(runs) < SECONDS_TO_NAME_JOB
            return None if young else Fate(f"Slurm does not know job {job_id} any more")
        return Fate(f"Slurm: job {job_id} is {state.word}, {state.reason}", cancelled=state.word == "CANCELLED")

    def cancel(self, owners: Sequence[Owner]) -> None:
        self.slurm.cancel([owner["job_id"] for owner in owners if "job_id" in owner])

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """Jobs go on by themselves; `lethe sweep cancel` ends them."""


@dataclass(frozen=True)
class Work:
    """What a Slurm job does: `work` on a trial's folders, with the consent of the command that submitted it."""

    folders: list[str]
    trusts: bool = False

    def __call__(self) -> None:
        from lethe.cli import quiet
        from lethe.launching import slurm

        quiet()
        job_id = slurm.current_job_id()
        deadline = time.monotonic() + SECONDS_TO_NAME_JOB  # the controller writes the job's id, unless it was killed
        while Run.open(self.folders[0]).record["job_id"] != job_id and time.monotonic() < deadline:
            time.sleep(0.2)
        with trust_task_code(self.trusts):
            work(self.folders, job_id)

    def before_requeue(self, reason: str) -> None:
        """The runs that have saved wait again, under the same job."""
        for folder in self.folders:
            run = Run.open(folder)
            if run.record["status"] == "cancelled":
                run.update(status="queued", reason=f"its job was {reason}; it goes on when Slurm starts it again")


def make(kind: str, folder: Path, jobs: int, settings: SlurmSettings) -> Launcher:
    """The launcher of that name."""
    return SlurmLauncher(folder, jobs, settings) if kind == "slurm" else LocalLauncher(folder, jobs)


def job_log(folder: Path, job_id: str) -> Path:
    """What a Slurm job of the sweep in `folder` has printed."""
    from lethe.launching import slurm

    return slurm.log_file(folder / JOBS, job_id)


def last_lines(file: Path, count: int = 5) -> list[str]:
    """The last lines of a log; none where there is no log."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 4096))
            return [printable(line, 400) for line in log.read().decode(errors="replace").splitlines()[-count:]]
    except OSError:
        return []


def _seconds_since_written(runs: Sequence[Run]) -> float:
    """Since anybody wrote the record of one of a trial's runs: whoever handed it out, or works on it."""
    return min((run.seconds_since_heartbeat for run in runs), default=float("inf"))


def _environment(number: int, jobs: int) -> dict[str, str]:
    """A worker's environment: its share of the cores, and a device of its own where there are several."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    if devices := _devices():
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    return environment


def _devices() -> list[str]:
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # an empty one hides them all
        return given.split(",") if given else []
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return [str(i) for i in range(listed.stdout.count("GPU "))]


@garbage.seldom()
def serve() -> None:
    """A local worker: trials from standard input, one line each; a line on standard output when one is done with."""
    from lethe.cli import quiet

    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done, first = os.fdopen(os.dup(1), "w"), True
    os.dup2(2, 1)  # what libraries print is no answer to the controller
    for line in sys.stdin:
        order = json.loads(line)
        os.chdir(order["cwd"])
        try:
            with trust_task_code(order["trust_task_code"]):
                work(order["folders"])
        except Terminated:
            sys.exit(143)
        if first:
            garbage.freeze()
            first = False
        try:
            done.write(f"{order['name']}\n")
            done.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    serve()
