"""What unlearning did to the model: agreement with the teachers, and distance and stable rank of the update by block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lethe.models.adapters import inner
from lethe.models.loading import device
from lethe.text import corpora
from lethe.training.optimizers import layer_of
from lethe.unlearning.frozen import Frozen

AGREEMENT_ROWS, AGREEMENT_BATCH = 128, 8
LANCZOS_STEPS = 32
"""Matmuls with a matrix and its transpose to find the largest singular value, enough if others are nearly as large."""


@torch.no_grad()
def agreement(student: nn.Module, compared: dict[str, tuple[list[list[int]], Frozen]], pad_id: int) -> dict[str, float]:
    """By name, the share of tokens at which the most likely next token is the same as the other model's."""
    was_training = student.training
    shares = {}
    for name, (sequences, other) in compared.items():
        ordered = sorted(sequences, key=len)
        starts = range(0, len(ordered), AGREEMENT_BATCH)
        batches = [corpora.pad(ordered[start : start + AGREEMENT_BATCH], pad_id) for start in starts]
        with other.whole() as model:
            theirs = _predicted(model, batches)
        ours = _predicted(student.eval(), batches)
        same = sum(int(((a == b) * mask).sum()) for a, b, (_, mask) in zip(ours, theirs, batches, strict=True))
        shares[name] = same / sum(int(mask.sum()) for _, mask in batches)
    student.train(was_training)
    return shares


def _predicted(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The most likely next token at each token of each batch."""
    return [model(input_ids=ids.to(device()), use_cache=False).logits.argmax(-1).cpu() for ids, _ in batches]


@torch.no_grad()
def update_by_layer(student: nn.Module, target: Frozen) -> dict[str, dict[str, float]]:
    """Per block, `distance` ‖θ − θ₀‖ from the target's weights, and `stable_rank` of the update.

    The stable rank of a matrix is ‖ΔW‖_F² / ‖ΔW‖₂², between 1 and its rank. That of a block is the mean over its
    matrices that have changed, with one matrix per expert. Adapters count as the matrices that they add.
    """
    squares: dict[str, float] = defaultdict(float)
    ranks: dict[str, list[float]] = defaultdict(list)
    base = inner(student)
    layers = {name.replace(".base_layer.", "."): layer for name, layer in layer_of(base).items()}
    with target.weights() as before:
        for name, square, stable in _updates(base, before):
            squares[layers[name]] += square
            ranks[layers[name]] += stable if layers[name] != "outside" else []
    return {
        layer: {"distance": math.sqrt(square)}
        | ({"stable_rank": sum(ranks[layer]) / len(ranks[layer])} if ranks[layer] else {})
        for layer, square in squares.items()
    }


def stable_ranks(matrices: Float[Tensor, "*matrices rows columns"]) -> list[float]:
    """‖W‖_F² / ‖W‖₂² of each matrix that is not 0."""
    each = matrices.reshape(-1, *matrices.shape[-2:])
    squares = each.square().sum((-2, -1))
    moved = squares > 0
    return (squares[moved] / spectral_norm(each[moved]).square()).tolist() if moved.any() else []


def spectral_norm(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, " matrices"]:
    """‖W‖₂, the largest singular value of each matrix, to a thousandth; a full decomposition takes many times as long.

    By the Lanczos method: power iteration on WᵀW that stores all its directions, and takes their best combination.
    The start is drawn from a fixed seed. (Golub and Van Loan, Matrix Computations, chapter 10.)
    """
    w = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    w = w / w.abs().amax((-2, -1), keepdim=True)  # squares of small numbers would underflow
    count, size = len(w), w.shape[-1]
    steps = min(size, LANCZOS_STEPS)
    v = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(w).expand(count, size)
    basis = w.new_zeros(count, steps, size)
    tridiagonal = torch.zeros(count, steps, steps, dtype=torch.float64)
    for step in range(steps):
        norm = v.norm(dim=-1, keepdim=True)
        if step:
            tridiagonal[:, step, step - 1] = tridiagonal[:, step - 1, step] = norm[:, 0].cpu()
        basis[:, step] = v = torch.where(norm > 1e-6, v / norm, 0)
        v = (w.mT @ (w @ v[..., None]))[..., 0]
        tridiagonal[:, step, step] = (v * basis[:, step]).sum(-1).cpu()
        for _ in range(2):  # twice, since rounding leaves a rest the first time
            known = basis[:, : step + 1]
            v = v - (known.mT @ (known @ v[..., None]))[..., 0]
    scale = matrices.abs().amax((-2, -1))
    return torch.linalg.eigvalsh(tridiagonal)[:, -1].sqrt().to(scale) * scale


def _updates(base: nn.Module, before: Callable[[str], Tensor]) -> Iterator[tuple[str, float, list[float]]]:
    """For each parameter: its name in the model without adapters, ‖ΔW‖_F², and the stable ranks of its matrices.

    If the weights under an adapter are unchanged, its update s · B A is never computed: with B = Q R and Aᵀ = Q' R', it has
    the singular values of s · R R'ᵀ, which is only r × r.
    """
    adapters: dict[str, Any] = {f"{name}.base_layer.weight": m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        plain, adapter = name.replace(".base_layer.", "."), adapters.get(name)
        change = parameter.detach().float() - before(plain).to(parameter.device).float()
        if adapter is not None and not change.any():
            a, b = (part["default"].weight.float() for part in (adapter.lora_A, adapter.lora_B))
            change = adapter.scaling["default"] * torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        elif adapter is not None:
            change += adapter.get_delta_weight("default")
        matrices = change.ndim in {2, 3} and min(change.shape[-2:]) > 1
        yield plain, change.square().sum().item(), stable_ranks(change) if matrices else []
