"""Losses on next-token distributions: each plain, from logits, and beside it a form that saves memory.

The chunked forms take the final hidden states and the output head, and make the logits of some tokens at a time
(`chunks.py`). Their values are those of the plain forms. `tokens` is the number of tokens of the whole optimizer update that a
loss is averaged over, where the batch is one of several that are accumulated. By default it is the batch's own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.utils.checkpoint import checkpoint

from lethe.objectives.chunks import CHUNK, PLAIN, logits_of, slices, sum_over_tokens, wide


def kl(
    logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "batch seq vocab"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """KL(teacher ‖ model) of next-token distributions in nats, averaged over non-padding tokens, in at least float32."""
    count = mask.sum() if tokens is None else tokens
    log_q = wide(logits).log_softmax(-1)
    log_p = wide(teacher_logits).log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / count


def chunked_kl(
    hidden: Float[Tensor, "batch seq hidden"],
    head: nn.Linear,
    teacher_hidden: Float[Tensor, "batch seq teacher"],
    teacher_head: nn.Linear,
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """`kl` from the inputs of the two output heads. The model's head gets a gradient unless it is frozen, the teacher none.

    A teacher's hidden states may come from a cache, in any type. What they are where `mask` is 0 does not matter.
    """
    teacher_hidden = teacher_hidden.detach().to(teacher_head.weight.dtype)
    if mask.numel() * len(head.weight) <= PLAIN:
        return kl(head(hidden), teacher_head(teacher_hidden).detach(), mask, tokens)
    keep = mask.bool()
    teacher = teacher_hidden[keep]

    def target(tokens: slice) -> Tensor:
        return logits_of(teacher[tokens], teacher_head.weight, teacher_head.bias)

    return sum_over_tokens(hidden[keep], head, target, _kl) / (mask.sum() if tokens is None else tokens)


def cross_entropy(
    logits: Float[Tensor, "batch seq vocab"],
    input_ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token in nats, averaged over the tokens that have one before them."""
    count = mask[:, 1:].sum() if tokens is None else tokens
    loss = torch_cross_entropy(wide(logits[:, :-1]).transpose(1, 2), input_ids[:, 1:], reduction="none")
    return (loss * mask[:, 1:]).sum() / count


def chunked_cross_entropy(
    hidden: Float[Tensor, "batch seq hidden"],
    head: nn.Linear,
    input_ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """`cross_entropy` from the inputs of the output head."""
    if mask.numel() * len(head.weight) <= PLAIN:
        return cross_entropy(head(hidden), input_ids, mask, tokens)
    keep = mask[:, 1:].bool()
    following = input_ids[:, 1:][keep][:, None]
    return sum_over_tokens(hidden[:, :-1][keep], head, following.__getitem__, _cross_entropy) / (
        keep.sum() if tokens is None else tokens
    )


def log_likelihood(
    logits: Float[Tensor, "batch seq vocab"], input_ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Log-likelihood of each document in nats: the sum over its tokens that have one before them."""
    loss = torch_cross_entropy(wide(logits[:, :-1]).transpose(1, 2), input_ids[:, 1:], reduction="none")
    return -(loss * mask[:, 1:]).sum(-1)


def chunked_log_likelihood(
    hidden: Float[Tensor, "batch seq hidden"],
    head: nn.Linear,
    input_ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
) -> Float[Tensor, " batch"]:
    """`log_likelihood` from the inputs of the output head. The backward pass makes the logits of each chunk again."""
    keep = mask[:, 1:].bool()
    states, following = hidden[:, :-1][keep].to(head.weight.dtype), input_ids[:, 1:][keep]

    def losses(states: Tensor, following: Tensor) -> Tensor:
        return torch_cross_entropy(wide(head(states)), following, reduction="none")

    parts = [checkpoint(losses, states[part], following[part], use_reentrant=False) for part in slices(len(states), CHUNK)]
    found = wide(hidden.new_zeros(keep.shape))
    return -found.masked_scatter(keep, torch.cat(parts)).sum(-1) if parts else -found.sum(-1)


def _kl(logits: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p − log q), and its gradient q − p."""
    log_p = wide(logits).log_softmax(-1)
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(-1)
    return losses, log_q.exp_().sub_(p)


def _cross_entropy(following: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """− log q(token), and its gradient q − 1(token)."""
    losses = -log_q.gather(-1, following).squeeze(-1)
    return losses, log_q.exp_().scatter_add_(-1, following, -torch.ones_like(following, dtype=log_q.dtype))
