"""Unlearning by checkpoint transfer: `UnlearnTrainer` and `unlearn`.

A batch holds as many forget as retain documents. On forget text the model is pulled to where the source, which never knew
the topic, is; on retain text its next-token distributions are held to the reference's:

    loss = remove_coef(t) · forget term + retain_coef(t) · retain term

The whole loss is `UnlearnTrainer.compute_loss`. `unlearn` checks the recipe, loads or fits the maps, rewinds if asked,
trains, saves an adapter or a model, evaluates it and keeps all of it as one run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lethe import corpora, objectives, preflight, refs, survey
from lethe.affine import WEIGHTS, AffineMap, fit_on_text, load_maps
from lethe.config import AffineConfig, LoraSettings, UnlearnConfig, to_dict
from lethe.errors import LetheError
from lethe.evaluate import load_tasks
from lethe.ledger import Run, sha256
from lethe.residual import blocks, capture, residuals
from lethe.teacher import Teacher
from lethe.training import Rows, RunTrainer, token_means

logger = logging.getLogger(__name__)


class UnlearnTrainer(RunTrainer):
    """A transformers Trainer with the objective of checkpoint transfer."""

    config: UnlearnConfig

    def __init__(self, *args: Any, teacher: Teacher, first_epoch_steps: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher, self.first_epoch_steps = teacher, first_epoch_steps

    def coefficients(self, steps_done: int) -> tuple[float, float]:
        """remove_coef(t) and retain_coef(t) after so many updates."""
        c = self.config
        return preflight.coefficients(c.schedule, c.remove_coef, c.retain_coef, steps_done, self.first_epoch_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """remove_coef(t) · forget term + retain_coef(t) · retain term, for one batch of an update."""
        remove, retain = self.coefficients(self.state.global_step)
        terms = self.forget_terms(model, **inputs["forget"])
        forget_loss = terms.get("cb_loss", 0) + self.kl_coef * terms.get("forget_kl_loss", 0)
        retain_loss = self.retain_term(model, **inputs["retain"]) if self.config.retain_coef else 0.0
        self.book(inputs, **terms, **{f"retain_{self.config.retain_loss}_loss": retain_loss})
        return remove * forget_loss + retain * retain_loss

    @property
    def kl_coef(self) -> float:
        """Weight of forget_kl_loss within the forget term."""
        return self.config.forget_kl_coef if self.config.forget_loss == "both" else 1.0

    def forget_terms(self, model: nn.Module, input_ids: Tensor, mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The forget terms that the recipe names, as token means over the update; `transfer` does not run the output head."""
        kind, layers, tokens = self.config.forget_loss, self.config.layers, self.tokens["forget"]
        terms = {}
        if kind == "transfer":
            activations = residuals(model, input_ids, layers)
        else:
            with capture(model, layers) as activations:
                logits = model(input_ids=input_ids, use_cache=False).logits
            terms["forget_kl_loss"] = objectives.forget_kl_loss(logits, self.teacher.source_logits(input_ids), mask, tokens)
        if kind != "distill":
            terms["cb_loss"] = objectives.cb_loss(activations, self.teacher.forget_targets(input_ids), mask, tokens)
        return terms

    def retain_term(self, model: nn.Module, input_ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """The retain term that the recipe names, as a token mean over the update."""
        tokens = self.tokens["retain"]
        if self.config.retain_loss == "mse":
            activations = residuals(model, input_ids, self.config.layers)
            return objectives.retain_mse_loss(activations, self.teacher.reference_activations(input_ids), mask, tokens)
        logits = model(input_ids=input_ids, use_cache=False).logits
        if self.config.retain_loss == "ce":
            return objectives.retain_ce_loss(logits, input_ids, mask, tokens - self.documents_in_update["retain"])
        return objectives.retain_kl_loss(logits, self.teacher.reference_logits(input_ids), mask, tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            remove, retain = self.coefficients(self.state.global_step - 1)
            self.book({}, remove_coef_t=remove, retain_coef_t=retain)
        super().log(logs, start_time)

    def unreached(self) -> list[str]:
        """Trainable parameters that no term of the loss gives a gradient, found by a probe batch that changes nothing."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))  # type: ignore[index]
        self.tokens = {name: int(text["mask"].sum()) for name, text in batch.items()}  # type: ignore[union-attr,index]
        self.documents_in_update = dict.fromkeys(self.tokens, 1)
        with torch.random.fork_rng():
            loss: Any = torch.zeros((), device=self.args.device)
            if self.config.remove_coef:
                loss = loss + sum(self.forget_terms(self.model, **batch["forget"]).values())  # type: ignore[arg-type]
            if self.config.retain_coef:
                loss = loss + self.retain_term(self.model, **batch["retain"])  # type: ignore[arg-type]
            loss.backward()
        names = survey.without_gradient(self.model)  # type: ignore[arg-type]
        self.model.zero_grad()  # type: ignore[union-attr]
        return names


def unlearn(config: UnlearnConfig) -> Run:
    """One unlearning run: check, maps, training, artifacts (`adapter` or `model`; `base`, `affine`), evaluation.

    Raises:
        LetheError: the recipe cannot work; raised before anything is written.
    """
    checked = preflight.check(config)
    load_tasks(config.eval.tasks, config.eval.task_data, config.eval.num_fewshot)
    run = Run.create("unlearn", config.name, to_dict(config), config.out)
    with run.running():
        trainer, tokenizer = _prepare(run, config, checked)
        trainer.train_with_bar(f"Unlearning {config.name}")
        _finish(run, config, trainer, tokenizer)
    return run


def inspect(config: UnlearnConfig) -> dict[str, Any]:
    """The plan of a run as it would be recorded, from the loaded models, without training; nothing is kept.

    Raises:
        LetheError: the recipe cannot work.
    """
    import tempfile

    checked = preflight.check(config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create("check", config.name, to_dict(config), folder)
        with run.running():
            _prepare(run, config, checked, maps=False)
        return run.record["plan"]


def _prepare(
    run: Run, config: UnlearnConfig, checked: preflight.Checked, maps: bool = True
) -> tuple[UnlearnTrainer, PreTrainedTokenizerBase]:
    """Models, maps and text of a run, made into a trainer; the plan and the parents are recorded."""
    model, tokenizer = refs.load(checked.model, config.dtype)
    teacher_dtype = config.teacher_dtype or config.dtype
    reference, _ = refs.load(checked.model, teacher_dtype)
    source, _ = refs.load(checked.source, teacher_dtype)
    run.update(
        parents={
            "model": refs.record(checked.model),
            "source": refs.record(checked.source),
            "forget": corpora.record(config.forget, checked.forget),
            "retain": corpora.record(config.retain, checked.retain),
        }
    )
    fitted = _maps(run, checked, reference, source, tokenizer, config) if maps else None
    teacher = Teacher(source, reference, fitted, config.layers)
    student = _student(run, config, model, source, tokenizer)
    rows = Rows(
        forget=corpora.rows_of(checked.forget, tokenizer, config.max_length, config.packing),
        retain=corpora.rows_of(checked.retain, tokenizer, config.max_length, config.packing),
    )
    plan = preflight.plan(config, len(rows)) | {"documents": {"forget": len(checked.forget), "retain": len(checked.retain)}}
    trainer = UnlearnTrainer(
        run, config, student.train(), tokenizer, rows, config.eval, teacher=teacher, first_epoch_steps=plan["first_epoch_steps"]
    )
    longest = max(len(row) for part in rows.texts.values() for row in part)
    plan |= survey.describe(student, config) | {"no_gradient": trainer.unreached()}
    plan["memory"] = survey.memory(student, teacher, config, longest)
    plan["dtypes"] = {"model": config.dtype, "source": teacher_dtype, "reference": teacher_dtype}
    plan["layers"] = {str(n): f"output of block {n} ({type(block).__name__})" for n, block in _layer_modules(student, config)}
    plan["coefficients"] = preflight.coefficients_over(config, plan)
    run.update(plan=plan)
    _warn(plan)
    return trainer, tokenizer


def _layer_modules(student: nn.Module, config: UnlearnConfig) -> list[tuple[int, nn.Module]]:
    found = blocks(student)
    return [(layer, found[layer]) for layer in config.layers]


def _warn(plan: dict[str, Any]) -> None:
    """Say what may not be meant, and refuse what cannot fit into memory.

    Raises:
        LetheError: the estimated memory is more than there is.
    """
    if unreached := plan["no_gradient"]:
        logger.warning(
            "%d trainable tensors get no gradient from any term (%s, …): they will not be trained", len(unreached), unreached[0]
        )
    free, needed = survey.available_memory(), sum(plan["memory"].values())
    if needed - plan["memory"]["weights"] - plan["memory"]["teachers"] > free:
        raise LetheError(
            f"memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free beside the models; "
            f"lower per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing"
        )


def _student(
    run: Run, config: UnlearnConfig, model: PreTrainedModel, source: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """The model that is trained: rewound towards the source if asked, with adapters if asked."""
    if config.rewind:
        rewind(model, source, config.rewind)
    if config.lora is None:
        return model.requires_grad_(True)
    if config.rewind and not config.merge:
        _save(run, "base", model, tokenizer)
    return add_adapters(model, config.lora, config.layers, config.seed)


@torch.no_grad()
def rewind(model: nn.Module, source: nn.Module, share: float) -> None:
    """θ ← (1 − share) θ_model + share θ_source, weight by weight, in place."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.lerp_(theirs[name].to(parameter), share)


def add_adapters(model: PreTrainedModel, lora: LoraSettings, layers: list[int], seed: int) -> nn.Module:
    """LoRA on the linear layers of the blocks up to the last of `layers`, its first weights drawn from `seed`.

    Blocks after the last forget layer get none: the forget term has no gradient there.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=linear_layers(model, max(layers), lora.targets),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def linear_layers(model: nn.Module, last: int, targets: str = "all") -> list[str]:
    """Full names of the linear layers in blocks 0 to `last`: those of attention, of the MLP (all others), or all.

    Attention modules are known by transformers' naming of their classes.

    Raises:
        LetheError: there is none of the kind.
    """
    linear: dict[int, str] = {}
    for block in blocks(model)[: last + 1]:
        attention = {id(m) for a in block.modules() if type(a).__name__.endswith("Attention") for m in a.modules()}
        kinds = {
            id(m): "attention" if id(m) in attention else "mlp" for m in block.modules() if isinstance(m, nn.Linear | Conv1D)
        }
        linear |= kinds
    names = [name for name, m in model.named_modules() if id(m) in linear and targets in {"all", linear[id(m)]}]
    if not names:
        raise LetheError(f"lora.targets: {type(model).__name__} has no linear layer of kind {targets}; use all")
    return names


def _maps(
    run: Run,
    checked: preflight.Checked,
    model: nn.Module,
    source: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: UnlearnConfig,
) -> AffineMap | None:
    if config.affine == "none" or config.forget_loss == "distill":
        return None
    if checked.affine:
        maps = load_maps(checked.affine, config.layers)
        run.update(parents={"affine": {"ref": config.affine, "sha256": sha256(checked.affine / WEIGHTS)}})
        return maps.to(model.device)  # type: ignore[arg-type]
    documents = corpora.select(config.retain, 0, "front")
    settings = AffineConfig(
        config.model,
        config.source,
        layers=config.layers,
        max_length=config.max_length,
        dtype=config.teacher_dtype or config.dtype,
    )
    maps = fit_on_text(model, source, tokenizer, documents, settings, config.retain)
    maps.record |= {"model": refs.record(checked.model), "source": refs.record(checked.source)}
    maps.save(run.path / "affine")
    run.update(
        artifacts={"affine": {"path": "affine", "sha256": sha256(run.path / "affine" / WEIGHTS)}}, scores=maps.record["scores"]
    )
    return maps


def _finish(run: Run, config: UnlearnConfig, trainer: UnlearnTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Losses, artifact, records and evaluation of a run that has been trained."""
    student: Any = trainer.model
    rows, texts = run.rows("metrics.jsonl"), trainer.train_dataset.texts  # type: ignore[union-attr]
    terms = {"cb_loss": "forget", "forget_kl_loss": "forget", f"retain_{config.retain_loss}_loss": "retain"}
    run.update(
        losses=token_means(rows, {term: text for term, text in terms.items() if term in rows[-1]}),
        plan={"tokens": sum(row["forget_tokens"] + row["retain_tokens"] for row in rows)},
        agreement=survey.agreement(student, trainer.teacher, texts["forget"], texts["retain"], tokenizer.pad_token_id),
        update_by_layer=survey.update_by_layer(student, trainer.teacher.reference),
    )
    if config.lora and config.merge:
        student = student.merge_and_unload()
    _save(run, "adapter" if config.lora and not config.merge else "model", student, tokenizer)
    run.update(evals=trainer.evaluation.at(trainer.state.global_step, student, f"Evaluating {config.name}"))


def _save(run: Run, kind: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = run.path / kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run.update(artifacts={kind: {"path": kind, "sha256": sha256(*folder.glob("*.safetensors"))}})
