"""The process and machine that a run executes on: versions, memory, and whether other programs use the cores."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from lethe import distributed
from lethe.errors import LetheError
from lethe.progress import console
from lethe.runs.locks import identity

PACKAGES = ["lethe-lm", "torch", "transformers", "peft", "lm_eval", "datasets", "safetensors"]
SECONDS = 0.2
"""How long the use of the cores is measured."""
logger = logging.getLogger(__name__)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes.

    Read from /proc where there is one: `getrusage` of a child process starts with the memory of its parent.
    """
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def available_memory() -> int:
    """Free memory in bytes for this process: of its GPU if there is one, else its share of the machine's."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return psutil.virtual_memory().available // distributed.local_world()


def refuse_several_processes(what: str) -> None:
    """Refuse to be one of several processes where one has to do the work.

    Raises:
        LetheError: there are several.
    """
    if (count := distributed.world()) > 1:
        raise LetheError(
            f"{what}: runs in one process, and {count} were started; start it without torchrun "
            f"(several runs at a time: --jobs, --launcher slurm; several devices for each: devices)"
        )


def environment() -> dict[str, Any]:
    """Versions and machine that a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        **identity(),
        "world_size": distributed.world(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed, such as datasets where no data set is read."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git_commit() -> str | None:
    """The commit of Lethe's own checkout; None when it is installed as a package or git is missing."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def say_if_busy() -> None:
    """Warn, once a process, if other programs leave fewer free cores than torch has threads.

    Call it while this process itself is idle. Work without torch, such as a sweep's controller, has no threads.
    """
    torch: Any = sys.modules.get("torch")
    if distributed.is_first() and torch is not None and torch.get_num_threads() > 1 and not torch.cuda.is_available():
        _say_if_busy(torch.get_num_threads())


@functools.cache
def _say_if_busy(threads: int) -> None:
    cores = psutil.cpu_count() or 1
    if warning := crowded(threads, cores, cores * psutil.cpu_percent(SECONDS) / 100):
        logger.info(warning)  # into the run's log
        console.print(f"lethe: {warning}", soft_wrap=True, markup=False)


def crowded(threads: int, cores: int, used: float) -> str | None:
    """The warning if other processes use so many of the cores; None if there is room for all threads."""
    if threads <= max(1, cores - used + 0.5):
        return None
    free = max(1, int(cores - used + 0.5))
    return (
        f"the machine is busy: other processes use {used:.1f} of {cores} cores, and {threads} threads beside them can be "
        f"several times slower than {free}; set OMP_NUM_THREADS={free}, or wait"
    )
