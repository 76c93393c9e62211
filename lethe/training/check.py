"""Checks before training, and the length of a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from lethe import distributed
from lethe.config import TamperConfig, TrainingSettings, UnlearnSettings
from lethe.errors import LetheError, printable
from lethe.models import refs
from lethe.runs.run import Run


def plan(config: TrainingSettings, examples: int | list[int], effective_batch: int | None = None) -> dict[str, Any]:
    """How long a run is: `steps` are optimizer updates, `forward_passes` the batches of one device.

    `unique_examples` is the number of documents of each kind (of the larger kind, when they differ). `effective_batch` is that
    of a resumed run, which keeps it if it had another number of processes. Several numbers of examples are those of stages, and
    each stage has `config.epochs` passes.
    """
    stages = examples if isinstance(examples, list) else [examples]
    examples = max(stages)
    processes = distributed.processes(config.devices)
    effective_batch = effective_batch or config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    passes = [math.ceil(stage / effective_batch) for stage in stages]
    per_epoch, by_stage = sum(passes), [math.ceil(config.epochs * updates) for updates in passes]
    steps = config.max_steps if config.max_steps > 0 else sum(by_stage)
    if config.warmup_steps >= steps:
        raise LetheError(
            f"warmup_steps: a run of {steps} updates never reaches lr {config.lr:g} with {config.warmup_steps}; lower it"
        )
    whole, rest = divmod(steps, per_epoch)
    in_update = math.ceil(effective_batch / (config.per_device_train_batch_size * processes))
    last = math.ceil((examples % effective_batch or effective_batch) / (config.per_device_train_batch_size * processes))
    each = whole * ((per_epoch - 1) * in_update + last) + rest * in_update
    return {
        "unique_examples": examples,
        "steps": steps,
        "forward_passes": each if len(stages) == 1 else steps * in_update,  # updates of stages are filled up
        "effective_batch": effective_batch,
        "epochs": steps / per_epoch,
        "first_epoch_steps": passes[0],
    } | ({"stage_steps": by_stage} if len(stages) > 1 else {})


def planned_batch(run: Run | None) -> int | None:
    """The documents of an update that a resumed run began with; None for a new run."""
    return ((run.record.get("plan") or {}) if run else {}).get("effective_batch")


def refuse_rank(config: UnlearnSettings | TamperConfig, model: refs.ModelRef) -> None:
    """Refuse adapters of a higher rank than the model's activations can have; a huge one would fail when it is made."""
    if config.lora is not None and config.lora.r > model.width:
        raise LetheError(
            f"lora.r: {config.lora.r} is above the width of '{model.name}', {model.width}, the highest useful rank; lower it"
        )


def refuse_8bit(config: UnlearnSettings | TamperConfig, devices: int) -> None:
    """Refuse 8-bit AdamW of all weights on several devices: with ddp each rounds at random, with fsdp it was not tried."""
    if devices > 1 and config.optimizer == "adamw_8bit" and config.lora is None:
        raise LetheError("optimizer: adamw_8bit trains all weights on one device only; use adamw or muon with parallel fsdp")


def refuse_unavailable(config: TrainingSettings) -> None:
    """Refuse settings that need a library that is not installed, or a logger that transformers does not have."""
    if config.optimizer == "adamw_8bit" and not any(map(importlib.util.find_spec, ("torchao", "bitsandbytes"))):
        raise LetheError("optimizer: adamw_8bit needs torchao or bitsandbytes, and neither is installed; pip install torchao")
    if config.report_to:
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            for callback in get_reporting_integration_callbacks(config.report_to):
                callback()  # raises where its library is missing
        except (ValueError, RuntimeError, ImportError) as error:
            raise LetheError(f"report_to: {printable(error, 400)}") from error
