"""The teachers of unlearning: the source, which never knew the topic, and the reference, the model as it was.

Both are loaded for themselves, frozen, in evaluation mode and apart from the model that is trained: a reference that
shared its weights would compare the model with itself, and the retain loss would be 0 for a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lethe.affine import AffineMap
from lethe.config import UnlearnConfig
from lethe.residual import States, read


@dataclass(frozen=True)
class Needs:
    """What the loss compares on a text: activations of `layers`, and next-token distributions (`output`) or not."""

    layers: tuple[int, ...] = ()
    output: bool = False


def needs(config: UnlearnConfig) -> dict[str, Needs]:
    """By text, what a recipe's terms ask of its teacher; a text that no teacher is asked about is left out."""
    layers = tuple(sorted(config.layers))
    found = {
        "forget": Needs(layers if config.forget_loss != "distill" else (), config.forget_loss != "transfer"),
        "retain": Needs(layers if config.retain_loss == "mse" else (), config.retain_loss == "kl"),
    }
    used = {"forget": config.remove_coef != 0, "retain": config.retain_coef != 0 and config.retain_loss != "ce"}
    return {text: need for text, need in found.items() if used[text]}


@dataclass
class Teacher:
    """What the model is compared with: `source` on forget text, through `maps` (None: as it is), `reference` on retain text.

    `heads` are the output heads by text; with one, a distribution is given as the final hidden states that the head turns
    into logits, without one as the logits.
    """

    source: nn.Module
    reference: nn.Module
    maps: AffineMap | None
    needs: dict[str, Needs]
    heads: dict[str, nn.Linear | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model in (self.source, self.reference):
            model.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, text: str, input_ids: Int[Tensor, "batch seq"]) -> States:
        """What the terms on a text compare the model's states with; activations of the source are mapped, W c + b."""
        model, need = self.source if text == "forget" else self.reference, self.needs[text]
        states = read(model, input_ids, list(need.layers), need.output, self.heads.get(text))
        if text == "forget" and self.maps and states.activations:
            states.activations = self.maps(states.activations)
        return states
