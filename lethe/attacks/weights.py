"""Attacks on the weights without training: noise, quantisation, pruning.

Each changes the matrices of the blocks' linear layers and experts in place, one matrix at a time. Embeddings, output head,
routers, norms and biases stay as they are, as is usual in quantisation and pruning of language models. The attack loads the
model again for its next strength, so that no second copy is held and changes do not add up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lethe.models.experts import matrices

GROUP = 64
# The 16 levels of NormalFloat4: quantiles of a normal distribution, scaled to [−1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCHEMES = {
    "noise": "w + strength · s · ε, with s the standard deviation of the matrix and ε standard normal",
    "quantize": "8 bits: int8, symmetric, absmax per output row; 4 bits: NF4, absmax per group of 64 along the rows",
    "prune": "the smallest weights of each matrix by magnitude are set to 0",
}


@torch.no_grad()
def disturb(model: nn.Module, attack: str, strength: float, seed: int = 0) -> int:
    """Do `attack` to the model's matrices at a strength; returns how many matrices there are.

    Noise is drawn on the CPU from `seed`, matrix after matrix, so that a stronger attack goes further the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "noise": lambda w: noised(w, strength, generator),
        "quantize": int8 if strength == 8 else nf4,
        "prune": lambda w: prune(w, strength),
    }
    found = matrices(model)
    for matrix in found:
        matrix.copy_(changes[attack](matrix))
    return len(found)


def noised(weight: Float[Tensor, "out in"], strength: float, generator: torch.Generator) -> Float[Tensor, "out in"]:
    """The matrix plus normal noise of `strength` times its own standard deviation."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + strength * weight.std(correction=0) * noise


def int8(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """To 8 bits and back: each output row in whole multiples, −127 to 127, of its largest magnitude / 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / torch.where(scale > 0, scale, 1)).round() * scale


def nf4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """To 4 bits and back. In groups of 64, along the rows, each weight becomes the nearest of 16 levels of its group's absmax.

    The last group may be shorter. As bitsandbytes' NF4 without double quantisation.
    """
    flat = weight.reshape(-1)
    grouped = nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    scale = grouped.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    index = torch.bucketize(grouped / torch.where(scale > 0, scale, 1), (levels[1:] + levels[:-1]) / 2)
    return (levels[index] * scale).view(-1)[: len(flat)].view(weight.shape)


def prune(weight: Float[Tensor, "out in"], share: float) -> Float[Tensor, "out in"]:
    """The matrix without the `share` of its weights that are smallest in magnitude (a count that is rounded)."""
    pruned = weight.flatten().clone()
    pruned[pruned.abs().argsort(stable=True)[: round(share * pruned.numel())]] = 0
    return pruned.view(weight.shape)
