"""How long `lethe runs` takes over many runs.

    python benchmarks/runs.py [COUNT]

Makes COUNT (5,000) runs of the usual kinds and statuses in a temporary folder, each with a full run.json and metrics.jsonl of
500 lines (written once, then copied), and times the command itself: a list, a chosen and sorted one, and JSON.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.ledger import now

KINDS = (("unlearn", 6), ("tamper", 2), ("evaluate", 2))
STATUSES = (("complete", 16), ("failed", 1), ("running", 1), ("queued", 1), ("diverged", 1))
COMMANDS = {
    "list": [],
    "chosen": ["--where", "kind=unlearn", "status=complete", "retain_coef<=5", "--sort", "lab_retain", "--reverse"],
    "columns": ["--columns", "id", "lr", "cb_loss", "lab_retain", "evals.lab_forget.acc", "--sort", "config.lr"],
    "json": ["--json"],
}


def record(rng: random.Random, number: int) -> dict[str, Any]:
    """A run's record, of the size that a real one has."""
    kind, status = (rng.choices(*zip(*weighted, strict=True))[0] for weighted in (KINDS, STATUSES))
    settings: Any = {"unlearn": c.UnlearnConfig, "tamper": c.TamperConfig, "evaluate": c.EvaluateConfig}[kind]
    given = {"model": "lab:final"} | ({"source": "lab:global_step900"} if kind == "unlearn" else {})
    config = c.to_dict(settings(**given)) | {"retain_coef": rng.choice([1, 2, 5, 10, 20]), "lr": 10 ** rng.uniform(-5, -3)}
    done = status in {"complete", "diverged"}
    result = {"stderr": 0.01, "low": 0.4, "high": 0.5, "n": 1024, "chance": 0.25, "num_fewshot": 0, "version": 1}
    result |= {"fingerprint": f"{rng.getrandbits(256):064x}", "answers": [256] * 4, "degenerate": False}
    layers = {f"layers.{n}": {"distance": rng.random(), "stable_rank": rng.random()} for n in range(8)}
    parents = {role: {"ref": f"lab:{role}", "sha256": f"{rng.getrandbits(256):064x}"} for role in ("model", "source", "forget")}
    return {
        "id": f"{number:08x}",
        "kind": kind,
        "name": f"ret{config['retain_coef']}-{number}",
        "status": status,
        "reason": None,
        "job_id": None,
        "launcher": "local",
        "created": now(),
        "started": now(),
        "finished": None,
        "heartbeat": now(),
        "config": config,
        "plan": {"steps": 500, "forward_passes": 4000, "effective_batch": 32, "tokens": 1e6},
        "losses": {"cb_loss": rng.random(), "retain_kl_loss": rng.random()} if done else {},
        "evals": {task: result | {"acc": rng.random()} for task in c.LAB_TASKS} if done else {},
        "parents": parents,
        "update_by_layer": layers,
        "environment": {"host": "node", "pid": 1, "seconds": 60.0},
    }


def main() -> None:
    """Make the runs, time the commands."""
    count, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 5000, random.Random(0)
    terms = {"loss": 1.0, "cb_loss": 0.5, "retain_kl_loss": 0.01, "grad_norm": 1.0, "tokens_per_second": 9999.9}
    metrics = "".join(json.dumps({"step": step} | terms) + "\n" for step in range(1, 501))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_text(metrics)
        for number in range(count):
            made = record(rng, number)
            path = Path(folder) / "runs" / f"{made['kind']}-{made['name']}-{made['id']}"
            path.mkdir(parents=True)
            (path / "run.json").write_text(json.dumps(made, indent=2))
            if made["status"] != "queued":
                shutil.copy(Path(folder) / "metrics.jsonl", path)
        for name, words in COMMANDS.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                command = [sys.executable, "-m", "lethe.cli", "runs", f"{folder}/runs", *words]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - start)
            print(f"{name:<8} {count} runs: {min(times):.2f} to {max(times):.2f} s")


if __name__ == "__main__":
    main()
