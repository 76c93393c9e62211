"""Tokens that a batch has more than once, computed once in the first block, while a model is trained.

Where positions enter by rotation, in attention, what the first block is given depends on a token alone. So do queries,
keys and values before they are rotated, and the MLP too if it stands beside attention, not after it. With U distinct
tokens among the N of a batch these take U rows; going back, the gradients at a token's places are added up first:

    y_n = f(x)_u(n),   ∂/∂f(x)_u = Σ ∂/∂y_n over the places n of token u
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

from lethe.residual import blocks

FEW = 0.75
"""The largest share of distinct tokens in a batch that is worth it."""
WHOLE = 64
"""Rows are filled up to a multiple of this: with odd numbers of rows, products are slower and sums end in another order."""


@contextlib.contextmanager
def once_a_token(model: nn.Module) -> Iterator[list[str]]:
    """Inside, training computes for each distinct token once what the first block of `model` makes of it alone.

    Yields the names of the block's modules that do so. There are none in smaller types than float32, whose rounding would
    not be the teachers', on GPUs, with dropout, and where positions are embedded.
    """
    block, once = blocks(model)[0], _Once()
    modules = _of_tokens_alone(model, block)
    with contextlib.ExitStack() as hooks:
        if modules:
            hooks.callback(model.get_input_embeddings().register_forward_hook(once.embedded).remove)  # type: ignore[operator]
            hooks.callback(block.register_forward_pre_hook(once.enters).remove)
        for module in modules.values():
            hooks.callback(module.register_forward_pre_hook(once.narrow).remove)
            hooks.callback(module.register_forward_hook(once.widen).remove)
        yield list(modules)


class Places:
    """Where the distinct tokens of a batch are: `first`, a place of each; `token`, for each place, which of them is there;
    `order`, all places, token after token; `starts`, where in `order` a token's places begin.

    `first` and `starts` are filled up with tokens that are at no place.
    """

    def __init__(self, ids: Int[Tensor, "batch seq"]):
        self.shape = ids.shape
        _, token, counts = ids.unique(return_inverse=True, return_counts=True)
        self.token = token.flatten()
        self.order = self.token.argsort(stable=True)
        starts, more = counts.cumsum(0) - counts, (0, -len(counts) % WHOLE)
        self.first, self.starts = pad(self.order[starts], more), pad(starts, more, value=ids.numel())


class _Once:
    """The hooks, and the places of the batch that the first block has been given last."""

    ids: Tensor | None = None
    places: Places | None = None

    def embedded(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.ids = args[0] if embedding.training and torch.is_grad_enabled() else None

    def enters(self, block: nn.Module, args: Any) -> None:
        ids, self.ids, self.places = self.ids, None, None
        if ids is None or getattr(block, "gradient_checkpointing", False):  # which runs the modules again, going back
            return
        places = Places(ids)
        if len(places.first) <= FEW * ids.numel():
            self.places = places

    def narrow(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.places is None else (args[0].flatten(0, 1)[self.places.first],)

    def widen(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if self.places is None else _Spread.apply(output, self.places).unflatten(0, self.places.shape)


class _Spread(torch.autograd.Function):
    """From a row for each distinct token, [U, width], to one for each place, [N, width]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return rows[places.token]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return embedding_bag(ctx.places.order, gradient.contiguous(), ctx.places.starts, mode="sum"), None


@torch.no_grad()
def _of_tokens_alone(model: nn.Module, block: nn.Module) -> dict[str, nn.Module]:
    """By name, the outermost modules with products in `block`, the first, that see one token at a time; found on a probe."""
    weight, modules = next(model.parameters()), list(model.modules())
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    positions = sum(isinstance(module, nn.Embedding) for module in modules) != 1
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or random or positions:
        return {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(args) == 1 and not kwargs and isinstance(output, Tensor):
                seen[name] = args[0], output

        return hook

    ids = torch.tensor([[1, 2, 3, 2, 4, 1], [3, 3, 1, 4, 2, 2]])
    places, was_training = Places(ids), model.training
    model.eval()
    try:
        with contextlib.ExitStack() as hooks:
            for name, module in block.named_modules():
                hooks.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
            model(input_ids=ids, use_cache=False)
        found: dict[str, nn.Module] = {}
        for name, module in block.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if name in seen and not inside and any(isinstance(m, nn.Linear) for m in module.modules()):
                given, made = seen[name]
                if given.shape[:2] == made.shape[:2] == ids.shape:
                    rows = given.flatten(0, 1)[places.first]
                    again = [x[places.token].unflatten(0, ids.shape) for x in (rows, module(rows))]
                    if all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(again, (given, made), strict=True)):
                        found[name] = module
    finally:
        model.train(was_training)
    return found
