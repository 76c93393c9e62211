"""Simple negative preference optimisation: NPO with the mean over a document's tokens, and without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from lethe.config.checks import Amount, above
from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class SimNPO(ForgetAndRetain):
    """Unlearn by simple negative preference optimisation (Fan et al., https://arxiv.org/abs/2410.07163).

        simnpo_loss = −(2 / β) · mean over documents of log σ(β (−log p(x) / |x| − δ))
        loss = remove_coef · simnpo_loss + retain_coef · retain loss

    log p(x) is the log-likelihood of a forget document, the sum over its |x| predicted tokens: all but the first. β is beta, δ
    is delta. The forget loss uses no reference, and no source checkpoint is used.
    """

    beta: Annotated[float, above(0)] = 4.5
    """Inverse temperature. Higher values stop pushing a document down sooner; values near 0 come close to gradient ascent."""
    delta: Amount = 0.0
    """Cross-entropy of a document from which on it is pushed down less, in nats per token. Higher values forget more."""
    remove_coef: Amount = 0.125
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_loss: Literal["kl", "ce", "mse"] = "ce"
    """ce: cross-entropy on the retain text, as in the paper; kl: KL(reference ‖ model) of next tokens; mse: distance from the
    reference's activations at layers."""

    by_document: ClassVar[tuple[str, ...]] = ("simnpo_loss",)

    def forget_need(self) -> Need:
        return Need(logits=True)

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        from torch.nn.functional import logsigmoid

        margin = -forget.log_likelihood() / forget.predicted_tokens() - self.delta
        loss = -2 / self.beta * forget.mean_over_documents(logsigmoid(self.beta * margin))
        return loss, {"simnpo_loss": loss}
