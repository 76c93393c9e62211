"""MUDMAN: unlearning gradients of a copy that relearns, masked by their agreement with the retain gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from lethe.config.checks import Amount, Fraction, Positive, above
from lethe.errors import LetheError
from lethe.methods.method import Losses, Need, OwnStep, Progress, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.update import Gradient, Update
    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class MUDMAN(OwnStep):
    """Unlearn by MUDMAN (Sondej et al., https://arxiv.org/abs/2506.12484).

        a ← 0.9 a + 0.1 ∇ CE(θ) on retain text                             a starts at 0
        φ ← φ − adversary_lr · ∇ CE(φ) on forget text                      φ ← θ every adversary_every updates
        g = ∇ Σ p log p at φ on forget text
        θ ← θ − retain_lr · a − lr · (g / ‖g‖, where g has the sign of a, else 0)

    θ are the weights, φ an adversary that relearns the topic, p its next-token distributions. 0.9 is retain_momentum. The norm
    is that of all of g. Only the matrices that read the input of the MLPs are trained. No source checkpoint is used.
    """

    lr: float = 0.1
    """Length of the forget step, before entries without agreement are removed. The schedule lowers retain_lr in proportion."""
    retain_lr: Amount = 1e-3
    """Learning rate of the retain step."""
    retain_momentum: Fraction = 0.9
    """Share of the earlier retain gradients in their running mean. A higher value averages over more updates."""
    adversary_lr: Annotated[float, above(0)] = 1e-3
    """Learning rate of the adversary. A higher value relearns more before each forget step."""
    adversary_every: Positive = 32
    """Updates after which the adversary starts again from the model's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "bfloat16":
            raise LetheError("dtype: the adversary's steps are lost to rounding in bfloat16; set it to float32")

    @property
    def trained(self) -> Trained:
        return Trained("mlp_in")

    def needs(self) -> dict[str, Need]:
        return {"forget": Need(logits=True), "retain": Need(logits=True)}

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        return negative_entropy(view) if text == "forget" else retain_cross_entropy(view)

    def gradient(self, update: Update) -> Gradient:
        import torch

        state, beta = update.state, self.retain_momentum
        if update.progress.done % self.adversary_every == 0 or "adversary" not in state:
            state["adversary"] = update.copy()
        for name, g in update.gradient("retain").items():
            mean = state.setdefault("retain", {}).setdefault(name, torch.zeros_like(g))
            mean.mul_(beta).add_(g, alpha=1 - beta)
        with update.at(state["adversary"]):
            update.add(update.gradient("forget", adversary_cross_entropy), -self.adversary_lr)
            for name, value in state["adversary"].items():
                value.copy_(update.parameters[name].detach())
            step = update.gradient("forget", negative_entropy)
        size = update.norm(step) or 1.0
        for name, a in state["retain"].items():  # in place: each of these is as large as the trained weights
            step[name].mul_(step[name].sign() == a.sign()).div_(size).add_(a, alpha=self.retain_lr / self.lr)
        return step


def negative_entropy(view: View) -> tuple[Tensor, Losses]:
    """Σ p log p, to be minimised: distributions become uniform."""
    loss = view.negative_entropy()
    return loss, {"negative_entropy_loss": loss}


def adversary_cross_entropy(view: View) -> tuple[Tensor, Losses]:
    """The loss that an adversary lowers on forget text."""
    loss = view.cross_entropy()
    return loss, {"adversary_ce_loss": loss}


def retain_cross_entropy(view: View) -> tuple[Tensor, Losses]:
    """Cross-entropy on retain text."""
    loss = view.cross_entropy()
    return loss, {"retain_ce_loss": loss}
