"""The trainer of unlearning: it reads the texts of a batch one by one and hands them to the method's loss.

    text of a batch -> the model's states, in one forward pass -> View -> method.loss(text, view, progress)

A procedure, or a wrapper such as `sam`, gets the batches of a whole update instead, as an `Update`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lethe import distributed
from lethe.methods.method import Losses, Method, Progress
from lethe.models.activations import read
from lethe.objectives.losses import head_of
from lethe.training.hf_trainer import Filler, Text
from lethe.training.trainer import RunTrainer
from lethe.unlearning.update import Loss, Update, step_gradient
from lethe.unlearning.view import Teacher, View


class UnlearnTrainer(RunTrainer):
    """A transformers Trainer whose loss is the method's.

    `teachers`: the teacher of each text. `target_variance`: by layer, the variance of the forget text's target; None if no loss
    is divided by it.
    """

    config: Method

    def __init__(self, *args: Any, teachers: dict[str, Teacher], first_epoch_steps: int, steps: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teachers, self.first_epoch_steps, self.steps = teachers, first_epoch_steps, steps
        self.target_variance: dict[int, float] | None = None
        self.needs = self.config.needs()
        self.by_update = self.config.by_update
        self.head = head_of(self.model)  # type: ignore[arg-type]
        compared = [teacher for teacher in teachers.values() if teacher.need.logits] if self.head is not None else []
        heads = [teacher.model.head() for teacher in compared]
        if None in heads:  # with one unknown head, all compare full logits
            self.head, compared = None, []
        for teacher, head in zip(compared, heads, strict=False):
            teacher.head = head

    def progress(self, done: int) -> Progress:
        """How far the run is after so many updates."""
        return Progress(done, self.first_epoch_steps, self.steps)

    def loss(self, model: nn.Module, name: str, text: Text) -> tuple[Tensor, Losses]:
        return self.loss_at(self.progress(self.state.global_step), model, name, text)

    def loss_at(self, progress: Progress, model: nn.Module, name: str, text: Text) -> tuple[Tensor, Losses]:
        """The method's loss on one text of a batch, and its parts."""
        return self.config.loss(name, self.view(model, name, text), progress)

    def view(self, model: nn.Module, name: str, text: Text) -> View:
        """The model's pass over one text of a batch, and what the loss compares it with."""
        need = self.needs[name]
        return View(
            text["input_ids"],
            text["mask"],
            text["index"],
            states=read(model, text["input_ids"], list(need.layers), need.logits, self.head),
            head=self.head,
            teacher=self.teachers.get(name),
            variance=self.target_variance if name == "forget" else None,
            tokens=self.tokens[name],
            documents=self.documents_in_update[name],
        )

    def update(self, batches: list[Any]) -> Tensor:
        """Give the trained parameters the gradient of an update that is more than that of the summed loss."""
        model: Any = self.model
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        texts: set[str] = set()
        names: set[str] = set()
        total = torch.zeros((), device=distributed.device())

        def passes(text: str, loss: Loss | None) -> None:
            """Of each text and loss, only the first values are logged: later ones are those at weights that a step tries."""
            first, known = text not in texts, frozenset(names)
            for batch in batches:
                value, parts, one = self._backward(model, text, batch, loss)
                total.add_(value * first)
                if not isinstance(batch, Filler):
                    new = {name: part for name, part in parts.items() if name not in known}
                    self.book({text: one} if first else {}, **new)
                    names.update(parts)
            texts.add(text)
            if not distributed.sharded_modules(model):
                distributed.add_up([p.grad for p in parameters.values() if p.grad is not None])

        update = Update(parameters, passes, self.progress(self.state.global_step), self.state_of_method)
        for name, gradient in step_gradient(self.config, update).items():
            parameters[name].grad = gradient
        return total * distributed.world()

    def _backward(self, model: nn.Module, name: str, batch: Any, loss: Loss | None) -> tuple[Tensor, Losses, Text]:
        """Add the gradient of a loss of one text of a batch. FSDP2 divides by the number of processes, so it is multiplied."""
        text: Any = self._prepare_inputs(batch)[name]  # type: ignore[index]
        value, parts = loss(self.view(model, name, text)) if loss else self.loss(model, name, text)
        counts = not isinstance(batch, Filler)
        (value * counts * (distributed.world() if distributed.sharded_modules(model) else 1)).backward()
        return value.detach() * counts, parts, text

    def changing(self) -> dict[str, float]:
        coefficients = self.config.coefficients(self.progress(self.state.global_step - 1))
        return {f"{name}_t": value for name, value in coefficients.items()}
