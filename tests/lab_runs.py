"""Short unlearning runs on the nano lab: the one place where tests make them, start them and compare them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lethe import LoraSettings, Transfer
from lethe.config import EvalSettings, to_dict
from lethe.lab.presets import active_preset
from lethe.runs.finding import find_runs
from lethe.runs.run import Run

LAYERS = [0, 2, 4]


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of three updates of eight documents of each kind, without dropout."""
    short: dict[str, Any] = {
        "source": f"lab:global_step{active_preset().onset}",
        "layers": LAYERS,
        "num_train_examples": 64,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "lora": LoraSettings(dropout=0.0),
        "eval": EvalSettings(["lab_forget_robust"], limit=8),
        "out": str(out),
    }
    return short | changes


def recipe(out: Path, **changes: Any) -> Transfer:
    """A short run of checkpoint transfer."""
    return Transfer(**settings(out, **changes))


def interruptible(out: Path, **changes: Any) -> Transfer:
    """A run of twenty updates that is saved and evaluated on the way, with dropout."""
    way: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 20, "save_every": 3}
    way |= {
        "lr_scheduler_type": "linear",
        "lora": LoraSettings(),
        "eval": EvalSettings(["lab_forget_robust"], every=5, limit=4),
    }
    return recipe(out, **(way | changes))


def start(command: str, config: Any, folder: Path) -> subprocess.Popen:
    """The command in a process of its own."""
    (folder / "recipe.json").write_text(json.dumps(to_dict(config)))
    words = [sys.executable, "-m", "lethe.cli", command, "--config", str(folder / "recipe.json")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, out: Path, file: str, lines: int) -> Run:
    """The run of `process`, as soon as its `file` has so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = find_runs(out) if out.exists() else []
        if runs and len(runs[0].rows(file)) >= lines:
            return runs[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("the run did not come so far")


def written(run: Run) -> list[Any]:
    """All that a run wrote line by line, without its speed."""
    metrics = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in run.rows("metrics.jsonl")]
    return [metrics, run.rows("batches.jsonl"), run.rows("curve.jsonl")]


def assert_same(run: Run, whole: Run) -> None:
    assert run.status == whole.status == "complete"
    assert written(run) == written(whole)
    for key in ("losses", "evals", "agreement", "update_by_layer", "parents"):
        assert run.record.get(key) == whole.record.get(key), key
    assert run.record["plan"].get("tokens") == whole.record["plan"].get("tokens")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.path / name).exists() == (whole.path / name).exists()
        if (run.path / name).exists():
            one, other = load_file(run.path / name), load_file(whole.path / name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (run.path / "saves").exists()
