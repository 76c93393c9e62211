"""One text in one batch, as the loss of a method sees it: the model's outputs and the teacher's.

A `Teacher` is the frozen model that the loss compares the model with on one text. The source never knew the topic.
The reference is the model before unlearning. A reference that saw the trained weights would compare the model with itself, and
the retain loss would always be 0. So it is either the model with its adapters off, where only adapters are trained, or it is
read from disk (`lethe.unlearning.frozen`).

A `View` owns the mask, the counts of the whole optimizer update that means are taken over, and the choice between the plain
and the chunked form of a loss (`lethe.objectives.losses`). The teacher runs, or its cache is read, when a loss first needs it.

A method's loss uses only the public functions of `View`. Each of them says which fields of `Need` it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from lethe.errors import LetheError
from lethe.maps.affine import AffineMap
from lethe.methods.method import Need
from lethe.models.activations import States, ending, read
from lethe.objectives import losses
from lethe.unlearning.frozen import Frozen

if TYPE_CHECKING:
    from lethe.unlearning.teacher_cache import Cache

T = TypeVar("T")
VECTOR = 16
"""Numbers per vector register. If a dimension is not a multiple of it, sums over that dimension add in another order."""


@dataclass
class Teacher:
    """The teacher on one text: `model`, whose activations go through `maps` if there are any.

    With `head`, the teacher's output head, its outputs are final hidden states that the head turns into logits. Without `head`,
    they are logits. `weights` is the hash of its weights. A `cache` replaces forward passes.
    """

    need: Need
    model: Frozen
    weights: str
    head: nn.Linear | None = None
    maps: AffineMap | None = None
    cache: Cache | None = None

    def flops(self, lengths: Sequence[int]) -> int:
        """The operations of its pass over documents of these lengths."""
        return self.model.flops.forward(lengths, self.need.depth, self.need.logits)

    def ending_flops(self, lengths: Sequence[int], layer: int | None) -> int:
        """The operations of what follows a layer (None: the last), in a pass over documents of these lengths."""
        return self.model.flops.ending(lengths, layer)

    def states(self, input_ids: Int[Tensor, "batch seq"], index: Int[Tensor, " batch"]) -> States:
        """The teacher's activations and outputs on documents `index`, from the cache if there is one."""
        if self.cache is not None:
            return self.cache.states(index, input_ids.shape[1], input_ids.device)
        return self.live(input_ids)

    @torch.no_grad()
    def live(self, input_ids: Int[Tensor, "batch seq"]) -> States:
        """The teacher's activations and outputs from a forward pass. Activations go through the affine maps, W c + b.

        float32 inputs are padded to whole vectors, so that a document's values are bit-identical in every batch. In smaller
        types they differ between batches. Teacher and model then see the same batch, so both have the same rounding.
        """
        width = input_ids.shape[1]
        vector = VECTOR if self.model.dtype == torch.float32 else 1
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        whole = width + -width % vector
        ids = pad(input_ids, (0, (whole if window is None else max(width, min(whole, window))) - width))
        with self.model.running() as model:
            states = read(model, ids, list(self.need.layers), self.need.logits, self.head)
        if self.maps and states.activations:
            states.activations = self.maps(states.activations)
        output = None if states.output is None else states.output[:, :width]
        return States({n: values[:, :width] for n, values in states.activations.items()}, output)

    def ending(
        self, input_ids: Int[Tensor, "batch seq"], layer: int | None, stream: Float[Tensor, "batch seq hidden"]
    ) -> Tensor:
        """What the teacher makes of `stream` in place of its activations at `layer` (None: those of the last block)."""
        with self.model.running() as model:
            return ending(model, input_ids, layer, stream.to(self.model.dtype), self.head)


def declared(value: T | None, what: str) -> T:
    """What a loss reads of a text.

    Raises:
        LetheError: the method's `needs()` does not declare it, so that it was not computed.
    """
    if value is None:
        raise LetheError(f"method: the loss reads {what} of a text for which needs() declares none; add it to the text's Need")
    return value


@dataclass
class View:
    """`states`: the model's activations and outputs on this text. `tokens`, `documents`: their numbers in the whole update.

    `head` is the model's output head, where the logits are its output for the final hidden states and nothing else. `given`:
    what `Method.begin` has computed, which the trial before training does without.
    """

    input_ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    index: Int[Tensor, " batch"]
    states: States
    tokens: int
    documents: int
    head: nn.Linear | None = None
    teacher: Teacher | None = None
    variance: dict[int, float] | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    teacher_runs: Callable[[], None] | None = None
    """Called when the teacher computes its outputs, and not when they come from a cache."""
    ending_runs: Callable[[int | None], None] | None = None
    """Called when the teacher's blocks after a layer (None: the last) and its output head run on the model's activations."""

    @cached_property
    def target(self) -> States:
        """The teacher's activations and outputs."""
        teacher = declared(self.teacher, "teacher")
        if self.teacher_runs and teacher.cache is None:
            self.teacher_runs()
        return teacher.states(self.input_ids, self.index)

    def distance(self) -> Tensor:
        """Mean over layers, tokens and dimensions of (h − a)², a the teacher's activation; over a's variance if it is known.

        Needs `teacher` and `layers`.
        """
        return losses.squared_distance(self.states.activations, self.target.activations, self.mask, self.tokens, self.variance)

    def distance_to(self, vector: Float[Tensor, " hidden"]) -> Tensor:
        """Mean over layers, tokens and dimensions of (h − vector)². Needs `layers`."""
        targets = {n: vector.to(values.device, losses.wide(values).dtype) for n, values in self.states.activations.items()}
        return losses.squared_distance(self.states.activations, targets, self.mask, self.tokens)

    def distance_from_direction(self, vectors: Float[Tensor, "vocab hidden"]) -> Tensor:
        """Mean over layers and tokens of 1 − cos(h, v), v the vector of the token. Needs `layers`."""
        return losses.cosine_distance(
            self.states.activations, vectors.to(self.input_ids.device)[self.input_ids], self.mask, self.tokens
        )

    def activation(self, layer: int) -> Float[Tensor, "batch seq hidden"]:
        """The model's activations at one layer. Needs it in `layers`."""
        return declared(self.states.activations.get(layer), f"layer {layer}")

    def teacher_activation(self, layer: int) -> Float[Tensor, "batch seq hidden"]:
        """The teacher's activations at one layer. Needs `teacher`, and the layer in `layers`."""
        return declared(self.target.activations.get(layer), f"layer {layer}")

    def ending(self, stream: Float[Tensor, "batch seq hidden"], layer: int | None = None) -> View:
        """The same text with the logits that the teacher gives if `stream` is the output of its block `layer` (None: the last).

        Its later blocks, final norm and output head are applied to `stream`, which gets a gradient. Needs `teacher`, `ending`.
        """
        teacher = declared(self.teacher, "teacher")
        if self.ending_runs:
            self.ending_runs(layer)
        found = replace(self, states=States({}, teacher.ending(self.input_ids, layer, stream)), head=teacher.head)
        if "target" in vars(self):
            vars(found)["target"] = self.target  # what the teacher has computed already
        return found

    def positive_cosine(self) -> Tensor:
        """Mean over layers and tokens of max(0, cos(h, a)), a the teacher's activation. Needs `teacher` and `layers`."""
        return losses.positive_cosine(self.states.activations, self.target.activations, self.mask, self.tokens)

    def norm_of_difference(self) -> Tensor:
        """Mean over layers and tokens of ‖h − a‖₂, a the teacher's activation. Needs `teacher` and `layers`."""
        return losses.norm_of_difference(self.states.activations, self.target.activations, self.mask, self.tokens)

    def kl(self) -> Tensor:
        """KL(teacher ‖ model) of next-token distributions, a mean over tokens. Needs `teacher` and `logits`."""
        ours, theirs, head = self._output, declared(self.target.output, "logits"), declared(self.teacher, "teacher").head
        if self.head is None or head is None:
            return losses.kl(ours, theirs, self.mask, self.tokens)
        return losses.chunked_kl(ours, self.head, theirs, head, self.mask, self.tokens)

    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the text's own next tokens, a mean over the tokens that have one before them. Needs `logits`."""
        tokens = self.tokens - self.documents
        if self.head is None:
            return losses.cross_entropy(self._output, self.input_ids, self.mask, tokens)
        return losses.chunked_cross_entropy(self._output, self.head, self.input_ids, self.mask, tokens)

    def negative_entropy(self) -> Tensor:
        """Σ p log p of the model's next-token distributions, a mean over tokens. Needs `logits`."""
        if self.head is None:
            return losses.negative_entropy(self._output, self.mask, self.tokens)
        return losses.chunked_negative_entropy(self._output, self.head, self.mask, self.tokens)

    def uniform_cross_entropy(self, top_k: int = 0) -> Tensor:
        """(log Σ exp z − mean z) / ln k of the k = `top_k` largest next-token logits z (0: all), a mean over tokens.

        It is 1 where they are equal, else more. Needs `logits`.
        """
        if self.head is None:
            return losses.uniform_cross_entropy(self._output, self.mask, self.tokens, top_k)
        return losses.chunked_uniform_cross_entropy(self._output, self.head, self.mask, self.tokens, top_k)

    def predicted_tokens(self) -> Int[Tensor, " batch"]:
        """The number of tokens of each document that have one before them; 1 if there are none."""
        return self.mask[:, 1:].sum(-1).clamp(min=1)

    def log_likelihood(self) -> Float[Tensor, " batch"]:
        """The model's log-likelihood of each document, the sum over its tokens that have one before them. Needs `logits`."""
        return self._log_likelihood(self._output, self.head)

    @torch.no_grad()
    def teacher_log_likelihood(self) -> Float[Tensor, " batch"]:
        """The teacher's log-likelihood of each document; it has no gradient. Needs `teacher` and `logits`."""
        return self._log_likelihood(declared(self.target.output, "logits"), declared(self.teacher, "teacher").head)

    def mean_over_documents(self, values: Float[Tensor, " batch"]) -> Tensor:
        """The batch's part of the mean over all documents of the update."""
        return values.sum() / self.documents

    @property
    def vocabulary(self) -> int:
        """The number of next-token logits. Needs `logits`."""
        return self._output.shape[-1] if self.head is None else len(self.head.weight)

    @property
    def _output(self) -> Tensor:
        return declared(self.states.output, "logits")

    def _log_likelihood(self, output: Tensor, head: nn.Linear | None) -> Tensor:
        if head is None:
            return losses.log_likelihood(output, self.input_ids, self.mask)
        return losses.chunked_log_likelihood(output, head, self.input_ids, self.mask)
