"""Faster training passes of a model, behind the setting `fast`.

LoRA without dropout is computed with one matmul in place of three. PEFT computes the left side, `fast_passes` the right:

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + bias = x Mᵀ + bias,   M = W + s · B A
    ∂/∂x = g M,   ∂/∂A = s · (g B)ᵀ x,   ∂/∂B = s · gᵀ (x Aᵀ)

x: inputs, g: gradient of y, W: frozen weight, A and B: the adapter's matrices, s: alpha / r. M takes r / tokens of the time of
x Mᵀ. So it is computed again in the backward pass instead of being saved. The gradient of M, as large as W, is never computed.

`fast_passes` replaces `forward` of the model's own LoRA modules until the context ends. Evaluation, merging and saving use
PEFT's code.
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


@contextlib.contextmanager
def fast_passes(model: nn.Module, fast: bool) -> Iterator[list[str]]:
    """Inside, training passes of `model` take the faster form where there is one; yields the names of the modules that do.

    These are PEFT's plain LoRA modules without dropout, with one float32 adapter on frozen float32 weights.
    """
    modules = dict(model.named_modules()) if fast else {}
    merged: dict[str, Any] = {name: m for name, m in modules.items() if type(m) is Linear and _can_merge(m)}
    for module in merged.values():
        module.forward = _forward(module)
    try:
        yield list(merged)
    finally:
        for module in merged.values():
            del module.forward  # the instance's attribute; the class's method is visible again


def _can_merge(module: Any) -> bool:
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


def _forward(module: Any) -> Callable[..., Tensor]:
    base, name, peft_forward = module.get_base_layer(), module.active_adapters[0], module.forward
    transposed, scale = isinstance(base, Conv1D), module.scaling[name]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        training = module.training and torch.is_grad_enabled()
        if not training or module.disable_adapters or module.merged or args or kwargs:
            return peft_forward(x, *args, **kwargs)
        weight = base.weight.T if transposed else base.weight  # read at each pass: sharding replaces parameters
        return _MergedLora.apply(x, weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, scale)

    return forward


class _MergedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        of_a = ((g @ b).T @ inputs).mul_(ctx.scale)
        of_b = (g.T @ (inputs @ a.T)).mul_(ctx.scale)
        of_x = gradient @ torch.addmm(weight, b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_a, of_b, None
