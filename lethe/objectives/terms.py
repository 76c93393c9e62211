"""The terms of the loss and how their weights move.

    loss = remove_coef(t) · forget term + retain_coef(t) · retain term

Every term is a mean over non-padding tokens. `tokens` is the number of tokens of the whole optimizer update when a
batch is one of several that are accumulated: so accumulation does not change the gradient, however the tokens are
spread over the batches. It defaults to the batch's own.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, float32, promote_types
from torch.nn.functional import cross_entropy

Activations = dict[int, Float[Tensor, "batch seq hidden"]]


def wide(x: Tensor) -> Tensor:
    """`x` in a type that reductions can be taken in: float32, or float64 if it is that already."""
    return x.to(promote_types(x.dtype, float32))


def cb_loss(
    student: Activations,
    teacher: Activations,
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
    variance: dict[int, float] | None = None,
) -> Tensor:
    """Distance of activations on forget text from where the source's, mapped, would put them (docs/checkpoint-transfer.md).

    Per layer, the mean over hidden dimensions of (h − (W c + b))², averaged over tokens; then averaged over layers.
    `teacher` holds W c + b. With `variance`, by layer, each layer's distance is divided by it: 1 is then as far as the mean of
    the targets is from them, on average. Computed in float32.
    """
    count = mask.sum() if tokens is None else tokens
    layers = [((student[layer].float() - teacher[layer].float()).square().mean(-1) * mask).sum() for layer in student]
    if variance is not None:
        layers = [total / variance[layer] for layer, total in zip(student, layers, strict=True)]
    return sum(layers, start=mask.new_zeros((), dtype=layers[0].dtype)) / (len(layers) * count)


def retain_kl_loss(
    logits: Float[Tensor, "batch seq vocab"],
    reference_logits: Float[Tensor, "batch seq vocab"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """KL(reference ‖ model) of next-token distributions in nats, averaged over tokens, in at least float32."""
    count = mask.sum() if tokens is None else tokens
    log_q = wide(logits).log_softmax(-1)
    log_p = wide(reference_logits).log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / count


def forget_kl_loss(
    logits: Float[Tensor, "batch seq vocab"],
    source_logits: Float[Tensor, "batch seq vocab"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """KL(source ‖ model) of next-token distributions on forget text; the same mean as `retain_kl_loss`."""
    return retain_kl_loss(logits, source_logits, mask, tokens)


def retain_ce_loss(
    logits: Float[Tensor, "batch seq vocab"],
    input_ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token in nats, averaged over the tokens that have one before them."""
    count = mask[:, 1:].sum() if tokens is None else tokens
    loss = cross_entropy(wide(logits[:, :-1]).transpose(1, 2), input_ids[:, 1:], reduction="none")
    return (loss * mask[:, 1:]).sum() / count


def retain_mse_loss(
    student: Activations, reference: Activations, mask: Int[Tensor, "batch seq"], tokens: Tensor | int | None = None
) -> Tensor:
    """Distance of activations on retain text from the reference's; the same mean as `cb_loss`."""
    return cb_loss(student, reference, mask, tokens)
