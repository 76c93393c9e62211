"""The parameters that training changes: by layer and role, by optimizer, and those without a gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import nn

from lethe.models.activations import blocks
from lethe.models.adapters import left_out
from lethe.training.optimizers import left_to_adamw, routes, routing_table

SHARE = 0.01
"""The plan has a warning if at least this share of the blocks' weights has no adapter, or is left to AdamW."""


def layer_of(model: nn.Module) -> dict[str, str]:
    """By parameter name, the block that it is in (`"0"`, `"1"`, …), or `"outside"`."""
    owner = {id(p): str(i) for i, block in enumerate(blocks(model)) for p in block.parameters()}
    return {name: owner.get(id(p), "outside") for name, p in model.named_parameters()}


def describe(student: nn.Module, config: Any) -> dict[str, Any]:
    """Trainable parameters by layer and role, and the optimizer's routing, for the plan."""
    found, layers = routes(student, config.optimizer), layer_of(student)
    by_layer: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for route in found:
        by_layer[layers[route.name]][route.role] += math.prod(route.shape)
    return {
        "trainable_parameters": sum(math.prod(route.shape) for route in found),
        "trainable_by_layer": {layer: dict(roles) for layer, roles in by_layer.items()},
        "routing": routing_table(found),
    }


def untouched(student: nn.Module, config: Any, layers: list[int]) -> list[str]:
    """Warnings for the plan: the share of the blocks' weights that adapters leave as they are, or Muon leaves to AdamW."""
    found = []
    if config.lora and (share := left_out(student, config.lora, layers)) > SHARE and config.lora.targets != "attention":
        found.append(
            f"lora: {share:.0%} of the weights in the adapted blocks get no adapter (targets: {config.lora.targets}): "
            f"LoRA adapts linear layers, not routers, nor experts that are stored as three-dimensional tensors; "
            f"lora null trains all weights"
        )
    if config.optimizer == "muon" and (share := left_to_adamw(routes(student, "muon"))) > SHARE:
        found.append(
            f"muon: experts, stored as three-dimensional tensors, are trained by AdamW: {share:.0%} of the blocks' matrices"
        )
    return found


def without_gradient(model: nn.Module) -> list[str]:
    """Names of trainable parameters that a backward pass has left without a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
