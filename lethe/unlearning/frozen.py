"""The models that a run compares with: the source, and the reference, which is the target before unlearning.

    Frozen            read from disk at the first pass, in memory until `free`; only the blocks that the losses read
    WithoutAdapters   the target under the adapters that are trained: no weights of its own

The end of a run needs models that are no longer in memory. `whole` then reads their blocks from disk as they run, and `weights`
reads one tensor after the other.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lethe.models import refs, streaming
from lethe.models.adapters import under_adapters, without_adapters
from lethe.models.flops import Flops
from lethe.objectives.losses import head_of


class Frozen:
    """A model that is never trained. `last`: the last block that passes need; None: all, with the output head.

    Several processes share its weights, each a part, since none of them changes it.

    `config` is its configuration and `dtype` the type of its weights. Both are known while the model is not in memory.
    """

    def __init__(self, ref: refs.ModelRef, dtype: str, last: int | None = None):
        self.ref, self.last, self.dtype = ref, last, getattr(torch, dtype)
        self._type = dtype
        self._model: nn.Module | None = None

    @cached_property
    def config(self) -> Any:
        """The configuration, from config.json."""
        return refs.configuration(self.ref)[0]

    @cached_property
    def flops(self) -> Flops:
        """The operations of its passes, from config.json."""
        return Flops(refs.outline(self.ref))

    @contextlib.contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The model, in evaluation mode, for passes that end at block `last`."""
        if self._model is None:
            self._model = refs.load(self.ref, self._type, self.last, sharded=True)[0].requires_grad_(False)
        yield self._model

    def head(self) -> nn.Linear | None:
        """The output head that the model's logits come from alone (`head_of`). It outlives `free`."""
        with self.running() as model:
            return head_of(model)

    def free(self) -> None:
        """Drop the model from memory. The next pass loads it again."""
        if self._model is not None:
            self._model = None
            gc.collect()  # parts of a model may refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def bytes(self) -> int:
        """Bytes of its weights that are in memory now."""
        parameters = [] if self._model is None else list(self._model.parameters())
        return sum(p.numel() * p.element_size() for p in parameters if not p.is_meta)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The whole model for a few passes: as it is in memory, else with its blocks read from disk."""
        if self._model is not None and self.last is None:
            yield self._model
        else:
            with streaming.streamed(self.ref, self._type) as model:
                yield model

    @contextlib.contextmanager
    def weights(self) -> Iterator[Callable[[str], Tensor]]:
        """A function from a parameter's name to its value."""
        with self.whole() as model:
            yield lambda name: streaming.weight_of(model, name)


class WithoutAdapters(Frozen):
    """The target before unlearning, as the weights of the model in training with its adapters off.

    It can never be compared with itself: all that is trained are adapters, and passes leave them out.

    Raises:
        ValueError: a weight that is no adapter's would be trained.
    """

    def __init__(self, ref: refs.ModelRef, dtype: str, student: nn.Module):
        super().__init__(ref, dtype)
        self.student = student
        if trained := [name for name, p in under_adapters(student).items() if p.requires_grad]:
            raise ValueError(f"{trained[0]} is trained, so the model without adapters would not be the reference")

    @contextlib.contextmanager
    def running(self) -> Iterator[nn.Module]:
        with without_adapters(self.student) as model:
            yield model

    whole = running

    def free(self) -> None:
        pass

    @contextlib.contextmanager
    def weights(self) -> Iterator[Callable[[str], Tensor]]:
        yield under_adapters(self.student).__getitem__
