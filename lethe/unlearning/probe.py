"""One batch before training: the time of an update, parameters without a gradient, and how the forget and retain loss compare.

The value of a loss says little about its weight: cb_loss is as large as the model's activations, squared, and the retain loss
is 0 at the start. So Lethe compares the norms of their gradients. The gradient of the forget loss is that at the start. The
gradient of the retain loss is that at the point where the forget loss is a tenth lower, to first order. To get there, every
weight moves by the same distance against the sign of its gradient, as in AdamW's first update. The model's weights are
restored. There is no comparison if the retain loss is not 0 at the start (`retain_loss: ce`, a rewound model), if the method
has no `scale` (`grad_diff`, `circuit_breaker`), without both losses, and for weights of a type that would round the move away.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lethe.distributed import whole
from lethe.training.hf_trainer import Text
from lethe.training.merged_lora import fast_passes

if TYPE_CHECKING:
    from lethe.methods.method import Method
    from lethe.unlearning.trainer import UnlearnTrainer

BALANCE = 100.0
"""Forget gradient over retain gradient in the lab's recipes (70 to 260), for which coefficients are proposed."""
DROP = 0.1
"""Share of the forget loss by which weights are moved before the gradient of the retain loss is taken."""
FAR = 30.0
"""One loss dominates if the ratio is so many times above or below that balance."""


@dataclass
class Probe:
    """What one batch shows: parameters without a gradient, seconds of a pass forward and back, and the scale (`measured`)."""

    no_gradient: list[str]
    seconds: float
    scale: dict[str, Any]


def probe(trainer: UnlearnTrainer) -> Probe:
    """Forward and backward passes over the longest documents. Weights and random state are restored."""
    rows: Any = trainer.train_dataset
    longest = sorted(range(len(rows)), key=lambda i: -rows.tokens(i))[: trainer.config.per_device_train_batch_size]
    batch: Any = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in longest]))  # type: ignore[arg-type]
    trainer.tokens = {name: int(text["mask"].sum()) for name, text in batch.items()}
    trainer.documents_in_update = {name: len(text["mask"]) for name, text in batch.items()}
    model: Any = trainer.model
    if trainer.config.gradient_checkpointing:  # Trainer turns it on when training begins
        model.activation_checkpointing_enable()
    with torch.random.fork_rng(), fast_passes(model, trainer.config.fast):
        scale = measured(trainer, batch)
        model.zero_grad()
        started = time.monotonic()
        for name, text in batch.items():
            trainer.loss_at(trainer.progress(trainer.first_epoch_steps), model, name, text)[0].backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    return Probe(names, seconds, scale)


def measured(trainer: UnlearnTrainer, batch: dict[str, Text]) -> dict[str, Any]:
    """The losses, the norms of the gradients of the weighted forget and retain loss, their ratio, and the weight of the forget
    loss that would give the lab's ratio. A name that ends in `_after` is a value after the weights were moved.
    """
    model, config = trainer.model, trainer.config
    wide = all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]
    compared = config.compares_gradients and wide
    found: dict[str, Any] = {}
    loss = 0.0
    if "forget" in batch:
        losses, loss, found["forget_gradient"] = _backward(trainer, batch, "forget", done=0)
        found = losses | found
    if "retain" in batch:
        with _moved(model, loss) if compared else contextlib.nullcontext():  # type: ignore[arg-type]
            losses, _, norm = _backward(trainer, batch, "retain", done=trainer.first_epoch_steps)
        after = "_after" if compared else ""
        found |= {name + after: value for name, value in losses.items()}
        found[f"retain_gradient{after}"] = norm
    if compared:
        retain = found["retain_gradient_after"]
        ratio = found["forget_gradient"] / retain if retain else math.inf
        near = BALANCE / FAR <= ratio <= BALANCE * FAR  # False for NaN and infinity
        found |= {"ratio": ratio, "dominates": "neither" if near else f"{'retain' if ratio < BALANCE else 'forget'} loss"}
        proposed = float(f"{getattr(config, config.scale) * BALANCE / ratio:.2g}") if ratio else math.inf  # type: ignore[arg-type]
        found[f"proposed_{config.scale}"] = proposed
    return {
        name: value if isinstance(value, str) else float(f"{value:.4g}") if math.isfinite(value) else None
        for name, value in found.items()
    }


def warning(scale: dict[str, Any], config: Method) -> list[str]:
    """A warning for the plan if the coefficients leave one loss without effect."""
    if scale.get("dominates", "neither") == "neither":
        return []
    ratio, proposed = scale["ratio"], scale.get(f"proposed_{config.scale}")
    times = f"{ratio:.2g} times" if ratio is not None else "not comparable with"
    text = f"the {scale['dominates']} dominates: the gradient of the weighted forget loss is {times} that of the retain loss"
    text += f" (about {BALANCE:g} times on the lab)"
    if proposed:
        text += f"; set {config.scale} to {proposed:g} for the lab's balance"
    return [text]


def _backward(trainer: UnlearnTrainer, batch: dict[str, Text], name: str, done: int) -> tuple[dict[str, float], float, float]:
    """The losses of one text of a batch, their weighted sum, and the norm of its gradient."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    model.zero_grad()
    loss, losses = trainer.loss_at(trainer.progress(done), model, name, batch[name])
    loss.backward()
    norms = [
        whole(p.grad.norm(dtype=torch.promote_types(p.dtype, torch.float32))) for p in model.parameters() if p.grad is not None
    ]
    values = {name: float(value.detach()) for name, value in losses.items()}
    return values, float(loss.detach()), float(torch.stack(norms).norm()) if norms else 0.0


@contextlib.contextmanager
def _moved(model: nn.Module, loss: float) -> Iterator[None]:
    """Inside, weights are moved so that the loss whose gradient they have is `DROP` lower; afterwards they are as they
    were, bit for bit.
    """
    moving: list[Any] = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    before = [p.detach().clone() for p in moving]
    slope = sum(float(whole(p.grad.norm(1, dtype=torch.float32))) for p in moving)
    with torch.no_grad():
        for parameter in moving if slope else ():
            parameter.sub_(parameter.grad.sign(), alpha=DROP * abs(loss) / slope)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moving, before, strict=True):
                parameter.copy_(value)
