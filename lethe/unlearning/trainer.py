"""The trainer of unlearning: it reads the texts of a batch one by one and hands them to the method's loss.

    text of a batch -> the model's states, in one forward pass -> View -> method.loss(text, view, progress)

A procedure, or a wrapper such as `sam`, gets the batches of a whole update instead, as an `Update`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lethe import distributed
from lethe.methods.method import Losses, Method, Need, Progress
from lethe.models.activations import States, read
from lethe.models.flops import Flops
from lethe.objectives.losses import head_of
from lethe.progress import bar
from lethe.training import cost
from lethe.training.hf_trainer import Filler, Text
from lethe.training.trainer import RunTrainer
from lethe.unlearning.trained import by_block
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
        self.given: dict[str, Tensor] = {}
        self.before: dict[str, list[tuple[cost.Tokens, int]]] = {}
        self.flops = Flops(self.model)  # type: ignore[arg-type]
        self.head = head_of(self.model)  # type: ignore[arg-type]
        read_out = [teacher for teacher in teachers.values() if teacher.need.logits or teacher.need.ending]
        compared = read_out if self.head is not None else []
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
        return self.config.loss(name, self.view(model, name, text, self.config.need_at(name, progress)), progress)

    def view(self, model: nn.Module, name: str, text: Text, need: Need, given: Teacher | None = None) -> View:
        """The model's pass over one text of a batch, and what the loss compares it with.

        With a teacher that is `given`, only this teacher runs.
        """
        teacher = given or self.teachers.get(name)
        lengths = text["mask"].sum(1).tolist()
        if given is None:
            count, passes = self.flops, (lengths, need.depth, need.logits)
            self.tally.add("model_forward", lengths, count.forward(*passes))
            if torch.is_grad_enabled():
                self.tally.add("model_backward", lengths, count.backward(*passes, self.config.gradient_checkpointing))
        return View(
            text["input_ids"],
            text["mask"],
            text["index"],
            states=read(model, text["input_ids"], list(need.layers), need.logits, self.head) if given is None else States(),
            head=self.head,
            teacher=teacher,
            variance=self.target_variance if name == "forget" else None,
            tokens=self.tokens[name],
            documents=self.documents_in_update[name],
            given=self.given,
            teacher_runs=partial(self._count_teacher, teacher, lengths) if teacher else None,
            ending_runs=partial(self._count_ending, teacher, lengths) if teacher else None,
        )

    def _count_teacher(self, teacher: Teacher, lengths: list[int]) -> None:
        self.tally.add(f"{teacher.need.teacher}_forward", lengths, teacher.flops(lengths))

    def _count_ending(self, teacher: Teacher, lengths: list[int], layer: int | None) -> None:
        """Forward and, with a gradient, back: as many operations again."""
        passes = 2 if torch.is_grad_enabled() else 1
        self.tally.add(f"{teacher.need.teacher}_forward", lengths, passes * teacher.ending_flops(lengths, layer))

    def update(self, batches: list[Any]) -> Tensor:
        """Give the trained parameters the gradient of an update that is more than that of the summed loss."""
        model: Any = self.model
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = torch.zeros((), device=distributed.device())
        update = self._update(batches, parameters, self.progress(self.state.global_step), total)
        for name, gradient in step_gradient(self.config, update).items():
            parameters[name].grad = gradient
        return total * distributed.world()

    def updates_over(
        self, text: str, parameters: dict[str, nn.Parameter], description: str, need: Need | None = None
    ) -> Iterator[Update]:
        """Once over a text before training, in the order of its documents, in updates as large as those of training.

        The gradients are those of `parameters`, which may be others than the run trains. Nothing is logged. `description` is
        for the progress bar, and names the work in the run's cost. With `need`, views have a teacher of this need, and the
        model itself does not run.
        """
        dataset: Any = self.train_dataset
        usual, self.flops = self.flops, Flops(self.model)  # type: ignore[arg-type]
        self.tally.take()
        count = dataset.own(text)
        groups = list(self.order.updates(list(range(count))))
        with bar(description, count, "documents") as advance:
            for done, numbers in enumerate(groups):
                batches = [self.collated([dataset.side_by_side(i) for i in some]) for some in numbers]
                self.count(batches)
                teacher = None if need is None else self._teacher_of(need)
                yield self._update(batches, parameters, Progress(done, len(groups), len(groups)), None, teacher)
                advance(self.documents_in_update[text])
        self.flops = usual
        taken = self.before.setdefault(description, [])  # several passes over a text add up
        taken += distributed.gather(self.tally.take())
        counted = cost.together(taken)
        cost.book(self.run, description, counted["passes"], counted["flops"])

    def _teacher_of(self, need: Need) -> Teacher:
        """The model of one of the run's teachers, for passes of another need."""
        found = next(teacher for teacher in self.teachers.values() if teacher.need.teacher == need.teacher)
        return dataclasses.replace(found, need=need, maps=None, cache=None)

    def _update(
        self,
        batches: list[Any],
        parameters: dict[str, nn.Parameter],
        progress: Progress,
        total: Tensor | None,
        teacher: Teacher | None = None,
    ) -> Update:
        """Batches as an `Update`. The loss of each text is added to `total` and logged; None: nothing is logged.

        Later losses of a text are not: a method takes them at weights that it tries.
        """
        model: Any = self.model
        texts: set[str] = set()
        names: set[str] = set()
        divided = any(map(distributed.is_sharded, parameters.values()))
        factor = distributed.world() if divided else 1  # FSDP2 divides the gradients of shards

        def passes(text: str, loss: Loss | None) -> Losses:
            first, known = total is not None and text not in texts, frozenset(names)
            sums: Losses = {}
            for batch in batches:
                one: Any = self._prepare_inputs(batch)[text]  # type: ignore[index]
                self.tally.counts = not isinstance(batch, Filler)
                if loss is None:
                    value, parts = self.loss_at(progress, model, text, one)
                else:
                    value, parts = loss(self.view(model, text, one, self.config.need_at(text, progress), teacher))
                counts = self.tally.counts
                if torch.is_grad_enabled():
                    (value * counts * factor).backward()
                else:
                    distributed.gathered_away(model)  # FSDP2 does it in a backward pass
                if first:
                    total.add_(value.detach() * counts)  # type: ignore[union-attr]
                if counts and total is not None:
                    self.book({text: one} if first else {}, **{name: p for name, p in parts.items() if name not in known})
                    names.update(parts)
                elif total is None:
                    sums |= {name: sums.get(name, 0) + part.detach() * counts for name, part in parts.items()}
            texts.add(text)
            if not divided:
                distributed.add_up([p.grad for p in parameters.values() if p.grad is not None])
            distributed.add_up(list(sums.values()))
            return sums

        blocks = by_block(self.model, parameters)  # type: ignore[arg-type]
        return Update(parameters, passes, progress, self.state_of_method, self.given, blocks)

    def changing(self) -> dict[str, float]:
        coefficients = self.config.coefficients(self.progress(self.state.global_step - 1))
        stage = {"stage": self.order.stage_of(self.state.global_step - 1)} if self.config.layered else {}
        return {f"{name}_t": value for name, value in coefficients.items()} | stage
