"""What Lethe needs of an architecture. Tried on random tokens before training; what does not work is refused.

A model is readable if each block returns the residual stream, [batch, seq, hidden], and if the activations and the output of a
sequence depend neither on other sequences of the batch nor on padding on the right. It is trainable if it computes the same in
training mode as in evaluation mode, with dropout off. The losses compare it with a teacher in evaluation mode, so they would
measure random routing, for instance, as a difference.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lethe.errors import LetheError
from lethe.models.activations import States, alike, blocks, read

SEQUENCES, LENGTH = 4, 16
DRAWS = 4
"""Passes in training mode of a model that draws random numbers. A model that draws none gets one."""


@torch.no_grad()
def refuse_unreadable(model: nn.Module, name: str, width: int, last: int | None = None) -> None:
    """Refuse a model whose activations are not finite, no residual stream, or depend on padding or on other sequences.

    Args:
        name: the user's name of the model.
        width: tokens of the longest sequence. Local attention behaves differently beyond its window.
        last: the last block that is read; None: all blocks and the output are.
    """
    short, device = -(-width // 2), next(model.parameters()).device
    ids = _ids(model, 2, width).to(device)
    padded = ids.clone()
    padded[0, short:] = 0
    together, alone = _states(model, name, padded, last), _states(model, name, ids[:1, :short], last)
    used = [p for p in model.parameters() if not p.is_meta]
    if not all(tensor.isfinite().all() for tensor in (*used, *_tensors(alone))):
        wrong = "its weights or activations are not finite numbers, so it diverged or is damaged"
        raise LetheError(f"model '{name}': {wrong}; give another")
    if not all(_mostly_alike(a[:1, :short], b) for a, b in zip(_tensors(together), _tensors(alone), strict=True)):
        wrong = "computes other activations for a sequence when padding or other sequences stand beside it"
        raise LetheError(f"model '{name}': {type(model).__name__} {wrong}; its architecture is not supported")


@torch.no_grad()
def refuse_untrainable(model: nn.Module, name: str, width: int) -> None:
    """Refuse a model that is not readable, or that computes something else in training mode than in evaluation mode."""
    refuse_unreadable(model, name, width)
    ids, was_training = _ids(model, SEQUENCES, LENGTH).to(next(model.parameters()).device), model.training
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
                how = "draws random numbers" if drawn else "computes something else"
                why = f"{how} in training, with dropout off"
                todo = "the losses would measure that, so choose another model, or set its noise or jitter in config.json to 0"
                raise LetheError(f"model '{name}': {type(model).__name__} {why}; {todo}")
            if not drawn:
                break
    finally:
        model.train(was_training)


def _ids(model: nn.Module, batch: int, seq: int) -> Int[Tensor, "batch seq"]:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (batch, seq), generator=torch.Generator().manual_seed(0))


def _states(model: nn.Module, name: str, ids: Tensor, last: int | None = None) -> States:
    """The activations of all blocks and the input of the output head; with `last`, those of the blocks up to it."""
    try:
        if last is not None:
            return read(model, ids, list(range(last + 1)))
        return read(model, ids, list(range(len(blocks(model)))), True, model.get_output_embeddings())  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wrong = f"{type(model).__name__} cannot run on token ids alone ({why})"
        raise LetheError(f"model '{name}': {wrong}; its architecture is not supported") from error


def _mostly_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding.

    Below float32 most tokens have to be equal, since rounding may make a router choose another expert for some.
    """
    if a.dtype == torch.float32:
        return alike(a, b)
    close = torch.finfo(a.dtype).eps ** 0.5
    return bool(((a - b).norm(dim=-1) <= close * b.norm(dim=-1)).float().mean() > 0.5)


def _tensors(states: States) -> list[Tensor]:
    output = [] if states.output is None else [states.output]
    return [states.activations[layer] for layer in sorted(states.activations)] + output


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
