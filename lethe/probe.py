"""One batch before training, which changes nothing: the time of an update, parameters without a gradient, and the loss's scale.

A term's value says little about its weight: cb_loss is as large as the model's activations, squared, and the retain terms are
0 at the start. So what is compared are gradients, at the two points where both exist: the forget term's at the start, and
the retain term's after one update of size lr against the forget term's gradient, each weight moved by lr as AdamW's first
update does. Without a forget term, where a rewound model starts away from the reference, or where weights are of a type that
would round the update away, the retain term's is taken at the start and nothing is compared.
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

from lethe import survey
from lethe.adapters import Merged
from lethe.training import quick_passes

if TYPE_CHECKING:
    from lethe.unlearn import UnlearnTrainer

BALANCE = 50.0
"""Forget over retain gradient of the lab's recipes that forget and retain (20 to 160): what coefficients are proposed for."""
FAR = 30.0
"""How many times above or below that balance one term is said to dominate."""
LIKE_LAB = "remove_coef for the lab's ratio"


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
    model: nn.Module = trainer.model  # type: ignore[assignment]
    with torch.random.fork_rng(), quick_passes(model) as merged:
        scale = measured(trainer, batch, merged)
        model.zero_grad()
        started = time.monotonic()
        sum(trainer.terms(model, batch).values()).backward()  # type: ignore[union-attr]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    names = survey.without_gradient(model)
    model.zero_grad()
    return Probe(names, seconds, scale)


def measured(trainer: UnlearnTrainer, batch: dict[str, dict[str, Tensor]], merged: Merged) -> dict[str, Any]:
    """Values of the terms, weighted norms of their gradients, their ratio, and what follows from it for the coefficients.

    The proposal keeps retain_coef and the balance of the lab's recipe.
    """
    model: nn.Module = trainer.model  # type: ignore[assignment]
    remove, retain = trainer.config.remove_coef, trainer.config.retain_coef
    found: dict[str, Any] = {}
    wide = all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    compared = len(batch) == 2 and wide and not trainer.config.rewind
    after = " after one update" if compared else ""
    if "forget" in batch:
        found["forget_gradient"] = _gradient(trainer, {"forget": batch["forget"]}, remove, found)
    with _moved(model, trainer.config.lr, merged) if compared else contextlib.nullcontext():
        if "retain" in batch:
            found[f"retain_gradient{after}"] = _gradient(trainer, {"retain": batch["retain"]}, retain, found, after)
    if compared:
        forget, retained = found["forget_gradient"], found[f"retain_gradient{after}"]
        ratio = forget / retained if retained else math.inf
        near = BALANCE / FAR <= ratio <= BALANCE * FAR  # a ratio that is no number is not
        found |= {"ratio": ratio, "dominates": "neither" if near else f"{'retain' if ratio < BALANCE else 'forget'} term"}
        found[LIKE_LAB] = float(f"{remove * BALANCE / ratio:.2g}") if ratio else math.inf
    return _numbers(found)


def warning(scale: dict[str, Any], config: Any) -> list[str]:
    """What to say of coefficients that leave one term without a weight."""
    if scale.get("dominates", "neither") == "neither":
        return []
    ratio, proposed = scale["ratio"], scale[LIKE_LAB]
    times = f"{ratio:.2g} times the retain term's" if ratio is not None else "not comparable with the retain term's"
    said = f"the {scale['dominates']} dominates: the forget term's weighted gradient is {times}, {BALANCE:g} times on the lab"
    if proposed:
        said += f"; remove_coef {proposed:g} beside retain_coef {config.retain_coef:g} would be as there"
    if config.cb_scale == "raw" and config.forget_loss != "distill":
        said += ", and with cb_scale relative coefficients carry over from one model to another"
    return [said]


def _gradient(trainer: UnlearnTrainer, batch: Any, coefficient: float, found: dict[str, Any], after: str = "") -> float:
    """The norm of a weighted term's gradient, which is left on the model; the values go into `found`."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    model.zero_grad()
    terms = trainer.terms(model, batch)
    found |= {name + after: float(value) for name, value in terms.items()}
    weights = {"forget_kl_loss": trainer.kl_coef}
    sum(weights.get(name, 1.0) * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    norms = [p.grad.norm(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return coefficient * float(torch.stack(norms).norm()) if norms else 0.0


@contextlib.contextmanager
def _moved(model: nn.Module, lr: float, merged: Merged) -> Iterator[None]:
    """Inside, each trained weight is lr further against its gradient; afterwards all are bit for bit as they were."""
    moving = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    before = [p.detach().clone() for p in moving]
    with torch.no_grad():
        for parameter in moving:
            parameter.sub_(parameter.grad.sign(), alpha=lr)  # type: ignore[union-attr]
    merged.renew()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moving, before, strict=True):
                parameter.copy_(value)
        merged.renew()


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers to four digits; None where there is none, which a record cannot hold otherwise."""
    return {
        name: value if isinstance(value, str) else float(f"{value:.4g}") if math.isfinite(value) else None
        for name, value in found.items()
    }
