"""A run whose work is done by processes of its own, one for each device: `devices` in its settings.

This process makes the run and waits. The processes resume it, as a worker of a sweep does, and record what becomes of it.
"""

from __future__ import annotations

from lethe import distributed
from lethe.errors import LetheError
from lethe.runs.peers import DONE
from lethe.runs.run import Run, Terminated, now

WORKER = "lethe.launching.worker"


def is_for_several(devices: int | None) -> bool:
    """Whether processes have to be started for this number of devices: not if this is one of them."""
    return distributed.world() == 1 and (devices or 1) > 1


def work_together(run: Run, devices: int, trusts: bool) -> Run:
    """Do the work of a queued or interrupted run, one process for each device. `trusts`: the user trusts code of tasks.

    Raises:
        LetheError: it was refused, and a new run is removed; or it failed, with the reason in its record.
        Terminated: it was stopped on request.
    """
    new = run.record["started"] is None
    distributed.refuse_devices(devices)
    run.lock.release()
    stopped: KeyboardInterrupt | None = None
    try:
        distributed.spawn(devices, WORKER, str(run.path.absolute()), str(trusts))
    except KeyboardInterrupt as error:
        stopped = error
    done = Run.open(run.path)
    if done.status in DONE:
        return done
    if done.record["status"] in {"queued", "running"}:
        done.update(status="failed", reason="its processes were killed", finished=now())
    reason = str(done.record["reason"])
    if new and done.record["started"] is None and not stopped:
        done.discard()
        raise LetheError(reason.removeprefix("LetheError: "))
    if stopped and str(stopped) == "SIGINT":
        raise stopped
    if stopped or done.status == "cancelled":
        raise Terminated(reason)
    raise LetheError(reason.removeprefix("LetheError: "))
