"""Memory of computations without weights: they run on the meta device, where a tensor has a size and no values.

    model on the meta device -> computation inside `recording()` -> Record: what was allocated, and when it was freed

The code that runs is that of training: the blocks of transformers, PEFT's adapters, the method's loss, the optimizer. Three
functions are replaced. Attention saves what a fused kernel saves, since the meta device would use the plain formula. A
grouped matmul of experts takes every type. A condition on values, such as "are all positions consecutive", is true.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
OUTER = -1
"""The number of a storage that was there before, such as a weight's."""


class Record(TorchDispatchMode):
    """The storages that operations made inside: (number, bytes, shape) when made, (number, −bytes, ()) when freed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int, tuple[int, ...]]] = []
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        for tensor in _of_meta(args, kwargs):
            self.numbers.setdefault(tensor.untyped_storage(), OUTER)
        output = function(*args, **(kwargs or {}))
        for tensor in _of_meta(output):
            storage = tensor.untyped_storage()
            if storage not in self.numbers:
                number, size = len(self.events), storage.nbytes()
                self.numbers[storage] = number
                self.events.append((number, size, tuple(tensor.shape)))
                weakref.finalize(storage, self.events.append, (number, -size, ()))
        return output

    def of(self, *tensors: Tensor | None) -> set[int]:
        """The numbers of the storages of tensors, those that were made here."""
        found = (self.numbers.get(tensor.untyped_storage()) for tensor in tensors if tensor is not None)
        return {number for number in found if number not in {None, OUTER}}

    @property
    def most(self) -> int:
        """The highest sum of bytes that were there at one moment."""
        return sum(self.peak(lambda number, size, shape: "all").values())

    def peak(self, kind: Callable[[int, int, tuple[int, ...]], str]) -> dict[str, int]:
        """Bytes by kind at the moment of the highest sum. `kind` names a storage by number, bytes and shape."""
        live: dict[str, int] = {}
        best: dict[str, int] = {}
        named = {number: kind(number, size, shape) for number, size, shape in self.events if size >= 0}
        total = most = 0
        for number, size, _ in self.events:
            live[named[number]] = live.get(named[number], 0) + size
            total += size
            if total > most:
                most, best = total, dict(live)
        return best


def _of_meta(*values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta)


class _Attention(torch.autograd.Function):
    """What fused attention allocates: the output and, for the backward pass, one number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class _Grouped(torch.autograd.Function):
    """A matmul of groups of tokens with the matrices of their experts."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, matrices)
        return tokens.new_empty(*tokens.shape[:-1], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Attention.apply(query, key, value)


def _grouped(tokens: Tensor, matrices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Grouped.apply(tokens, matrices)


REPLACED: list[tuple[Any, str, Callable[..., Tensor]]] = [
    (module, name, replacement)
    for module in (torch, functional)
    for name, replacement in (("scaled_dot_product_attention", _attention), ("grouped_mm", _grouped), ("_grouped_mm", _grouped))
    if hasattr(module, name)
]


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Inside, operations on the meta device are recorded."""
    record = Record()
    with contextlib.ExitStack() as stack:
        for module, name, replacement in REPLACED:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield stack.enter_context(record)
