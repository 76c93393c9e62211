"""Circuit breakers: activations on forget text become orthogonal to the reference's, and those on retain text stay close."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from lethe.config import LAYERS
from lethe.config.checks import Amount, above
from lethe.errors import LetheError
from lethe.methods.method import Losses, Method, Need, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class CircuitBreaker(Method):
    """Unlearn by circuit breakers (Zou et al., https://arxiv.org/abs/2406.04313).

        cos_loss = mean over layers and forget tokens of max(0, cos(h, h₀))
        retain_norm_loss = mean over layers and retain tokens of ‖h − h₀‖₂
        loss = remove_coef · (1 − p) · cos_loss + retain_coef · p · retain_norm_loss

    h is the model's activation at a layer, h₀ the reference's. p = updates done / (2 · updates of the run) rises from 0 to 1/2.
    The paper's α is the value of both coefficients. No source checkpoint is used.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Layers whose activations both losses read. Layer L is the residual stream after block L (from 0). Adapters sit on the
    blocks up to the last of these layers."""
    remove_coef: Annotated[float, above(0)] = 10.0
    """Weight of the forget loss at the start; it falls to half of this. Higher values forget more."""
    retain_coef: Amount = 10.0
    """Twice the weight of the retain loss at the end; it rises from 0 (0: no retain loss). Higher values preserve more of the
    other knowledge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            raise LetheError("layers: name at least one layer whose activations are compared, such as [0, 1, 2]")

    def needs(self) -> dict[str, Need]:
        need = Need("reference", tuple(sorted(self.layers or ())))
        return {"forget": need} | ({"retain": need} if self.retain_coef else {})

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        now = self.coefficients(progress)
        if text == "forget":
            loss = view.positive_cosine()
            return now["remove_coef"] * loss, {"cos_loss": loss}
        loss = view.norm_of_difference()
        return now["retain_coef"] * loss, {"retain_norm_loss": loss}

    def coefficients(self, progress: Progress) -> dict[str, float]:
        p = progress.done / progress.steps / 2
        return {"remove_coef": self.remove_coef * (1 - p), "retain_coef": self.retain_coef * p}
