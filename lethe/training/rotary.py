"""Rotary embedding of queries and keys as one operation, while a model is trained.

    q' = q ⊙ cos + swap(q) ⊙ (−sin, sin),   ∂/∂q = g ⊙ cos + swap(g ⊙ (−sin, sin)),   swap exchanges the two halves

over the first dimensions of each head. transformers writes it as a dozen operations on slices; going backward, each slice
fills and adds a tensor of the whole size. The values are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lethe.models.activations import blocks

NAME = "apply_rotary_pos_emb"


@contextlib.contextmanager
def one_operation(model: nn.Module) -> Iterator[bool]:
    """Inside, gradients through the rotary embedding of `model` take one operation; yields whether it is one that can."""
    module = sys.modules[type(blocks(model)[0]).__module__]
    plain: Any = getattr(module, NAME, None)
    fits = plain is not None and _is_rotation(plain)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or not torch.is_grad_enabled() or q.dtype != k.dtype or q.dtype != cos.dtype:
            return plain(q, k, cos, sin, *args, **kwargs)
        return _Rotation.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    if fits:
        setattr(module, NAME, rotate)
    try:
        yield fits
    finally:
        if fits:
            setattr(module, NAME, plain)


def _is_rotation(plain: Any) -> bool:
    """Whether a model's own function is the rotation of halves, found on a probe."""
    rng = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=rng) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        theirs = plain(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    ours = _rotated(q, k, cos.unsqueeze(1), _signed(sin.unsqueeze(1)))
    return len(theirs) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _signed(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, signed: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """[batch, heads, seq, head] of each, with cos and sin' [batch, 1, seq, rotated]; `back`: gradients instead of values."""
    both = torch.cat((q, k), 1)  # a copy, and the only one: what follows is in place
    part, half = both[..., : cos.shape[-1]], cos.shape[-1] // 2
    other = (part * signed).roll(half, -1) if back else part.roll(half, -1).mul_(signed)
    part.mul_(cos).add_(other)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        signed = _signed(sin)
        ctx.save_for_backward(cos, signed)
        return _rotated(q, k, cos, signed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        return *_rotated(of_q, of_k, cos, signed, back=True), None, None
