"""What tests of sweeps share: a recipe that takes seconds on the nano lab, and controllers in processes of their own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from lethe.config import SweepConfig
from lethe.errors import LetheError
from lethe.lab.presets import active_preset
from lethe.runs.finding import find_runs
from lethe.runs.run import Run

TASKS = ["lab_forget_robust", "lab_retain"]


def recipe(**changes):
    settings = {
        "source": f"lab:global_step{active_preset().onset}",
        "lr": 1e-2,
        "num_train_examples": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_every": 2,
        "affine": "none",
        "layers": [0, 2, 4],
        "eval": {"tasks": TASKS, "limit": 40},
    }
    return settings | changes


def config(out: Path, **changes) -> SweepConfig:
    settings = {"unlearn": recipe(), "vary": {"retain_coef": [1, 10]}, "out": str(out)} | changes
    return SweepConfig(**settings)


def trials(run: Run) -> dict[str, dict]:
    return {trial["name"]: trial for trial in run.record["trials"]}


def weights(run: Run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def start(*words: str, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lethe.cli", *words, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=(out.parent / "controller.log").open("a"),
        start_new_session=True,
    )


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


def at_work(out: Path) -> list[Run]:
    """Unlearning runs that have made an update."""
    with contextlib.suppress(LetheError):
        return [
            r for r in find_runs(out) if r.record["kind"] == "unlearn" and r.status == "running" and r.rows("metrics.jsonl")
        ]
    return []
