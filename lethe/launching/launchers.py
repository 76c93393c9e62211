"""Where trials run: in worker processes on this machine, or as Slurm jobs. Either way the work is `work(folders)`.

The controller starts a trial with `start`, which returns the trial's owner: the worker process or the job. `lost` says which
owners do not work on their trials any more. A local worker takes trial after trial, one line of JSON each, from the
controller's pipe. When the controller is gone, the worker finishes its trial and ends.
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
from typing import Any

from lethe.config import SlurmSettings
from lethe.errors import LetheError, printable
from lethe.evaluation.tasks.consent import trusts_task_code
from lethe.launching import slurm
from lethe.launching.worker import SECONDS_TO_NAME_JOB, Work
from lethe.runs import slurm_jobs
from lethe.runs.locks import identity, lives
from lethe.runs.run import Run
from lethe.runs.supervise import LOST_AFTER_SECONDS

JOBS = "slurm"
"""The folder, in a sweep's folder, with the files of its jobs."""
SECONDS_TO_SAVE = 120
SECONDS_TO_BEGIN = 3600
"""How long a run may load its models, during which it writes no heartbeat."""
Owner = dict[str, Any]
Owned = tuple[Owner, Sequence[Run]]


@dataclass(frozen=True)
class Loss:
    """Why nobody works on a trial any more. A trial that a user `cancelled` is not restarted."""

    reason: str
    cancelled: bool = False


class LocalLauncher:
    """Worker processes on this machine, which share its cores and GPUs.

    A worker starts more processes for a run of several devices. `devices`: the most that a run has.
    """

    def __init__(self, folder: Path, jobs: int, devices: int):
        self.folder, self.jobs, self.devices = folder, jobs, devices
        self.gpus = _gpus()
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    def room(self) -> int:
        """How many more trials can be started now."""
        self._drop_ended()
        return self.jobs - sum(worker.busy for worker in self.workers)

    def start(self, name: str, folders: Sequence[Path]) -> Owner:
        worker = next((worker for worker in self.workers if not worker.busy), None) or self._new_worker()
        worker.give(name, folders)
        return worker.identity

    def lost(self, owned: Sequence[Owned]) -> list[Loss | None]:
        """For each unfinished trial: None if its owner works on it, or will."""
        self._drop_ended()
        return [self._loss(owner, runs) for owner, runs in owned]

    def _loss(self, owner: Owner, runs: Sequence[Run]) -> Loss | None:
        alive = lives(owner)
        if alive is None:  # a worker of a controller on another machine
            begun = any(run.record["status"] == "running" for run in runs)
            silent = _seconds_since_written(runs)
            if silent < (LOST_AFTER_SECONDS if begun else SECONDS_TO_BEGIN):
                return None
            return Loss(f"no heartbeat from {owner['host']} for {silent:.0f} s")
        if worker := next((worker for worker in self.workers if worker.process.pid == owner["pid"]), None):
            if worker.busy:
                return None
            return Loss(f"the worker (process {owner['pid']}) is done with it, but it is not complete")
        return None if alive else Loss(f"the worker (process {owner['pid']}) has ended")

    def wait(self, seconds: float) -> None:
        """Wait until a worker is done, at most so long."""
        for key, _ in self.selector.select(seconds):
            if key.data.process.stdout.readline():
                key.data.busy = False
        self._drop_ended()

    def stop(self) -> None:
        """Stop the workers, each after it has saved its trial."""
        for worker in self.workers:
            worker.process.terminate()
            with contextlib.suppress(BrokenPipeError):  # of one that ends at this moment
                worker.stdin.close()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for worker in self.workers:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._drop_ended()

    def _new_worker(self) -> _Worker:
        number = next(i for i in range(self.jobs) if i not in {worker.number for worker in self.workers})
        worker = _Worker(number, self.folder / f"worker-{number}.log", self._environment(number))
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _environment(self, number: int) -> dict[str, str]:
        """A worker's environment: its share of the cores and, where there are several GPUs, GPUs of its own."""
        environment = dict(os.environ)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.jobs * self.devices))))
        if self.gpus:
            own = [self.gpus[i % len(self.gpus)] for i in range(number * self.devices, (number + 1) * self.devices)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environment

    def _drop_ended(self) -> None:
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self.selector.unregister(worker.stdout)
            worker.stdin.close()
            worker.stdout.close()
            self.workers.remove(worker)


class _Worker:
    """A worker process as its controller sees it."""

    def __init__(self, number: int, log: Path, environment: dict[str, str]):
        self.number, self.busy = number, False
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lethe.launching.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the controller alone, which stops its workers itself
            )
        self.stdin: Any = self.process.stdin
        self.stdout: Any = self.process.stdout
        self.identity = identity(self.process.pid)

    def give(self, name: str, folders: Sequence[Path]) -> None:
        paths = [str(folder.resolve()) for folder in folders]
        order = {"name": name, "folders": paths, "cwd": os.getcwd(), "trust_task_code": trusts_task_code()}
        self.busy = True
        with contextlib.suppress(BrokenPipeError):  # it has just died, which `lost` will find
            self.stdin.write(json.dumps(order).encode() + b"\n")
            self.stdin.flush()


class SlurmLauncher:
    """One Slurm job per trial."""

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

    def lost(self, owned: Sequence[Owned]) -> list[Loss | None]:
        states = slurm_jobs.states([owner["job_id"] for owner, _ in owned])
        found = [self._loss(owner["job_id"], states[owner["job_id"]], runs) for owner, runs in owned]
        self.alive = {owner["job_id"] for (owner, _), loss in zip(owned, found, strict=True) if loss is None}
        return found

    def _loss(self, job_id: str, state: slurm_jobs.JobState, runs: Sequence[Run]) -> Loss | None:
        if state.alive is not False:  # None: Slurm does not answer, which says nothing about the job
            return None
        if state.word == slurm_jobs.UNKNOWN:
            young = _seconds_since_written(runs) < SECONDS_TO_NAME_JOB
            return None if young else Loss(f"Slurm does not know job {job_id} any more")
        return Loss(f"Slurm: job {job_id} is {state.word}, {state.reason}", cancelled=state.word == "CANCELLED")

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """Does nothing: jobs continue without a controller, and `lethe sweep cancel` ends them."""


Launcher = LocalLauncher | SlurmLauncher


def make(kind: str, folder: Path, jobs: int, settings: SlurmSettings, devices: int) -> Launcher:
    """The launcher of that name, for the sweep in `folder`. `devices`: the largest number in the settings of a run."""
    return SlurmLauncher(folder, jobs, settings) if kind == "slurm" else LocalLauncher(folder, jobs, devices)


def refuse_too_many(jobs: int, devices: int) -> None:
    """Refuse local jobs of several devices each if this machine has GPUs, but too few.

    Raises:
        LetheError: names the numbers.
    """
    if devices > 1 and 0 < (here := len(_gpus())) < jobs * devices:
        raise LetheError(
            f"jobs: {jobs} jobs of {devices} devices need {jobs * devices} GPUs, and this machine has {here}; lower one of both"
        )


def last_lines(file: Path, count: int = 5) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 4096))
            return [printable(line, 400) for line in log.read().decode(errors="replace").splitlines()[-count:]]
    except OSError:
        return []


def _seconds_since_written(runs: Sequence[Run]) -> float:
    """Seconds since the record of one of a trial's runs was written, by the controller or by its worker."""
    return min((run.seconds_since_heartbeat for run in runs), default=float("inf"))


def _gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # an empty one hides all GPUs
        return given.split(",") if given else []
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return [str(i) for i in range(listed.stdout.count("GPU "))]
