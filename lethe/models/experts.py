"""Mixtures of experts: where their weight matrices are, and which linear layers are routers.

transformers has the experts of a block as three-dimensional tensors, [experts, …, …]. A router beside them has one output for
each expert. A gate has one output, for an expert that all tokens use. Adapters and orthogonal updates leave routers and gates
alone, since a small change of these sends tokens to other experts.
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
"""End of the settings that count experts: num_experts, num_local_experts, n_routed_experts, …"""


@torch.no_grad()
def plain_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear layer and nothing else. Some routers are linear layers that compute more."""
    if isinstance(module, Conv1D) or type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = module.weight[:2] + 1
    try:
        output = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if not isinstance(output, Tensor) or output.is_meta:  # without values, the shape has to do
        return isinstance(output, Tensor) and output.shape == (len(x), module.out_features)
    return alike(output, linear(x, module.weight, module.bias))


def routers(model: nn.Module) -> set[int]:
    """The ids of the linear layers in the blocks that are routers or gates of experts."""
    config: Any = model.config
    widths = _counts(config.get_text_config().to_dict())
    if not widths:
        return set()
    inside = [m for block in blocks(model) for m in block.modules()]
    # Keys and values may have as many outputs as there are experts.
    own = {id(m) for a in inside if type(a).__name__.endswith("Attention") for m in a.children()}
    return {id(m) for m in inside if isinstance(m, nn.Linear) and m.out_features in widths | {1} and id(m) not in own}


def fused(module: nn.Module) -> list[Tensor]:
    """The module's own tensors with a matrix for each expert, [experts, …, …]."""
    return [] if isinstance(module, _ConvNd) else [p for p in module.parameters(recurse=False) if p.ndim == 3]


def matrices(model: nn.Module) -> list[Float[Tensor, "out in"]]:
    """Views of the matrices in the blocks: of linear layers except routers, and of each expert."""
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
    """All numbers of experts in a configuration and in its inner configurations."""
    found = {value for key, value in config.items() if str(key).endswith(COUNTS) and type(value) is int and value > 1}
    return found.union(*(_counts(value) for value in config.values() if isinstance(value, dict)))
