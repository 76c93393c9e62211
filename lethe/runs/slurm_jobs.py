"""What Slurm says about jobs: one question to sacct and squeue (or scontrol) for all of them; and cancelling them.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from lethe.errors import LetheError

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "STOPPED", "RESV_DEL_HOLD"}
WORKS = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
UNKNOWN = "UNKNOWN"
MAY_RETURN = {UNKNOWN, "PREEMPTED", "NODE_FAIL"}  # ended for sacct, while slurmctld may have the job waiting again
ANSWER_SECONDS = 30
# A signal that comes before Python has its handlers must not end the job: Slurm would take it for failed.
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


def current_job_id() -> str | None:
    """The job that this process belongs to (`17_3`: one of an array); None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


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


def _ordered(*command: str) -> None:
    answer, words = _asked(*command)
    if answer is None:
        raise LetheError(f"slurm: {command[0]}: {words}")


def facts_of(job_id: str) -> dict[str, str]:
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
        return None, one_line(str(error))
    return (done.stdout if done.returncode == 0 else None), one_line(done.stderr) or f"exit code {done.returncode}"


def one_line(text: str) -> str:
    """Slurm's lines as one, without the program's name before each."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines if line)
