"""A run whose work is done by processes of its own, one for each device: `devices` in its settings.

This process makes the run and waits. The processes resume it, as a worker of a sweep does, and record what becomes of it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid

from lethe import distributed
from lethe.errors import LetheError
from lethe.runs.locks import in_words
from lethe.runs.peers import DONE
from lethe.runs.run import Run, Terminated, now

WORKER = "lethe.launching.worker"
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that PyTorch's launcher handles in its own way, also after it is done."""
SECONDS_TO_SAVE = 600
"""How long processes may take to save after a request to stop, before they are killed."""


def is_for_several(devices: int | None, resumed: bool = False) -> bool:
    """Whether processes have to be started for this number of devices: not if this is one of them.

    Raises:
        LetheError: another number of processes was started for a new run, or there are fewer GPUs.
    """
    import torch

    here = distributed.local_world()
    if devices and distributed.world() > 1 and devices != here and not resumed:
        raise LetheError(f"devices: {devices}, but {here} processes were started on this machine; leave devices out")
    if devices and torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise LetheError(f"devices: {devices}, but this machine has {torch.cuda.device_count()} GPUs; lower it")
    return distributed.world() == 1 and (devices or 1) > 1


def work_together(run: Run, devices: int, trusts: bool) -> Run:
    """Do the work of a queued or interrupted run, one process for each device. `trusts`: the user trusts code of tasks.

    Raises:
        LetheError: it was refused, and a new run is removed; or it failed, with the reason in its record.
        Terminated: it was stopped on request.
    """
    new = run.record["started"] is None and "sweep" not in run.record
    run.lock.release()
    stopped: KeyboardInterrupt | None = None
    try:
        _spawn(devices, WORKER, str(run.path.absolute()), str(trusts))
    except KeyboardInterrupt as error:
        stopped = error
    done = Run.open(run.path)
    if done.status in DONE:
        return done
    if done.status == "running":  # by other processes, which were faster
        raise LetheError(f"'{done.path}' is in use by {in_words(done.record['environment'])}; wait until it is done")
    if done.record["status"] in {"queued", "running"}:
        done.update(status="failed", reason="its processes were killed", finished=now())
    run.record = done.record
    reason = str(done.record["reason"])
    if new and done.record["started"] is None and not stopped:
        run.discard()
        raise LetheError(reason.removeprefix("LetheError: "))
    if stopped and str(stopped) == "SIGINT":
        raise stopped
    if stopped or done.status == "cancelled":
        raise Terminated(reason)
    raise LetheError(reason.removeprefix("LetheError: "))


def _spawn(devices: int, module: str, *arguments: str) -> None:
    """Start `python -m MODULE ARGUMENTS` once per device with PyTorch's elastic launcher, and wait until all have ended.

    They share the cores. What becomes of them is for them to record. A request to stop this process is passed on.

    Raises:
        KeyboardInterrupt: this process was asked to stop, and the others have stopped.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment, handlers = dict(os.environ), {number: signal.getsignal(number) for number in HANDLED}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // devices)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints a page when a process ends
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id=uuid.uuid4().hex, max_restarts=0, local_addr="localhost",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.5, logs_specs=DefaultLogsSpecs(log_dir=logs),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError:
            pass
        except SignalException as error:
            raise KeyboardInterrupt(error.sigval.name) from error
        finally:
            os.environ.clear()
            os.environ.update(environment)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
