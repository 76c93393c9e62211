"""The teachers of unlearning: the source, which never knew the topic, and the reference, the model as it was.

Both are loaded for themselves, frozen, in evaluation mode and apart from the model that is trained: a reference that
shared its weights would compare the model with itself, and the retain loss would be 0 for a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import pad

from lethe.config import UnlearnConfig
from lethe.maps.affine import AffineMap
from lethe.models.activations import States, read

if TYPE_CHECKING:
    from lethe.unlearning.teacher_cache import Cache

VECTOR = 16
"""Numbers of a vector register: sums over a row whose length is no multiple of it end in another order."""


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
    caches: dict[str, Cache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model in (self.source, self.reference):
            model.eval().requires_grad_(False)

    def of(self, text: str) -> nn.Module:
        """The teacher on a text."""
        return self.source if text == "forget" else self.reference

    def states(self, text: str, input_ids: Int[Tensor, "batch seq"], index: Int[Tensor, " batch"]) -> States:
        """What the terms on a text compare the model's states with; from the text's cache if there is one."""
        if text in self.caches:
            return self.caches[text].states(index, input_ids.shape[1], input_ids.device)
        return self.live(text, input_ids)

    @torch.no_grad()
    def live(self, text: str, input_ids: Int[Tensor, "batch seq"]) -> States:
        """The teacher's states now; activations of the source are mapped, W c + b.

        In float32, padded to whole vectors, so that a document's values do not depend, to the last bit, on the batch it comes
        in. In smaller types they do, so they are rounded as the model's own: on the same batch.
        """
        model, need, width = self.of(text), self.needs[text], input_ids.shape[1]
        vector = VECTOR if model.dtype == torch.float32 else 1
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
        whole = width + -width % vector
        ids = pad(input_ids, (0, (whole if window is None else max(width, min(whole, window))) - width))
        states = read(model, ids, list(need.layers), need.output, self.heads.get(text))
        if text == "forget" and self.maps and states.activations:
            states.activations = self.maps(states.activations)
        output = None if states.output is None else states.output[:, :width]
        return States({n: values[:, :width] for n, values in states.activations.items()}, output)
