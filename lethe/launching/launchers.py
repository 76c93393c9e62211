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
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lethe.config import SlurmSettings
from lethe.errors import printable
from lethe.evaluation.tasks.consent import trusts_task_code
from lethe.launching import slurm
from lethe.launching.work import SECONDS_TO_NAME_JOB, Work
from lethe.runs import slurm_jobs
from lethe.runs.locks import identity, lives
from lethe.runs.run import LOST_AFTER_SECONDS, Run

JOBS = "slurm"
"""Where in a sweep's folder its jobs' files are."""
SECONDS_TO_SAVE = 120
SECONDS_TO_BEGIN = 3600
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
                [sys.executable, "-m", "lethe.launching.work"],
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
        self.folder, self.jobs, self.settings = folder / JOBS, jobs, settings
        self.alive: set[str] = set()

    def room(self) -> int:
        return self.jobs - len(self.alive)

    def start(self, name: str, folders: Sequence[Path]) -> Owner:
        paths = [str(folder.resolve()) for folder in folders]
        job_id = slurm.submit(Work(paths, trusts_task_code()), self.folder, self.settings, name)
        self.alive.add(job_id)
        for path in paths:
            run = Run.open(path)
            if run.record["status"] == "queued":
                run.update(job_id=job_id)
        return {"job_id": job_id}

    def fates(self, owners: Sequence[tuple[Owner, Sequence[Run]]]) -> list[Fate | None]:
        states = slurm_jobs.states([owner["job_id"] for owner, _ in owners])
        found = [self._fate(owner["job_id"], states[owner["job_id"]], runs) for owner, runs in owners]
        self.alive = {owner["job_id"] for (owner, _), fate in zip(owners, found, strict=True) if fate is None}
        return found

    def _fate(self, job_id: str, state: Any, runs: Sequence[Run]) -> Fate | None:
        if state.alive is not False:  # None: Slurm does not answer, which says nothing about the job
            return None
        if state.word == slurm_jobs.UNKNOWN:
            young = _seconds_since_written(runs) < SECONDS_TO_NAME_JOB
            return None if young else Fate(f"Slurm does not know job {job_id} any more")
        return Fate(f"Slurm: job {job_id} is {state.word}, {state.reason}", cancelled=state.word == "CANCELLED")

    def cancel(self, owners: Sequence[Owner]) -> None:
        slurm_jobs.cancel([owner["job_id"] for owner in owners if "job_id" in owner])

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """Jobs go on by themselves; `lethe sweep cancel` ends them."""


def make(kind: str, folder: Path, jobs: int, settings: SlurmSettings) -> Launcher:
    """The launcher of that name."""
    return SlurmLauncher(folder, jobs, settings) if kind == "slurm" else LocalLauncher(folder, jobs)


def job_log(folder: Path, job_id: str) -> Path:
    """What a Slurm job of the sweep in `folder` has printed."""
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
