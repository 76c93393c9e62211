"""Faster training passes of a model, behind the setting `fast`.

x: inputs, W: frozen weight, A and B: the adapter's matrices, s: alpha / r, g: gradient of y. PEFT computes

    y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ

**float32, without dropout**: one matmul in place of three.

    y = x Mᵀ + bias,   M = W + s · B A,   ∂/∂x = g M,   ∂/∂A = s · (g B)ᵀ x,   ∂/∂B = s · gᵀ (x Aᵀ)

M takes r / tokens of the time of x Mᵀ. So it is computed again in the backward pass instead of being saved. The gradient of M,
as large as W, is never computed.

**bfloat16 or float16**: PEFT converts x to the adapter's float32 and writes its part of y in float32 several times. On a GPU
that moves about 28 bytes per number of y, which takes nearly as long as x Wᵀ. Here the adapter's two matmuls are in the type of
x, and x Wᵀ is added to their result, about 4 bytes per number. M would be cheaper still. But an update that is smaller than
half a rounding step of W vanishes in M, and those of LoRA are. Here, matmuls add up in float32 and y is rounded once, so a
small part of the adapter counts. The adapter's weights stay float32; only their copies in the pass are rounded.

On a GPU, each block of a large model is also compiled (torch.compile): norms, rotary embeddings, GELU and residual sums become
few kernels, and the backward pass computes most of them again from fewer saved tensors. Hooks on blocks stay outside. Where a
block cannot be compiled, the model runs as it is, and the log says why. On a CPU, compiling gained 4 to 7 % on the lab.

`fast_passes` replaces `forward` of the model's own modules until the context ends. Evaluation, merging and saving use the code
of PEFT and transformers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lethe.distributed import sharded_modules
from lethe.models.activations import alike, blocks

logger = logging.getLogger(__name__)
HALF = {torch.bfloat16, torch.float16}
COMPILED = 10**9
"""Weights from which blocks are compiled. Compiling takes about a minute, which smaller models do not save in a short run."""


@contextlib.contextmanager
def fast_passes(model: nn.Module, fast: bool) -> Iterator[list[str]]:
    """Inside, training passes of `model` take the faster form where there is one; yields the names of the modules that do.

    These are PEFT's plain LoRA modules with one float32 adapter on frozen weights. Those of float32 must be without dropout.
    """
    modules = dict(model.named_modules()) if fast else {}
    adapted: dict[str, Any] = {name: m for name, m in modules.items() if type(m) is Linear and _is_plain(m)}
    replaced: list[Any] = list(adapted.values())
    for module in replaced:
        module.forward = _forward(module)
    if fast and _worth_compiling(model):
        replaced += compile_blocks(model)
    try:
        yield list(adapted)
    finally:
        for module in replaced:
            del module.forward  # the instance's attribute; the class's method is visible again


def _worth_compiling(model: nn.Module) -> bool:
    weights = list(model.parameters())
    if sharded_modules(model):  # FSDP2 replaces a block's weights around each pass, which was not tried with compiled blocks
        return False
    return weights[0].is_cuda and sum(p.numel() for p in weights) >= COMPILED


def _is_plain(module: Any) -> bool:
    base, names = module.get_base_layer(), module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or type(base) not in {nn.Linear, Conv1D}:
        return False
    (name,) = names
    dropped = not isinstance(module.lora_dropout[name], nn.Identity)
    return (
        (base.weight.dtype in HALF or (base.weight.dtype == torch.float32 and not dropped))
        and all(part[name].weight.dtype == torch.float32 for part in (module.lora_A, module.lora_B))
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and name not in module.lora_variant
        and not module.lora_bias[name]
    )


def _forward(module: Any) -> Callable[..., Tensor]:
    base, name, peft_forward = module.get_base_layer(), module.active_adapters[0], module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        training = module.training and torch.is_grad_enabled()
        if not training or module.disable_adapters or module.merged or args or kwargs or x.dtype != base.weight.dtype:
            return peft_forward(x, *args, **kwargs)
        a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        if weight.dtype == torch.float32:
            return _MergedLora.apply(x, weight, base.bias, a, b, scale)
        dropped = None if isinstance(module.lora_dropout[name], nn.Identity) else module.lora_dropout[name](x)
        return _HalfLora.apply(x, dropped, weight, base.bias, a.to(x.dtype), b.to(x.dtype) * scale)

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


class _HalfLora(torch.autograd.Function):
    """x Wᵀ + bias + (d Aᵀ) Bᵀ in the type of x, rounded once; d: x after dropout (None: x itself), B: times s.

    torch 2.11 compiles wrong gradients for a function that gets one tensor twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        inputs = (x if dropped is None else dropped).flatten(0, -2)
        low = inputs @ a.T
        y = low @ b.T if bias is None else torch.addmm(bias, low, b.T)
        ctx.save_for_backward(inputs, low, weight, a, b)
        ctx.has_dropout = dropped is not None
        return y.addmm_(x.flatten(0, -2), weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, low, weight, a, b = ctx.saved_tensors
        g = gradient.flatten(0, -2)
        gb = g @ b
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_low = gb @ a
            of_x = g @ weight if ctx.has_dropout else of_low.addmm_(g, weight)
            of_x = of_x.view(*gradient.shape[:-1], -1)
            of_dropped = of_low.view(*gradient.shape[:-1], -1) if ctx.has_dropout else None
        return of_x, of_dropped, None, None, gb.T @ inputs, g.T @ low


def compile_blocks(model: nn.Module) -> list[nn.Module]:
    """Compile `forward` of each block until the caller deletes that attribute; returns the blocks.

    The first pass tries one block, forward and backward. If that fails or gives other values, all blocks run as they are.
    """
    found: list[Any] = list(blocks(model))
    works: list[bool] = []
    for block in found:
        block.forward = _compiled(block, works)
    return found


def _compiled(block: Any, works: list[bool]) -> Callable[..., Any]:
    plain = block.forward
    fast = torch.compile(plain, options={"fallback_random": True})  # torch's own dropout

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not block.training or not torch.is_grad_enabled():
            return plain(x, *args, **kwargs)
        if not works:
            works.append(_works(block, plain, fast, x, args, kwargs))
        return (fast if works[0] else plain)(x, *args, **kwargs)

    return forward


def _works(block: nn.Module, plain: Any, fast: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block can be compiled, and gives the same output and gradient then. Random state stays as it is."""
    results = []
    try:
        for forward in (plain, fast):
            with torch.random.fork_rng():
                inputs = x.detach().requires_grad_()
                found = forward(inputs, *args, **kwargs)
                found = found if isinstance(found, Tensor) else found[0]
                results.append((found.detach(), torch.autograd.grad(found.square().sum(), inputs)[0]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        why = str(error).strip().split("\n")[0][:200]
        logger.warning(f"fast: blocks cannot be compiled and run as they are ({type(error).__name__}: {why})")
        return False
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())  # compiled, it may draw in another order
    if not drops and not all(alike(ours, theirs) for ours, theirs in zip(*reversed(results), strict=True)):
        logger.warning("fast: a compiled block gives other values, so blocks run as they are; try another version of torch")
        return False
    return True
