"""Going on with an interrupted run, whatever its kind: the same function that made it, given the run itself.

Unlearning and attacks go on from their newest whole save, and end in the bits that they would have ended in. A sweep of
checkpoints keeps what it has measured. An evaluation or a fit of maps, which have nothing to go on from, are done again.
"""

from __future__ import annotations

import importlib
from typing import Any

from lethe import config as c
from lethe.config.parse import build
from lethe.errors import LetheError
from lethe.results.listing import is_imported
from lethe.runs.machine import refuse_several_processes
from lethe.runs.run import STOP, Run, find_run
from lethe.sweeps.trust import consented

KINDS: dict[str, tuple[type, str]] = {
    "unlearn": (c.UnlearnConfig, "unlearn"),
    "tamper": (c.TamperConfig, "tamper"),
    "evaluate": (c.EvaluateConfig, "evaluate"),
    "checkpoints": (c.CheckpointsConfig, "checkpoints"),
    "affine": (c.AffineConfig, "affine"),
    "sweep": (c.SweepConfig, "sweep"),
}
FUNCTIONS = {"affine": "fit_affine"}


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
        return go_on(run, config.trust_record)
    finally:
        run.lock.release()


def _refuse_ended(run: Run) -> None:
    if run.status in {"complete", "diverged"}:
        raise LetheError(f"run: '{run.path}' is {run.status}, there is nothing to go on with; start a new run")


def go_on(run: Run, trusts: bool = False) -> Run:
    """Do what is left of a run that was queued or interrupted, with the function that makes runs of its kind.

    `trusts`: the user agrees to what a sweep's record runs or opens.

    Runs are looked for, and made, beside it: its record may come from another machine.
    """
    if run.record["kind"] not in KINDS:
        raise LetheError(f"run: '{run.path}' is of kind {run.record['kind']}; what can be resumed: {', '.join(KINDS)}")
    settings, module = KINDS[run.record["kind"]]
    if run.record["kind"] == "sweep":
        from lethe.sweeps.controller import config_of

        settings = config_of(run)
    try:
        made: Any = build(settings, run.record["config"] | {"out": str(run.path.parent)})
    except LetheError as error:
        raise LetheError(f"run: the config in '{run.path / 'run.json'}' cannot be used: {error}") from error
    if isinstance(made, c.LaunchSettings):
        consented(made, trusts)
    elif trusts:
        raise LetheError(f"trust_record: has no effect on a run of kind {run.record['kind']}; leave it out")
    return getattr(importlib.import_module(f"lethe.{module}"), FUNCTIONS.get(module, module))(made, run)
