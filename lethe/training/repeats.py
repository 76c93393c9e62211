"""Tokens that a batch has more than once, computed once in the first block, while a model is trained.

Where positions enter in attention, as by rotation, what the first block is given depends on a token alone. So do queries,
keys and values before they are rotated, and the MLP too if it stands beside attention, not after it. With U distinct
tokens among the N of a batch these take U rows; going back, the gradients at a token's places are added up first:

    y_n = f(x)_u(n),   ∂/∂f(x)_u = Σ ∂/∂y_n over the places n of token u
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import embedding_bag, pad

from lethe.models.activations import blocks

FEW = 0.75
"""The largest share of distinct tokens in a batch that is worth it."""
WHOLE = 64
"""Rows are filled up to a multiple of this. Products of odd numbers of rows are slower, and a row's sums can end in another
order there than in the teacher's pass over all rows."""


@contextlib.contextmanager
def once_a_token(model: nn.Module) -> Iterator[list[str]]:
    """Inside, training computes for each distinct token once what the first block of `model` makes of it alone.

    Yields the names of the block's modules that do so. There are none on GPUs, with dropout, and in smaller types than
    float32, where rows of another batch are rounded otherwise than the teachers' are.
    """
    block, once = blocks(model)[0], _Once()
    modules = _of_tokens_alone(model, block)
    with contextlib.ExitStack() as hooks:
        if modules:
            hooks.callback(model.get_input_embeddings().register_forward_hook(once.embedded).remove)  # type: ignore[operator]
            hooks.callback(block.register_forward_pre_hook(once.enters).remove)
            hooks.callback(block.register_forward_hook(once.leaves, always_call=True).remove)
        for module in modules.values():
            hooks.callback(module.register_forward_pre_hook(once.narrow).remove)
            hooks.callback(module.register_forward_hook(once.widen).remove)
        yield list(modules)


class Places:
    """Where the distinct tokens of a batch are: `first`, a place of each; `token`, for each place, which of them is there;
    `order`, all places, token after token; `starts`, where in `order` a token's places begin.

    `first` is filled up with the first place, `starts` so that nothing is added up there.
    """

    def __init__(self, ids: Int[Tensor, "batch seq"]):
        self.shape = ids.shape
        _, token, counts = ids.unique(return_inverse=True, return_counts=True)
        self.token = token.flatten()
        self.order = self.token.argsort(stable=True)
        starts, more = counts.cumsum(0) - counts, (0, -len(counts) % WHOLE)
        self.first, self.starts = pad(self.order[starts], more), pad(starts, more, value=ids.numel())

    def narrow(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "1 U width"]:
        """A row for each distinct token."""
        return x.flatten(0, 1)[self.first][None]

    def widen(self, rows: Float[Tensor, "1 U width"]) -> Float[Tensor, "batch seq width"]:
        """Each token's row at all of its places."""
        return _Spread.apply(rows[0], self).unflatten(0, self.shape)


class _Once:
    """The hooks, and the places of the batch that is in the first block."""

    ids: Tensor | None = None
    places: Places | None = None

    def embedded(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.ids = args[0] if args and embedding.training and torch.is_grad_enabled() else None

    def enters(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        ids, self.ids = self.ids, None
        # Checkpointing runs the block again, going back, without what leads to it.
        if ids is None or getattr(block, "gradient_checkpointing", False) or not args or args[0].shape[:2] != ids.shape:
            return
        places = Places(ids)
        if len(places.first) <= FEW * ids.numel():
            with torch.no_grad():  # of the token alone, this time too: whatever was added to embeddings shows
                if torch.equal(places.widen(places.narrow(args[0])), args[0]):
                    self.places = places

    def leaves(self, block: nn.Module, args: Any, output: Any) -> None:
        self.places = None

    def narrow(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (self.places.narrow(args[0]),) if self.places else None

    def widen(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self.places.widen(output) if self.places else None


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
    """By name, the outermost modules with linear layers in the first block that see one token at a time.

    Found on a probe in training mode, so that dropout shows, with the block's weights moved, so that attention shows that
    adds nothing as yet.
    """
    weight = next(model.parameters())
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or random:
        return {}
    rng = torch.Generator().manual_seed(0)
    moved = {name: p + 0.1 * torch.randn(p.shape, generator=rng) for name, p in block.named_parameters()}
    inside = next(name for name, module in model.named_modules() if module is block)
    ids = torch.tensor([[0, 1, 2, 1, 0, 0], [2, 2, 0, 1, 1, 0]])
    places, was_training = Places(ids), model.training
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(args) == 1 and not kwargs and isinstance(output, Tensor) and args[0].dim() == output.dim() == 3:
                seen[name] = args[0], output

        return hook

    found: dict[str, nn.Module] = {}
    try:
        model.train()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for name, module in block.named_modules():
                if name and any(isinstance(m, nn.Linear) for m in module.modules()):
                    stack.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
            weights = {f"{inside}.{name}": p for name, p in moved.items()}
            functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})
        for name, module in block.named_modules():
            if name not in seen or any(name.startswith(f"{outer}.") for outer in found):
                continue
            given, made = seen[name]
            its = {key.removeprefix(f"{name}."): p for key, p in moved.items() if key.startswith(f"{name}.")}
            if _alike(places.widen(places.narrow(given)), given):
                rows = functional_call(module, its, (places.narrow(given),))
                if _alike(places.widen(rows), made):
                    found[name] = module
    except (RuntimeError, ValueError, IndexError, TypeError):
        return {}
    finally:
        model.train(was_training)
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
