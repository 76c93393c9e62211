"""LoRA without dropout as one product, while a model is trained.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + bias = x Mᵀ + bias,   M = W + s · B A
    ∂/∂x = g M,   ∂/∂A = s · (g B)ᵀ x,   ∂/∂B = s · gᵀ (x Aᵀ)

M is formed anew only when A or B have changed, which is once an update. The gradient of M itself, a matrix as large as W,
is never formed. On a CPU the backward pass takes some rows at a time, which then are in its caches for all five products.
PEFT's own forward is what evaluation, merging and saving use; it is back when training is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

ROWS = 2048
"""Rows that the backward pass takes at a time on a CPU: those of a product as wide as 512 stay in a core's cache."""
PARTS = 4
"""Parts that a sum over rows is taken in, if each has whole 128: in one part, products with a short side leave cores idle."""


class Merged:
    """The adapters that compute their output in one product; `renew` is to be called once an update."""

    def __init__(self, names: list[str]):
        self.names, self.updates = names, 0

    def renew(self) -> None:
        """Say that A and B may have changed: fused optimizers change weights without a trace."""
        self.updates += 1


@contextlib.contextmanager
def one_product(model: nn.Module) -> Iterator[Merged]:
    """Inside, adapters of `model` that allow it compute their output in one product in training.

    Those do that are PEFT's plain LoRA without dropout, in float32 on frozen float32 weights, one adapter at a time.
    """
    fitting: dict[str, Any] = {name: m for name, m in model.named_modules() if type(m) is Linear and _fits(m)}
    merged = Merged(list(fitting))
    for module in fitting.values():
        module.forward = _forward(module, merged)
    try:
        yield merged
    finally:
        for module in fitting.values():
            del module.forward  # the instance's own: the class's is back


def merged_bytes(model: nn.Module) -> int:
    """Bytes of the matrices M that `one_product` holds for `model`."""
    return sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if type(m) is Linear and _fits(m))


def _fits(module: Any) -> bool:
    base, names = module.get_base_layer(), module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or type(base) not in {nn.Linear, Conv1D}:
        return False
    (name,) = names
    weights = (base.weight, module.lora_A[name].weight, module.lora_B[name].weight)
    return (
        all(weight.dtype == torch.float32 for weight in weights)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and isinstance(module.lora_dropout[name], nn.Identity)
        and name not in module.lora_variant
        and not module.lora_bias[name]
    )


def _forward(module: Any, merged: Merged) -> Callable[..., Tensor]:
    base, name = module.get_base_layer(), module.active_adapters[0]
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    weight, plain = base.weight.T if isinstance(base, Conv1D) else base.weight, module.forward
    product = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    formed_from: tuple[int, ...] | None = None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal formed_from
        if not (module.training and torch.is_grad_enabled()) or module.disable_adapters or module.merged or args or kwargs:
            return plain(x, *args, **kwargs)
        if formed_from != (now := (merged.updates, a._version, b._version)):
            with torch.no_grad():
                torch.addmm(weight, b, a, alpha=scale, out=product)
            formed_from = now
        return _OneProduct.apply(x, product, base.bias, a, b, scale)

    return forward


class _OneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        g, rows = gradient.flatten(0, -2), x.flatten(0, -2)
        size = ROWS if g.device.type == "cpu" else max(1, len(g))
        of_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_a = of_b = None
        for start in range(0, len(g), size):
            some, inputs = g[start : start + size], rows[start : start + size]
            if of_x is not None:
                torch.mm(some, merged, out=of_x[start : start + size])
            of_a = _plus(of_a, _summed(some @ b, inputs))
            of_b = _plus(of_b, _summed(inputs @ a.T, some))  # ∂/∂Bᵀ, quicker than ∂/∂B
        of_a, of_b = (None if total is None else total.mul_(ctx.scale) for total in (of_a, of_b))
        return None if of_x is None else of_x.view(x.shape), None, None, of_a, None if of_b is None else of_b.T, None


def _summed(thin: Tensor, rows: Tensor) -> Tensor:
    """thinᵀ · rows, a sum over as many products as both have rows."""
    if rows.device.type != "cpu" or len(rows) % (128 * PARTS):
        return thin.T @ rows
    a, b = (x.view(PARTS, -1, x.shape[1]) for x in (thin, rows))
    return torch.bmm(a.transpose(1, 2), b).sum(0)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
