"""The teachers of unlearning: the source, which never knew the topic, and the reference, the model as it was.

Both are loaded for themselves, frozen, in evaluation mode and apart from the model that is trained: a reference that
shared its weights would compare the model with itself, and the retain loss would be 0 for a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.affine import AffineMap
from lethe.objectives import Activations
from lethe.residual import residuals


@dataclass
class Teacher:
    """What the model is compared with: `source` on forget text, through `maps` (None: as it is), `reference` on retain text."""

    source: nn.Module
    reference: nn.Module
    maps: AffineMap | None
    layers: list[int]

    def __post_init__(self) -> None:
        for model in (self.source, self.reference):
            model.eval().requires_grad_(False)

    @torch.no_grad()
    def forget_targets(self, input_ids: Int[Tensor, "batch seq"]) -> Activations:
        """Where the forget term wants the activations: W c + b at each layer."""
        activations = residuals(self.source, input_ids, self.layers)
        return self.maps(activations) if self.maps else activations

    @torch.no_grad()
    def source_logits(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """The source's next-token logits on forget text, for distillation."""
        return self.source(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def reference_logits(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """The reference's next-token logits on retain text."""
        return self.reference(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def reference_activations(self, input_ids: Int[Tensor, "batch seq"]) -> Activations:
        """The reference's activations on retain text, for the MSE retain term."""
        return residuals(self.reference, input_ids, self.layers)
