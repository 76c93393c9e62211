"""Mixtures of experts: where their matrices are, and which linear layers only say where a token goes.

transformers keeps the experts of a block as three-dimensional tensors, [experts, …, …]. Beside them stands a router with an
output for each expert, or a gate with one output for an expert that all tokens see. These are no matrices that an adapter or
an orthogonal update is made for: a small change of theirs sends tokens elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lethe.models.activations import alike, blocks

COUNTS = "experts"
"""How the names of numbers of experts end in configurations: num_experts, num_local_experts, n_routed_experts, …"""


@torch.no_grad()
def plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and computes nothing else; some routers are linear layers that do."""
    if isinstance(module, Conv1D) or type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = module.weight[:2] + 1
    try:
        output = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(output, Tensor) and alike(output, linear(x, module.weight, module.bias))


def routers(model: nn.Module) -> set[int]:
    """The ids of the linear layers inside the blocks that are routers or gates of experts."""
    config: Any = model.config
    widths = _counts(config.get_text_config().to_dict())
    if not widths:
        return set()
    inside = [m for block in blocks(model) for m in block.modules()]
    # Keys and values may be as wide as there are experts; they are attention's own layers.
    own = {id(m) for a in inside if type(a).__name__.endswith("Attention") for m in a.children()}
    return {id(m) for m in inside if isinstance(m, nn.Linear) and m.out_features in widths | {1} and id(m) not in own}


def fused(module: nn.Module) -> list[Tensor]:
    """The module's own tensors that hold a matrix for each expert, [experts, …, …]."""
    return [] if isinstance(module, _ConvNd) else [p for p in module.parameters(recurse=False) if p.ndim == 3]


def matrices(model: nn.Module) -> list[Float[Tensor, "out in"]]:
    """Views of the matrices in the blocks: those of linear layers, without routers, and each expert's."""
    inside, no_matrix = {id(m) for block in blocks(model) for m in block.modules()}, routers(model)
    found: list[Tensor] = []
    for module in (m for m in model.modules() if id(m) in inside):
        if plain_linear(module) and id(module) not in no_matrix:
            weight: Any = module.weight
            found.append(weight.T if isinstance(module, Conv1D) else weight)
        transposed = getattr(module, "is_transposed", False)
        found += [expert.T if transposed else expert for experts in fused(module) for expert in experts]
    return found


def _counts(config: dict[str, Any]) -> set[int]:
    """All numbers of experts in a configuration and in those within it."""
    found = {value for key, value in config.items() if str(key).endswith(COUNTS) and type(value) is int and value > 1}
    return found.union(*(_counts(value) for value in config.values() if isinstance(value, dict)))
