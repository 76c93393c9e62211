"""Resuming an interrupted run of any kind, with the function that made it, given the run itself.

Unlearning and attacks resume from their newest whole save, with a bit-identical result. A sweep of checkpoints does not repeat
what it has measured. An evaluation or a fit of maps starts again.
"""

from __future__ import annotations

from lethe import config as c
from lethe import distributed
from lethe.errors import LetheError
from lethe.launching.worker import resume_run
from lethe.methods import user_file
from lethe.results.listing import is_imported
from lethe.runs.finding import find_run
from lethe.runs.machine import refuse_several_processes
from lethe.runs.run import STOP, Run
from lethe.sweeps.controller import sweep
from lethe.sweeps.folder import config_of


def resume(config: c.ResumeConfig) -> Run:
    """Resume a run.

    Raises:
        LetheError: there is no such run, it has ended, another process works on it, or what it was made from has changed.
    """
    run = find_run(config.run.removeprefix("run:"), config.out)
    if is_imported(run):
        raise LetheError(f"run: '{config.run}' was imported from {run.record['imported']['file']}; there is nothing to resume")
    _refuse_ended(run)
    run.hold()
    try:
        _refuse_ended(run)  # since it was read
        distributed.from_first(lambda: (run.path / STOP).unlink(missing_ok=True))
        if run.record["kind"] == "sweep":
            refuse_several_processes("sweep")
            if config.devices:
                raise LetheError("devices: a sweep's runs have their own number of devices; leave it out")
            return sweep(config_of(run, config.trust_record), run)
        if config.trust_record and "method_file" in run.record:
            user_file.trust(user_file.kept(run))
        elif config.trust_record:
            raise LetheError(f"trust_record: has no effect on a run of kind {run.record['kind']}; leave it out")
        return resume_run(run, config.devices)
    finally:
        run.lock.release()


def _refuse_ended(run: Run) -> None:
    if run.status in {"complete", "diverged"}:
        raise LetheError(f"run: '{run.path}' is {run.status}, there is nothing to resume; start a new run")
