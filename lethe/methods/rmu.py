"""Representation misdirection: activations on forget text are moved to a random vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from lethe.config.checks import Amount, above
from lethe.errors import LetheError
from lethe.methods.method import ForgetAndRetain, Losses, Need, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class RMU(ForgetAndRetain):
    """Unlearn by representation misdirection (Li et al., https://arxiv.org/abs/2403.03218).

        rmu_loss = mean over forget tokens and dimensions of (h − s u)²
        retain_mse_loss = mean over retain tokens and dimensions of (h − h₀)²
        loss = remove_coef · rmu_loss + retain_coef · retain loss

    h is the model's activation at one layer and h₀ the reference's. u is a random vector of norm 1 with positive entries, drawn
    from the seed, and s is steering. Only the matrices that write the output of the MLP are trained, or get adapters: those of
    this layer's block and of the two before it. No source checkpoint is used.
    """

    layers: list[int] | None = field(default_factory=lambda: [3])
    """The one layer whose activations are moved. Layer L is the residual stream after block L (from 0)."""
    steering: Annotated[float, above(0)] = 6.5
    """Norm of the vector that activations on forget text are moved to. Choose several times the norm of the activations."""
    retain_coef: Amount = 1200.0
    """Weight of the retain loss (0: no retain loss). Higher values preserve more of the other knowledge."""
    retain_loss: Literal["kl", "ce", "mse"] = "mse"
    """mse: distance from the reference's activations at the layer, as in the paper; kl: KL(reference ‖ model) of next tokens;
    ce: cross-entropy on the retain text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None or len(self.layers) != 1:
            raise LetheError("layers: rmu moves the activations of one layer; name it, such as [7] of 32")

    def forget_need(self) -> Need:
        return Need(layers=tuple(self.layers or ()))

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        import torch

        width = forget.activation(self.layer).shape[-1]
        direction = torch.rand(width, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        loss = forget.distance_to(self.steering * direction / direction.norm())
        return loss, {"rmu_loss": loss}

    @property
    def layer(self) -> int:
        """The layer whose activations are moved."""
        return self.layers[0] if self.layers else 0

    @property
    def trained(self) -> Trained:
        return Trained("mlp_out", tuple(range(max(0, self.layer - 2), self.layer + 1)))
