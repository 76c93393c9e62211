"""Going on with an interrupted run, whatever its kind: the same function that made it, given the run itself.

Unlearning and attacks go on from their newest whole save, and end in the bits that they would have ended in. A sweep of
checkpoints keeps what it has measured. An evaluation or a fit of maps, which have nothing to go on from, are done again.
"""

from __future__ import annotations

from lethe import config as c
from lethe.errors import LetheError
from lethe.launching.work import resume_run
from lethe.results.listing import is_imported
from lethe.runs.machine import refuse_several_processes
from lethe.runs.run import STOP, Run, find_run
from lethe.sweeps.controller import resume_sweep


def resume(config: c.ResumeConfig) -> Run:
    """Go on with a run.

    Raises:
        LetheError: there is no such run, it is complete or diverged, it is at work, or what it was made from has changed.
    """
    refuse_several_processes()
    run = find_run(config.run.removeprefix("run:"), config.out)
    if is_imported(run):
        raise LetheError(
            f"run: '{config.run}' was imported from {run.record['imported']['file']}; there is nothing to go on from"
        )
    _refuse_ended(run)
    run.hold()
    try:
        _refuse_ended(run)  # since it was read
        (run.path / STOP).unlink(missing_ok=True)
        if run.record["kind"] == "sweep":
            return resume_sweep(run, config.trust_record)
        if config.trust_record:
            raise LetheError(f"trust_record: has no effect on a run of kind {run.record['kind']}; leave it out")
        return resume_run(run)
    finally:
        run.lock.release()


def _refuse_ended(run: Run) -> None:
    if run.status in {"complete", "diverged"}:
        raise LetheError(f"run: '{run.path}' is {run.status}, there is nothing to go on with; start a new run")
