"""A trial as a Slurm job: submitted through submitit, stopped by Slurm's signals, resumed when Slurm requeues it.

What is submitted is a callable that works until it is done or raises `Terminated` (see `Run.running`), after it has saved.
Slurm's signals lead to that. SIGTERM (preemption, scancel, requeue) reaches the run by itself. USR2, which submitit has Slurm
send before the time limit, is passed on as SIGTERM. Then submitit requeues a job that is out of time or preempted, under
its id. A job that Slurm itself requeues, or that a user has cancelled, just ends.

A job for several devices has one task for each, and all call the same work. Slurm signals every task, so all save. Rank 0 alone
requeues the job. When one task has ended, the others have `save_seconds` to end too, before srun kills them.

Nothing here imports torch, and submitit is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lethe import distributed
from lethe.config import SlurmSettings, minutes
from lethe.errors import LetheError
from lethe.files import slug
from lethe.runs import garbage
from lethe.runs.run import Terminated
from lethe.runs.slurm_jobs import current_job_id, facts_of, offers_gpus, one_line

IGNORE_SIGNALS = 'bash -c \'trap "" TERM USR2; exec "$@"\' lethe '
"""Starts Python with the signals ignored until it handles them: a signal that ended it would make the job fail."""
THREADS = "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
"""A shell line for jobs of several processes: each would start a thread for every core of the node."""
LEAST_SECONDS_TO_END = 60
logger = logging.getLogger(__name__)


def submit(work: Callable[[], Any], folder: str | Path, settings: SlurmSettings, name: str) -> str:
    """Submit one job and return its id. `folder`, on a file system that the nodes share, gets its pickle, script and log.

    `work` is an object of a class in an importable module, and lets `Terminated` through. A requeued job calls it again, from
    its pickle: it has to find out what is already done. If it has a method `before_requeue(reason)`, that is called when the
    work was stopped and the same job will resume it.

    Raises:
        LetheError: there is no Slurm here, or sbatch refuses; in its own words.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise LetheError("slurm: there is no sbatch on this machine; run this where jobs are submitted, or use launcher local")
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    python = IGNORE_SIGNALS + shlex.quote(sys.executable)
    tasks = max(1, settings.devices)
    several = settings.nodes * tasks > 1
    seconds_to_end = max(settings.save_seconds, LEAST_SECONDS_TO_END)
    srun = [f"--cpus-per-task={settings.cpus}"] if settings.cpus else []  # since 22.05 not taken from sbatch
    if several:  # a cluster may kill all tasks when one fails, which then could not record why
        srun += ["--kill-on-bad-exit=0", f"--wait={seconds_to_end}"]
    executor = submitit.SlurmExecutor(folder, max_num_timeout=settings.max_timeouts, python=python)
    executor.update_parameters(
        job_name=slug(name),  # without line breaks, since it becomes part of the job's script
        partition=settings.partition,
        account=settings.account,
        time=minutes(settings.time),
        nodes=settings.nodes,
        **({"ntasks_per_node": tasks} if several else {}),
        gpus_per_node=settings.devices if _requests_gpus(settings) else None,
        cpus_per_task=settings.cpus,
        mem=settings.memory,
        setup=[*settings.setup, *([THREADS] if several else [])] or None,
        signal_delay_s=settings.save_seconds,
        srun_args=srun or None,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, **settings.extra},
    )
    try:
        with _outside_of_a_job():
            return executor.submit(_Requeueable(work)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise LetheError(f"slurm: sbatch refused '{name}': {one_line(str(error))}") from error


def _requests_gpus(settings: SlurmSettings) -> bool:
    """Whether the job's devices are GPUs that Lethe requests: those that the partition has, unless `extra` requests some."""
    options = settings.extra.items()
    requested = any(
        name.startswith("gpus") or (name.startswith(("gres", "tres")) and "gpu" in str(value)) for name, value in options
    )
    return settings.devices > 0 and not requested and _has_gpus(settings.partition)


@functools.cache
def _has_gpus(partition: str | None) -> bool:
    has = offers_gpus(partition)
    if not has:
        where = f"partition {partition}" if partition else "the cluster"
        logger.warning("slurm: %s offers no GPUs, so jobs compute on CPUs, one process for each of slurm.devices", where)
    return has


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Without Slurm's variables: a job that submits another one must not pass its own on."""
    if current_job_id() is None:
        yield
        return
    from submitit.helpers import clean_env

    where = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
    with clean_env():
        os.environ.update(where)
        yield


class _Requeueable:
    """Runs the work with Slurm's signals passed on to it. submitit pickles it, and calls `checkpoint` before it requeues."""

    def __init__(self, work: Callable[[], Any]):
        self.work = work

    @garbage.seldom()
    def __call__(self) -> Any:
        from submitit import JobEnvironment

        job = JobEnvironment()
        if job.num_tasks > 1:
            distributed.be_one_of(
                job.global_rank, job.num_tasks, job.local_rank, job.num_tasks // job.num_nodes, job.hostnames[0], _port(job)
            )
        usr2 = signal.Signals[f"SIG{job.USR_SIG}"]
        requeue_and_exit: Any = signal.getsignal(usr2)  # submitit's own handler, which may not interrupt a training step
        half_written = job.paths.submitted_pickle.with_suffix(".pkl.save_tmp")
        half_written.unlink(missing_ok=True)  # left by a kill; submitit fails on it
        process = os.getpid()
        out_of_time = False

        def pass_on(number: int, frame: Any) -> None:
            nonlocal out_of_time
            if os.getpid() == process:  # forked processes have this handler too, and get the signal from Slurm
                out_of_time = True
                os.kill(process, signal.SIGTERM)

        def terminate(number: int, frame: Any) -> None:
            raise Terminated("SIGTERM")

        signal.signal(usr2, pass_on)
        signal.signal(signal.SIGTERM, terminate)
        try:
            return self.work()
        except Terminated as error:
            for number in (signal.SIGTERM, usr2):  # the requeue sends more of them, which must not end scontrol
                signal.signal(number, signal.SIG_IGN)
            if not distributed.is_first():
                sys.exit(f"stopped: {error}")
            facts = facts_of(job.job_id)
            runs = facts.get("JobState") == "RUNNING"
            preempted = facts.get("PreemptTime", "None") != "None"
            by_slurm = not runs and int(facts.get("Restarts", 0)) > restarts()
            by_submitit = runs and (out_of_time or preempted)
            if by_slurm or by_submitit:
                reason = "requeued by Slurm" if by_slurm else "preempted" if preempted else "out of time"
                getattr(self.work, "before_requeue", lambda reason: None)(reason)
            if by_submitit:
                requeue_and_exit(usr2, None)
            sys.exit(f"stopped: {error}")

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _port(job: Any) -> int:
    """Where the tasks of a job meet: another port for each job, below those that Linux gives to outgoing connections."""
    return 10_000 + int(job.raw_job_id) % 20_000


def restarts() -> int:
    """How often the job of this process has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def log_file(folder: str | Path, job_id: str) -> Path:
    """Where a job submitted with `folder` writes what it prints, over all its restarts."""
    return Path(folder) / f"{job_id}_0_log.out"
