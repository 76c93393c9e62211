"""Gradient difference: gradient ascent on the forget text's cross-entropy, beside gradient descent on the retain loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class GradDiff(ForgetAndRetain):
    """Unlearn by gradient difference (Maini et al., https://arxiv.org/abs/2401.06121).

        forget_ce_loss = mean over tokens of log p(next token)
        loss = remove_coef · forget_ce_loss + retain_coef · retain loss

    forget_ce_loss is the cross-entropy with a minus. It has no lower bound: with a high learning rate, a long run or a low
    retain_coef, the model forgets everything. No source checkpoint is used.
    """

    retain_loss: Literal["kl", "ce", "mse"] = "ce"
    """ce: cross-entropy on the retain text, as in the paper; kl: KL(reference ‖ model) of next tokens; mse: distance from the
    reference's activations at layers."""

    scale: ClassVar[str | None] = None

    def forget_need(self) -> Need:
        return Need(logits=True)

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        loss = -forget.cross_entropy()
        return loss, {"forget_ce_loss": loss}
