"""The trainer of unlearning: it reads the texts of a batch one by one and hands them to the method's loss.

text of a batch -> the model's states, in one forward pass -> View -> method.loss(text, view, progress)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lethe.methods.method import Losses, Method, Progress
from lethe.models.activations import read
from lethe.objectives.losses import head_of
from lethe.training.hf_trainer import Text
from lethe.training.trainer import RunTrainer
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

    def changing(self) -> dict[str, float]:
        coefficients = self.config.coefficients(self.progress(self.state.global_step - 1))
        return {f"{name}_t": value for name, value in coefficients.items()}
