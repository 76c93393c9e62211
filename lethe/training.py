"""What unlearning and attacks share: a transformers Trainer that keeps a run's books.

Every optimizer update writes one line to metrics.jsonl, from the values of that update alone: the terms of the loss
as token means over the whole update, the rate of every parameter group as the optimizer that steps has it, the norm
of the gradient, tokens a second. A loss that is not a number ends the run as `diverged`. Evaluation runs in process.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from lethe import corpora
from lethe.config import EvalSettings, TrainingSettings
from lethe.evaluate import NotNumbersError, evaluate_model, value_of
from lethe.ledger import Run
from lethe.optimizers import make_optimizer
from lethe.progress import Advance, bar

LAST_SHARE = 0.05


class Rows(Dataset):
    """Documents for training: item i is a dict of one row of token ids from each text, the shorter text repeated."""

    def __init__(self, **texts: list[list[int]]):
        self.texts = texts

    def __len__(self) -> int:
        return max(len(rows) for rows in self.texts.values())

    def __getitem__(self, i: int) -> dict[str, tuple[int, list[int]]]:
        return {name: (i % len(rows), rows[i % len(rows)]) for name, rows in self.texts.items()}


class Collate:
    """A batch: for each text `input_ids`, `mask` and `index` (which documents they are)."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: list[dict[str, tuple[int, list[int]]]]) -> dict[str, dict[str, Tensor]]:
        batch = {}
        for name in items[0]:
            ids, mask = corpora.pad([item[name][1] for item in items], self.pad_id)
            batch[name] = {"input_ids": ids, "mask": mask, "index": torch.tensor([item[name][0] for item in items])}
        return batch


class RunTrainer(Trainer):
    """A Trainer whose log is the run's metrics.jsonl and batches.jsonl.

    A subclass defines `compute_loss` from terms that are token means over the whole update a batch belongs to, and hands
    the terms to `book`. `self.tokens` has that update's non-padding tokens by text, `self.documents_in_update` its documents.
    """

    def __init__(
        self,
        run: Run,
        config: TrainingSettings,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        evaluation: EvalSettings,
    ):
        self.run, self.config = run, config
        super().__init__(model, _arguments(run, config), data_collator=Collate(tokenizer.pad_token_id), train_dataset=rows)  # type: ignore[arg-type]
        self.loss_is_scaled_for_ga = True
        self.tokens: dict[str, int] = {}
        self.documents_in_update: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._terms: dict[str, float] = defaultdict(float)
        self._documents: dict[str, list[int]] = defaultdict(list)
        self._started = time.monotonic()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.evaluation = Evaluation(run, tokenizer, evaluation)
        self.add_callback(self.evaluation)

    def book(self, inputs: dict[str, dict[str, Tensor]], **terms: Tensor | float) -> None:
        """Keep a batch's documents and its share of the update's terms for the log."""
        for name, text in inputs.items():
            self._documents[name] += text["index"].tolist()
        for name, value in terms.items():
            self._terms[name] += float(value)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name, its groups tagged by name."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config)  # type: ignore[arg-type]
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[no-untyped-def]
        """The batches of one update; counts its tokens first, so that every token weighs the same."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = {name: sum(int(b[name]["mask"].sum()) for b in batches) for name in (batches[0] if batches else {})}
        self.documents_in_update = {name: sum(len(b[name]["mask"]) for b in batches) for name in self.tokens}
        self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        return batches, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": self.state.global_step, "loss": logs["loss"]} | self._terms
        row["lr"] = self._rates
        row["grad_norm"] = logs.get("grad_norm")
        row |= {f"{name}_tokens": count for name, count in self.tokens.items()}
        row["tokens_per_second"] = round(sum(self.tokens.values()) / max(1e-9, now - self._started), 1)
        self._started = now
        self.run.append("metrics.jsonl", row)
        self.run.append("batches.jsonl", {"step": self.state.global_step} | self._documents)
        self._terms.clear()
        self._documents.clear()
        if not math.isfinite(row["loss"]):
            self.run.update(status="diverged", reason=f"the loss was {row['loss']} at step {row['step']}; lower lr")
            self.control.should_training_stop = True
        super().log({k: v for k, v in row.items() if isinstance(v, float | int)}, start_time)

    def train_with_bar(self, description: str) -> None:
        """Train, with a progress bar that shows the terms of the loss and the latest evaluation."""
        with bar(description, self.planned_steps()) as advance:
            self.add_callback(_Bar(advance, self.evaluation))
            self.train()

    def planned_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


class Evaluation(TrainerCallback):
    """Evaluates the model in process and writes curve.jsonl, at every `every` steps and when asked."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, settings: EvalSettings):
        self.run, self.tokenizer, self.settings = run, tokenizer, settings
        self.last: tuple[int, dict[str, Any]] | None = None

    def at(self, step: int, model: nn.Module, description: str | None = None) -> dict[str, Any]:
        """The evaluation at `step`; done once a step."""
        if self.last is None or self.last[0] != step:
            try:
                asked = self.settings
                evals = evaluate_model(
                    model,
                    self.tokenizer,
                    asked.tasks,
                    asked.limit,
                    description,
                    task_data=asked.task_data,
                    num_fewshot=asked.num_fewshot,
                )
            except NotNumbersError as error:
                self.run.update(status="diverged", reason=f"step {step}: {error}; lower lr")
                evals = {}
            self.run.append("curve.jsonl", {"step": step, "evals": evals})
            self.last = (step, evals)
        return self.last[1]

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.settings.every and state.global_step % self.settings.every == 0:
            self.at(state.global_step, model)
            control.should_training_stop |= self.run.record["status"] == "diverged"

    def note(self) -> str:
        """The latest evaluation in a few words."""
        return "  ".join(f"{task} {value_of(result):.3f}" for task, result in self.last[1].items()) if self.last else ""


class _Bar(TrainerCallback):
    def __init__(self, advance: Advance, evaluation: Evaluation):
        self.advance, self.evaluation = advance, evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            terms = [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith("_loss")]
            self.advance(1, "  ".join([*terms, self.evaluation.note()]))


def token_means(rows: list[dict[str, Any]], weights: dict[str, str]) -> dict[str, float]:
    """Means over the last 5 % of updates (at least one), each update weighing as many tokens as it had.

    `weights` names the terms and the text each is a mean over, such as {"cb_loss": "forget"}.
    """
    last = rows[-max(1, math.ceil(LAST_SHARE * len(rows))) :]
    means = {}
    for term, text in weights.items():
        tokens = [row[f"{text}_tokens"] for row in last]
        means[term] = math.fsum(row[term] * n for row, n in zip(last, tokens, strict=True)) / sum(tokens)
    return means


def _arguments(run: Run, config: TrainingSettings) -> TrainingArguments:
    saving: dict[str, Any] = {"activation_checkpointing": True} if config.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(run.path / "saves"),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=config.report_to or "none",
        disable_tqdm=True,
        **saving,
        remove_unused_columns=False,
        label_names=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
