"""One batch before training, which changes nothing: the time of an update, parameters without a gradient, and the loss's scale.

A term's value says little about its weight: cb_loss is as large as the model's activations, squared, and the retain terms are
0 at the start. So what is compared are gradients, at the two points where both exist: the forget term's at the start, and
the retain term's at a point where the forget term is a tenth lower, to first order: all weights are moved by one distance
against the sign of its gradient, as AdamW's first update does. Learning rates do not matter to that. Without a forget term,
where a rewound model starts away from the reference, or where weights are of a type that would round the move away, the
retain term's gradient is taken at the start and nothing is compared.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethe.training import parameters
from lethe.training.fast import fast_passes

if TYPE_CHECKING:
    from lethe.unlearning.pipeline import UnlearnTrainer

BALANCE = 100.0
"""Forget over retain gradient of the lab's recipes that forget and retain (70 to 260): what coefficients are proposed for."""
DROP = 0.1
"""Share of the forget term by which weights are moved before the retain term's gradient is taken."""
FAR = 30.0
"""How many times above or below that balance one term is said to dominate."""


@dataclass
class Probe:
    """What one batch shows: parameters without a gradient, seconds of a pass forward and back, and the scale (`measured`)."""

    no_gradient: list[str]
    seconds: float
    scale: dict[str, Any]


def probe(trainer: UnlearnTrainer) -> Probe:
    """Forward and backward passes over the longest documents; weights and random state are afterwards as they were."""
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
        sum(trainer.terms(model, batch).values()).backward()  # type: ignore[union-attr]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    names = parameters.without_gradient(model)
    model.zero_grad()
    return Probe(names, seconds, scale)


def document_bytes(trainer: UnlearnTrainer) -> int:
    """Bytes of activations that the longest documents, one of each text, keep for the backward pass.

    They are those of two less those of one, which leaves out what is kept once for all, such as weights.
    """
    model: nn.Module = trainer.model  # type: ignore[assignment]
    texts: Any = trainer.train_dataset.texts  # type: ignore[union-attr]
    longest = {name: (0, max(rows, key=len)) for name, rows in texts.items()}
    kept: list[int] = []
    for count in (1, 2):
        batch: Any = trainer._prepare_inputs(trainer.data_collator([longest] * count))  # type: ignore[arg-type]
        trainer.tokens = trainer.documents_in_update = dict.fromkeys(batch, 1)
        found: dict[int, int] = {}

        def keep(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # a tensor with its graph would be held by that graph, for ever

        with torch.random.fork_rng(), fast_passes(model, trainer.config.fast):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                terms = trainer.terms(model, batch)
            kept.append(sum(found.values()))
            del terms
    return max(0, kept[1] - kept[0])


def measured(trainer: UnlearnTrainer, batch: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The terms, the norms of their weighted gradients, their ratio, and the remove_coef that makes it the lab's.

    `_after`: where the weights have been moved.
    """
    model, config = trainer.model, trainer.config
    wide = all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]
    compared = len(batch) == 2 and wide and not config.rewind
    found: dict[str, Any] = {}
    loss = 0.0
    if "forget" in batch:
        terms, loss, norm = _backward(trainer, {"forget": batch["forget"]})
        found |= terms | {"forget_gradient": config.remove_coef * norm}
    if "retain" in batch:
        with _moved(model, loss) if compared else contextlib.nullcontext():  # type: ignore[arg-type]
            terms, _, norm = _backward(trainer, {"retain": batch["retain"]})
        after = "_after" if compared else ""
        found |= {name + after: value for name, value in terms.items()} | {f"retain_gradient{after}": config.retain_coef * norm}
    if compared:
        retain = found["retain_gradient_after"]
        ratio = found["forget_gradient"] / retain if retain else math.inf
        near = BALANCE / FAR <= ratio <= BALANCE * FAR  # a ratio that is no number is not
        found |= {"ratio": ratio, "dominates": "neither" if near else f"{'retain' if ratio < BALANCE else 'forget'} term"}
        found["proposed_remove_coef"] = float(f"{config.remove_coef * BALANCE / ratio:.2g}") if ratio else math.inf
    return {
        name: value if isinstance(value, str) else float(f"{value:.4g}") if math.isfinite(value) else None
        for name, value in found.items()
    }


def warning(scale: dict[str, Any], config: Any) -> list[str]:
    """What to say of coefficients that leave one term without a weight."""
    if scale.get("dominates", "neither") == "neither":
        return []
    ratio, proposed = scale["ratio"], scale["proposed_remove_coef"]
    times = f"{ratio:.2g} times" if ratio is not None else "not comparable with"
    text = f"the {scale['dominates']} dominates: the forget term's gradient, weighted, is {times} the retain term's"
    text += f" (about {BALANCE:g} times on the lab)"
    if proposed:
        text += f"; set remove_coef to {proposed:g} beside retain_coef {config.retain_coef:g} for the lab's balance"
    if config.cb_scale == "raw" and config.forget_loss != "distill":
        text += "; with cb_scale relative, coefficients carry over from one model to another"
    return [text]


def _backward(trainer: UnlearnTrainer, batch: Any) -> tuple[dict[str, float], float, float]:
    """The terms on a batch of one text, their sum as in the loss, and the norm of its gradient, which is left on the model."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    model.zero_grad()
    terms = trainer.terms(model, batch)
    loss: Any = sum(trainer.kl_coef * value if name == "forget_kl_loss" else value for name, value in terms.items())
    loss.backward()
    norms = [p.grad.norm(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    values = {name: float(value) for name, value in terms.items()}
    return values, float(loss), float(torch.stack(norms).norm()) if norms else 0.0


@contextlib.contextmanager
def _moved(model: nn.Module, loss: float) -> Iterator[None]:
    """Inside, weights are moved so that the loss whose gradient they have is `DROP` lower; afterwards they are as they
    were, bit for bit.
    """
    moving: list[Any] = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    before = [p.detach().clone() for p in moving]
    slope = sum(float(p.grad.norm(1, dtype=torch.float32)) for p in moving)
    with torch.no_grad():
        for parameter in moving if slope else ():
            parameter.sub_(parameter.grad.sign(), alpha=DROP * loss / slope)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moving, before, strict=True):
                parameter.copy_(value)
