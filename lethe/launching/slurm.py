"""Slurm, and nothing else here speaks with it: jobs are submitted through submitit, asked about, cancelled and requeued.

What is submitted is a callable that works until it is done or `Terminated` (see `ledger.Run.running`). Slurm's signals become
that one: SIGTERM (preemption, scancel, requeue) is what a run listens to anyway, and USR2, which submitit has Slurm send
before the time limit, is passed on as SIGTERM. When the run has saved and let `Terminated` through, a job that was out of
time or is being preempted is requeued under its id by submitit; one that Slurm requeues or has cancelled ends as it is.
Nothing here imports torch, and submitit is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lethe.config import SlurmSettings, minutes
from lethe.errors import LetheError
from lethe.folders import slug
from lethe.runs import garbage
from lethe.runs.run import Terminated

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "STOPPED", "RESV_DEL_HOLD"}
WORKS = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
UNKNOWN = "UNKNOWN"
MAY_RETURN = {UNKNOWN, "PREEMPTED", "NODE_FAIL"}  # ended for sacct, while slurmctld may have the job waiting again
ANSWER_SECONDS = 30
# A signal that comes before Python has its handlers must not end the job: Slurm would take it for failed.
PATIENTLY = 'bash -c \'trap "" TERM USR2; exec "$@"\' lethe '
logger = logging.getLogger(__name__)
_warned = threading.Event()


@dataclass(frozen=True)
class JobState:
    """How a job stands. `word` is Slurm's own, or UNKNOWN.

    `alive`: it waits or works; None when Slurm did not answer well enough to tell.
    """

    word: str
    reason: str
    alive: bool | None


NEVER_SEEN = JobState(UNKNOWN, "Slurm does not know the job", False)


class Work(Protocol):
    """What can be submitted: an object of a class in an importable module, which lets `Terminated` through.

    A requeued job calls it again, from its pickle: it has to look for what is already done. If it has a method
    `before_requeue(reason)`, that is called when the work has been stopped and the same job will go on with it later.
    """

    def __call__(self) -> Any: ...


def submit(work: Work, folder: str | Path, settings: SlurmSettings, name: str) -> str:
    """Submit one job and return its id. `folder`, on a file system that the nodes share, gets its pickle, script and log.

    Raises:
        LetheError: there is no Slurm here, or sbatch refuses; in its own words.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise LetheError(
            "slurm: there is no sbatch on this machine; run this where jobs are submitted, or use the launcher local"
        )
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(
        folder, max_num_timeout=settings.max_timeouts, python=PATIENTLY + shlex.quote(sys.executable)
    )
    executor.update_parameters(
        job_name=slug(name),  # it stands in the job's script
        partition=settings.partition,
        account=settings.account,
        time=minutes(settings.time),
        gpus_per_node=settings.devices or None,
        cpus_per_task=settings.cpus,
        mem=settings.memory,
        setup=settings.setup or None,
        signal_delay_s=settings.save_seconds,
        # Since 22.05 srun does not take this from sbatch.
        srun_args=[f"--cpus-per-task={settings.cpus}"] if settings.cpus else None,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, **settings.extra},
    )
    try:
        with _outside_of_a_job():
            return executor.submit(_Requeueable(work)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise LetheError(f"slurm: sbatch refused '{name}': {_words(str(error))}") from error


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """A job that submits another must not hand on what Slurm has given it."""
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

    def __init__(self, work: Work):
        self.work = work

    @garbage.seldom()
    def __call__(self) -> Any:
        from submitit import JobEnvironment

        job = JobEnvironment()
        soon = signal.Signals[f"SIG{job.USR_SIG}"]
        requeue_and_exit: Any = signal.getsignal(soon)  # submitit's: works only outside of a step of training
        job.paths.submitted_pickle.with_suffix(".pkl.save_tmp").unlink(
            missing_ok=True
        )  # left by a kill; submitit stumbles on it
        process = os.getpid()
        out_of_time = []

        def pass_on(number: int, frame: Any) -> None:
            if os.getpid() == process:  # Slurm signals every process of the job, and forked ones have this handler too
                out_of_time.append(number)
                os.kill(process, signal.SIGTERM)

        def terminate(number: int, frame: Any) -> None:
            raise Terminated("SIGTERM")

        signal.signal(soon, pass_on)
        signal.signal(signal.SIGTERM, terminate)
        try:
            return self.work()
        except Terminated as error:
            for number in (signal.SIGTERM, soon):  # more of them come with the requeue; scontrol must not be ended by them
                signal.signal(number, signal.SIG_IGN)
            facts = _shown(job.job_id)
            works = facts.get("JobState") == "RUNNING"
            preempted = facts.get("PreemptTime", "None") != "None"
            by_slurm = not works and int(facts.get("Restarts", 0)) > restarts()
            if by_slurm or (works and (out_of_time or preempted)):
                reason = "requeued by Slurm" if by_slurm else "preempted" if preempted else "out of time"
                getattr(self.work, "before_requeue", lambda reason: None)(reason)
            if works and (out_of_time or preempted):
                requeue_and_exit(soon, None)
            sys.exit(f"stopped: {error}")

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def current_job_id() -> str | None:
    """The job that this process belongs to (`17_3`: one of an array); None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How many times the job of this process has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def log_file(folder: str | Path, job_id: str) -> Path:
    """Where a job submitted with `folder` writes what it prints, over all its restarts."""
    return Path(folder) / f"{job_id}_0_log.out"


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """How the jobs stand: one question to sacct for all, one to squeue (or else scontrol).

    Accounting knows jobs of long ago but is seconds behind, and holds a job for ended that slurmctld has put back into the
    queue. So slurmctld has the word on the jobs that it remembers: those alive, and those ended some minutes ago.
    Where accounting does not answer, there is a warning, and older jobs are UNKNOWN.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    known = _from_sacct(ids)
    listed = _from_controller(ids)
    for job in ids:
        if listed is None and known.get(job, NEVER_SEEN).word in MAY_RETURN:
            known[job] = JobState(known.get(job, NEVER_SEEN).word, "squeue and scontrol do not answer", None)
        elif listed and job in listed and (job not in known or known[job].word != listed[job].word or listed[job].alive):
            known[job] = listed[job]  # of an end that both know, accounting has the exit code
    return {job: known.get(job, NEVER_SEEN) for job in ids}


def _from_sacct(ids: list[str]) -> dict[str, JobState]:
    """What accounting knows; nothing, with a warning, where it does not answer."""
    answer, words = _asked("sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State,ExitCode", "-j", ",".join(ids))
    if answer is None:
        _warn_without_accounting(words)
    rows = [line.split("|") for line in (answer or "").splitlines() if line.count("|") == 2]
    return {job: _state(state, code, "None") for job, state, code in rows if job in ids}


def _from_controller(ids: list[str]) -> dict[str, JobState] | None:
    """What slurmctld knows, through squeue or else scontrol; None when neither answers."""
    answer, words = _asked("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", "-j", ",".join(ids))
    if answer is not None:
        rows = [line.split("|", 2) for line in answer.splitlines() if line.count("|") >= 2]
        return {job.strip(): _state(state, "", reason) for job, state, reason in rows}
    if "Invalid job id" in words:  # it was asked for one alone, and does not know it
        return {}
    if "Unable to contact" in words:  # nor could scontrol
        return None
    answer, _ = _asked("scontrol", "show", "job", "--oneliner")
    if answer is None:
        return None
    jobs = {}
    for facts in map(_facts, answer.splitlines()):
        if "JobId" in facts and "JobState" in facts:
            array = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}" if "ArrayTaskId" in facts else facts["JobId"]
            state = _state(facts["JobState"], facts.get("ExitCode", ""), facts.get("Reason", ""))
            jobs[facts["JobId"]] = jobs[array] = state
    return jobs


def _state(state: str, code: str, reason: str) -> JobState:
    """From a state such as "CANCELLED by 1000", an exit code such as 1:0 (status and signal), a reason such as None."""
    word, _, by = state.strip().partition(" ")
    if word in WAITS | WORKS:
        return JobState(word, reason.strip(), True)
    status, _, number = code.strip().partition(":")
    ends = [by, f"exit code {status}", f"signal {number}"]
    told = [end for end in ends if end and not end.endswith(("code ", "code 0", "signal ", "signal 0"))]
    return JobState(word, ", ".join(told) or reason.strip(), False)


def _warn_without_accounting(words: str) -> None:
    """Once a process."""
    if _warned.is_set():
        return
    _warned.set()
    logger.warning(
        "Slurm's accounting does not answer (%s); asking squeue and scontrol, which forget jobs soon after their end", words
    )


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel the jobs; those already at an end stay as they are.

    Raises:
        LetheError: scancel fails; in its own words.
    """
    ids = list(job_ids)
    if ids:
        _ordered("scancel", *ids)


def requeue(job_ids: Iterable[str]) -> None:
    """Put jobs, running or ended not long ago, back into the queue under their ids.

    Raises:
        LetheError: scontrol refuses; in its own words.
    """
    ids = list(job_ids)
    if ids:
        _ordered("scontrol", "requeue", ",".join(ids))


def _ordered(*command: str) -> None:
    answer, words = _asked(*command)
    if answer is None:
        raise LetheError(f"slurm: {command[0]}: {words}")


def _shown(job_id: str) -> dict[str, str]:
    """What scontrol shows of one job; nothing when it does not answer."""
    return _facts(_asked("scontrol", "show", "job", "--oneliner", job_id)[0] or "")


def _facts(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def _asked(*command: str) -> tuple[str | None, str]:
    """What a program of Slurm's answers, None when it fails; and its complaints in one line."""
    if shutil.which(command[0]) is None:
        return None, f"there is no {command[0]} on this machine"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, _words(str(error))
    return (done.stdout if done.returncode == 0 else None), _words(done.stderr) or f"exit code {done.returncode}"


def _words(text: str) -> str:
    """Slurm's lines as one, without the program's name before each."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines if line)
