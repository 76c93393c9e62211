"""A teacher: the frozen model that the loss compares the model with on one text.

The source never knew the topic; the reference is the model as it was. Both are loaded for themselves, in evaluation mode and
apart from the model that is trained: a reference that shared its weights would compare the model with itself, and the retain
loss would be 0 for a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import pad

from lethe.maps.affine import AffineMap
from lethe.methods.method import Need
from lethe.models.activations import States, read

if TYPE_CHECKING:
    from lethe.unlearning.teacher_cache import Cache

VECTOR = 16
"""Numbers of a vector register: sums over a row whose length is no multiple of it end in another order."""


@dataclass
class Teacher:
    """The teacher on one text: `model`, whose activations go through `maps` if there are any.

    With `head`, the teacher's output head, distributions are final hidden states that the head turns into logits; without
    one they are logits. `weights` is the hash of its weights. A `cache` takes the place of forward passes.
    """

    need: Need
    model: nn.Module
    weights: str
    head: nn.Linear | None = None
    maps: AffineMap | None = None
    cache: Cache | None = None

    def states(self, input_ids: Int[Tensor, "batch seq"], index: Int[Tensor, " batch"]) -> States:
        """The teacher's states on documents `index`, from the cache if there is one."""
        if self.cache is not None:
            return self.cache.states(index, input_ids.shape[1], input_ids.device)
        return self.live(input_ids)

    @torch.no_grad()
    def live(self, input_ids: Int[Tensor, "batch seq"]) -> States:
        """The teacher's states from a forward pass; activations are mapped, W c + b.

        In float32, padded to whole vectors, so that a document's values do not depend, to the last bit, on the batch it comes
        in. In smaller types they do, so they are rounded as the model's own: on the same batch.
        """
        model: Any = self.model
        width = input_ids.shape[1]
        vector = VECTOR if model.dtype == torch.float32 else 1
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        whole = width + -width % vector
        ids = pad(input_ids, (0, (whole if window is None else max(width, min(whole, window))) - width))
        states = read(model, ids, list(self.need.layers), self.need.logits, self.head)
        if self.maps and states.activations:
            states.activations = self.maps(states.activations)
        output = None if states.output is None else states.output[:, :width]
        return States({n: values[:, :width] for n, values in states.activations.items()}, output)
