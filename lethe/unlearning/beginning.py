"""What a method computes once, before the first update (`Method.begin`): kept in the run, and loaded when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lethe import distributed
from lethe.files import sha256, write_atomically
from lethe.methods.method import Method
from lethe.runs.run import Run
from lethe.unlearning.trainer import UnlearnTrainer

FILE = "method.safetensors"


def begin(run: Run, config: Method, trainer: UnlearnTrainer) -> None:
    """Compute what the method needs before the first update, or load what an interrupted run has computed."""
    path, recorded = run.path / FILE, (run.record.get("artifacts") or {}).get("method")
    if type(config).begin is Method.begin:
        return
    if not distributed.from_first(lambda: recorded and path.is_file() and sha256(path) == recorded["sha256"]):
        model: Any = trainer.model
        with torch.random.fork_rng():  # a run that loads the result draws the same dropout afterwards
            found = config.begin(model, trainer.updates_over)
        whole = {name: distributed.whole(value.detach()).cpu().contiguous() for name, value in found.items()}
        digest = distributed.from_first(lambda: _write(path, whole))
        values = {name: float(value) for name, value in whole.items() if value.ndim == 0}
        facts: dict[str, Any] = {"path": path.name, "sha256": digest} | ({"values": values} if values else {})
        run.update(artifacts={"method": facts})
    trainer.given = {name: value.to(distributed.device()) for name, value in load_file(path).items()}


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    write_atomically(path, save(tensors))
    return sha256(path)
