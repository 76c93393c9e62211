"""Checks before training, and the length of a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from lethe.config import (
    TamperConfig,
    TrainingSettings,
    UnlearnSettings,
)
from lethe.errors import LetheError, nearest, printable
from lethe.models import refs


def plan(config: TrainingSettings, examples: int) -> dict[str, Any]:
    """How long a run is: `steps` are optimizer updates, `forward_passes` batches, on one device.

    `unique_examples` is the number of documents of each kind (of the larger kind, when they differ).
    """
    batches = math.ceil(examples / config.per_device_train_batch_size)
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
    if config.warmup_steps >= steps:
        raise LetheError(
            f"warmup_steps: a run of {steps} updates never reaches lr {config.lr:g} with {config.warmup_steps}; lower it"
        )
    whole, rest = divmod(steps, per_epoch)
    return {
        "unique_examples": examples,
        "steps": steps,
        "forward_passes": whole * batches + min(batches, rest * config.gradient_accumulation_steps),
        "effective_batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "epochs": steps / per_epoch,
        "first_epoch_steps": per_epoch,
    }


def refuse_rank(config: UnlearnSettings | TamperConfig, model: refs.ModelRef) -> None:
    """Refuse adapters of a higher rank than the model's activations can have; a huge one would fail when it is made."""
    if config.lora is not None and config.lora.r > model.width:
        raise LetheError(
            f"lora.r: {config.lora.r} is above the width of '{model.name}', {model.width}, the highest useful rank; lower it"
        )


REPORTERS: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")
}


REPORTERS |= {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}
"""The loggers of transformers, and for each the packages of which it needs one."""


def refuse_unavailable(config: TrainingSettings) -> None:
    """Refuse settings that need a library that is not installed."""

    def missing(*packages: str) -> bool:
        return not any(map(importlib.util.find_spec, packages))

    if config.optimizer == "adamw_8bit" and missing("torchao", "bitsandbytes"):
        raise LetheError("optimizer: adamw_8bit needs torchao or bitsandbytes, and neither is installed; pip install torchao")
    for name in config.report_to:
        if name not in REPORTERS:
            raise LetheError(f"report_to: '{printable(name, 80)}' is not a logger of transformers{nearest(name, REPORTERS)}")
        if missing(*REPORTERS[name]):
            raise LetheError(f"report_to: '{name}' is not installed; pip install {REPORTERS[name][0]}, or leave it out")
