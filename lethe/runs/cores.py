"""Whether other processes use the cores that this one is going to work on."""

from __future__ import annotations

import functools
import logging

import psutil

from lethe.progress import console

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
