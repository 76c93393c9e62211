"""What unlearning and attacks share: a transformers Trainer that keeps a run's books.

Every optimizer update writes one line to metrics.jsonl, from the values of that update alone: the terms of the loss
as token means over the whole update, the rate of every parameter group as the optimizer that steps has it, the norm
of the gradient, tokens a second. A loss that is not a number, or far above the first ones, makes the run `diverged`.
Evaluation runs in process. Saves are Lethe's own (`saves.py`): what a resumed run does is bit for bit what it would have done.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from lethe.config import EvalSettings, TrainingSettings
from lethe.evaluation.accuracy import NotNumbersError, evaluate_model, value_of
from lethe.models.allocator import kept_memory
from lethe.progress import Advance, bar
from lethe.runs.machine import say_if_busy
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import saves
from lethe.training.merged_lora import Merged, one_product
from lethe.training.optimizers import make_optimizer
from lethe.training.repeats import once_a_token
from lethe.training.rotary import one_operation

logger = logging.getLogger(__name__)
FIRST_UPDATES = 20
LAST_SHARE = 0.05


class Rows(Dataset):
    """Documents for training: item i is a dict of one row of token ids from each text, the shorter text repeated."""

    def __init__(self, **texts: list[list[int]]):
        self.texts = texts

    def __len__(self) -> int:
        return max(len(rows) for rows in self.texts.values())

    def __getitem__(self, i: int) -> dict[str, tuple[int, list[int]]]:
        return {name: (i % len(rows), rows[i % len(rows)]) for name, rows in self.texts.items()}

    def tokens(self, i: int) -> int:
        """Number of tokens of item i, over all texts."""
        return sum(len(rows[i % len(rows)]) for rows in self.texts.values())


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


@contextlib.contextmanager
def without_walks(model: nn.Module) -> Iterator[None]:
    """Inside, `model.train()` and `model.zero_grad()`, which Trainer calls at every update, visit no more than has to change.

    On a small model with adapters, walking over all modules and frozen parameters takes as long as a block's pass.
    """
    walk, trained = model.train, [p for p in model.parameters() if p.requires_grad]
    walk()

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else walk(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad  # the instance's own: the class's are back


@contextlib.contextmanager
def quick_passes(model: nn.Module) -> Iterator[Merged]:
    """Inside, passes of `model` in training compute nothing twice; yields what to `renew` once an update."""
    with one_operation(model), one_product(model) as merged, once_a_token(model):
        yield merged


class RunTrainer(Trainer):
    """A Trainer whose log is the run's metrics.jsonl and batches.jsonl.

    A subclass defines `compute_loss` from losses that are means over the whole update a batch belongs to, and hands
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
        self._first_losses: list[float] = []
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.evaluation = Evaluation(run, tokenizer, evaluation, config.on_divergence == "stop")
        self.add_callback(self.evaluation)
        self.add_callback(_Saving(run, config.save_every))

    def book(self, inputs: dict[str, dict[str, Tensor]], **terms: Tensor | float) -> None:
        """Keep a batch's documents and its share of the update's terms for the log."""
        for name, text in inputs.items():
            self._documents[name] += text["index"].tolist()
        for name, value in terms.items():
            self._terms[name] += value.item() if isinstance(value, Tensor) else value

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name, its groups tagged by name."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config)  # type: ignore[arg-type]
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[no-untyped-def]
        """The batches of one update; counts its tokens first, so that every token weighs the same."""
        self.merged.renew()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = {name: sum(int(b[name]["mask"].sum()) for b in batches) for name in (batches[0] if batches else {})}
        self.documents_in_update = {name: sum(len(b[name]["mask"]) for b in batches) for name in self.tokens}
        self._rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        return batches, count

    def train(self, *args: Any, **kwargs: Any) -> Any:
        model: nn.Module = self.model  # type: ignore[assignment]
        with kept_memory(), without_walks(model), quick_passes(model) as self.merged:
            return super().train(*args, **kwargs)

    def _clip_grad_norm(self, model):  # type: ignore[no-untyped-def]
        if self.accelerator.distributed_type != DistributedType.NO:
            return super()._clip_grad_norm(model)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        return clip_grad_norm_(parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": self.state.global_step, "loss": logs["loss"]} | self._terms
        row["lr"] = self._rates
        row["grad_norm"] = logs.get("grad_norm")
        row |= {f"{name}_tokens": count for name, count in self.tokens.items()}
        row |= {f"{name}_documents": count for name, count in self.documents_in_update.items()}
        row["tokens_per_second"] = round(sum(self.tokens.values()) / max(1e-9, now - self._started), 1)
        self._started = now
        self.run.append("metrics.jsonl", row)
        self.run.append("batches.jsonl", {"step": self.state.global_step} | self._documents)
        self._terms.clear()
        self._documents.clear()
        self._look_for_divergence(row["step"], row["loss"])
        super().log({k: v for k, v in row.items() if isinstance(v, float | int)}, start_time)

    def _look_for_divergence(self, step: int, loss: float) -> None:
        """Mark the run as diverged when the loss is no number, or above `divergence_factor` times the first ones' mean."""
        if len(self._first_losses) < FIRST_UPDATES:
            self._first_losses.append(loss)
        mean = math.fsum(self._first_losses) / len(self._first_losses)
        facts = self.run.record.get("divergence")
        if facts and facts["step"] == step:  # found by the evaluation at this step, which comes before its losses
            self.run.update(divergence={"first_loss": self._first_losses[0], "loss": loss})
        factor = self.config.divergence_factor
        high = factor > 0 and step > FIRST_UPDATES and loss > factor * mean
        if not high and math.isfinite(loss):
            return
        if not self.run.diverged:
            why = f"above {factor:g} times {mean:.4g}, the mean of the first" if high else "not a number"
            first = self._first_losses[0]
            said = f"at step {step} the loss was {loss:.4g}, {why} (first loss {first:.4g}); lower lr"
            self.run.update(divergence={"step": step, "first_loss": first, "loss": loss, "reason": said})
        if self.config.on_divergence == "stop":
            self.control.should_training_stop = True

    def train_with_bar(self, description: str) -> None:
        """Train from the newest save, or from the start, with a bar that shows the losses and the latest evaluation.

        A run that diverged, and stops there, has the weights of its last save afterwards, or those before the first update.
        """
        planned = self.planned_steps()
        save = saves.newest(self.run.path / "saves")
        done = int(save.name.removeprefix("step-")) if save else 0
        reached = max((row["step"] for row in self.run.rows("metrics.jsonl")), default=0)
        if reached > done:
            again = f"going on from update {done}, the newest whole save; {reached - done} are done again"
            logger.warning(again if save else f"beginning anew: of {reached} updates there is no whole save")
        self.run.keep_until(done)
        if self.run.diverged and self.run.record["divergence"]["step"] > done:  # what led to it is done again
            self.run.update(divergence=None)
        self._first_losses = [row["loss"] for row in self.run.rows("metrics.jsonl")[:FIRST_UPDATES]]
        with bar(description, planned) as advance:
            advance(done)
            self.add_callback(_Bar(advance, self.evaluation))
            if save and done >= planned:
                saves.load_weights(save, self.model)  # type: ignore[arg-type]
                self.state.global_step = done
            else:
                began, evaluated = time.monotonic(), _seconds(self.run, "evaluation_seconds")
                if save is None and self.config.on_divergence == "stop":
                    saves.begin(self.run.path / "saves", self.model)  # type: ignore[arg-type]
                try:
                    with self.run.deferring():
                        self.train(resume_from_checkpoint=str(save) if save else None)
                finally:
                    evaluated = _seconds(self.run, "evaluation_seconds") - evaluated
                    _add_seconds(self.run, "training_seconds", time.monotonic() - began - evaluated)
        if self.run.diverged and self.run.record["divergence"]["step"] > done and self.config.on_divergence == "stop":
            self._fall_back()

    def _fall_back(self) -> None:
        """Put back the weights of the last planned save before the divergence, or those before the first update."""
        save, step = saves.before_divergence(self.run.path / "saves", self.config.save_every)
        saves.load_weights(save, self.model)  # type: ignore[arg-type]
        self.state.global_step = step
        self.run.update(divergence={"weights_of_step": step})

    def clear_saves(self) -> None:
        """Remove the saves of a run that is complete."""
        if self.run.status == "complete":
            saves.clear(self.run.path / "saves")

    def _save_checkpoint(self, model, trial):  # type: ignore[no-untyped-def]
        ending = self.run.diverged and self.config.on_divergence == "stop"
        if not ending and all(bool(p.isfinite().all()) for p in saves.trained(self.model).values()):  # fit to go back to
            folder = self.run.path / "saves"
            parts = (self.model, self.optimizer, self.lr_scheduler, self.state)
            saves.write(folder, self.state.global_step, *parts, every=self.config.save_every)
            self.run.beat()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):  # type: ignore[no-untyped-def]
        saves.load_weights(Path(resume_from_checkpoint), self.model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint):  # type: ignore[no-untyped-def]
        if checkpoint is not None:
            saves.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint):  # type: ignore[no-untyped-def]
        if checkpoint is not None:
            saves.load_random(Path(checkpoint))

    def planned_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


def keep_threads(run: Run) -> None:
    """Work with as many threads as the run began with: sums in another order would not be the same bits."""
    say_if_busy()
    recorded, given = run.record["environment"].get("threads"), torch.get_num_threads()
    if recorded is None:
        run.update(environment={"threads": given})
    elif recorded != given:
        logger.warning(f"working with {recorded} threads, as the run began, not {given}: other sums would not be the same bits")
        torch.set_num_threads(recorded)


class Evaluation(TrainerCallback):
    """Evaluates the model in process and writes curve.jsonl, at every `every` steps and when asked."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, settings: EvalSettings, stops: bool = True):
        self.run, self.tokenizer, self.settings, self.stops = run, tokenizer, settings, stops
        self.last: tuple[int, dict[str, Any]] | None = None

    def known(self, step: int) -> bool:
        """Whether there is an evaluation at `step`, of this process or of the one that a resumed run goes on from."""
        evals = [line["evals"] for line in self.run.rows("curve.jsonl") if line["step"] == step]
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
        """The evaluation at `step`, done once; `facts` are written beside it, `before` is text before each question."""
        if not self.known(step):
            began = time.monotonic()
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
                    before=before,
                )
            except NotNumbersError as error:
                advice = "lower strengths" if facts else "lower lr"
                if not self.run.diverged:
                    rows = self.run.rows("metrics.jsonl")
                    seen = rows and rows[-1]["step"] == step
                    losses = {"first_loss": rows[0]["loss"], "loss": rows[-1]["loss"]} if seen else {}
                    self.run.update(divergence={"step": step, "reason": f"step {step}: {error}; {advice}"} | losses)
                evals, facts = {}, (facts or {}) | {"evals_missing": str(error)}
            self.run.append("curve.jsonl", {"step": step} | (facts or {}) | {"evals": evals})
            _add_seconds(self.run, "evaluation_seconds", time.monotonic() - began)
            self.last = (step, evals)
        return self.last[1] if self.last else {}

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.settings.every and state.global_step % self.settings.every == 0:
            self.at(state.global_step, model)
            control.should_training_stop |= self.stops and self.run.diverged

    def note(self) -> str:
        """The latest evaluation in a few words."""
        return "  ".join(f"{task} {value_of(result):.3f}" for task, result in self.last[1].items()) if self.last else ""


def _seconds(run: Run, name: str) -> float:
    return float((run.record.get("environment") or {}).get(name) or 0.0)


def _add_seconds(run: Run, name: str, seconds: float) -> None:
    """Add to what a run has taken for one thing, before it was resumed too."""
    run.update(environment={name: round(_seconds(run, name) + seconds, 3)})


class _Saving(TrainerCallback):
    """Asks for a save at every `every` updates, at the last one, and before a run that was told to stop does so."""

    def __init__(self, run: Run, every: int):
        self.run, self.every = run, every

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        due = state.global_step >= state.max_steps or (self.every and state.global_step % self.every == 0)
        control.should_save = bool(due or self.run.stopping)
        control.should_training_stop |= bool(self.run.stopping)


class _Bar(TrainerCallback):
    def __init__(self, advance: Advance, evaluation: Evaluation):
        self.advance, self.evaluation = advance, evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            terms = [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith("_loss")]
            self.advance(1, "  ".join([*terms, self.evaluation.note()]))


def weighted_means(rows: list[dict[str, Any]], units: dict[str, str]) -> dict[str, float]:
    """Means of losses over the last 5 % of updates (at least one), each update weighing as many units as it had.

    `units` names, for each loss, the number in a line that it is a mean over, such as {"cb_loss": "forget_tokens"}.
    """
    last = rows[-max(1, math.ceil(LAST_SHARE * len(rows))) :]
    means = {}
    for loss, unit in units.items():
        counts = [row[unit] for row in last]
        means[loss] = math.fsum(row[loss] * n for row, n in zip(last, counts, strict=True)) / sum(counts)
    return means


def _arguments(run: Run, config: TrainingSettings) -> TrainingArguments:
    scheduler = config.lr_scheduler_type
    saving: dict[str, Any] = {"activation_checkpointing": True} if config.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(run.path),
        run_name=run.record["name"],
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,  # `constant` would ignore it
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several in sight Trainer would wrap the model and multiply the batch
    return arguments
