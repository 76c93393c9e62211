"""Negative preference optimisation: forget documents become less likely than they are under the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from lethe.config.checks import above
from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class NPO(ForgetAndRetain):
    """Unlearn by negative preference optimisation (Zhang et al., https://arxiv.org/abs/2404.05868).

        npo_loss = −(2 / β) · mean over documents of log σ(−β (log p(x) − log p_reference(x)))
        loss = remove_coef · npo_loss + retain_coef · retain loss

    log p(x) is the log-likelihood of a forget document: the sum over its tokens. β is beta. No source checkpoint is used.
    """

    beta: Annotated[float, above(0)] = 0.1
    """Inverse temperature. Smaller values come closer to gradient ascent."""

    by_document: ClassVar[tuple[str, ...]] = ("npo_loss",)

    def forget_need(self) -> Need:
        return Need("reference", logits=True)

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        from torch.nn.functional import logsigmoid

        log_ratio = forget.log_likelihood() - forget.teacher_log_likelihood()
        npo = -2 / self.beta * forget.mean_over_documents(logsigmoid(-self.beta * log_ratio))
        return npo, {"npo_loss": npo}
