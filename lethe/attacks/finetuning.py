"""The attack by fine-tuning on text of the topic, with plain next-token training.

All weights are trained in float32, whatever type they were saved in. An attack on bfloat16 weights loses most of its updates
to rounding, which makes any model look robust. The share of updates that were lost is recorded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from lethe import distributed
from lethe.config import TamperConfig, to_dict
from lethe.evaluation.accuracy import refuse_unscorable
from lethe.models import refs
from lethe.models.activations import blocks, read
from lethe.models.adapters import add_adapters, merged
from lethe.models.architecture_check import refuse_untrainable
from lethe.models.flops import Flops
from lethe.models.loading import divided
from lethe.objectives.losses import head_of
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import cost, optimizers
from lethe.training.check import refuse_8bit
from lethe.training.saves import save_artifact
from lethe.training.trainer import RunTrainer, Sequences, keep_threads, weighted_means
from lethe.unlearning.view import View

if TYPE_CHECKING:
    from lethe.attacks.tampering import CheckedAttack

LORA, FULL = 6.0, 20.0
"""Bytes per weight that an attack takes, with a reserve: float32 weights; of all weights also gradients and AdamW's state."""
logger = logging.getLogger(__name__)


class TamperTrainer(RunTrainer):
    """A transformers Trainer for plain next-token training on the attacker's text."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.head = head_of(self.model)  # type: ignore[arg-type]
        self.flops = Flops(self.model)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, name: str, text: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the next token, as a mean over the update's tokens that have one before them."""
        lengths = text["mask"].sum(1).tolist()
        self.tally.add("model_forward", lengths, self.flops.forward(lengths, 0, True))
        self.tally.add("model_backward", lengths, self.flops.backward(lengths, 0, True, self.config.gradient_checkpointing))
        states = read(model, text["input_ids"], [], True, self.head)
        view = View(**text, states=states, tokens=self.tokens[name], documents=self.documents_in_update[name], head=self.head)
        loss = view.cross_entropy()
        return loss, {"attack_loss": loss}


def finetune(config: TamperConfig, checked: CheckedAttack, run: Run | None) -> Run:
    """Train on the attacker's text, and evaluate in between."""
    model: Any
    refuse_8bit(config, distributed.world())
    sharded = divided(
        lambda: refs.outline(checked.model), config.parallel, LORA if config.lora or config.adapter == "train" else FULL
    )
    model, tokenizer = refs.load(checked.model, "float32", sharded=sharded)
    refuse_unscorable(model, tokenizer, config.eval)
    if not isinstance(model, PeftModel):
        refuse_untrainable(model, config.model, config.max_length)
    model = _attacked(model, config, checked)
    run = run or Run.create("tamper", config.name, to_dict(config), config.out)
    with run.running():
        keep_threads(run)
        rows = Sequences(attack=corpora.tokenise(checked.documents, tokenizer, config.max_length))
        trainer = TamperTrainer(run, config, model.train(), tokenizer, rows, config.eval)
        trainer.may_miss_gradients = distributed.world() > 1 and trainer.misses_gradients()
        trainer.add_callback(LostUpdates(trainer))
        run.set_parents(**checked.parents(config))
        warnings = optimizers.untouched(model, config, list(range(len(blocks(model)))))
        for warning in warnings:
            logger.warning(warning)
        run.update(plan=checked.plan | optimizers.describe(model, config) | {"warnings": warnings})
        trainer.evaluation.at(0, model, "Evaluating before the attack")
        trainer.train_with_bar(f"Attacking {config.model}")
        lines = distributed.from_first(lambda: run.rows("metrics.jsonl"))
        if config.save_model:  # before anything that may fail
            model = merged(model) if isinstance(model, PeftModel) else model
            save_artifact(run, "model", model, tokenizer)
        run.try_to_record(
            losses=lambda: weighted_means(lines, {"attack_loss": "attack_tokens"}) | {"lost_updates": lost_share(lines)},
            plan=lambda: {"tokens": sum(line["attack_tokens"] for line in lines)},
        )
        run.update(evals=trainer.evaluation.at(trainer.state.global_step, model))
        run.try_to_record(cost=lambda: cost.summary(run, lines, checked.model, config.out))
    trainer.clear_saves()
    return run


def _attacked(model: Any, config: TamperConfig, checked: CheckedAttack) -> Any:
    """The model with the weights that the attack trains: all of them, new adapters, or the adapter that is there."""
    distributed.gathered_away(model)
    if checked.model.adapter and config.adapter == "train":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return model
    if checked.model.adapter:
        model = merged(model)
    if config.lora:
        return add_adapters(model, config.lora, list(range(len(blocks(model)))), config.seed)
    return model.requires_grad_(True)


class LostUpdates(TrainerCallback):
    """Counts, at the first few updates, the weights with a gradient and those of them that the update left as they were.

    The first update of a warm-up has a rate of 0 and is left out.
    """

    def __init__(self, trainer: RunTrainer, updates: int = 5):
        self.trainer, self.updates = trainer, updates
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if 0 <= state.global_step - (args.warmup_steps > 0) < self.updates:
            counted = [
                p for p in model.parameters() if p.grad is not None and (distributed.is_first() or distributed.is_sharded(p))
            ]
            moved = [(distributed.own(p.detach()), distributed.own(p.grad)) for p in counted]
            self._before = [(weight, weight.clone(), gradient != 0) for weight, gradient in moved]

    def on_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._before:
            lost = sum(int((moved & (weight == before)).sum()) for weight, before, moved in self._before)
            self.trainer.book({}, lost_updates=lost, weights_with_gradient=sum(int(m.sum()) for _, _, m in self._before))
        self._before = []


def lost_share(lines: list[dict[str, Any]]) -> float | None:
    """Lost updates over all, from metrics.jsonl; None when there was no update."""
    counts = [(line["lost_updates"], line["weights_with_gradient"]) for line in lines if "lost_updates" in line]
    total = sum(count for _, count in counts)
    return sum(lost for lost, _ in counts) / total if total else None
