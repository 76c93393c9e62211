"""The trainer that unlearning and attacks share: it records a run while transformers' Trainer trains.

Each optimizer update adds one line to metrics.jsonl, with the values of that update alone: every loss as a mean over the
update, the learning rate of every parameter group, the norm of the gradient, tokens per second. A loss that is not a number,
or far above the first losses, makes the run `diverged`. Evaluation runs in this process and adds a line to curve.jsonl. Saves
are Lethe's own (`saves.py`), so that a resumed run is bit-identical to one that was not interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from lethe import distributed
from lethe.config import EvalSettings, TrainingSettings
from lethe.evaluation.accuracy import NotNumbersError, evaluate_model, value_of
from lethe.progress import Advance, bar
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import saves
from lethe.training.budget import Budget
from lethe.training.cost import add_seconds, seconds, together
from lethe.training.hf_trainer import HfTrainer

logger = logging.getLogger(__name__)
FIRST_UPDATES = 20
"""Updates whose mean loss a later loss is compared with, to find a divergence."""
LAST_SHARE = 0.05
"""Share of the updates, from the last one back, that `weighted_means` is taken over."""


class Sequences(Dataset):
    """Training data: item i has one sequence of token ids from each text, with its number. The shorter text repeats."""

    def __init__(self, **texts: list[list[int]]):
        self.texts = texts

    @property
    def stages(self) -> list[int]:
        """The number of items of each stage of training."""
        return [len(self)]

    def __len__(self) -> int:
        return max(len(sequences) for sequences in self.texts.values())

    def __getitem__(self, i: int) -> dict[str, tuple[int, list[int]]]:
        return {name: (number, self.texts[name][number]) for name, number in self.numbers(i).items()}

    def own(self, text: str) -> int:
        """The number of sequences that are a text's own."""
        return len(self.texts[text])

    def side_by_side(self, i: int) -> dict[str, tuple[int, list[int]]]:
        """Sequence i of each text."""
        return {name: (i % len(sequences), sequences[i % len(sequences)]) for name, sequences in self.texts.items()}

    def numbers(self, i: int) -> dict[str, int]:
        """The number of the sequence of each text in item i."""
        return {name: i % len(sequences) for name, sequences in self.texts.items()}

    def tokens(self, i: int) -> int:
        """Number of tokens of item i, over all texts."""
        return sum(len(self.texts[name][number]) for name, number in self.numbers(i).items())


def collate(items: list[dict[str, tuple[int, list[int]]]], pad_id: int) -> dict[str, dict[str, Tensor]]:
    """A batch: for each text `input_ids`, `mask` and `index`, the sequences' numbers."""
    batch = {}
    for name in items[0]:
        ids, mask = corpora.pad([item[name][1] for item in items], pad_id)
        batch[name] = {"input_ids": ids, "mask": mask, "index": torch.tensor([item[name][0] for item in items])}
    return batch


class RunTrainer(HfTrainer):
    """A Trainer that writes one line to metrics.jsonl and one to batches.jsonl for each optimizer update."""

    def __init__(
        self,
        run: Run,
        config: TrainingSettings,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sequences: Sequences,
        evaluation: EvalSettings,
    ):
        super().__init__(run, config, model, sequences, partial(collate, pad_id=tokenizer.pad_token_id))
        self._losses: dict[str, float] = defaultdict(float)
        self._documents: dict[str, list[int]] = defaultdict(list)
        self._started = time.monotonic()
        self._first_losses: list[float] = []
        self.evaluation = Evaluation(run, tokenizer, evaluation, config.on_divergence == "stop")
        self.budget: Budget | None = None
        self.add_callback(self.evaluation)
        self.add_callback(_Saving(run, config.save_every))

    def limit(self, budget: Budget) -> None:
        """End the run once it exceeds this budget."""
        self.budget = budget
        self.add_callback(budget)

    def book(self, inputs: dict[str, dict[str, Tensor]], **losses: Tensor | float) -> None:
        """Add a batch's documents, and its part of the update's losses, to the log of this update."""
        for name, text in inputs.items():
            self._documents[name] += text["index"].tolist()
        for name, value in losses.items():
            self._losses[name] += value.item() if isinstance(value, Tensor) else value

    def changing(self) -> dict[str, float]:
        """Settings that change during the run, for the log: their values in the update that was made last."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        now = time.monotonic()
        counted = distributed.gather((dict(self._losses), dict(self._documents), self.tally.take()))
        parts = [each[:2] for each in counted]  # some processes may have had no document
        row: dict[str, Any] = {"step": self.state.global_step, "loss": logs["loss"]}
        row |= {name: sum(losses.get(name, 0.0) for losses, _ in parts) for losses, _ in parts for name in losses}
        row |= self.changing()
        row["lr"] = self.learning_rates
        row["grad_norm"] = logs.get("grad_norm")
        row |= {f"{name}_tokens": count for name, count in self.tokens.items()}
        row |= {f"{name}_documents": count for name, count in self.documents_in_update.items()}
        row |= together(each[2] for each in counted)
        row["tokens_per_second"] = round(sum(self.tokens.values()) / max(1e-9, now - self._started), 1)
        self._started = now
        self.run.append("metrics.jsonl", row)
        documents = {name: [index for _, part in parts for index in part.get(name, [])] for name in self.tokens}
        self.run.append("batches.jsonl", {"step": self.state.global_step} | documents)
        self._losses.clear()
        self._documents.clear()
        self._look_for_divergence(row["step"], row["loss"])
        super().log({k: v for k, v in row.items() if isinstance(v, float | int)}, start_time)

    def _look_for_divergence(self, step: int, loss: float) -> None:
        """Mark the run as diverged if the loss is not a number, or above `divergence_factor` · |mean of the first losses|."""
        if len(self._first_losses) < FIRST_UPDATES:
            self._first_losses.append(loss)
        mean = math.fsum(self._first_losses) / len(self._first_losses)
        facts = self.run.record.get("divergence")
        if facts and facts["step"] == step:  # found by this step's evaluation, which Trainer runs before it logs
            self.run.update(divergence={"first_loss": self._first_losses[0], "loss": loss})
        factor = self.config.divergence_factor
        high = factor > 0 and step > FIRST_UPDATES and loss > factor * abs(mean)
        if not high and math.isfinite(loss):
            return
        if not self.run.diverged:
            why = f"above {factor:g} times {mean:.4g}, the mean of the first updates" if high else "not a number"
            first = self._first_losses[0]
            said = f"at step {step} the loss was {loss:.4g}, {why} (first loss {first:.4g}); lower lr"
            self.run.update(divergence={"step": step, "first_loss": first, "loss": loss, "reason": said})
        if self.config.on_divergence == "stop":
            self.control.should_training_stop = True

    def train_with_bar(self, description: str) -> None:
        """Train from the newest save, or from the start. A progress bar shows the losses and the latest evaluation.

        If the run diverges and stops there, the model has the weights of the last planned save afterwards, or, without one, the
        weights from before the first update. With a budget, it always has the last weights within the budget.
        """
        planned = self.planned_steps()
        save, done = distributed.from_first(self._resume_point)
        if self.run.diverged and self.run.record["divergence"]["step"] > done:  # the updates that led to it are repeated
            self.run.update(divergence=None)
        self.run.keep_until(done)
        self._first_losses = distributed.from_first(
            lambda: [row["loss"] for row in self.run.rows("metrics.jsonl")[:FIRST_UPDATES]]
        )
        with bar(description, planned) as advance:
            advance(done)
            self.add_callback(_Bar(advance, self.evaluation))
            ended = self.budget is not None and save is not None and self.budget.resume(done)
            if save and (done >= planned or ended):
                saves.load_weights(save, self.model)  # type: ignore[arg-type]
                self.state.global_step = done
            else:
                self._train_timed(save)
        stopped = self.run.diverged and self.run.record["divergence"]["step"] > done and self.config.on_divergence == "stop"
        if self.budget is not None or stopped:
            self._fall_back(stopped)

    def _resume_point(self) -> tuple[Path | None, int]:
        """The newest complete save and its step. The records of later updates, which are repeated, are removed."""
        save = saves.newest(self.run.path / "saves")
        done = int(save.name.removeprefix("step-")) if save else 0
        reached = max((row["step"] for row in self.run.rows("metrics.jsonl")), default=0)
        if reached > done:
            again = f"resuming from update {done}, the newest complete save; {reached - done} updates are repeated"
            logger.warning(again if save else f"starting again: there is no complete save of the {reached} updates")
        return save, done

    def _train_timed(self, save: Path | None) -> None:
        """Train, and record the seconds it takes, without those of evaluations."""
        began, others = time.monotonic(), self._other_seconds()
        if save is None and self.budget is not None:
            self.budget.begin(self.model)  # type: ignore[arg-type]
        elif save is None and self.config.on_divergence == "stop":
            saves.begin(self.run.path / "saves", self.model)  # type: ignore[arg-type]
        try:
            with self.run.deferring():
                self.train(resume_from_checkpoint=str(save) if save else None)
        finally:
            add_seconds(self.run, "training", time.monotonic() - began - (self._other_seconds() - others))

    def _other_seconds(self) -> float:
        return seconds(self.run, "evaluation") + seconds(self.run, "budget")

    def _fall_back(self, diverged: bool) -> None:
        """Load the last weights within the budget. Without a budget: those of the last planned save before the divergence, or
        from before the first update.
        """
        model: Any = self.model
        if self.budget is not None:
            step = self.budget.restore(model)
        else:
            save, step = saves.before_divergence(self.run.path / "saves", self.config.save_every)
            saves.load_weights(save, model)
        self.state.global_step = step
        if diverged:
            self.run.update(divergence={"weights_of_step": step})

    def clear_saves(self) -> None:
        """Remove the saves of a run that is complete."""
        if self.run.record["status"] == "complete" and distributed.is_first():
            saves.clear(self.run.path / "saves")


def keep_threads(run: Run) -> None:
    """Use the number of threads that the run started with. With another number, results differ in their last bits."""
    before, given = run.record["environment"], torch.get_num_threads()
    recorded, processes = before.get("threads"), before.get("threads_of", distributed.world())
    if recorded is None or processes != distributed.world():
        run.update(environment={"threads": given, "threads_of": distributed.world()})
    elif recorded != given:
        logger.warning(f"using {recorded} threads, as the run did before, not {given}, so that the result is bit-identical")
        torch.set_num_threads(recorded)


class Evaluation(TrainerCallback):
    """Evaluates the model in this process every `every` steps, and whenever `at` is called. Writes curve.jsonl."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, settings: EvalSettings, stops: bool = True):
        self.run, self.tokenizer, self.settings, self.stops = run, tokenizer, settings, stops
        self.last: tuple[int, dict[str, Any]] | None = None

    def known(self, step: int) -> bool:
        """Whether the run has an evaluation at `step`, made by this process or before the run was resumed."""
        lines = distributed.from_first(lambda: self.run.rows("curve.jsonl"))
        evals = [line["evals"] for line in lines if line["step"] == step]
        if evals:
            self.last = (step, evals[-1])
        return bool(self.last and self.last[0] == step)

    def at(
        self,
        step: int,
        model: nn.Module,
        description: str | None = None,
        facts: dict[str, Any] | None = None,
        before: str = "",
    ) -> dict[str, Any]:
        """The results at `step`, evaluated if the run does not have them.

        `facts` are recorded beside the results. `before` is text before each question.
        """
        if not self.known(step):
            began = time.monotonic()
            try:
                evals = evaluate_model(
                    model,
                    self.tokenizer,
                    self.settings.tasks,
                    self.settings.limit,
                    description,
                    task_data=self.settings.task_data,
                    num_fewshot=self.settings.num_fewshot,
                    before=before,
                )
            except NotNumbersError as error:
                self._record_divergence(step, f"{error}; {'lower strengths' if facts else 'lower lr'}")
                evals, facts = {}, (facts or {}) | {"evals_missing": str(error)}
            self.run.append("curve.jsonl", {"step": step} | (facts or {}) | {"evals": evals})
            add_seconds(self.run, "evaluation", time.monotonic() - began)
            self.last = (step, evals)
        return self.last[1] if self.last else {}

    def _record_divergence(self, step: int, why: str) -> None:
        if self.run.diverged:
            return
        rows = distributed.from_first(lambda: self.run.rows("metrics.jsonl"))
        logged = rows and rows[-1]["step"] == step
        losses = {"first_loss": rows[0]["loss"], "loss": rows[-1]["loss"]} if logged else {}
        self.run.update(divergence={"step": step, "reason": f"step {step}: {why}"} | losses)

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.settings.every and state.global_step % self.settings.every == 0:
            self.at(state.global_step, model)
            control.should_training_stop |= self.stops and self.run.diverged

    def note(self) -> str:
        """The latest results in one line."""
        return "  ".join(f"{task} {value_of(result):.3f}" for task, result in self.last[1].items()) if self.last else ""


class _Saving(TrainerCallback):
    """Requests a save every `every` updates, at the last update, and before a run stops on request."""

    def __init__(self, run: Run, every: int):
        self.run, self.every = run, every

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        due = state.global_step >= state.max_steps or (self.every and state.global_step % self.every == 0)
        stopping = self.run.agree_to_stop()
        control.should_save = bool(due or stopping)
        control.should_training_stop |= stopping


class _Bar(TrainerCallback):
    def __init__(self, advance: Advance, evaluation: Evaluation):
        self.advance, self.evaluation = advance, evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            losses = [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith("_loss")]
            self.advance(1, "  ".join([*losses, self.evaluation.note()]))


def weighted_means(rows: list[dict[str, Any]], units: dict[str, str]) -> dict[str, float]:
    """Means of losses over the last 5 % of the updates, at least one, each update weighing as many units as it had.

    `units` names, for each loss, the number in a line that it is a mean over, such as {"cb_loss": "forget_tokens"}.
    """
    last = rows[-max(1, math.ceil(LAST_SHARE * len(rows))) :]
    means = {}
    for loss, unit in units.items():
        counts = [row[unit] for row in last]
        means[loss] = math.fsum(row[loss] * n for row, n in zip(last, counts, strict=True)) / sum(counts)
    return means
