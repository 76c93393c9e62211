"""Which weights of a model are trained: all, those that the method names, or adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lethe.methods.method import Method
from lethe.models.activations import blocks
from lethe.models.adapters import add_adapters, mlp_matrices


def trainable(config: Method, model: PreTrainedModel) -> nn.Module:
    """The model with those weights set to be trained that the recipe trains, or with adapters.

    Raises:
        LetheError: the model has no such weights.
    """
    part = config.trained
    names = None if part.matrices == "all" else mlp_matrices(model, part.matrices, part.blocks)
    if config.lora:
        return add_adapters(model, config.lora, adapted_layers(config, model), config.seed, names)
    model.requires_grad_(names is None)
    for name in names or ():
        module: Any = model.get_submodule(name)
        module.weight.requires_grad_(True)
    return model


def adapted_layers(config: Method, model: nn.Module) -> list[int]:
    """The layers that decide where adapters sit: on all blocks up to the last of them."""
    return list(range(len(blocks(model)))) if config.layers is None else config.layers
