"""UNDO: an unlearned model is distilled into a copy of itself whose weights were shrunk and made noisy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lethe.config.unlearning import CorruptSettings
from lethe.errors import LetheError
from lethe.methods.method import Losses, Method, Need, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class Undo(Method):
    """Make an unlearned model robust, by distillation into its corrupted weights (Lee et al., https://arxiv.org/abs/2506.06278).

        start: matrices θ ← (1 − α) θ₀ + α β N, vectors θ ← (1 − α) θ₀
        loss = ½ · KL(reference ‖ model on forget text) + ½ · KL(reference ‖ model on retain text)

    The setting model is a model that another run has unlearned. It is the reference θ₀ on both texts. α is corrupt.share and
    β is corrupt.noise. Each KL is a mean over the tokens of its text. With rewind, training starts near the source instead.
    """

    corrupt: CorruptSettings | None = field(default_factory=CorruptSettings)
    """The noise in the weights to start from; null, together with rewind: start near the source instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.moves_start:
            raise LetheError("corrupt: null leaves nothing to restore; give corrupt a share, or set rewind")

    def needs(self) -> dict[str, Need]:
        return dict.fromkeys(("forget", "retain"), Need("reference", logits=True))

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        kl = view.kl()
        return kl / 2, {f"{text}_kl_loss": kl}
