"""transformers' Trainer, with what Lethe changes about it: every override of one of Trainer's methods is in this file.

Trainer runs the loop. In each update it calls, in this order: `get_batch_samples`, `training_step` for each batch, `log`, and,
when a callback asks for it, `_save_checkpoint`. An update has the same documents whatever the number of processes. Methods with
an underscore are private to transformers, so pyproject.toml names the versions that Lethe is tested with.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from lethe import distributed
from lethe.config import TrainingSettings
from lethe.runs.run import Run
from lethe.training import saves
from lethe.training.check import planned_batch
from lethe.training.cost import Tally
from lethe.training.merged_lora import fast_passes
from lethe.training.optimizers import make_optimizer

Text = dict[str, Tensor]
"""One text of a batch: `input_ids`, `mask`, and `index`, the numbers of its sequences."""
APART = 7919
"""Distance between the seeds of two processes' dropout."""


class HfTrainer(Trainer):
    """A Trainer with Lethe's optimizers, saves and token counts. `RunTrainer` adds a run's records.

    A subclass defines `loss`, from losses that are means over the whole update, and `book`, which logs them.

    `tokens` holds the number of tokens by text, without padding, over the whole current update, of all processes.
    `documents_in_update` holds the number of documents. `learning_rates` holds the rate of each parameter group that the update
    steps with.
    """

    by_update = False
    """Whether `update` computes the gradient of a whole update, in place of one pass after the other over each batch."""
    may_miss_gradients = False
    """Whether some trained parameters may get no gradient from the last text of a batch. Several processes have to know."""

    def __init__(self, run: Run, config: TrainingSettings, model: nn.Module, data: Any, collate: Any):
        self.run, self.config = run, config
        self.order = Order(data.stages, config, planned_batch(run))
        self.tokens: dict[str, int] = {}
        self.documents_in_update: dict[str, int] = {}
        self.batches: list[Any] = []
        self.state_of_method: dict[str, dict[str, Tensor]] = {}
        self.learning_rates: dict[str, float] = {}
        self.tally = Tally()
        distributed.start()
        super().__init__(model, _arguments(run, config, self.order), data_collator=collate, train_dataset=data)
        self.is_distributed_loading_by_transformers = False  # Lethe averages gradients itself
        self.loss_is_scaled_for_ga = True  # losses are divided by the tokens of the update, not of the batch
        self.remove_callback(ProgressCallback)  # Lethe has its own bar
        self.remove_callback(PrinterCallback)

    def misses_gradients(self) -> bool:
        """Whether a trained parameter gets no gradient from the last text of the first item."""
        batch: Any = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))  # type: ignore[arg-type,index]
        self.tokens = {name: int(text["mask"].sum()) for name, text in batch.items()}
        self.documents_in_update = dict.fromkeys(batch, 1)
        model: Any = self.model
        with torch.random.fork_rng():
            self.loss(model, *list(batch.items())[-1])[0].backward()
        missing = any(p.requires_grad and p.grad is None for p in model.parameters())
        model.zero_grad()
        return missing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name. Trainer knows no Muon and would leave its parameter groups unnamed."""
        if self.optimizer is None:
            distributed.gathered_away(self.model)  # type: ignore[arg-type]
            self.optimizer = make_optimizer(self.model, self.config)  # type: ignore[arg-type]
        return self.optimizer

    def loss(self, model: nn.Module, name: str, text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one text of a batch and its parts by name: this batch's part of means over the update."""
        raise NotImplementedError

    def update(self, batches: list[Any]) -> Tensor:
        """Give the trained parameters the gradient of a whole update. Returns what `training_step` returns."""
        raise NotImplementedError

    def book(self, inputs: dict[str, Text], **losses: Tensor | float) -> None:
        """Add a batch's documents, and its part of the update's losses, to the log of this update."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Passes forward and back over one text after the other, so that one text's activations are in memory at a time.

        Returns the sum of the losses, times the number of processes: gradients are averaged, while losses are parts of a sum.
        A batch of no documents, of a process that has fewer than others, is a pass whose loss does not count.
        """
        model.train()
        if self.by_update:
            last = inputs is self.batches[-1]
            return self.update(self.batches) if last else torch.zeros((), device=distributed.device())
        batch: dict[str, Any] = self._prepare_inputs(inputs)
        total: Any = 0.0
        factor = 0 if isinstance(inputs, Filler) else distributed.world()
        self.tally.counts = bool(factor)
        for name, text in batch.items():
            waits = name != list(batch)[-1]  # gradients are averaged once, after the last text
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                loss, parts = model(name, text) if model is not self.model else self.loss(model, name, text)
                loss = loss * factor
                loss.backward()
            total = total + loss.detach()
            if factor:
                self.book({name: text}, **parts)
            del loss, parts
        return total

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches. Trainer's own loader would repeat documents, so that all processes have equally many."""
        pin = self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, batch_sampler=self.order, collate_fn=self.collated, pin_memory=pin)  # type: ignore[arg-type]

    def collated(self, items: list[Any]) -> Any:
        """A batch of these documents of the training data; without any, one that does not count."""
        return self.data_collator(items) if items else Filler(self.data_collator([self.train_dataset[0]]))  # type: ignore[index]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The model, inside a module that averages gradients if there are several processes."""
        return distributed.averaged(self.model, self.loss, self.may_miss_gradients, self.by_update) or model  # type: ignore[arg-type]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the whole gradient. With sharded parameters, Trainer's is not a number yet."""
        return distributed.whole(super()._get_grad_norm(model, grad_norm))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Text]], Any]:
        """The batches of one update. Counts their tokens first, because the loss is a mean over all tokens of the update."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.batches = batches
        self.count(batches)
        # The scheduler changes the rates before Trainer logs the update.
        self.learning_rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        return batches, count

    def count(self, batches: list[Any]) -> None:
        """Count the tokens and documents of an update, of all processes."""
        names, real = list(batches[0] if batches else {}), [b for b in batches if not isinstance(b, Filler)]
        tokens = [sum(int(b[name]["mask"].sum()) for b in real) for name in names]
        counts = list(map(int, distributed.total(tokens + [sum(len(b[name]["mask"]) for b in real) for name in names])))
        self.tokens = dict(zip(names, counts, strict=False))
        self.documents_in_update = dict(zip(names, counts[len(names) :], strict=True))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with fast passes. They end with the training, so that saving and evaluating afterwards use PEFT's code."""
        if distributed.world() > 1:  # processes must not draw the same dropout
            seeds = [self.config.seed + APART * rank for rank in range(distributed.world())]
            torch.manual_seed(seeds[distributed.rank()])
            self.run.update(environment={"dropout_seeds": seeds})
        self.tally.take()  # of batches that were tried
        with fast_passes(self.model, self.config.fast):  # type: ignore[arg-type]
            return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write Lethe's own save: complete or absent, and checked by hash. A diverged run must not overwrite a good save."""
        ending = self.run.diverged and self.config.on_divergence == "stop"
        distributed.gathered_away(self.model)  # type: ignore[arg-type]
        broken = [not distributed.own(p).isfinite().all() for p in saves.trained(self.model).values()]  # type: ignore[arg-type]
        if not ending and not distributed.total([any(broken)])[0]:
            parts = (self.model, self.optimizer, self.lr_scheduler, self.state)
            saves.write(self.run.path / "saves", self.state.global_step, *parts, self.state_of_method, self.config.save_every)  # type: ignore[arg-type]
            self.run.beat()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a Lethe save by name."""
        saves.load_weights(Path(resume_from_checkpoint), self.model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state of a Lethe save, whose files have other names."""
        if checkpoint is not None:
            saves.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)
            self.state_of_method = saves.load_state(Path(checkpoint), self.model)  # type: ignore[arg-type]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state of a Lethe save, so that the resumed run is bit-identical."""
        if checkpoint is not None:
            saves.load_random(Path(checkpoint))

    def planned_steps(self) -> int:
        """Optimizer updates of the whole run, as Trainer counts them."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


class Filler(dict):
    """A batch whose loss does not count."""


class Order(Sampler):
    """Which documents are in which batch of this process: lists of indices, for one epoch.

    Every epoch has another order, from the seed. An update takes the next `effective_batch` documents of it. The processes
    share these evenly, and split their part into batches of `per_device_train_batch_size`. All have equally many batches, so a
    process with fewer documents ends with empty ones. The last update of an epoch may have fewer documents.

    `stages`: the number of items of each stage. Several stages, each with its `epochs` passes, are one epoch for Trainer. It
    counts batches by the update, so the last update of each pass then has as many batches as the others, some of them empty.

    `effective_batch`: that of the run that is resumed, which may have had another number of processes.
    """

    def __init__(self, stages: list[int], config: TrainingSettings, effective_batch: int | None = None):
        self.stages, self.seed, self.size = stages, config.seed, config.per_device_train_batch_size
        self.epochs = config.epochs if len(stages) == 1 else 1.0
        """Epochs of Trainer."""
        given = self.size * config.gradient_accumulation_steps * distributed.world()
        self.effective_batch = effective_batch or given
        self.batches_in_update = self._batches_of(self.effective_batch)
        passes = [math.ceil(stage / self.effective_batch) for stage in stages]
        self.updates_in_stage = passes if len(stages) == 1 else [math.ceil(config.epochs * updates) for updates in passes]
        """Updates of each stage in one epoch of Trainer."""
        self.set_epoch(0)

    @property
    def batch_sampler(self) -> Order:
        """Where Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _batches_of(self, documents: int) -> int:
        """Batches of each process in an update of so many documents."""
        return -(-documents // (self.size * distributed.world()))

    def __len__(self) -> int:
        lacking = 0
        if len(self.stages) == 1 and (rest := self.stages[0] % self.effective_batch):
            lacking = self.batches_in_update - self._batches_of(rest)
        return sum(self.updates_in_stage) * self.batches_in_update - lacking

    def stage_of(self, done: int) -> int:
        """The stage, from 1, of the update after `done` updates."""
        return 1 + sum(done >= end for end in itertools.accumulate(self.updates_in_stage[:-1]))

    def __iter__(self) -> Iterator[list[int]]:
        first, seed = 0, self.seed + self.epoch
        for items, updates in zip(self.stages, self.updates_in_stage, strict=True):
            for done in range(0, updates, math.ceil(items / self.effective_batch)):
                order = (first + torch.randperm(items, generator=torch.Generator().manual_seed(seed))).tolist()
                for update in itertools.islice(self.updates(order), updates - done):
                    yield from update
                    if len(self.stages) > 1:
                        yield from [[]] * (self.batches_in_update - len(update))
                seed += 1
            first += items

    def updates(self, documents: list[int]) -> Iterator[list[list[int]]]:
        """Documents in their order, divided into updates: for each, the batches of this process."""
        for start in range(0, len(documents), self.effective_batch):
            update = documents[start : start + self.effective_batch]
            own = list(distributed.share(update))
            yield [own[at : at + self.size] for at in range(0, self._batches_of(len(update)) * self.size, self.size)]


def _arguments(run: Run, config: TrainingSettings, order: Order) -> TrainingArguments:
    scheduler = config.lr_scheduler_type
    arguments = TrainingArguments(
        output_dir=str(run.path),
        run_name=run.record["name"],
        num_train_epochs=order.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=order.batches_in_update,
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
        ddp_backend=distributed.backend(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several GPUs Trainer would wrap the model and multiply the batch
    return arguments
