"""Unlearning by checkpoint transfer: `UnlearnTrainer` and `unlearn`.

A batch holds as many forget as retain documents. On forget text the model is pulled to where the source, which never knew
the topic, is; on retain text its next-token distributions are held to the reference's:

    loss = remove_coef(t) · forget term + retain_coef(t) · retain term

The whole loss is `UnlearnTrainer.compute_loss`. `unlearn` checks the recipe, loads or fits the maps, rewinds if asked,
trains, saves an adapter or a model, evaluates it and keeps all of it as one run.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.config import CheckpointsConfig, UnlearnConfig, to_dict
from lethe.errors import LetheError, full_disk
from lethe.evaluation.accuracy import load_tasks, refuse_unscorable
from lethe.evaluation.checkpoint_sweep import checkpoints
from lethe.models import refs
from lethe.models.activations import States, blocks, read, rows_can_leave
from lethe.models.adapters import add_adapters
from lethe.models.architecture_check import refuse_unreadable, refuse_untrainable
from lethe.objectives import terms as losses
from lethe.objectives.blocked import blocked_kl_loss, head_of, next_token_loss
from lethe.results import regimes
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import parameters
from lethe.training.check import plan as training_plan
from lethe.training.optimizers import needs_masters, newton_schulz_dtype
from lethe.training.saves import save_artifact
from lethe.training.trainer import Rows, RunTrainer, keep_threads, token_means
from lethe.unlearning import changes, maps, memory, teacher_cache
from lethe.unlearning.check import Checked, check, coefficients, coefficients_over
from lethe.unlearning.probe import document_bytes, probe, warning
from lethe.unlearning.teacher import Teacher, needs

logger = logging.getLogger(__name__)
TEACHER = {"forget": "source", "retain": "model"}
"""By text, the part of a run's record that names its teacher's weights."""


class UnlearnTrainer(RunTrainer):
    """A transformers Trainer with the objective of checkpoint transfer."""

    config: UnlearnConfig

    def __init__(self, *args: Any, teacher: Teacher, first_epoch_steps: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher, self.first_epoch_steps = teacher, first_epoch_steps
        self.variance: dict[int, float] | None = None
        heads = [head_of(model) for model in (self.model, teacher.source, teacher.reference)]  # type: ignore[arg-type]
        known = None not in heads
        self.head = heads[0] if known else None
        teacher.heads = {"forget": heads[1], "retain": heads[2]} if known else {}
        c = self.config
        both = c.remove_coef != 0 and c.retain_coef != 0 and c.forget_loss == "transfer"
        # In smaller types the model's states would be rounded otherwise than the reference's, which sees retain rows alone.
        exact = next(self.model.parameters()).dtype == torch.float32  # type: ignore[union-attr]
        longest = max(len(row) for rows in self.train_dataset.texts.values() for row in rows)  # type: ignore[union-attr]
        self.joint = both and exact and rows_can_leave(self.model, c.layers, self.head, longest)  # type: ignore[arg-type]

    def coefficients(self, steps_done: int) -> tuple[float, float]:
        """remove_coef(t) and retain_coef(t) after so many updates."""
        c = self.config
        return coefficients(c.schedule, c.remove_coef, c.retain_coef, steps_done, self.first_epoch_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """remove_coef(t) · forget term + retain_coef(t) · retain term, for one batch of an update."""
        remove, retain = self.coefficients(self.state.global_step)
        terms = self.terms(model, inputs)
        self.book(inputs, **terms)
        weights = {"cb_loss": remove, "forget_kl_loss": remove * self.kl_coef}
        return sum(weights.get(name, retain) * term for name, term in terms.items())

    @property
    def kl_coef(self) -> float:
        """Weight of forget_kl_loss within the forget term."""
        return self.config.forget_kl_coef if self.config.forget_loss == "both" else 1.0

    def terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The terms of the loss that the recipe names, as token means over the update."""
        states = self.states(model, batch)
        terms: dict[str, Tensor] = {}
        if "forget" in batch:
            terms |= self.forget_terms(states["forget"], **batch["forget"])
        if "retain" in batch:
            terms |= self.retain_terms(states["retain"], **batch["retain"])
        return terms

    def states(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, States]:
        """The model's states on each text, in one pass where that is possible and not more work than two.

        In one pass, forget rows leave the batch after the last layer whose activations are compared. With `transfer`, the
        output head never runs on forget text either way.
        """
        c = self.config
        layers = {"forget": c.layers * (c.forget_loss != "distill"), "retain": c.layers * (c.retain_loss == "mse")}
        output = {"forget": c.forget_loss != "transfer", "retain": c.retain_loss != "mse"}
        ids = {name: text["input_ids"] for name, text in batch.items()}
        if not (self.joint and len(batch) == 2 and not_more_work(ids["forget"], ids["retain"])):
            return {name: read(model, ids[name], layers[name], output[name], self.head) for name in batch}
        (count, width), other = ids["forget"].shape, ids["retain"].shape[1]
        padded = [pad(rows, (0, max(width, other) - rows.shape[1])) for rows in (ids["forget"], ids["retain"])]
        found = read(model, torch.cat(padded), c.layers, output["retain"], self.head, leave=count)
        kept = {layer: found.activations[layer][count:, :other] for layer in layers["retain"]}
        ending = None if found.output is None else found.output[:, :other]
        gone = {layer: found.activations[layer][:count, :width] for layer in layers["forget"]}
        return {"forget": States(gone), "retain": States(kept, ending)}

    def forget_terms(self, states: States, input_ids: Tensor, mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The forget terms that the recipe names, from the model's states."""
        aim, tokens = self.teacher.states("forget", input_ids, index), self.tokens["forget"]
        terms = {}
        if states.output is not None:
            terms["forget_kl_loss"] = self.kl(states, aim, "forget", mask)
        if states.activations:
            terms["cb_loss"] = losses.cb_loss(states.activations, aim.activations, mask, tokens, self.variance)
        return terms

    def retain_terms(self, states: States, input_ids: Tensor, mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The retain term that the recipe names, from the model's states."""
        kind, tokens = self.config.retain_loss, self.tokens["retain"]
        if kind == "ce":
            loss = next_token_loss(states.output, self.head, input_ids, mask, tokens - self.documents_in_update["retain"])  # type: ignore[arg-type]
        elif kind == "mse":
            aim = self.teacher.states("retain", input_ids, index)
            loss = losses.retain_mse_loss(states.activations, aim.activations, mask, tokens)
        else:
            loss = self.kl(states, self.teacher.states("retain", input_ids, index), "retain", mask)
        return {f"retain_{kind}_loss": loss}

    def kl(self, states: States, aim: States, text: str, mask: Tensor) -> Tensor:
        """KL(teacher ‖ model) on a text, as a token mean over the update; without full logits where the heads are known."""
        ours, theirs, head, tokens = states.output, aim.output, self.teacher.heads.get(text), self.tokens[text]
        if self.head is None or head is None:
            return losses.retain_kl_loss(ours, theirs, mask, tokens)  # type: ignore[arg-type]
        return blocked_kl_loss(ours, self.head, theirs, head, mask, tokens)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            remove, retain = self.coefficients(self.state.global_step - 1)
            self.book({}, remove_coef_t=remove, retain_coef_t=retain)
        super().log(logs, start_time)


def not_more_work(forget: Tensor, retain: Tensor) -> bool:
    """Whether rows of ids, padded to a common width, are at most a tenth more tokens than padded by text."""
    width = max(forget.shape[1], retain.shape[1])
    return (len(forget) + len(retain)) * width <= 1.1 * (forget.numel() + retain.numel())


def unlearn(config: UnlearnConfig, run: Run | None = None) -> Run:
    """One unlearning run: check, maps, training, artifacts (`adapter` or `model`; `base`, `affine`), evaluation.

    `run` is an interrupted run of this configuration to go on with.

    Raises:
        LetheError: the recipe cannot work; nothing is left behind.
    """
    checked = check(config)
    load_tasks(config.eval.tasks, config.eval.task_data, config.eval.num_fewshot, config.eval.limit)
    if config.finds_source:
        config = with_source(config)
        checked = check(config)
    resumed = run is not None
    run = run or Run.create("unlearn", config.name, to_dict(config), config.out)
    trainer, tokenizer = _prepared(run, config, checked, resumed)
    with run.running():
        keep_threads(run)
        for warning in run.record["plan"]["warnings"]:
            logger.warning(warning)
        if config.fits_maps:
            trainer.teacher.maps = maps.fitted(run, config, checked, trainer.teacher, tokenizer)
            checked.mapped.clear()
        if config.cb_scale == "relative":
            rows: Any = trainer.train_dataset
            trainer.variance = maps.variances(run, trainer.teacher, rows.texts["forget"], tokenizer.pad_token_id)
        _cache_teachers(run, config, trainer)
        trainer.train_with_bar(f"Unlearning {config.name}")
        _finish(run, config, trainer, tokenizer, checked)
    trainer.clear_saves()
    return run


def with_source(config: UnlearnConfig) -> UnlearnConfig:
    """The recipe with its source found: the latest checkpoint that is at chance on the forget task among those evaluated.

    Raises:
        LetheError: there are no checkpoints, none is ignorant, or no task tells.
    """
    task = regimes.forget_task(config.eval.tasks) or config.eval.tasks[0]
    data = {name: file for name, file in config.eval.task_data.items() if name == task}
    where = config.source.partition(":")[2] or None
    sweep = checkpoints(
        CheckpointsConfig(
            config.model, where, [task], task_data=data, num_fewshot=config.eval.num_fewshot, dtype=config.dtype, out=config.out
        )
    )
    if sweep.record["latest_ignorant"] is None:
        raise LetheError(f"source: no checkpoint is at chance on {task}; see {sweep.path}, or name a source")
    return dataclasses.replace(config, source=sweep.record["latest_ignorant"])


def inspect(config: UnlearnConfig) -> dict[str, Any]:
    """The plan of a run as it would be recorded, from the loaded models, without training; nothing is kept.

    Raises:
        LetheError: the recipe cannot work.
    """
    checked = check(config)
    load_tasks(config.eval.tasks, config.eval.task_data, config.eval.num_fewshot, config.eval.limit)
    if config.finds_source:
        config = with_source(config)
        checked = check(config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create("check", config.name, to_dict(config), folder)
        _prepared(run, config, checked)
        return run.record["plan"]


def _prepared(
    run: Run, config: UnlearnConfig, checked: Checked, resumed: bool = False
) -> tuple[UnlearnTrainer, PreTrainedTokenizerBase]:
    """The trainer of a run, its plan and parents recorded; a new run that is refused is removed.

    Raises:
        LetheError: what only the loaded models show cannot work, or differs from what a resumed run began with.
    """
    try:
        run.hold()
        return _prepare(run, config, checked)
    except Exception as error:
        run.lock.release()
        if not resumed and (isinstance(error, LetheError) or full_disk(error)):
            run.discard()
        raise


def _prepare(run: Run, config: UnlearnConfig, checked: Checked) -> tuple[UnlearnTrainer, PreTrainedTokenizerBase]:
    libraries = memory.taken()
    model, tokenizer = refs.load(checked.model, config.dtype)
    refuse_unscorable(model, tokenizer, config.eval)
    teacher_dtype = config.teacher_dtype or config.dtype
    reference, _ = refs.load(checked.model, teacher_dtype)
    source, _ = refs.load(checked.source, teacher_dtype)
    if changes.same_weights(source, reference):
        raise LetheError(
            f"source: '{config.source}' holds the very weights of '{config.model}'; the source never learned the topic"
        )
    run.set_parents(
        model=refs.record(checked.model),
        source=refs.record(checked.source),
        forget=corpora.record(config.forget, checked.forget),
        retain=corpora.record(config.retain, checked.retain),
    )
    teacher = Teacher(source, reference, None, needs(config))
    refuse_unreadable(source, config.source, config.max_length)
    refuse_untrainable(model, config.model, config.max_length)
    teacher.maps, maps_plan, warnings = maps.given(run, config, checked, teacher, tokenizer)
    student = _student(run, config, model, source, tokenizer)
    used = {"forget": config.remove_coef, "retain": config.retain_coef}
    documents = {"forget": checked.forget, "retain": checked.retain}
    texts = {
        name: corpora.sequences_of(documents[name], tokenizer, config.max_length, config.packing) for name in used if used[name]
    }
    rows = Rows(**texts)
    plan = training_plan(config, len(rows)) | {"documents": {name: len(part) for name, part in documents.items()}}
    plan["tokens"] = round(sum(map(rows.tokens, range(len(rows)))) * plan["epochs"])
    trainer = UnlearnTrainer(
        run, config, student.train(), tokenizer, rows, config.eval, teacher=teacher, first_epoch_steps=plan["first_epoch_steps"]
    )
    plan |= parameters.describe(student, config)
    plan["teachers"] = _teachers_plan(run, config, trainer, plan["epochs"])
    longest = max(len(row) for part in texts.values() for row in part)
    mapped = maps.tokens_of(checked.mapped, tokenizer, config.max_length)
    plan["memory"] = memory.estimate(student, teacher, config, longest, document_bytes(trainer), mapped, libraries)
    cached = [text for text, how in plan["teachers"].items() if how.startswith("cached")]
    plan["memory"]["caches"] = sum(teacher_cache.size_of(teacher, text, texts[text]) for text in cached)
    _refuse_memory(plan["memory"])
    plan |= _probed(config, checked, trainer, tokenizer, plan["forward_passes"])
    masters = " (trained as float32)" if needs_masters(student, config.optimizer) else ""
    plan["dtypes"] = {"model": config.dtype + masters, "source": teacher_dtype, "reference": teacher_dtype}
    if config.reads_layers:
        plan["layers"] = {
            str(n): f"output of block {n} ({type(block).__name__})" for n, block in _layer_modules(student, config)
        }
    plan["maps"] = maps_plan
    plan["coefficients"] = coefficients_over(config, plan)
    warnings += parameters.untouched(student, config, config.layers)
    run.update(plan=plan | {"warnings": warnings + _warnings(config, plan)})
    return trainer, tokenizer


def _probed(
    config: UnlearnConfig,
    checked: Checked,
    trainer: UnlearnTrainer,
    tokenizer: PreTrainedTokenizerBase,
    passes: int,
) -> dict[str, Any]:
    """The parts of the plan that one batch shows; where maps are to be fitted, with maps from a few documents."""
    teacher, rows = trainer.teacher, trainer.train_dataset
    seconds: dict[str, float] = {}
    if config.fits_maps and config.remove_coef:
        teacher.maps, seconds["fitting maps"] = maps.sketched(config, checked, teacher, tokenizer)
    if config.cb_scale == "relative":
        trainer.variance = maps.variances_of(teacher, rows.texts["forget"], tokenizer.pad_token_id)  # type: ignore
    found = probe(trainer)
    if config.fits_maps:
        teacher.maps = None
    seconds["training, without evaluation"] = found.seconds * passes
    return {"no_gradient": found.no_gradient, "seconds": seconds, "scale": found.scale}


def _layer_modules(student: nn.Module, config: UnlearnConfig) -> list[tuple[int, nn.Module]]:
    found = blocks(student)
    return [(layer, found[layer]) for layer in config.layers]


def _warnings(config: UnlearnConfig, plan: dict[str, Any]) -> list[str]:
    """What may not be meant."""
    found = []
    if unreached := plan["no_gradient"]:
        found.append(
            f"{len(unreached)} trainable tensors get no gradient from any term ({unreached[0]}, …): they will not be trained"
        )
    if config.teacher_dtype not in {None, config.dtype}:
        found.append(f"teachers in {config.teacher_dtype} beside a {config.dtype} model: the losses measure rounding, too")
    if config.optimizer == "muon" and config.lora:
        found.append("muon orthogonalises the updates of A and B, the two matrices of an adapter, each by itself")
    if newton_schulz_dtype(config.newton_schulz_dtype) == torch.bfloat16 and not torch.cuda.is_available():
        found.append("newton_schulz_dtype: bfloat16 products are about a hundred times slower than float32 on a CPU")
    found += warning(plan["scale"], config)
    if config.schedule == "ramp" and plan["steps"] < plan["first_epoch_steps"]:
        found.append(
            f"schedule: the run ends within its first epoch, so the ramp is cut short and "
            f"retain_coef rises to {plan['coefficients']['end'][1]:g} of {config.retain_coef:g}"
        )
    return found


def _refuse_memory(parts: dict[str, int]) -> None:
    """Refuse what cannot fit into memory, the models being there already.

    Raises:
        LetheError: the estimate is more than there is.
    """
    free, needed = memory.available_memory(), sum(parts.values())
    if needed - parts["libraries"] - parts["weights"] - parts["teachers"] > free:
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
        save_artifact(run, "base", model, tokenizer)
    return add_adapters(model, config.lora, config.layers, config.seed)


@torch.no_grad()
def rewind(model: nn.Module, source: nn.Module, share: float) -> None:
    """θ ← (1 − share) θ_model + share θ_source, weight by weight, in place."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.lerp_(theirs[name].to(parameter), share)


def _teachers_plan(run: Run, config: UnlearnConfig, trainer: UnlearnTrainer, epochs: float) -> dict[str, str]:
    """By text, whether its teacher's states are computed live or come from a cache, and why."""
    rows: Any = trainer.train_dataset
    plan = {}
    for text in trainer.teacher.needs:
        seen, weights = epochs * len(rows) / len(rows.texts[text]), run.record["parents"][TEACHER[text]]["sha256"]
        plan[text] = teacher_cache.choose(config, trainer.teacher, text, rows.texts[text], weights, seen)
    return plan


def _cache_teachers(run: Run, config: UnlearnConfig, trainer: UnlearnTrainer) -> None:
    """Open or build the caches; a resumed run has the teachers that it began with."""
    chosen = run.record.get("teachers") or _teachers_plan(run, config, trainer, run.record["plan"]["epochs"])
    for text, how in chosen.items():
        if how.startswith("cached"):
            rows: Any = trainer.train_dataset
            weights = run.record["parents"][TEACHER[text]]["sha256"]
            cache = teacher_cache.open_or_build(trainer.teacher, text, rows.texts[text], weights)
            if cache is None:
                chosen[text] = "live: a cache could not be written"
            else:
                trainer.teacher.caches[text] = cache
    run.update(teachers=chosen, plan={"teachers": chosen})


def _finish(
    run: Run,
    config: UnlearnConfig,
    trainer: UnlearnTrainer,
    tokenizer: PreTrainedTokenizerBase,
    checked: Checked,
) -> None:
    """Artifact, records and evaluation of a run that has been trained; the artifact first, so that nothing loses it."""
    student: Any = trainer.model
    if config.lora and config.merge:
        student = student.merge_and_unload()
    save_artifact(run, "adapter" if config.lora and not config.merge else "model", student, tokenizer)
    rows = run.rows("metrics.jsonl")
    terms = {"cb_loss": "forget", "forget_kl_loss": "forget", f"retain_{config.retain_loss}_loss": "retain"}
    seen = [
        corpora.tokenise(part[: changes.AGREEMENT_ROWS], tokenizer, config.max_length)
        for part in (checked.forget, checked.retain)
    ]
    run.try_to_record(
        losses=lambda: token_means(rows, {term: text for term, text in terms.items() if term in rows[-1]}),
        plan=lambda: {"tokens": sum(row.get(f"{text}_tokens", 0) for row in rows for text in ("forget", "retain"))},
        agreement=lambda: changes.agreement(student, trainer.teacher, seen[0], seen[1], tokenizer.pad_token_id),
        update_by_layer=lambda: changes.update_by_layer(student, trainer.teacher.reference),
    )
    run.update(evals=trainer.evaluation.at(trainer.state.global_step, student, f"Evaluating {config.name}"))
