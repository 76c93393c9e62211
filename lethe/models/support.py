"""What Lethe needs of a model, tried before training: what does not fit is refused rather than measured wrongly.

A model can be read if each block returns the residual stream, [batch, seq, hidden], and if a document's activations and
output depend neither on the other rows of its batch nor on the padding on its right. It can be trained if, its dropouts being
off, it computes in training mode what it computes in evaluation mode: every loss compares it with a teacher in evaluation
mode, so that routers that draw random numbers, for instance, would be measured too.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lethe.errors import LetheError
from lethe.models.activations import States, alike, blocks, read

ROWS, LENGTH = 4, 16
DRAWS = 4
"""Passes in training mode of a model that draws random numbers; one that draws none needs only one."""


@torch.no_grad()
def refuse_unreadable(model: nn.Module, name: str, width: int) -> None:
    """Refuse a model whose activations are not finite, no residual stream, or depend on padding or on other rows.

    `name` is what the user calls the model, `width` the tokens of the longest row: local attention shows beyond its window.

    Raises:
        LetheError: the weights are damaged, or the architecture is not supported.
    """
    short, device = -(-width // 2), next(model.parameters()).device
    rows = _ids(model, 2, width).to(device)
    padded = rows.clone()
    padded[0, short:] = 0
    together, alone = _states(model, name, padded), _states(model, name, rows[:1, :short])
    if not all(tensor.isfinite().all() for tensor in (*model.parameters(), *_tensors(alone))):
        raise LetheError(
            f"model '{name}': its weights, or the activations that they give, are not finite numbers; it has diverged or is "
            f"damaged, give another"
        )
    if not all(_mostly_alike(a[:1, :short], b) for a, b in zip(_tensors(together), _tensors(alone), strict=True)):
        raise LetheError(
            f"model '{name}': {type(model).__name__} computes other activations for a document when padding or other documents "
            f"stand beside it; its architecture is not supported"
        )


@torch.no_grad()
def refuse_untrainable(model: nn.Module, name: str, width: int) -> None:
    """Refuse a model that cannot be read, or that computes something else in training mode than in evaluation mode.

    Raises:
        LetheError: the architecture is not supported, or has something random in it that its configuration leaves on.
    """
    refuse_unreadable(model, name, width)
    ids, was_training = _ids(model, ROWS, LENGTH).to(next(model.parameters()).device), model.training
    plain = _states(model.eval(), name, ids)
    try:
        model.train()
        for draw in range(DRAWS):
            with torch.random.fork_rng():
                torch.manual_seed(draw)
                before = _random_state(ids.device)
                found = _states(model, name, ids)
                drawn = not torch.equal(before, _random_state(ids.device))
            if not all(alike(a, b) for a, b in zip(_tensors(found), _tensors(plain), strict=True)):
                raise LetheError(_unlike(model, name, drawn))
            if not drawn:
                break
    finally:
        model.train(was_training)


def _unlike(model: nn.Module, name: str, drawn: bool) -> str:
    why = "draws random numbers in training, beside dropout, which is off" if drawn else "computes something else in training"
    config: Any = model.config
    parts = [config.to_dict(), *(part for part in config.to_dict().values() if isinstance(part, dict))]
    rates = [(str(key), value) for part in parts for key, value in part.items() if type(value) in {int, float} and value]
    noise = ", ".join(f"{key}: {value:g}" for key, value in rates if re.search("jitter|noise|drop", key))
    has = f" (its configuration has {noise})" if noise else ""
    return f"model '{name}': {type(model).__name__} {why}{has}; the losses would measure that, so choose another model"


def _ids(model: nn.Module, rows: int, width: int) -> Int[Tensor, "rows width"]:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))


def _states(model: nn.Module, name: str, ids: Tensor) -> States:
    """The activations of all blocks and the logits' inputs.

    Raises:
        LetheError: the model cannot be run on token ids alone.
    """
    try:
        return read(model, ids, list(range(len(blocks(model)))), True, model.get_output_embeddings())  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(
            f"model '{name}': {type(model).__name__} cannot be run on rows of token ids ({why}); "
            f"its architecture is not supported"
        ) from error


def _mostly_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding; in less than float32, most tokens of theirs: a router that rounding has
    sent a token to another expert is no fault."""
    if a.dtype == torch.float32:
        return alike(a, b)
    close = torch.finfo(a.dtype).eps ** 0.5
    return bool(((a - b).norm(dim=-1) <= close * b.norm(dim=-1)).float().mean() > 0.5)


def _tensors(states: States) -> list[Tensor]:
    output = [] if states.output is None else [states.output]
    return [states.activations[layer] for layer in sorted(states.activations)] + output


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
