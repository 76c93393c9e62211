"""Seconds of short commands, with Python's usual garbage collection (`main`) and with Lethe's (`console`, runs/garbage.py).

    LETHE_LAB=nano python benchmarks/start.py

Measured on the built-in lab's model: five questions, a check, three updates. Both variants take turns three times. Prints
medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from lethe.evaluation.lab import build_lab
from lethe.lab import presets

ROUNDS = 3


def main() -> None:
    source = f"lab:global_step{presets.active_preset().onset}"
    build_lab()
    commands = {
        "evaluate": ["lab:final", "--limit", "5"],
        "check": ["--config", "lab", "--source", source],
        "unlearn": f"--config lab --source {source} --affine none --epochs 1 --max_steps 3 --warmup_steps 0".split(),
    }
    print(f"{'command':<10}{'main':>8}{'console':>9}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands.items():
            found: dict[str, list[float]] = {"main": [], "console": []}
            for _ in range(ROUNDS):
                for entry, times in found.items():
                    code = f"import sys; from lethe import cli; sys.exit(cli.{entry}())"
                    began = time.perf_counter()
                    subprocess.run([sys.executable, "-c", code, name, *words, "--out", folder], check=True, capture_output=True)
                    times.append(time.perf_counter() - began)
            searched, spared = (statistics.median(times) for times in found.values())
            print(f"{name:<10}{searched:>8.1f}{spared:>9.1f}{spared / searched:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
