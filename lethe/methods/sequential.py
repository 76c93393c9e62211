"""Sequential unlearning: block after block, from the last to the first, forgets through the frozen blocks behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lethe.config import LAYERS
from lethe.errors import LetheError
from lethe.methods.method import ForgetAndRetain, Losses, Need, Progress, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.update import Gradient, Update
    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class Sequential(ForgetAndRetain):
    """Unlearn one block after the other, from the last of the layers to the first.

        z = head₀(norm₀(blocks₀ after L (h)))
        sequential_loss = mean over forget tokens of (log Σ exp z − mean z) / ln V
        loss = remove_coef · sequential_loss + retain_coef · retain loss

    h is the model's activation at layer L, the one whose turn it is. blocks₀, norm₀ and head₀ are later blocks, final norm and
    output head of the model before unlearning. V is the size of the vocabulary. Only block L is trained, or its adapters. Each
    layer has its turn for an equal share of the updates. No source checkpoint is used.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Layers that have a turn, from the last to the first. Layer L is the residual stream after block L (from 0). Only these
    blocks are trained, or get adapters."""
    remove_coef: float = 10.0
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_coef: float = 5.0
    """Weight of the retain loss (0: no retain loss). Higher values preserve more of the other knowledge."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """Shape of the learning rate after the warm-up, over the whole run. With constant, all layers have the same rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise LetheError("layers: name the layers that have a turn, such as [0, 1, 2]")
        self.refuse_idle("layered", when=True, why="with method sequential, whose layers have turns")

    def forget_need(self) -> Need:
        return Need("reference", layers=tuple(sorted(self.layers or ())), ending="blocks")

    def need_at(self, text: str, progress: Progress) -> Need:
        need = self.needs()[text]
        return Need("reference", layers=(self.layer_at(progress),), ending="blocks") if need.ending else need

    def layer_at(self, progress: Progress) -> int:
        """The layer whose turn it is."""
        order = sorted(self.layers or (), reverse=True)
        return order[min(len(order) - 1, progress.done * len(order) // progress.steps)]

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        ((layer, h),) = forget.states.activations.items()
        loss = forget.ending(h, layer).uniform_cross_entropy()
        return loss, {"sequential_loss": loss}

    def gradient(self, update: Update) -> Gradient:
        with update.only(self.layer_at(update.progress)):
            return update.added(*(update.gradient(text) for text in self.needs()))

    @property
    def trained(self) -> Trained:
        return Trained(blocks=tuple(sorted(self.layers or ())))

    def coefficients(self, progress: Progress) -> dict[str, float]:
        return super().coefficients(progress) | {"layer": self.layer_at(progress)}

    def warnings(self, plan: dict[str, Any]) -> list[str]:
        few = plan["steps"] < len(self.layers or ())
        said = f"layers: {len(self.layers or ())} layers share {plan['steps']} updates, so that some get none; raise epochs"
        return super().warnings(plan) + ([said] if few else [])
