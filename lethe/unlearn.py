"""Unlearning by checkpoint transfer: `UnlearnTrainer` and `unlearn`.

A batch holds as many forget as retain documents. On forget text the model's activations are pulled to where the
source's, mapped, are; on retain text its next-token distributions are held to the reference's:

    loss = remove_coef(t) · cb_loss + retain_coef(t) · retain loss

The whole loss is `UnlearnTrainer.compute_loss`. `unlearn` checks the recipe, loads or fits the maps, trains, saves an
adapter or a model, evaluates it and keeps all of it as one run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lethe import corpora, objectives, preflight, refs
from lethe.affine import WEIGHTS, AffineMap, fit_on_text, load_maps
from lethe.config import AffineConfig, LoraSettings, UnlearnConfig, to_dict
from lethe.ledger import Run, sha256
from lethe.residual import blocks, residuals
from lethe.teacher import Teacher
from lethe.training import Rows, RunTrainer, token_means, trainable


class UnlearnTrainer(RunTrainer):
    """A transformers Trainer with the objective of checkpoint transfer."""

    config: UnlearnConfig

    def __init__(self, *args: Any, teacher: Teacher, first_epoch_steps: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher, self.first_epoch_steps = teacher, first_epoch_steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """remove_coef(t) · cb_loss + retain_coef(t) · retain loss, for one batch of an update."""
        config = self.config
        remove, retain = preflight.coefficients(
            config.schedule, config.remove_coef, config.retain_coef, self.state.global_step, self.first_epoch_steps
        )
        forget = inputs["forget"]
        activations = residuals(model, forget["input_ids"], config.layers)
        targets = self.teacher.forget_targets(forget["input_ids"])
        cb_loss = objectives.cb_loss(activations, targets, forget["mask"], self.tokens["forget"])
        retain_loss = self.retain_loss(model, **inputs["retain"]) if config.retain_coef else torch.zeros_like(cb_loss)
        self.book(inputs, cb_loss=cb_loss, **{f"retain_{config.retain_loss}_loss": retain_loss})
        return remove * cb_loss + retain * retain_loss

    def retain_loss(self, model: nn.Module, input_ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """The retain term that the recipe names, as a token mean over the update."""
        tokens = self.tokens["retain"]
        if self.config.retain_loss == "mse":
            layers = self.config.layers
            activations = residuals(model, input_ids, layers)
            return objectives.retain_mse_loss(activations, self.teacher.reference_activations(input_ids), mask, tokens)
        logits = model(input_ids=input_ids, use_cache=False).logits
        if self.config.retain_loss == "ce":
            return objectives.retain_ce_loss(logits, input_ids, mask, tokens - self.documents_in_update["retain"])
        return objectives.retain_kl_loss(logits, self.teacher.reference_logits(input_ids), mask, tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            done = self.state.global_step - 1
            c = self.config
            remove, retain = preflight.coefficients(c.schedule, c.remove_coef, c.retain_coef, done, self.first_epoch_steps)
            self.book({}, remove_coef_t=remove, retain_coef_t=retain)
        super().log(logs, start_time)


def unlearn(config: UnlearnConfig) -> Run:
    """One unlearning run: check, maps, training, artifacts (`adapter` or `model`, `affine`), evaluation.

    Raises:
        LetheError: the recipe cannot work; raised before anything is written.
    """
    checked = preflight.check(config)
    run = Run.create("unlearn", config.name, to_dict(config), config.out)
    with run.running():
        model, tokenizer = refs.load(checked.model, config.dtype)
        reference, _ = refs.load(checked.model, config.dtype)
        source, _ = refs.load(checked.source, config.dtype)
        maps = _maps(run, checked, reference, source, tokenizer, config)
        rows = Rows(
            forget=corpora.tokenise(checked.forget, tokenizer, config.max_length),
            retain=corpora.tokenise(checked.retain, tokenizer, config.max_length),
        )
        student = add_adapters(model, config.lora, config.layers, config.seed) if config.lora else model
        trainer = UnlearnTrainer(
            run,
            config,
            student.train(),
            tokenizer,
            rows,
            config.eval,
            teacher=Teacher(source, reference, maps, config.layers),
            first_epoch_steps=checked.plan["first_epoch_steps"],
        )
        run.update(
            plan=checked.plan | {"trainable_parameters": trainable(student)},
            parents={
                "model": refs.record(checked.model),
                "source": refs.record(checked.source),
                "forget": corpora.record(config.forget, checked.forget),
                "retain": corpora.record(config.retain, checked.retain),
            },
        )
        trainer.train_with_bar(f"Unlearning {config.name}")
        _finish(run, config, student, tokenizer, trainer)
    return run


def add_adapters(model: PreTrainedModel, lora: LoraSettings, layers: list[int], seed: int) -> nn.Module:
    """LoRA on every linear layer of the blocks up to the last of `layers`, its first weights drawn from `seed`.

    Blocks after the last forget layer get none: the forget term has no gradient there.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=linear_layers(model, max(layers)),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def linear_layers(model: nn.Module, last: int) -> list[str]:
    """Full names of the linear layers in blocks 0 to `last`."""
    wanted = {id(m) for block in blocks(model)[: last + 1] for m in block.modules() if isinstance(m, nn.Linear | Conv1D)}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _maps(
    run: Run,
    checked: preflight.Checked,
    model: nn.Module,
    source: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: UnlearnConfig,
) -> AffineMap | None:
    if config.affine == "none":
        return None
    if checked.affine:
        maps = load_maps(checked.affine, config.layers)
        run.update(parents={"affine": {"ref": config.affine, "sha256": sha256(checked.affine / WEIGHTS)}})
        return maps.to(model.device)  # type: ignore[arg-type]
    settings = AffineConfig(
        config.model, config.source, config.retain, config.layers, max_length=config.max_length, dtype=config.dtype
    )
    maps = fit_on_text(model, source, tokenizer, corpora.read(config.retain), settings)
    maps.record |= {"model": refs.record(checked.model), "source": refs.record(checked.source)}
    maps.save(run.path / "affine")
    run.update(
        artifacts={"affine": {"path": "affine", "sha256": sha256(run.path / "affine" / WEIGHTS)}}, scores=maps.record["scores"]
    )
    return maps


def _finish(
    run: Run, config: UnlearnConfig, student: nn.Module, tokenizer: PreTrainedTokenizerBase, trainer: UnlearnTrainer
) -> None:
    """Losses, artifact and evaluation of a run that has been trained."""
    rows = run.rows("metrics.jsonl")
    run.update(
        losses=token_means(rows, {"cb_loss": "forget", f"retain_{config.retain_loss}_loss": "retain"}),
        plan={"tokens": sum(row["forget_tokens"] + row["retain_tokens"] for row in rows)},
    )
    kind = "adapter" if config.lora else "model"
    folder = run.path / kind
    student.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    run.update(artifacts={kind: {"path": kind, "sha256": sha256(*folder.glob("*.safetensors"))}})
    run.update(evals=trainer.evaluation.at(trainer.state.global_step, student, f"Evaluating {config.name}"))
