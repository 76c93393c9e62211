"""LoRA adapters: which linear layers get one, which share of the weights gets none, and passes without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lethe import distributed
from lethe.config import LoraSettings
from lethe.errors import LetheError, printable
from lethe.models.activations import blocks
from lethe.models.experts import fused, plain_linear, routers


def add_adapters(
    model: PreTrainedModel, lora: LoraSettings, layers: list[int], seed: int, names: list[str] | None = None
) -> nn.Module:
    """Put LoRA on the linear layers of the blocks up to the last of `layers`, with initial weights from `seed`.

    Later blocks get none, since the forget loss has no gradient there. `names`: put it on these linear layers instead.

    Raises:
        LetheError: there is no layer to adapt, or PEFT does not adapt this architecture.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=linear_layers(model, max(layers), lora.targets) if names is None else names,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        why = printable(error, 200)
        raise LetheError(f"lora: PEFT does not adapt {type(model).__name__} ({why}); train all weights: lora null") from error


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` computes what it did before it got adapters, in evaluation mode. Afterwards it is as it was.

    PEFT's own `disable_adapter` would also switch `requires_grad` off and on, in the middle of an update.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    adapted: list[tuple[Any, bool]] = [(m, m._disable_adapters) for m, _ in modes if isinstance(m, BaseTunerLayer)]
    model.eval()
    for module, _ in adapted:
        module._disable_adapters = True
    try:
        yield model
    finally:
        for module, off in adapted:
            module._disable_adapters = off
        for module, training in modes:
            module.training = training


def merged(model: Any) -> Any:
    """The model with its adapter merged into its weights, in place. Of a sharded weight, each process changes its part."""
    from peft.tuners.lora import LoraLayer

    if not distributed.sharded_modules(model):
        return model.merge_and_unload()
    distributed.gathered_away(model)
    with torch.no_grad():
        for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
            weight: Any = layer.get_base_layer().weight  # type: ignore[union-attr]
            change: Any = layer.get_delta_weight("default")  # type: ignore[attr-defined,operator]
            part = distributed.own(weight)
            part.copy_(part + distributed.own(distributed.put(change, weight)))
    return model.unload()


def inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def under_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to no adapter, by their names in the model without adapters."""
    return {name.replace(".base_layer.", "."): p for name, p in inner(model).named_parameters() if ".lora_" not in name}


def linear_layers(model: nn.Module, last: int, targets: str = "all") -> list[str]:
    """Full names of the linear layers in blocks 0 to `last`. `targets`: `attention`, `mlp` (all others) or `all`.

    The names of their classes identify attention modules. Routers of experts get no adapter. Nor do layers that PEFT would
    mistake for experts by their names, since it would adapt the experts of all blocks instead.
    """
    attention, no_target = _attention(model, last), routers(model)
    kinds = {
        id(m): "attention" if id(m) in attention else "mlp"
        for block in blocks(model)[: last + 1]
        for m in block.modules()
        if plain_linear(m) and id(m) not in no_target
    }
    names = [name for name, m in model.named_modules() if id(m) in kinds and targets in {"all", kinds[id(m)]}]
    names = [name for name in names if name not in _taken_for_experts(model, names)]
    if not names:
        raise LetheError(f"lora.targets: {type(model).__name__} has no linear layer of kind {targets} to adapt; use all")
    return names


def mlp_matrices(model: nn.Module, which: str, numbers: tuple[int, ...] | None = None) -> list[str]:
    """Full names of linear layers of the MLPs. `which`: mlp, mlp_in (they read the residual stream) or mlp_out (they write it).

    `numbers`: of these blocks; None: of all. An MLP writes with its last linear layer.

    Raises:
        LetheError: the MLP of a block is a mixture of experts, or has no such layer.
    """
    config: Any = model.config
    width = config.get_text_config().hidden_size
    attention, no_target = _attention(model, len(blocks(model)) - 1), routers(model)
    prefixes = {id(module): name for name, module in model.named_modules()}
    found = []
    for number, block in enumerate(blocks(model)):
        if numbers is not None and number not in numbers:
            continue
        linear: list[Any] = [m for m in block.modules() if plain_linear(m) and id(m) not in attention | no_target]
        shapes = [tuple(m.weight.shape) if isinstance(m, Conv1D) else tuple(reversed(m.weight.shape)) for m in linear]
        writing = linear[-1:] if shapes and shapes[-1][1] == width else []
        reading = [m for m, shape in zip(linear, shapes, strict=True) if shape[0] == width and m not in writing]
        if not writing or not reading or any(fused(m) for m in block.modules()) or len(linear) > len(reading) + len(writing):
            raise LetheError(
                f"method: it trains the matrices of plain MLPs, and block {number} of {type(model).__name__} has another kind "
                f"(such as experts); use a method that trains all weights, such as npo"
            )
        chosen = {"mlp": reading + writing, "mlp_in": reading, "mlp_out": writing}[which]
        found += [prefixes[id(module)] for module in chosen]
    return found


def left_out(model: nn.Module, lora: LoraSettings, layers: list[int]) -> float:
    """The share of the target weights, in the blocks up to the last of `layers`, that has no adapter."""
    attention = _attention(model, max(layers)) if lora.targets == "mlp" else set()
    total = adapted = 0
    for block in blocks(model)[: max(layers) + 1]:
        for name, module in block.named_modules():
            own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            if ".lora_" not in f".{name}" and id(module) not in attention:
                total += own
                adapted += own * name.endswith("base_layer")
    return 1 - adapted / total if total else 0.0


def _attention(model: nn.Module, last: int) -> set[int]:
    """The ids of the attention modules in blocks 0 to `last`, and of all modules inside them."""
    inside = [a for block in blocks(model)[: last + 1] for a in block.modules() if type(a).__name__.endswith("Attention")]
    return {id(m) for a in inside for m in a.modules()}


def _taken_for_experts(model: nn.Module, names: list[str]) -> set[str]:
    """Those of `names` that PEFT would take for the experts of a transformers 4 adapter."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model=model, conversions=None)  # type: ignore[arg-type]
    return set(names) - set(config.target_modules or ())
