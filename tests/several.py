"""Runs of several processes over gloo, for tests: commands and scripts that start them, and the comparison with one process.

    finished(torchrun(2, several_work, "recipes", file))      the jobs in a file, each by two processes
    apart(run, whole)                                         how far losses and weights of two runs are apart

A script or command that does not end in time is killed with all its processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from lethe.runs.finding import find_runs
from lethe.runs.run import Run

LETHE = (sys.executable, "-m", "lethe")
SECONDS = 400
WORK = str(Path(__file__).parent / "several_work.py")


def torchrun(processes: int, *words: str) -> tuple[str, ...]:
    """The command that starts so many processes; `words`: a script, or `-m lethe …`."""
    return sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *words


def start(*words: str, **environment: str) -> subprocess.Popen:
    """A command in a process group of its own."""
    path = ":".join(filter(None, [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    settings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        words, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen, seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code and standard error of a command, which has so many seconds left."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        raise
    return process.returncode, errors or out


def finished(words: tuple[str, ...], **environment: str) -> str:
    """Standard error of a command that has to succeed."""
    code, errors = ended(start(*words, **environment))
    assert code == 0, errors[-3000:]
    return errors


def work(processes: int, jobs: list[tuple[str, Any]], folder: Path, **environment: str) -> None:
    """Do jobs, each the name of a function of Lethe and its settings, by so many processes."""
    file = folder / f"jobs-{processes}-{time.monotonic_ns()}"
    file.write_bytes(pickle.dumps(jobs))
    words = WORK, "jobs", str(file)
    finished((sys.executable, *words) if processes == 1 else torchrun(processes, *words), **environment)


def only_run(out: Path) -> Run:
    (run,) = find_runs(out)
    return Run.open(run.path)


def split(config: Any, processes: int, accumulated: int = 1, **changes: Any) -> Any:
    """A recipe for one process, with the same effective batch for several."""
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps // (processes * accumulated)
    return dataclasses.replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **changes)


def rank_process(run: Run, rank: int) -> int:
    """The process id of a rank."""
    return json.loads((run.path / "ranks" / f"{rank}.json").read_text())["pid"]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights of a run's model or adapter, without key biases: their gradient is 0, and Adam enlarges its rounding."""
    (file,) = [*run.path.glob("model/*.safetensors"), *run.path.glob("adapter/*.safetensors")]
    found = load_file(file)
    for name, value in found.items():
        if name.endswith("query_key_value.bias"):
            value.view(2, 3, -1)[:, 1] = 0  # two heads
    return found


def weights_apart(run: Run, whole: Run) -> float:
    """The largest ‖W − W'‖ / ‖W'‖ of a tensor."""
    one, other = weights(run), weights(whole)
    assert one.keys() == other.keys()
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    return max(float((one[n].double() - other[n].double()).norm() / other[n].double().norm().clamp(min=1e-30)) for n in one)


def losses_apart(run: Run, whole: Run) -> float:
    """The largest relative distance of a loss at any update. A part of the loss is compared relative to the whole loss.

    Trainer rounds the whole loss to float32, so for float64 it is left out.
    """
    worst, rounded = 0.0, whole.record["config"].get("dtype") == "float64"
    for row, other in zip(run.rows("metrics.jsonl"), whole.rows("metrics.jsonl"), strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if name.endswith("loss") or name == "grad_norm"):
            if name == "loss" and rounded:
                continue
            scale = max(abs(other[name]), abs(other["loss"])) if name.endswith("loss") else abs(other[name])
            worst = max(worst, abs(row[name] - other[name]) / scale if math.isfinite(row[name]) else math.inf)
    return worst


def assert_same_data(run: Run, whole: Run) -> None:
    """Every update has the same documents, numbers of tokens and learning rates."""
    for row, other in zip(run.rows("metrics.jsonl"), whole.rows("metrics.jsonl"), strict=True):
        counted = [name for name in row if name.endswith(("_tokens", "_documents")) or name in {"lr", "step"}]
        assert {name: row[name] for name in counted} == {name: other[name] for name in counted}
    for row, other in zip(run.rows("batches.jsonl"), whole.rows("batches.jsonl"), strict=True):
        assert row["step"] == other["step"] and row.keys() == other.keys()
        assert all(sorted(row[text]) == sorted(other[text]) for text in row.keys() - {"step"})
