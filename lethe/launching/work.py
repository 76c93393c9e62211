"""What a worker does with a trial: resume each of its runs that is not complete, in order.

A trial is a list of run folders that were made beforehand, `queued`, each with its configuration. Whatever happened before
(nothing, a kill, a preemption), `work(folders)` does what is left. A run that another process has at work is not touched:
whoever works on a run holds it (`Run.hold`). `serve` is a local worker process, `Work` a Slurm job's callable.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.config.parse import build
from lethe.errors import LetheError, printable
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.methods.method import Method
from lethe.progress import quiet
from lethe.runs import garbage
from lethe.runs.locks import HeldError
from lethe.runs.run import Run, Terminated, now
from lethe.runs.slurm_jobs import current_job_id

SETTINGS: dict[str, type] = {
    "unlearn": Method,
    "tamper": c.TamperConfig,
    "evaluate": c.EvaluateConfig,
    "checkpoints": c.CheckpointsConfig,
    "affine": c.AffineConfig,
}
"""The kinds of runs that can be resumed alone, with their settings."""
ENDED = ("complete", "failed", "diverged", "cancelled")


SECONDS_TO_NAME_JOB = 30


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


@dataclass(frozen=True)
class Work:
    """What a Slurm job does: `work` on a trial's folders, with the consent of the command that submitted it."""

    folders: list[str]
    trusts: bool = False

    def __call__(self) -> None:
        quiet()
        job_id = current_job_id()
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


@garbage.seldom()
def serve() -> None:
    """A local worker: trials from standard input, one line each; a line on standard output when one is done with."""
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


def go_on(run: Run) -> Run:
    """Do what is left of a run that was queued or interrupted, with the function that makes runs of its kind.

    Models are looked for beside it: its record may come from another machine.

    Raises:
        LetheError: runs of its kind cannot be resumed, or its configuration cannot be used.
    """
    kind = run.record["kind"]
    if kind not in SETTINGS:
        raise LetheError(f"run: '{run.path}' is of kind {kind}; what can be resumed: {', '.join(SETTINGS)}, sweep")
    return _function(kind)(settings_of(run, SETTINGS[kind]), run)


def settings_of(run: Run, kind: type) -> Any:
    """The configuration that a run's record holds, with the folder that the run is in now.

    Raises:
        LetheError: it cannot be used.
    """
    try:
        return build(kind, run.record["config"] | {"out": str(run.path.parent)})
    except LetheError as error:
        raise LetheError(f"run: the config in '{run.path / 'run.json'}' cannot be used: {error}") from error


def _function(kind: str) -> Callable[[Any, Run], Run]:
    function: Any
    if kind == "unlearn":
        from lethe.unlearning.pipeline import unlearn as function
    elif kind == "tamper":
        from lethe.attacks.tampering import tamper as function
    elif kind == "evaluate":
        from lethe.evaluation.accuracy import evaluate as function
    elif kind == "checkpoints":
        from lethe.evaluation.checkpoint_sweep import checkpoints as function
    else:
        from lethe.maps.affine import fit_affine as function
    return function


if __name__ == "__main__":
    serve()
