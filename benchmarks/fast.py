"""What a setting costs or saves in training: seconds of an update with a recipe as it is, and with one setting changed.

    python benchmarks/fast.py lab -- --fast false
    python benchmarks/fast.py lab-hold -- --teacher_cache cached

Settings before `--` apply to both. Those after it make the second variant. Short runs of both variants take turns in one
process. Prints medians over all updates: CPU time of the process, time of the clock, and their ratios (second / first). On a
machine that others use, the ratio of CPU times is the reliable one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

from lethe import cli
from lethe.runs.run import Run

BLOCKS, UPDATES, WARM = 6, 6, 2


def updates(command: list[str]) -> list[tuple[float, float]]:
    """CPU and clock seconds of each update of one run, without its first `WARM`."""
    ends: list[tuple[float, float]] = []
    append = Run.append

    def noting(run: Run, file: str, row: dict[str, Any]) -> None:
        append(run, file, row)
        if file == "metrics.jsonl":
            ends.append((time.process_time(), time.perf_counter()))

    Run.append = noting  # type: ignore[method-assign]
    try:
        if cli.main(command):
            raise SystemExit(f"lethe {' '.join(command)} failed")
    finally:
        Run.append = append  # type: ignore[method-assign]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]


def main() -> None:
    recipe, *rest = sys.argv[1:]
    cut = rest.index("--")
    common, changed = rest[:cut], rest[cut + 1 :]
    found: list[list[tuple[float, float]]] = [[], []]
    with tempfile.TemporaryDirectory() as out:
        short = ["--max_steps", str(UPDATES + WARM), "--epochs", "1", "--eval.limit", "1", "--affine", "none", "--out", out]
        for block in range(BLOCKS):
            for which in (0, 1) if block % 2 == 0 else (1, 0):
                found[which] += updates(["unlearn", "--config", recipe, *short, *common, *(changed if which else [])])
    for i, clock in enumerate(("CPU", "wall")):
        one, other = (statistics.median(pair[i] for pair in pairs) for pairs in found)
        print(f"{clock:>5} ms an update: {1e3 * one:.1f}, with {' '.join(changed)}: {1e3 * other:.1f}; ratio {other / one:.3f}")


if __name__ == "__main__":
    main()
