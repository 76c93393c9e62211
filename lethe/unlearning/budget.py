"""What `budget` reads during a run, on held-out text and on the retain task.

kl         KL(reference ‖ model), a mean over the tokens of text that is not trained on; the reference runs once
restored   cross-entropy of the model / cross-entropy of the reference − 1, on the same text
retain     accuracy of the model before unlearning − accuracy now, on the same questions
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe import distributed
from lethe.config import BudgetSettings
from lethe.evaluation.accuracy import NotNumbersError, evaluate_model, evaluation_mode
from lethe.evaluation.requests import load_tasks
from lethe.evaluation.scoring import Scorer
from lethe.methods.method import HELD_OUT, Method
from lethe.models.activations import read
from lethe.results.regimes import number, retain_task
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import cost
from lethe.training.budget import Budget
from lethe.unlearning.trainer import UnlearnTrainer
from lethe.unlearning.view import View

SHARE = 0.04
"""Share of the run's operations that the checks take at most, where the recipe leaves `every` open."""

FEW = 5
"""A plan warns of fewer checks."""


@dataclass
class Checks:
    """Measures the values that a recipe names. `sequences`: held-out text, without any if no value reads it."""

    run: Run
    config: Method
    budget: BudgetSettings
    trainer: UnlearnTrainer
    tokenizer: PreTrainedTokenizerBase
    sequences: list[list[int]]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The values of the model as it is, by the names of the limits."""
        found = self.on_text(model) if self.budget.reads_text else {}
        if self.budget.retain is not None:
            found["retain"] = self.run.record["budget"]["retain_before"] - self.accuracy(model)
        return found

    @torch.no_grad()
    def on_text(self, model: nn.Module) -> dict[str, float]:
        """`kl` and `restored` on the held-out text, as far as the recipe names them. The processes share the batches."""
        teacher, size = self.trainer.teachers[HELD_OUT], self.config.per_device_train_batch_size
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        tokens, device, head = sum(map(len, self.sequences)), distributed.device(), self.trainer.head
        pad_id: Any = self.tokenizer.pad_token_id

        def part(rows: list[int]) -> tuple[float, float, float]:
            ids, mask = (t.to(device) for t in corpora.pad([self.sequences[i] for i in rows], pad_id))
            states, index = read(model, ids, [], True, head), torch.tensor(rows, device=device)
            view = View(ids, mask, index, states, tokens, len(order), head, teacher)
            kl = float(view.kl()) if self.budget.kl is not None else 0.0
            if self.budget.restored is None:
                return kl, 0.0, 0.0
            return kl, float(-view.log_likelihood().sum()), float(-view.teacher_log_likelihood().sum())

        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with evaluation_mode(model), distributed.uneven(model, lambda: part(batches[0])):
            parts = [part(rows) for rows in distributed.share(batches)]
        kl, ours, theirs = distributed.total([math.fsum(column) for column in zip(*parts, strict=True)] or [0.0] * 3)
        found = {"kl": kl} if self.budget.kl is not None else {}
        return found | ({"restored": ours / theirs - 1} if self.budget.restored is not None else {})

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on the first `questions` of the retain task. Not a number if the model's answers are none."""
        given, task = self.config.eval, str(retain_task(self.config.eval.tasks))
        try:
            found = evaluate_model(
                model, self.tokenizer, [task], self.budget.questions, task_data=given.task_data, num_fewshot=given.num_fewshot
            )
        except NotNumbersError:
            return math.nan
        return number(found[task])

    def limit(self) -> None:
        """End the run once it exceeds its budget. Before training: records the accuracy of the model before unlearning."""
        if self.budget.retain is not None and "retain_before" not in (self.run.record.get("budget") or {}):
            model: Any = self.trainer.model
            self.run.update(budget={"retain_before": self.accuracy(model)})
        every = self.run.record["plan"]["budget"]["every"]
        self.trainer.limit(Budget(self.run, self.budget.limits, self.budget.restored, self, every))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document and each question of a check. The answers of a question share its context."""
        lengths = list(map(len, self.sequences))
        if self.budget.retain is not None:
            given, task = self.config.eval, str(retain_task(self.config.eval.tasks))
            with evaluation_mode(self.trainer.model):  # type: ignore[arg-type]
                scorer = Scorer(self.trainer.model, self.tokenizer)  # type: ignore[arg-type]
                for leaf in load_tasks([task], given.task_data, given.num_fewshot)[task]:
                    for requests in leaf.encoded(scorer, self.budget.questions):
                        lengths.append(max(len(c) for c, _ in requests) + sum(len(answer) for _, answer in requests))
        return lengths

    def plan(self, updates: int, epochs: float) -> dict[str, Any]:
        """When the model is checked, how often, and the estimated share of the run's operations that this takes."""
        check = self.trainer.flops.forward(self.lengths, 0, True)
        update = update_flops(self.trainer, updates, epochs)
        every = self.budget.every or math.ceil(check / (SHARE * update))
        checks = math.ceil(updates / every)
        share = checks * check / (checks * check + updates * update)
        restored = {"restored": self.budget.restored} if self.budget.restored else {}
        return {**self.budget.limits, **restored, "every": every, "checks": checks, "share_of_flops": float(f"{share:.2g}")}

    def book(self) -> None:
        """Record what the checks cost."""
        count = len(self.run.record["budget"]["values"])
        passed = count * sum(self.lengths)
        cost.book(self.run, "budget", {"model_forward": passed}, count * self.trainer.flops.forward(self.lengths, 0, True))


def checks_of(plan: dict[str, Any]) -> int:
    """How often a run is checked, by its plan."""
    return plan["budget"]["checks"] if "budget" in plan else 0


def warnings(plan: dict[str, Any]) -> list[str]:
    """A warning for the plan if there are few checks."""
    if not 0 < checks_of(plan) < FEW:
        return []
    return [
        f"budget: the run is checked {checks_of(plan)} times, so it may end far within its budget; lower budget.every, or "
        "budget.documents and budget.questions"
    ]


def update_flops(trainer: UnlearnTrainer, updates: int, epochs: float) -> float:
    """The operations of an update, without those of live teachers, a mean over the run."""
    data: Any = trainer.train_dataset
    total = 0
    for name, need in trainer.needs.items():
        lengths = [len(data[i][name][1]) for i in range(len(data))]
        passes = (lengths, need.depth, need.logits)
        total += trainer.flops.forward(*passes) + trainer.flops.backward(*passes)
    return total * epochs / updates
