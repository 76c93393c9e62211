"""Which weights of a model are trained: all, those that the method names, or adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lethe.methods.method import Method
from lethe.models.activations import blocks
from lethe.models.adapters import add_adapters, linear_layers, mlp_matrices


def trainable(config: Method, model: PreTrainedModel) -> nn.Module:
    """The model with those weights set to be trained that the recipe trains, or with adapters.

    Raises:
        LetheError: the model has no such weights.
    """
    part = config.trained
    names = None if part.matrices == "all" else mlp_matrices(model, part.matrices, part.blocks)
    if part.matrices == "all" and part.blocks is not None:
        return _some_blocks(config, model, part.blocks)
    if config.lora:
        return add_adapters(model, config.lora, adapted_layers(config, model), config.seed, names)
    model.requires_grad_(names is None)
    for name in names or ():
        module: Any = model.get_submodule(name)
        module.weight.requires_grad_(True)
    return model


def _some_blocks(config: Method, model: PreTrainedModel, numbers: tuple[int, ...]) -> nn.Module:
    """The model with all weights of some blocks set to be trained, or with adapters in these blocks."""
    found = blocks(model)
    if config.lora:
        names = {id(m): name for name, m in model.named_modules()}
        inside = {names[id(m)] for number in numbers for m in found[number].modules()}
        wanted = [name for name in linear_layers(model, max(numbers), config.lora.targets) if name in inside]
        return add_adapters(model, config.lora, list(numbers), config.seed, wanted)
    model.requires_grad_(False)
    for number in numbers:
        found[number].requires_grad_(True)
    return model


def by_block(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[int, set[str]]:
    """By the number of a block, the names of those of these parameters that are in it."""
    numbers = {id(p): number for number, block in enumerate(blocks(model)) for p in block.parameters()}
    found: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        if id(parameter) in numbers:
            found.setdefault(numbers[id(parameter)], set()).add(name)
    return found


def adapted_layers(config: Method, model: nn.Module) -> list[int]:
    """The layers that decide where adapters sit: on all blocks up to the last of them."""
    return list(range(len(blocks(model)))) if config.layers is None else config.layers
