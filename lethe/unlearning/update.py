"""The gradient of one optimizer update, for methods and wrappers that need more than that of the summed loss.

    Update.gradient("forget")    the gradient of the loss of one text, over all batches of the update
    Update.moved(by)             inside, the weights are elsewhere
    step_gradient(config, …)     what the optimizer steps with: a procedure's gradient, or forget and retain gradient combined

A plain loss needs none of this: `HfTrainer.training_step` adds up its gradient batch by batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lethe.distributed import whole
from lethe.methods.method import Losses, Method, Progress
from lethe.unlearning.view import View

Gradient = dict[str, Tensor]
"""A tensor for each trained parameter that a loss reaches, by the parameter's name."""
Loss = Callable[[View], tuple[Tensor, Losses]]


@dataclass
class Update:
    """One optimizer update, as `Method.gradient` sees it.

    `parameters` are the trained ones, by name. `passes(text, loss)` adds the gradient of a loss of one text to `.grad`, over
    all batches of the update and all processes; without gradients enabled, it only logs the loss. `state` is what the method
    remembers from one update to the next: tensors in the form of a parameter. Saves hold it. `given`: what `Method.begin` has
    computed. `blocks`: by number, the names of the trained parameters of a block. `losses`: before training, the parts of the
    loss of the last passes, as means over the update; during it they are logged.
    """

    parameters: dict[str, nn.Parameter]
    passes: Callable[[str, Loss | None], Losses]
    progress: Progress
    state: dict[str, Gradient] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[int, set[str]] = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)

    def gradient(self, text: str, loss: Loss | None = None) -> Gradient:
        """The gradient of the loss of one text at the present weights.

        `loss`: a function from the text's view to the loss and its parts for the log; None: the method's own.
        """
        self.clear()
        self.losses = self.passes(text, loss)
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.clear()
        return found

    def value(self, text: str) -> None:
        """Compute the method's loss of one text at the present weights without its gradient, for the log."""
        with torch.no_grad():
            self.passes(text, None)

    def clear(self) -> None:
        """Forget the gradients that the parameters have."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @staticmethod
    def added(*gradients: Gradient) -> Gradient:
        """The sum of gradients, each with parameters of its own."""
        found: Gradient = {}
        for gradient in gradients:
            found |= {name: found[name] + value if name in found else value for name, value in gradient.items()}
        return found

    @staticmethod
    def norm(gradient: Gradient) -> float:
        """The Euclidean norm of all entries together, those of all processes."""
        squares = [whole(g.to(torch.promote_types(g.dtype, torch.float32)).square().sum()) for g in gradient.values()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    @contextlib.contextmanager
    def only(self, block: int) -> Iterator[None]:
        """Inside, gradients are those of the parameters of one block, and no pass goes further back."""
        others = [p for name, p in self.parameters.items() if name not in self.blocks[block]]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def moved(self, by: Gradient, scale: float = 1.0) -> Iterator[None]:
        """Inside, the weights are θ + scale · by. Afterwards they are as they were, bit for bit."""
        with self.restored(by):
            self.add(by, scale)
            yield

    @contextlib.contextmanager
    def restored(self, which: Gradient | None = None) -> Iterator[None]:
        """Inside, weights may change. Afterwards they are as they were. `which`: names of those that change; None: all."""
        before = {name: self.parameters[name].detach().clone() for name in which or self.parameters}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.parameters[name].copy_(value)

    @contextlib.contextmanager
    def at(self, weights: Gradient) -> Iterator[None]:
        """Inside, the weights of these names are `weights`. Afterwards they are as they were."""
        with self.restored(weights):
            with torch.no_grad():
                for name, value in weights.items():
                    self.parameters[name].copy_(value)
            yield

    def copy(self) -> Gradient:
        """The present weights."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def add(self, change: Gradient, scale: float = 1.0) -> None:
        """θ ← θ + scale · change."""
        for name, value in change.items():
            self.parameters[name].add_(value, alpha=scale)


def step_gradient(config: Method, update: Update) -> Gradient:
    """The gradient that the optimizer steps with."""
    return config.gradient(update) if config.is_procedure else combined(config, update)


def combined(config: Method, update: Update) -> Gradient:
    """The sum of the forget gradient and of the retain gradient, with the wrappers that the settings name."""
    forget = sharpness_aware(update, config.sam.rho) if config.sam else update.gradient("forget")
    retain = update.gradient("retain") if "retain" in config.needs() else {}
    if config.same_sign:
        forget = agreeing(forget, retain)
    return update.added(forget, retain)


def sharpness_aware(update: Update, rho: float) -> Gradient:
    """The forget gradient at θ + ρ g / ‖g‖, with the forget gradient g at θ: where the forget loss is higher close by.

    The norm is that of all trained parameters together. (Fan et al., https://arxiv.org/abs/2502.05374.)
    """
    gradient = update.gradient("forget")
    size = update.norm(gradient)
    if not size:
        return gradient
    with update.moved(gradient, rho / size):
        return update.gradient("forget")


def agreeing(forget: Gradient, retain: Gradient) -> Gradient:
    """The forget gradient where it has the sign of the retain gradient, else 0."""
    return {
        name: torch.where(value.sign() == retain[name].sign(), value, 0) if name in retain else torch.zeros_like(value)
        for name, value in forget.items()
    }
