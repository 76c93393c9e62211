"""Losses on activations."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from lethe.objectives.chunks import wide

Activations = dict[int, Float[Tensor, "batch seq hidden"]]


def squared_distance(
    student: Activations,
    target: Activations,
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
    variance: dict[int, float] | None = None,
) -> Tensor:
    """Squared distance of activations from their target: `cb_loss`, and the retain loss `mse`.

        mean over layers, non-padding tokens and dimensions of (h − a)²

    `target` holds a by layer: the source's mapped activation W c + b, or the reference's. With `variance`, each layer's
    distance is divided by the variance of its target. Computed in at least float32. `tokens` is the number of non-padding
    tokens of the
    whole optimizer update, where the batch is one of several that are accumulated; by default it is the batch's own.
    """
    count = mask.sum() if tokens is None else tokens
    layers = [((wide(student[layer]) - wide(target[layer])).square().mean(-1) * mask).sum() for layer in student]
    if variance is not None:
        layers = [total / variance[layer] for layer, total in zip(student, layers, strict=True)]
    return sum(layers, start=mask.new_zeros((), dtype=layers[0].dtype)) / (len(layers) * count)
