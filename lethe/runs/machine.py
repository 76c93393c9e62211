"""The machine and process that a run works on: versions, memory, and whether it is alone at its work."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import psutil

from lethe.errors import LetheError
from lethe.progress import console
from lethe.runs.locks import identity


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes.

    Linux's own count: that of `getrusage` begins with what the parent process held.
    """
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def refuse_several_processes() -> None:
    """Refuse a process that is one of several at the same work, as under torchrun: each would write a run of its own.

    Raises:
        LetheError: there are several.
    """
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise LetheError(
            f"WORLD_SIZE is {count}: one of several processes at one run, as torchrun starts them, which Lethe does not do; "
            f"start it without torchrun (runs beside each other: --jobs, --launcher slurm)"
        )


def environment() -> dict[str, Any]:
    """Versions and machine that a run's numbers depend on."""
    packages = ["lethe-lm", "torch", "transformers", "peft", "lm_eval", "datasets", "safetensors"]
    return {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        **identity(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of Lethe's own checkout; None when it is installed as a package or git is missing."""
    here = Path(__file__).parent.parent
    if not (here.parent / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


logger = logging.getLogger(__name__)
SECONDS = 0.2
"""How long the machine is watched, once a process."""


@functools.cache
def say_if_busy() -> None:
    """Say, once a process, if there are fewer free cores than threads: threads that wait for each other then wait for others.

    Called while this process itself has nothing to do.
    """
    import torch  # not above: a refusal of what calls this needs none

    threads, cores = torch.get_num_threads(), psutil.cpu_count() or 1
    if threads == 1 or torch.cuda.is_available():
        return
    used = cores * psutil.cpu_percent(SECONDS) / 100
    if warning := crowded(threads, cores, used):
        logger.info(warning)  # into the run's log
        console.print(f"lethe: {warning}", soft_wrap=True, markup=False)


def crowded(threads: int, cores: int, used: float) -> str | None:
    """What to say when other processes use so many of the cores; None where there is room for all threads."""
    if threads == 1 or threads <= cores - used + 0.5:
        return None
    free = max(1, int(cores - used + 0.5))
    return (
        f"the machine is busy: other processes use {used:.1f} of {cores} cores, and {threads} threads beside them can be "
        f"several times slower than {free}; set OMP_NUM_THREADS={free}, or wait"
    )
