"""What a worker does with a trial: it resumes each of the trial's runs that is not complete, in order.

The controller makes a trial's runs beforehand, `queued`, each in a folder with its configuration. `work(folders)`
completes them, whatever happened before (nothing, a kill, a preemption). A process that works on a run holds it (`Run.hold`),
and `work` skips a run that another process holds. `serve` is a local worker process, `Work` the callable of a Slurm job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lethe
from lethe import config as c
from lethe import distributed
from lethe.config.parse import build
from lethe.errors import LetheError, printable
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.methods import user_file
from lethe.methods.method import Method
from lethe.progress import quiet
from lethe.runs import garbage
from lethe.runs.locks import HeldError
from lethe.runs.peers import DONE
from lethe.runs.record import Status
from lethe.runs.run import Run, Terminated, now
from lethe.runs.slurm_jobs import current_job_id
from lethe.runs.supervise import log_file

SETTINGS: dict[str, Any] = {
    "unlearn": Method,
    "tamper": c.TamperConfig,
    "evaluate": c.EvaluateConfig,
    "checkpoints": c.CheckpointsConfig,
    "affine": c.AffineConfig,
}
"""The settings of each kind of run that can be resumed alone."""
RENAMED = {"kept_threshold": "retained_threshold", "prune": "stop_early"}
"""Settings of sweeps by the names that records of earlier versions have."""
SECONDS_TO_NAME_JOB = 30


def work(folders: Sequence[str | Path], job_id: str | None = None) -> Status | None:
    """Resume each run that is not complete, in order, until one does not complete. Returns the status of the last one.

    A run that is refused, or raises, is `failed` with its reason. Returns None at once if another process works on one.
    """
    for folder in folders:
        if distributed.from_first(lambda: Run.open(folder).status) == "complete":  # noqa: B023 (called at once)
            continue
        run = Run.open(folder)
        try:
            run.hold(job_id)
        except HeldError:
            return None
        try:
            if (status := _finish(run, job_id)) != "complete":
                return status
        finally:
            run.lock.release()
    return "complete"


def _finish(run: Run, job_id: str | None) -> Status:
    """Resume a run that this process holds. Returns its status then.

    Raises:
        Terminated: this process received a request to stop, but the run did not.
    """
    if job_id is not None and run.record["job_id"] != job_id:
        run.update(job_id=job_id)
    if run.status == "complete":
        return run.status
    if request := distributed.from_first(run.asked_to_stop):
        run.update(status="cancelled", reason=request, finished=now())
        return run.status
    try:
        run = resume_run(run)
    except Terminated:
        if not run.asked_to_stop():
            raise
    except Exception as error:
        ended = run.record["status"] in {"complete", "failed", "diverged", "cancelled"}
        if not ended and not isinstance(error, LetheError):
            with log_file(run.path).open("a") as log:
                log.writelines(f"{printable(line)}\n" for line in traceback.format_exc().splitlines())
        reason = f"{type(error).__name__}: {error}"
        if distributed.is_of_another(error):  # once the run is `running`, its peers know which one
            reason = "another process of the run ended before it began; see log-rank*.txt and the logs of the job"
        # Written even if the run has recorded it: if the disk is full now, this raises, and the run counts as lost.
        run.update(**{} if ended else {"status": "failed", "reason": reason, "finished": now()})
    return run.status


@dataclass(frozen=True)
class Work:
    """What a Slurm job does: `work` on a trial's folders. `trusts`: whether the submitting user trusts code of tasks."""

    folders: list[str]
    trusts: bool = False

    def __call__(self) -> None:
        quiet()
        job_id = current_job_id()
        deadline = time.monotonic() + SECONDS_TO_NAME_JOB  # the controller writes the job's id, unless it was killed
        while Run.open(self.folders[0]).record["job_id"] != job_id and time.monotonic() < deadline:
            time.sleep(0.2)
        with trust_task_code(self.trusts):
            if work(self.folders, job_id) == "complete":
                with contextlib.suppress(RuntimeError):  # of one that has failed
                    distributed.gather(None)  # when one task has ended, Slurm gives the others only some time

    def before_requeue(self, reason: str) -> None:
        """Runs that have saved are queued again, under the same job."""
        for folder in self.folders:
            run = Run.open(folder)
            if run.record["status"] == "cancelled":
                run.update(status="queued", reason=f"its job was {reason}; it resumes when Slurm restarts the job")


@garbage.seldom()
def serve() -> None:
    """A local worker: reads one trial per line from standard input, and writes a line when it is done with it."""
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not reach the controller
    for line in sys.stdin:
        order = json.loads(line)
        os.chdir(order["cwd"])
        try:
            with trust_task_code(order["trust_task_code"]):
                work(order["folders"])
        except Terminated:
            sys.exit(143)
        try:
            done.write(f"{order['name']}\n")
            done.flush()
        except BrokenPipeError:
            return


def resume_run(run: Run, devices: int | None = None) -> Run:
    """Do what is left of a run that was queued or interrupted, with the function that makes runs of its kind.

    Models that it names by `run:ID` are looked for beside it. `devices`: a number of processes other than its settings name.

    Raises:
        LetheError: runs of its kind cannot be resumed, or its configuration cannot be used.
    """
    kind = run.record["kind"]
    if kind not in SETTINGS:
        raise LetheError(f"run: '{run.path}' is of kind {kind}; you can resume: {', '.join(SETTINGS)}, sweep")
    function = getattr(lethe, "fit_affine" if kind == "affine" else kind)
    settings = settings_of(run, SETTINGS[kind])
    if devices is not None:
        if not hasattr(settings, "devices"):
            raise LetheError(f"devices: a run of kind {kind} uses one process; leave it out")
        settings = replace(settings, devices=devices)
    return function(settings, run)


def settings_of(run: Run, kind: type) -> Any:
    """The configuration in a run's record, with the folder that the run is in now.

    Raises:
        LetheError: it cannot be used.
    """
    settings = run.record["config"]
    if run.record["kind"] == "sweep":
        settings = {RENAMED.get(name, name): value for name, value in settings.items()}
        if settings.get("find") == "keeps":
            settings["find"] = "retained"
        if settings.get("unlearn"):
            settings["unlearn"] = Method.of_record(settings["unlearn"])
    try:
        if run.record["kind"] == "unlearn" and user_file.is_file(settings.get("method")):
            settings = settings | {"method": str(user_file.kept(run))}
        return build(kind, settings | {"out": str(run.path.parent)})
    except LetheError as error:
        raise LetheError(f"run: the config in '{run.path / 'run.json'}' cannot be used: {error}") from error


@garbage.seldom()
def one_of_several(folder: str, trusts: str) -> int:
    """One of the processes that do a run's work together (`runs/together.py`); returns the exit code."""
    quiet()
    os.dup2(2, 1)
    try:
        with trust_task_code(trusts == "True"):
            if work([folder]) == "failed":  # perhaps in this process alone, so that the others are not waited for
                distributed.has_last_word()
            else:
                with contextlib.suppress(RuntimeError):
                    distributed.gather(None)  # the first has recorded how the run ended
    except Terminated:
        return 143
    except KeyboardInterrupt:  # at the keyboard, which the process that started this one reports
        return 130
    return 0 if Run.open(folder).record["status"] in DONE else 1


if __name__ == "__main__":
    sys.exit(one_of_several(*sys.argv[1:]) if sys.argv[1:] else serve())
