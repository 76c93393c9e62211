"""TAR: the model is trained so that an attacker who fine-tunes it stays at high entropy on forget text."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from lethe.config import LAYERS
from lethe.config.checks import Amount, Count, Positive, above
from lethe.config.training import LoraSettings
from lethe.errors import LetheError
from lethe.methods.method import Losses, Method, Need, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.update import Gradient, Update
    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class TAR(Method):
    """Unlearn by tampering attack resistance (Tamirisa et al., https://arxiv.org/abs/2408.00761).

        first mapping_steps updates: mean over layers and forget tokens of (1 − cos(h, v)) + CE on retain text
        then: g = Σ over i of remove_coef · exp(0.0625 (i − (K − 1))) · ∇ Σ p log p at θ_i on forget text
              step = g + retain_coef · ∇ (CE + mean over layers, tokens and dimensions of (h − h₀)² on retain text)

    θ_1 … θ_K are the weights of an attacker that fine-tunes the model on the update's forget text with AdamW. The sum is over
    every attack_every-th of its K = attack_steps steps. v is a fixed random vector of the token, drawn from the seed, h the
    model's activation at a layer, h₀ the reference's, p the attacker's next-token distributions. Each update takes K passes
    over its forget text, so this method is for small models. No source checkpoint is used.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Layers whose activations are mapped on forget text and held on retain text. Layer L is the residual stream after block L
    (from 0)."""
    mapping_steps: Count = 50
    """Updates that map activations on forget text to random vectors, before the updates with an attacker."""
    attack_steps: Positive = 8
    """Steps of the attacker in each update (K). More steps cost more time in proportion."""
    attack_every: Positive = 4
    """After every so many steps of the attacker, its weights add to the forget gradient."""
    attack_lr: Annotated[float, above(0)] = 1e-4
    """Learning rate of the attacker."""
    remove_coef: Amount = 4.0
    """Weight of the forget gradient. Higher values forget more."""
    retain_coef: Amount = 1.0
    """Weight of the retain loss. Higher values preserve more of the other knowledge."""
    lora: LoraSettings | None = None
    """Train LoRA adapters, which the attacker trains too; null: train all weights, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise LetheError("layers: name at least one layer whose activations are mapped and held, such as [0, 1, 2]")
        if self.attack_every > self.attack_steps:
            raise LetheError(
                f"attack_every: no step of the attacker counts if it is above attack_steps, {self.attack_steps}; lower it"
            )
        if self.dtype == "bfloat16":
            raise LetheError("dtype: the attacker's steps are lost to rounding in bfloat16; set it to float32")

    def needs(self) -> dict[str, Need]:
        layers = tuple(sorted(self.layers or ()))
        return {"forget": Need(layers=layers, logits=True), "retain": Need("reference", layers=layers, logits=True)}

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        mapping = progress.done < self.mapping_steps
        if text == "forget":
            return self.random_mapping(view) if mapping else attacker_cross_entropy(view)
        ce = view.cross_entropy()
        if mapping:
            return ce, {"retain_ce_loss": ce}
        mse = view.distance()
        return self.retain_coef * (ce + mse), {"retain_ce_loss": ce, "retain_mse_loss": mse}

    def random_mapping(self, view: View) -> tuple[Tensor, Losses]:
        """1 − cos(h, v) of forget tokens."""
        width = view.activation(min(self.layers or ())).shape[-1]
        loss = view.distance_from_direction(directions(self.seed, view.vocabulary, width))
        return loss, {"mapping_loss": loss}

    def gradient(self, update: Update) -> Gradient:
        if update.progress.done < self.mapping_steps:
            return update.added(update.gradient("forget"), update.gradient("retain"))
        return update.added(self.tamper_resistance(update), update.gradient("retain"))

    def tamper_resistance(self, update: Update) -> Gradient:
        """The gradients of negative entropy at the attacker's weights, weighted and added up."""
        import torch

        total: Gradient = {}
        with update.restored():
            attacker = torch.optim.AdamW(update.parameters.values(), lr=self.attack_lr)
            for i in range(self.attack_steps):
                for name, g in update.gradient("forget").items():
                    update.parameters[name].grad = g
                attacker.step()
                if (i + 1) % self.attack_every == 0:
                    weight = self.remove_coef * math.exp(0.0625 * (i - (self.attack_steps - 1)))
                    found = update.gradient("forget", attacked_entropy)
                    total = update.added(total, {name: weight * g for name, g in found.items()})
        return total


@functools.cache
def directions(seed: int, vocabulary: int, width: int) -> Tensor:
    """A random vector for each token, [vocabulary, width]."""
    import torch

    return torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed))


def attacker_cross_entropy(view: View) -> tuple[Tensor, Losses]:
    """The loss that the attacker lowers on forget text."""
    loss = view.cross_entropy()
    return loss, {"attacker_ce_loss": loss}


def attacked_entropy(view: View) -> tuple[Tensor, Losses]:
    """Σ p log p of the attacked model, to be minimised."""
    loss = view.negative_entropy()
    return loss, {"negative_entropy_loss": loss}
