"""Distillation from the source: on forget text the model learns the source's next-token distributions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lethe.config import LAYERS
from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class Distill(ForgetAndRetain):
    """Unlearn by distillation from an early checkpoint that had not learned the topic.

        loss = remove_coef(t) · KL(source ‖ model on forget text) + retain_coef(t) · retain loss

    Both are averaged over tokens. No activations are compared, and no affine maps are used.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Adapters sit on the blocks up to the last of these layers; null: on all blocks. Also the layers of retain_loss mse."""
    remove_coef: float = 5.0
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_coef: float = 5.0
    """Weight of the retain loss (0: no retain loss). Higher values preserve more of the other knowledge."""
    schedule: Literal["ramp", "constant"] = "ramp"
    """ramp: over the first epoch retain_coef rises from 0, and remove_coef falls by a quarter; constant: neither changes."""

    def forget_need(self) -> Need:
        return Need("source", logits=True)

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        kl = forget.kl()
        return kl, {"forget_kl_loss": kl}
