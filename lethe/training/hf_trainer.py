"""transformers' Trainer, with what Lethe changes about it: every override of one of Trainer's methods is in this file.

Trainer runs the loop. In each update it calls, in this order: `get_batch_samples`, `compute_loss` for each batch, `log`, and,
when a callback asks for it, `_save_checkpoint`. Methods with an underscore are private to transformers, so pyproject.toml names
the versions that Lethe is tested with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from lethe.config import TrainingSettings
from lethe.runs.run import Run
from lethe.training import saves
from lethe.training.merged_lora import fast_passes
from lethe.training.optimizers import make_optimizer


class HfTrainer(Trainer):
    """A Trainer with Lethe's optimizers, saves and token counts. `RunTrainer` adds a run's records.

    `tokens` holds the number of tokens by text, without padding, over the whole current update. `documents_in_update` holds the
    number of documents. `learning_rates` holds the rate of each parameter group that the update steps with.
    """

    def __init__(self, run: Run, config: TrainingSettings, model: nn.Module, data: Dataset, collate: Any):
        self.run, self.config = run, config
        self.tokens: dict[str, int] = {}
        self.documents_in_update: dict[str, int] = {}
        self.learning_rates: dict[str, float] = {}
        super().__init__(model, _arguments(run, config), data_collator=collate, train_dataset=data)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the update, not of the batch
        self.remove_callback(ProgressCallback)  # Lethe has its own bar
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name. Trainer knows no Muon and would leave its parameter groups unnamed."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config)  # type: ignore[arg-type]
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, dict[str, Tensor]]], Any]:
        """The batches of one update. Counts their tokens first, because the loss is a mean over all tokens of the update."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = {name: sum(int(b[name]["mask"].sum()) for b in batches) for name in (batches[0] if batches else {})}
        self.documents_in_update = {name: sum(len(b[name]["mask"]) for b in batches) for name in self.tokens}
        # The scheduler changes the rates before Trainer logs the update.
        self.learning_rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        return batches, count

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with fast passes. They end with the training, so that saving and evaluating afterwards use PEFT's code."""
        with fast_passes(self.model, self.config.fast):  # type: ignore[arg-type]
            return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write Lethe's own save: complete or absent, and checked by hash. A diverged run must not overwrite a good save."""
        ending = self.run.diverged and self.config.on_divergence == "stop"
        if not ending and all(bool(p.isfinite().all()) for p in saves.trained(self.model).values()):  # type: ignore[arg-type]
            parts = (self.model, self.optimizer, self.lr_scheduler, self.state)
            saves.write(self.run.path / "saves", self.state.global_step, *parts, every=self.config.save_every)  # type: ignore[arg-type]
            self.run.beat()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a Lethe save by name."""
        saves.load_weights(Path(resume_from_checkpoint), self.model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state of a Lethe save, whose files have other names."""
        if checkpoint is not None:
            saves.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state of a Lethe save, so that the resumed run is bit-identical."""
        if checkpoint is not None:
            saves.load_random(Path(checkpoint))

    def planned_steps(self) -> int:
        """Optimizer updates of the whole run, as Trainer counts them."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


def _arguments(run: Run, config: TrainingSettings) -> TrainingArguments:
    scheduler = config.lr_scheduler_type
    arguments = TrainingArguments(
        output_dir=str(run.path),
        run_name=run.record["name"],
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,  # `constant` has no warm-up
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=config.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several GPUs Trainer would wrap the model and multiply the batch
    return arguments
