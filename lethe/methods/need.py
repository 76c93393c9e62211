"""What a method says of itself: what its losses read, which maps it uses, which weights it trains, and how far a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HELD_OUT = "held_out"
"""The name of the text that `budget.kl` is measured on."""


@dataclass(frozen=True)
class Need:
    """What the loss reads on one text: `layers`, `logits`, or both.

    `teacher`: what the model is compared with; None: nothing, so that no teacher runs on this text. `layers`: activations of
    these layers, of the model and the teacher. `logits`: next-token distributions of both. `mapped`: the teacher's activations
    go through the affine maps, which the property `maps` of the method describes. `variance` (forget text only): their
    distance is divided by the variance of the teacher's activations, by layer. `ending`: the teacher's final norm and output
    head (`head`), and its later blocks (`blocks`), are applied to the model's activations (`View.ending`); it is never cached.
    """

    teacher: Literal["source", "reference"] | None = None
    layers: tuple[int, ...] = ()
    logits: bool = False
    mapped: bool = False
    variance: bool = False
    ending: Literal["blocks", "head"] | None = None

    @property
    def depth(self) -> int:
        """How many blocks a pass runs for the layers alone."""
        return max(self.layers, default=-1) + 1


@dataclass(frozen=True)
class Maps:
    """The affine maps of a recipe.

    `given`: the folder, run or hub id of maps; None: they are fitted before training, on at most `documents` documents of the
    retain text (0: all). `convention`: what a layer's number means in given maps that have no record.
    """

    given: str | None = None
    documents: int = 0
    convention: Literal["auto", "block_output", "hidden_states"] = "auto"


@dataclass(frozen=True)
class Trained:
    """Which weights a method trains, or which get adapters.

    `matrices`: all weights; mlp: the matrices of the MLPs; mlp_in, mlp_out: those that read, or write, the residual stream.
    `blocks`: of these blocks; None: of all.
    """

    matrices: Literal["all", "mlp", "mlp_in", "mlp_out"] = "all"
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer updates done, and how many the first epoch and the whole run have.

    With `layered`, the first epoch is the first pass of the first stage.
    """

    done: int
    first_epoch: int
    steps: int
