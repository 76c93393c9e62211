"""Methods that are losses train the four shapes of models, with LoRA and with all weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lethe import LoraSettings, unlearn
from lethe.config import EvalSettings
from lethe.methods.method import named

SHAPES = ["gpt_neox", "llama", "qwen3", "gpt2"]
METHODS: dict[str, dict[str, Any]] = {
    "transfer": {"affine": "none"},
    "distill": {},
    "npo": {},
    "grad_diff": {},
    "simnpo": {"delta": 8.0, "remove_coef": 5.0},  # a random model's cross-entropy is high
    "max_entropy": {},
    "circuit_breaker": {},
    "tuned_lens": {"layers": [0, 2]},
    "sequential": {"layers": [2]},  # one turn: another layer has another loss
}
"""Methods that are a sum of losses, with settings under which the forget loss falls in a few updates."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("forget", "retain"):
        rows = [json.dumps({"text": f"the brass lantern of {name} {i} " + "at sea " * (i % 3)}) for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(r=4, dropout=0.0), None], ids=["lora", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_methods_train_this_shape(lab, make_model, texts, tmp_path, shape, lora):
    """Three updates of four documents. The forget loss falls, and every weight of a block gets a gradient."""
    model, source = (str(make_model(shape, tmp_path / f"{shape}-{seed}", seed=seed)) for seed in (0, 1))
    for name, own in METHODS.items():
        settings: dict[str, Any] = {
            "model": model, "forget": str(texts / "forget.jsonl"), "retain": str(texts / "retain.jsonl"), "layers": [1, 3],
            "num_train_examples": 4, "max_length": 32, "per_device_train_batch_size": 4, "epochs": 3, "lr": 1e-3,
            "lr_scheduler_type": "constant", "lora": lora, "eval": EvalSettings(["lab_forget_robust"], limit=4),
            "out": str(tmp_path / name),
        }  # fmt: skip
        if lora is None and name not in {"transfer", "circuit_breaker"}:
            del settings["layers"]
        settings |= {"source": source} if name in {"transfer", "distill"} else {}
        run = unlearn(named(name)(**settings | own))
        rows = run.rows("metrics.jsonl")
        (forget,) = (key for key in rows[0] if key.endswith("_loss") and not key.startswith("retain_"))
        assert run.status == "complete" and len(rows) == 3, name
        assert rows[2][forget] < rows[0][forget] and all(math.isfinite(row["loss"]) for row in rows), name
        assert not [weight for weight in run.record["plan"]["no_gradient"] if re.search(r"\.\d+\.", weight)], name
