"""Maximum entropy: on forget text, next-token distributions become uniform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lethe.config.checks import Count
from lethe.errors import LetheError
from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.models.refs import ModelRef
    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class MaxEntropy(ForgetAndRetain):
    """Unlearn by maximum entropy: on forget text, every next token becomes equally likely.

        entropy_loss = mean over tokens of (log Σ exp z − mean z) / ln k
        loss = remove_coef · entropy_loss + retain_coef · retain loss

    z are the k logits of a token: those of the whole vocabulary, or with top_k the k largest. The loss is the cross-entropy
    from the uniform distribution, divided by its lowest value. No source checkpoint is used.
    """

    top_k: Count = 0
    """Number of largest logits that become equal (0: all). Lower values change fewer of the next-token probabilities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1:
            raise LetheError(
                "top_k: one logit alone is always uniform; set it to 2 or more, such as 100, or to 0 for all logits"
            )
        self.refuse_idle("top_k", when=self.remove_coef == 0, why="while remove_coef is 0")

    def forget_need(self) -> Need:
        return Need(logits=True)

    def refuse_model(self, model: ModelRef) -> None:
        if model.vocabulary is not None and self.top_k > model.vocabulary:
            raise LetheError(
                f"top_k: {self.top_k} is above the vocabulary of '{model.name}', {model.vocabulary} tokens; "
                "lower it, or set it to 0 for all logits"
            )

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        loss = forget.uniform_cross_entropy(self.top_k)
        return loss, {"entropy_loss": loss}
