"""One text in one batch, as the loss of a method sees it: the model's pass beside the teacher's.

A view owns the mask, the counts of the whole optimizer update that means are taken over, and the choice between the plain and
the memory-saving form of a loss (`lethe.objectives`). The teacher runs, or its cache is read, when a loss first asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.models.activations import States
from lethe.objectives import distributions
from lethe.objectives.activations import squared_distance
from lethe.unlearning.teacher import Teacher


@dataclass
class View:
    """`states` are the model's on this text; `tokens` and `documents` those of the whole update.

    `head` is the model's output head, where the logits are its output for the final hidden states and nothing else.
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

    @cached_property
    def target(self) -> States:
        """The teacher's states."""
        assert self.teacher is not None
        return self.teacher.states(self.input_ids, self.index)

    def distance(self) -> Tensor:
        """Mean over layers, tokens and dimensions of (h − a)², a the teacher's activation; over a's variance if it is known."""
        return squared_distance(self.states.activations, self.target.activations, self.mask, self.tokens, self.variance)

    def kl(self) -> Tensor:
        """KL(teacher ‖ model) of next-token distributions, a mean over tokens."""
        ours, theirs = self._output, self.target.output
        assert self.teacher is not None and theirs is not None
        if self.head is None or self.teacher.head is None:
            return distributions.kl(ours, theirs, self.mask, self.tokens)
        return distributions.chunked_kl(ours, self.head, theirs, self.teacher.head, self.mask, self.tokens)

    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the text's own next tokens, a mean over the tokens that have one before them."""
        tokens = self.tokens - self.documents
        if self.head is None:
            return distributions.cross_entropy(self._output, self.input_ids, self.mask, tokens)
        return distributions.chunked_cross_entropy(self._output, self.head, self.input_ids, self.mask, tokens)

    def log_likelihood(self) -> Float[Tensor, " batch"]:
        """The model's log-likelihood of each document, the sum over its tokens."""
        return self._log_likelihood(self._output, self.head)

    @torch.no_grad()
    def teacher_log_likelihood(self) -> Float[Tensor, " batch"]:
        """The teacher's log-likelihood of each document; it has no gradient."""
        assert self.teacher is not None and self.target.output is not None
        return self._log_likelihood(self.target.output, self.teacher.head)

    def mean_over_documents(self, values: Float[Tensor, " batch"]) -> Tensor:
        """The batch's part of the mean over all documents of the update."""
        return values.sum() / self.documents

    @property
    def _output(self) -> Tensor:
        assert self.states.output is not None
        return self.states.output

    def _log_likelihood(self, output: Tensor, head: nn.Linear | None) -> Tensor:
        if head is None:
            return distributions.log_likelihood(output, self.input_ids, self.mask)
        return distributions.chunked_log_likelihood(output, head, self.input_ids, self.mask)


class Silent(View):
    """A text that a loss is measured without: each of its parts is 0, and it has no gradient."""

    def distance(self) -> Tensor:
        return torch.zeros((), device=self.mask.device)

    kl = cross_entropy = distance

    def log_likelihood(self) -> Float[Tensor, " batch"]:
        return torch.zeros(len(self.mask), device=self.mask.device)

    teacher_log_likelihood = log_likelihood


def silence(text: dict[str, Tensor]) -> Silent:
    """The silent view of a text in a batch."""
    return Silent(text["input_ids"], text["mask"], text["index"], States(), tokens=1, documents=1)
