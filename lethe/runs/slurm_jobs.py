"""What Slurm says about jobs, and cancelling them. `states` asks sacct and squeue once for all jobs.

Nothing here imports torch.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from lethe.errors import LetheError

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "STOPPED", "RESV_DEL_HOLD"}
WORKS = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
UNKNOWN = "UNKNOWN"
MAY_RETURN = {UNKNOWN, "PREEMPTED", "NODE_FAIL"}
"""States in which accounting takes a job for ended, while slurmctld may have requeued it."""
ANSWER_SECONDS = 30
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobState:
    """The state of a job. `word` is Slurm's own, or UNKNOWN. `alive`: it waits or works; None if Slurm does not answer."""

    word: str
    reason: str
    alive: bool | None


NEVER_SEEN = JobState(UNKNOWN, "Slurm does not know the job", False)


def current_job_id() -> str | None:
    """The job that this process belongs to (`17_3`: one of an array); None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """The states of the jobs.

    Accounting (sacct) knows old jobs, but is seconds behind, and takes a requeued job for ended. slurmctld (squeue)
    is right about the jobs that it remembers: those alive, and those that ended some minutes ago. Without accounting, there is
    a warning, and older jobs are UNKNOWN.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    known = _from_sacct(ids)
    listed = _from_squeue(ids)
    for job in ids:
        accounted = known.get(job, NEVER_SEEN)
        if listed is None and accounted.word in MAY_RETURN:
            known[job] = JobState(accounted.word, "squeue does not answer", None)
        elif listed and job in listed and (accounted.word != listed[job].word or listed[job].alive):
            known[job] = listed[job]  # where both know of the same end, accounting has the exit code
    return {job: known.get(job, NEVER_SEEN) for job in ids}


def _from_sacct(ids: list[str]) -> dict[str, JobState]:
    """What accounting knows; nothing, with a warning, if it does not answer."""
    answer, error = _output("sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State,ExitCode", "-j", ",".join(ids))
    if answer is None:
        _warn_without_accounting(error)
    rows = [line.split("|") for line in (answer or "").splitlines() if line.count("|") == 2]
    return {job: _state(state, code, "None") for job, state, code in rows if job in ids}


def _from_squeue(ids: list[str]) -> dict[str, JobState] | None:
    """What slurmctld knows; None if it does not answer."""
    answer, error = _output("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", "-j", ",".join(ids))
    if answer is None:
        return {} if "Invalid job id" in error else None  # of one job alone that slurmctld does not know
    rows = [line.split("|", 2) for line in answer.splitlines() if line.count("|") >= 2]
    return {job.strip(): _state(state, "", reason) for job, state, reason in rows}


def _state(state: str, code: str, reason: str) -> JobState:
    """From a state such as "CANCELLED by 1000", an exit code such as 1:0 (status and signal), a reason such as None."""
    word, _, by = state.strip().partition(" ")
    if word in WAITS | WORKS:
        return JobState(word, reason.strip(), True)
    status, _, number = code.strip().partition(":")
    ends = [by] if by else []
    ends += [f"exit code {status}"] if status not in {"", "0"} else []
    ends += [f"signal {number}"] if number not in {"", "0"} else []
    return JobState(word, ", ".join(ends) or reason.strip(), False)


@functools.cache
def _warn_without_accounting(error: str) -> None:
    """Warn once for each error."""
    logger.warning("Slurm's accounting does not answer (%s); using squeue, which forgets jobs soon after their end", error)


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel the jobs. Those that have ended stay as they are.

    Raises:
        LetheError: scancel fails; in its own words.
    """
    ids = list(job_ids)
    if ids:
        answer, error = _output("scancel", *ids)
        if answer is None:
            raise LetheError(f"slurm: scancel: {error}")


def facts_of(job_id: str) -> dict[str, str]:
    """What scontrol shows of one job; nothing if it does not answer."""
    return dict(re.findall(r"(\w+)=(\S*)", _output("scontrol", "show", "job", "--oneliner", job_id)[0] or ""))


def offers_gpus(partition: str | None) -> bool:
    """Whether a node of the partition (None: of any) has GPUs. True if Slurm does not answer: sbatch will refuse."""
    answer, _ = _output("sinfo", "--noheader", "--format=%G", *([f"--partition={partition}"] if partition else []))
    return answer is None or bool(re.search(r"\bgpu\b", answer))


def _output(*command: str) -> tuple[str | None, str]:
    """What one of Slurm's programs prints (None if it fails), and its errors in one line."""
    if shutil.which(command[0]) is None:
        return None, f"there is no {command[0]} on this machine"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, one_line(str(error))
    return (done.stdout if done.returncode == 0 else None), one_line(done.stderr) or f"exit code {done.returncode}"


def one_line(text: str) -> str:
    """Slurm's lines as one, without the program's name before each."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines if line)
