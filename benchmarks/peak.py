"""Peak memory of unlearning runs, seen from outside the process, beside the estimate of `lethe check`.

    python benchmarks/peak.py RECIPE.yaml [--setting value ...]

Runs the recipe with LoRA and with all weights, with live and with cached teachers, each in a fresh process. Resident memory
includes pages of files that are mapped (weights, caches), which the system can take back; *own* memory does not. Both are read
every 10 ms from /proc (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "LoRA, live": ["--lora", "{r: 16, alpha: 16, dropout: 0.0}", "--teacher_cache", "live"],
    "LoRA, cached": ["--lora", "{r: 16, alpha: 16, dropout: 0.0}", "--teacher_cache", "cached"],
    "all weights, live": ["--lora", "null", "--teacher_cache", "live"],
    "all weights, cached": ["--lora", "null", "--teacher_cache", "cached"],
}


def memory(process: int) -> tuple[int, int]:
    """Resident and own bytes of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return found.get("VmRSS", 0), found.get("RssAnon", 0)


def run(words: list[str]) -> tuple[int, int, int]:
    """The peaks of resident and own bytes of a run, and its estimate."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "lethe", "unlearn", *words, "--out", out]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            resident = own = 0
            while process.poll() is None:
                now = memory(process.pid)
                resident, own = max(resident, now[0]), max(own, now[1])
                time.sleep(0.01)
            if process.returncode:
                raise SystemExit(process.stderr.read() if process.stderr else "the run failed")
        (record,) = (json.loads(file.read_text()) for file in Path(out).glob("*/run.json"))
    return resident, own, sum(record["plan"]["memory"].values())


def main() -> None:
    print(f"{'MiB, peak':20} {'resident':>9} {'own':>9} {'estimate':>9}")
    for name, words in RUNS.items():
        peaks = run(["--config", *sys.argv[1:], *words])
        print(f"{name:20} {' '.join(f'{peak / 2**20:9.0f}' for peak in peaks)}", flush=True)


if __name__ == "__main__":
    main()
