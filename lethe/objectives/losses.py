"""The losses that methods are made of: on activations, and on next-token distributions.

Each loss is a plain function of activations or logits. A loss on distributions also has a chunked form with the same value. It
takes the final hidden states and the output head, and never holds the logits of all tokens. `tokens` is the number of tokens
that a loss is averaged over: those of the whole optimizer update if batches are accumulated, by default the batch's own.

The chunked forms work on one chunk of tokens after the other:

    z = W h + b,   loss = Σ_t ℓ(z_t) / tokens,   g = ∂ℓ/∂z,   ∂loss/∂h_t = Wᵀ g_t / tokens,   ∂loss/∂W = Σ_t g_t h_tᵀ / tokens

For each chunk the logits are made, the loss is added up, and so are its gradients, which are known up to a factor as soon as
the logits are. Padding is not computed. After the fused linear cross-entropy of Liger Kernel, https://arxiv.org/abs/2410.10989.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cosine_similarity, linear
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.utils.checkpoint import checkpoint

Activations = dict[int, Float[Tensor, "batch seq hidden"]]
CHUNK, GPU_CHUNK = 128, 512
"""Tokens of a chunk, or a sixth of all tokens if that is less. With fewer, matmuls with a large vocabulary lose speed."""
PANEL = 2**20
"""Weights of the output head that one matmul takes on a CPU: faster than all at once with few tokens, and in less memory."""
PLAIN = 2**21
"""Up to this many logits, the plain form of a loss is faster, and is used."""
LEAST = 2**18
"""Logits that a chunk may have even if it is then more than `CHUNK` tokens."""
SLICE = 2**17
"""Logits that the softmax works on at one time on a CPU: few enough to stay in a core's cache."""

Target = Callable[[slice], Tensor]
"""What the loss compares some tokens with, [tokens, …]: a teacher's logits, or the token ids that follow."""
Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(target, log-probabilities) of some tokens -> (their losses, ∂ loss / ∂ logits); may write into the log-probabilities."""


def wide(x: Tensor) -> Tensor:
    """`x` in a type that reductions can be taken in: float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_of(model: nn.Module) -> nn.Linear | None:
    """The model's output head, if its logits are the head's output for the final hidden state and nothing else.

    None where they are not (capped or scaled logits, an adapter on the head): the losses then need the model's own
    logits. Found on a probe of four tokens, with the head's output enlarged so that a cap shows.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:  # a sharded head has a class of its own
        return None
    calls: list[tuple[Tensor, Tensor]] = []

    def enlarge(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        calls.append((args[0], output))
        return 64 * output

    handle = head.register_forward_hook(enlarge)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits = model(input_ids=torch.arange(4, device=head.weight.device)[None], use_cache=False).logits
    finally:
        handle.remove()
    if len(calls) != 1:
        return None
    hidden, output = calls[0]
    plain = torch.equal(output, linear(hidden, head.weight, head.bias)) and torch.equal(logits, (64 * output).to(logits))
    return head if plain else None


def of_tokens(values: Tensor, mask: Int[Tensor, "batch seq"]) -> Tensor:
    """The values at tokens, without padding, one row each. On the meta device, which has no values, no token is padding."""
    return values.flatten(0, 1) if mask.is_meta else values[mask.bool()]


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
    tokens that the mean is over: those of the whole optimizer update if batches are accumulated, by default the batch's own.
    """
    count = mask.sum() if tokens is None else tokens
    layers = [((wide(student[layer]) - wide(target[layer])).square().mean(-1) * mask).sum() for layer in student]
    if variance is not None:
        layers = [total / variance[layer] for layer, total in zip(student, layers, strict=True)]
    return sum(layers, start=mask.new_zeros((), dtype=layers[0].dtype)) / (len(layers) * count)


def cosine_distance(
    student: Activations, target: Float[Tensor, "batch seq hidden"], mask: Int[Tensor, "batch seq"], tokens: int
) -> Tensor:
    """Mean over layers and non-padding tokens of 1 − cos(h, target), in at least float32."""
    cosines = [cosine_similarity(wide(h), target.to(wide(h)), dim=-1) for h in student.values()]
    return _mean_over_layers([1 - cosine for cosine in cosines], mask, tokens)


def positive_cosine(
    student: Activations, target: Activations, mask: Int[Tensor, "batch seq"], tokens: Tensor | int | None = None
) -> Tensor:
    """Mean over layers and non-padding tokens of max(0, cos(h, a)), in at least float32; `target` holds a by layer.

    Where h = a, as at the start of training, the cosine is at its maximum: its gradient is 0, up to rounding.
    """
    pairs = [(wide(student[layer]), wide(target[layer])) for layer in student]
    return _mean_over_layers([cosine_similarity(h, a, dim=-1).relu() for h, a in pairs], mask, tokens)


def norm_of_difference(
    student: Activations, target: Activations, mask: Int[Tensor, "batch seq"], tokens: Tensor | int | None = None
) -> Tensor:
    """Mean over layers and non-padding tokens of ‖h − a‖₂, in at least float32; `target` holds a by layer.

    Where h = a, as at the start of training, the gradient is 0.
    """
    return _mean_over_layers([(wide(student[n]) - wide(target[n])).norm(dim=-1) for n in student], mask, tokens)


def _mean_over_layers(values: list[Tensor], mask: Tensor, tokens: Tensor | int | None) -> Tensor:
    total = torch.stack([(value * mask).sum() for value in values]).sum()
    return total / (len(values) * (mask.sum() if tokens is None else tokens))


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
    teacher = of_tokens(teacher_hidden, mask)

    def target(tokens: slice) -> Tensor:
        return logits_of(teacher[tokens], teacher_head.weight, teacher_head.bias)

    return sum_over_tokens(of_tokens(hidden, mask), head, target, _kl) / (mask.sum() if tokens is None else tokens)


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
    later = mask[:, 1:]
    following = of_tokens(input_ids[:, 1:], later)[:, None]
    return sum_over_tokens(of_tokens(hidden[:, :-1], later), head, following.__getitem__, _cross_entropy) / (
        later.sum() if tokens is None else tokens
    )


def negative_entropy(
    logits: Float[Tensor, "batch seq vocab"], mask: Int[Tensor, "batch seq"], tokens: Tensor | int | None = None
) -> Tensor:
    """Σ p log p of next-token distributions in nats, averaged over non-padding tokens: −ln V if they are uniform."""
    log_p = wide(logits).log_softmax(-1)
    return ((log_p.exp() * log_p).sum(-1) * mask).sum() / (mask.sum() if tokens is None else tokens)


def chunked_negative_entropy(
    hidden: Float[Tensor, "batch seq hidden"],
    head: nn.Linear,
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
) -> Tensor:
    """`negative_entropy` from the inputs of the output head."""
    if mask.numel() * len(head.weight) <= PLAIN:
        return negative_entropy(head(hidden), mask, tokens)
    rows = of_tokens(hidden, mask)
    return sum_over_tokens(rows, head, rows.__getitem__, _entropy) / (mask.sum() if tokens is None else tokens)


def uniform_cross_entropy(
    logits: Float[Tensor, "batch seq vocab"],
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
    top_k: int = 0,
) -> Tensor:
    """(log Σ exp z − mean z) / ln k of next-token logits z, averaged over non-padding tokens: 1 if they are equal, else more.

    z are all logits, or the k = `top_k` largest.
    """
    z = wide(logits).topk(top_k, -1).values if top_k else wide(logits)
    loss = (z.logsumexp(-1) - z.mean(-1)) / math.log(z.shape[-1])
    return (loss * mask).sum() / (mask.sum() if tokens is None else tokens)


def chunked_uniform_cross_entropy(
    hidden: Float[Tensor, "batch seq hidden"],
    head: nn.Linear,
    mask: Int[Tensor, "batch seq"],
    tokens: Tensor | int | None = None,
    top_k: int = 0,
) -> Tensor:
    """`uniform_cross_entropy` from the inputs of the output head."""
    if mask.numel() * len(head.weight) <= PLAIN:
        return uniform_cross_entropy(head(hidden), mask, tokens, top_k)
    rows = of_tokens(hidden, mask)  # as the target too, which the uniform distribution does not need
    total = sum_over_tokens(rows, head, rows.__getitem__, partial(_uniform, top_k))
    return total / (mask.sum() if tokens is None else tokens)


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
    later = mask[:, 1:]
    states, following = of_tokens(hidden[:, :-1], later).to(head.weight.dtype), of_tokens(input_ids[:, 1:], later)

    def losses(states: Tensor, following: Tensor) -> Tensor:
        return torch_cross_entropy(wide(head(states)), following, reduction="none")

    parts = [
        checkpoint(losses, states[part], following[part], use_reentrant=False) for part in slices(len(states), _chunk(states))
    ]
    found = wide(hidden.new_zeros(later.shape))
    return -found.masked_scatter(later.bool(), torch.cat(parts)).sum(-1) if parts else -found.sum(-1)


def sum_over_tokens(hidden: Tensor, head: nn.Linear, target_of: Target, compare: Compare) -> Tensor:
    """Σ of the tokens' losses, [] in at least float32; `hidden` is [tokens, hidden]."""
    inputs = hidden, head.weight, head.bias
    if not torch.is_grad_enabled():
        inputs = tuple(x if x is None else x.detach() for x in inputs)  # type: ignore[assignment]
    return _Chunked.apply(*inputs, target_of, compare)


class _Chunked(torch.autograd.Function):
    """Σ of the tokens' losses, its gradients found on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_of: Target, compare: Compare) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = target_of, compare, ctx.needs_input_grad[:3]
        loss, ctx.gradients = _walk(hidden, weight, bias, *ctx.rest)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and returned, because a head's gradient is too large for two copies. A second backward pass
        # through the same graph, which is rare, computes them again.
        gradients = ctx.gradients or _walk(*ctx.saved_tensors, *ctx.rest)[1]
        ctx.gradients = None
        return *(g if g is None else g.mul_(factor) for g in gradients), None, None


def _walk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_of: Target, compare: Compare, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Σ of the tokens' losses, and its gradients with respect to hidden states, weight and bias where needed."""
    count, vocabulary = len(hidden), len(weight)
    losses = wide(hidden.new_empty(count))
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    of_weight = torch.zeros_like(weight, dtype=losses.dtype) if needed[1] else None
    of_bias = torch.zeros_like(bias, dtype=losses.dtype) if needed[2] else None  # type: ignore[arg-type]
    for chunk in slices(count, max(LEAST // vocabulary, min(_chunk(hidden), -(-count // 6)))):
        logits, target = logits_of(hidden[chunk], weight, bias), target_of(chunk)
        for part in slices(len(logits), SLICE // vocabulary if logits.device.type == "cpu" else len(logits)):
            log_q = wide(logits[part]).log_softmax(-1)
            losses[chunk][part], logits[part] = compare(target[part], log_q)
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[chunk])
        if of_weight is not None:
            _add_matmul(of_weight, logits.T, hidden[chunk])
        if of_bias is not None:
            of_bias += wide(logits).sum(0)
        del logits, target  # before those of the next chunk are made
    gradients = of_hidden, of_weight, of_bias
    return losses.sum(), [g if g is None else g.to(hidden.dtype) for g in gradients]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W h + b of some tokens, one panel of W after the other."""
    logits = hidden.new_empty(len(hidden), len(weight))
    bias = weight.new_zeros(len(weight)) if bias is None else bias  # with a bias, a matmul of few tokens uses the cores better
    for panel in slices(len(weight), PANEL // weight.shape[1] if hidden.device.type == "cpu" else len(weight)):
        torch.addmm(bias[panel], hidden, weight[panel].T, out=logits[:, panel])
    return logits


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:  # of half precision: summed in float32 over the chunks
        total += a @ b


def _chunk(hidden: Tensor) -> int:
    """Tokens of a chunk on this device; the meta device stands for a GPU."""
    return CHUNK if hidden.device.type == "cpu" else GPU_CHUNK


def slices(count: int, size: int) -> list[slice]:
    """The numbers from 0 to `count` in slices of `size`."""
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _kl(logits: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p − log q), and its gradient q − p."""
    log_p = wide(logits).log_softmax(-1)
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(-1)
    return losses, log_q.exp_().sub_(p)


def _uniform(top_k: int, target: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(log Σ exp z − mean z) / ln k of all or the k largest logits, and its gradient (softmax z − 1 / k) / ln k."""
    z, where = log_q.topk(top_k, -1) if top_k else (log_q, None)  # less a constant of the token, which changes neither
    k, total = z.shape[-1], z.logsumexp(-1)
    losses = (total - z.mean(-1)) / math.log(k)
    gradient = z.sub_(total[:, None]).exp_().sub_(1 / k).div_(math.log(k))
    return losses, gradient if where is None else torch.zeros_like(log_q).scatter_(-1, where, gradient)


def _cross_entropy(following: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """− log q(token), and its gradient q − 1(token)."""
    losses = -log_q.gather(-1, following).squeeze(-1)
    return losses, log_q.exp_().scatter_add_(-1, following, -torch.ones_like(following, dtype=log_q.dtype))


def _entropy(states: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q log q, and its gradient q (log q − Σ q log q)."""
    q = log_q.exp()
    losses = (q * log_q).sum(-1)
    return losses, log_q.sub_(losses[..., None]).mul_(q)
