"""What a run is made of before it trains: models, teachers, texts, the trainer, and the plan that is recorded.

`prepare` loads the model and whichever teachers the method needs, refuses what only loaded models show, and runs one batch
to measure what the plan says about time, memory and gradients. A resumed run has its plan already. Teachers are in memory only
while they run: once maps are fitted and outputs cached, `free_teachers` drops those that training does not need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import distributed
from lethe.errors import LetheError, full_disk
from lethe.evaluation.accuracy import refuse_unscorable
from lethe.files import sha256
from lethe.maps.affine import AffineMap
from lethe.methods.method import HELD_OUT, Method, Trained
from lethe.models import refs, streaming
from lethe.models.activations import blocks, copied
from lethe.models.adapters import without_adapters
from lethe.models.architecture_check import refuse_unreadable, refuse_untrainable
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import cost, optimizers
from lethe.training.check import plan as training_plan
from lethe.training.check import refuse_8bit
from lethe.training.optimizers import needs_masters, newton_schulz_dtype
from lethe.training.saves import save_artifact
from lethe.training.trainer import Sequences
from lethe.unlearning import budget, changes, maps, memory, teacher_cache
from lethe.unlearning.budget import Checks, checks_of
from lethe.unlearning.check import Checked
from lethe.unlearning.fit import parallel_of
from lethe.unlearning.frozen import Frozen, WithoutAdapters
from lethe.unlearning.layered import Layered
from lethe.unlearning.probe import probe, warning
from lethe.unlearning.start import move_start
from lethe.unlearning.trained import adapted_layers, trainable
from lethe.unlearning.trainer import UnlearnTrainer
from lethe.unlearning.view import Teacher


@dataclass
class Prepared:
    """A run that is ready to train. `reference` is the target before training; `source` is None where the run uses none."""

    config: Method
    checked: Checked
    trainer: UnlearnTrainer
    tokenizer: PreTrainedTokenizerBase
    reference: Frozen
    source: Frozen | None
    held_out: list[list[int]] = field(default_factory=list)
    """Sequences of the text that checks of the budget read."""
    checks: Checks | None = None

    @property
    def sequences(self) -> dict[str, list[list[int]]]:
        """The token ids of each text's sequences."""
        dataset: Any = self.trainer.train_dataset
        return dataset.texts | ({HELD_OUT: self.held_out} if self.held_out else {})

    @property
    def pad_id(self) -> int:
        """The token that sequences are padded with."""
        return self.tokenizer.pad_token_id  # type: ignore[return-value]

    @property
    def mapped(self) -> Teacher | None:
        """The teacher whose activations go through the affine maps."""
        return next((teacher for teacher in self.trainer.teachers.values() if teacher.need.mapped), None)

    def unit(self, loss: str) -> str:
        """What a loss is a mean over: `documents` or `tokens`."""
        return "documents" if loss in self.config.by_document else "tokens"

    def fit_maps(self, run: Run) -> None:
        """Fit the maps where the recipe says so, or load those that an interrupted run has fitted."""
        if self.config.fits_maps and self.mapped and self.pair:
            self.mapped.maps = maps.fitted(run, self.config, self.checked, self.pair, self.tokenizer)
            maps.book(run, self.mapped.maps, len(self.checked.mapped), self.reference, self.mapped.model)
            self.checked.mapped.clear()

    def measure_variance(self, run: Run) -> None:
        """Measure the variance of the forget text's target, where a loss is relative to it."""
        teacher = self.trainer.teachers.get("forget")
        if teacher and teacher.need.variance:
            self.trainer.target_variance = maps.variances(run, teacher, self.sequences["forget"], self.pad_id)

    @property
    def pair(self) -> maps.Pair | None:
        """The target before training, and the source if there is one, in memory for a while. Only before training."""
        model: Any = self.trainer.model
        return partial(_pair, self.config, model, self.reference, self.source) if self.source else None

    def free_teachers(self) -> None:
        """Drop the models that training does not run: those whose outputs are cached, and those that no loss reads."""
        teachers = self.trainer.teachers.values()
        live = [teacher.model for teacher in teachers if teacher.cache is None]
        for teacher in teachers:
            alone = teacher.cache is not None and distributed.world() > 1  # only passes gather a sharded model's head
            if (alone or teacher.model not in live) and teacher.model.bytes and teacher.head is not None:
                teacher.head = copied(teacher.head)  # a view of the model's file would hold all of it
        for model in (self.source, self.reference):
            if model is not None and model not in live:
                model.free()

    def compared(self) -> dict[str, tuple[list[list[int]], Frozen]]:
        """What agreement is measured on: sequences of each text, and the model to agree with."""
        some = {
            text: corpora.tokenise(documents[: changes.AGREEMENT_ROWS], self.tokenizer, self.config.max_length)
            for text, documents in (("forget", self.checked.forget), ("retain", self.checked.retain))
        }
        found = {"retain_with_reference": (some["retain"], self.reference)}
        return ({"forget_with_source": (some["forget"], self.source)} if self.source else {}) | found


def prepare(run: Run, config: Method, checked: Checked, resumed: bool = False) -> Prepared:
    """Load everything and record plan and parents. A new run that is refused is removed.

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


def _prepare(run: Run, config: Method, checked: Checked) -> Prepared:
    refuse_8bit(config, distributed.world())
    libraries = memory.taken()
    planned, parallel = run.record.get("plan") or {}, parallel_of(config, checked.model)
    model, tokenizer = refs.load(checked.model, config.dtype, sharded=parallel == "fsdp")
    refuse_unscorable(model, tokenizer, config.eval)
    reference, source = _teacher_models(config, checked, new=not planned)
    parents = _record_parents(run, config, checked)
    refuse_untrainable(model, config.model, config.max_length)
    given: AffineMap | None = None
    maps_plan, warnings = "none", list[str]()
    if config.maps and checked.affine and source:
        pair = partial(_pair, config, model, reference, source)
        given, maps_plan, warnings = maps.given(run, config, config.maps, checked.affine, checked, pair, tokenizer)
    elif config.fits_maps:
        maps_plan = f"fitted on {len(checked.mapped)} documents of the retain text before training"
    student = _student(run, config, checked, model, source, tokenizer)
    if config.lora and _untouched(config):
        reference = WithoutAdapters(checked.model, config.dtype, student)
    teachers = _teachers(config, reference, source, parents)
    for teacher in teachers.values():
        teacher.maps = given if teacher.need.mapped else None
    documents = {"forget": checked.forget, "retain": checked.retain}
    dataset = _training_data(config, documents, tokenizer)
    plan = training_plan(config, dataset.stages, planned.get("effective_batch"))
    if isinstance(dataset, Layered):
        plan["stages"] = dataset.described(plan.pop("stage_steps"))
    plan["documents"] = {name: len(part) for name, part in documents.items()}
    plan |= {"devices": distributed.world(), "parallel": parallel} if distributed.world() > 1 else {}
    plan["tokens"] = round(sum(map(dataset.tokens, range(len(dataset)))) * plan["epochs"])
    trainer = UnlearnTrainer(
        run, config, student.train(), tokenizer, dataset, config.eval,
        teachers=teachers, first_epoch_steps=plan["first_epoch_steps"], steps=plan["steps"],
    )  # fmt: skip
    trainer.may_miss_gradients = distributed.world() > 1 and not trainer.by_update and trainer.misses_gradients()
    held_out = corpora.tokenise(checked.held_out, tokenizer, config.max_length) if checked.held_out else []
    made = Prepared(config, checked, trainer, tokenizer, reference, source, held_out)
    if config.budget:
        made.checks = Checks(run, config, config.budget, trainer, tokenizer, held_out)
        plan["budget"] = planned.get("budget") or made.checks.plan(plan["steps"], plan["epochs"])
    if planned:
        division = {"devices": distributed.world(), "parallel": parallel}
        if division != {"devices": planned.get("devices", 1), "parallel": planned.get("parallel", parallel)}:
            parts, by_phase = _memory(made, run.record.get("teachers") or planned["teachers"], libraries)
            run.record["plan"] = planned = planned | division | {"memory": parts, "memory_by_phase": by_phase}
            run.update(plan=division)
        memory.refuse_too_much(planned["memory"], memory.loaded(made))
        return made
    _describe(made, plan, libraries)
    plan["maps"] = maps_plan
    if scored := (run.record.get("rewound") or {}).get("seconds"):
        plan["seconds"]["scoring weights"] = scored
    warnings += optimizers.untouched(student, config, adapted_layers(config, student)) if config.trained == Trained() else []
    run.update(plan=plan | {"warnings": warnings + _warnings(config, plan)})
    return made


def _record_parents(run: Run, config: Method, checked: Checked) -> dict[str, Any]:
    """Record what the run is made from: models, texts, scores."""
    parents = {"model": refs.record(checked.model)}
    parents |= {"source": refs.record(checked.source)} if checked.source else {}
    parents["forget"] = corpora.record(config.forget, checked.forget)
    parents["retain"] = corpora.record(config.retain, checked.retain)
    parents |= {"scores": {"ref": config.rewind_weights, "sha256": sha256(checked.scores)}} if checked.scores else {}
    if config.budget and checked.held_out:
        parents[HELD_OUT] = corpora.record(config.budget.text or config.retain, checked.held_out)
    run.set_parents(**parents)
    return parents


def _training_data(config: Method, documents: dict[str, list[corpora.Document]], tokenizer: Any) -> Sequences:
    """The sequences of the texts that the losses read; those of all stages, if there are stages."""
    length, packing = config.max_length, config.packing
    rows = {name: corpora.sequences_of(documents[name], tokenizer, length, packing) for name in config.needs()}
    return Layered(config.layered.parts, **rows) if config.layered else Sequences(**rows)


def _teacher_models(config: Method, checked: Checked, new: bool) -> tuple[Frozen, Frozen | None]:
    """The target before training and, where the run uses one, the source. A new run's source is refused if it cannot work."""
    dtype = config.teacher_dtype or config.dtype
    reference = Frozen(checked.model, dtype, _last_layer(config, "reference"))
    if checked.source is None:
        return reference, None
    source = Frozen(checked.source, dtype, _last_layer(config, "source"))
    if new and streaming.same_weights(checked.source, checked.model, dtype):
        raise LetheError(
            f"source: '{config.source}' has the weights of '{config.model}'; name a checkpoint that has not learned the topic"
        )
    if new and any(need.teacher == "source" for need in config.needs().values()):
        with source.running() as model:
            refuse_unreadable(model, config.source, config.max_length, source.last)
    return reference, source


def _last_layer(config: Method, role: str) -> int | None:
    """The last block that passes of the source or the reference need; None: all, for logits."""
    needs = [need for need in config.compared().values() if need.teacher == role or need.mapped]
    logits = any((need.logits or need.ending) and need.teacher == role for need in needs)
    return None if logits or not needs else max(layer for need in needs for layer in need.layers)


def _untouched(config: Method) -> bool:
    """Whether a model that is not trained yet has the weights and the type of its teachers' target."""
    return not config.moves_start and config.teacher_dtype in {None, config.dtype}


@contextlib.contextmanager
def _pair(config: Method, model: nn.Module, reference: Frozen, source: Frozen) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The target and the source for passes before training, when `model` itself is the target if nothing has touched it."""
    with without_adapters(model) if _untouched(config) else reference.running() as target, source.running() as other:
        yield target, other


def _teachers(config: Method, reference: Frozen, source: Frozen | None, parents: dict[str, Any]) -> dict[str, Teacher]:
    """By text, the teacher that the method's loss needs."""
    models: dict[Any, Any] = {"reference": (reference, parents["model"]), "source": (source, parents.get("source"))}
    needed = config.compared().items()
    return {text: Teacher(need, models[need.teacher][0], models[need.teacher][1]["sha256"]) for text, need in needed}


def _student(
    run: Run,
    config: Method,
    checked: Checked,
    model: PreTrainedModel,
    source: Frozen | None,
    tokenizer: PreTrainedTokenizerBase,
) -> nn.Module:
    """The model that is trained: with the weights that the recipe starts from, and with adapters where it has them."""
    distributed.gathered_away(model)
    move_start(run, config, checked, model, source, tokenizer)
    if config.lora and config.moves_start and not config.merge:
        save_artifact(run, "base", model, tokenizer)
    return trainable(config, model)


def _describe(made: Prepared, plan: dict[str, Any], libraries: int) -> None:
    """Add to the plan what the loaded models and one batch show."""
    config, trainer, student = made.config, made.trainer, made.trainer.model
    plan |= optimizers.describe(student, config)  # type: ignore[arg-type]
    plan["teachers"] = distributed.from_first(lambda: teachers_plan(made, plan["epochs"], checks_of(plan)))
    plan["memory"], plan["memory_by_phase"] = _memory(made, plan["teachers"], libraries)
    memory.refuse_too_much(plan["memory"], memory.loaded(made))
    plan |= _probed(made, plan["forward_passes"])
    masters = " (trained as float32)" if needs_masters(student, config.optimizer) else ""  # type: ignore[arg-type]
    dtype = config.teacher_dtype or config.dtype
    plan["dtypes"] = {"model": config.dtype + masters} | ({"source": dtype} if made.source else {}) | {"reference": dtype}
    if config.reads_layers:
        found = blocks(student)  # type: ignore[arg-type]
        layers = adapted_layers(config, student)  # type: ignore[arg-type]
        plan["layers"] = {str(n): f"output of block {n} ({type(found[n]).__name__})" for n in layers}
    moments = {"start": 0, "middle": plan["steps"] // 2, "end": plan["steps"] - 1}
    changing = {moment: config.coefficients(trainer.progress(done)) for moment, done in moments.items()}
    if changing["start"]:
        plan["coefficients"] = {moment: list(values.values()) for moment, values in changing.items()}


def _memory(made: Prepared, teachers: dict[str, str], libraries: int) -> tuple[dict[str, int], dict[str, int]]:
    """The estimate: the parts of the phase that takes most, and the sum of each phase. Empty if the model allows none."""
    config = made.config
    load = memory.Load(
        width=max(len(row) for part in made.sequences.values() for row in part),
        tokens={text: sum(map(len, part)) for text, part in made.sequences.items()},
        mapped_tokens=maps.tokens_of(made.checked.mapped, made.tokenizer, config.max_length),
        cached=frozenset(text for text, how in teachers.items() if how.startswith("cached")),
        gpu=torch.cuda.is_available(),
        libraries=libraries,
        processes=distributed.world(),
        parallel="fsdp" if distributed.sharded_modules(made.trainer.model) else "ddp",  # type: ignore[arg-type]
    )
    try:
        found = memory.estimate(config, lambda: refs.outline(made.checked.model, config.dtype), load)
    except LetheError:
        return {}, {}
    return found.parts, found.by_phase


def _probed(made: Prepared, passes: int) -> dict[str, Any]:
    """The parts of the plan that one batch shows; where maps are to be fitted, with maps from a few documents."""
    config, trainer, mapped = made.config, made.trainer, made.mapped
    seconds: dict[str, float] = {}
    if config.fits_maps and mapped and made.pair:
        mapped.maps, seconds["fitting maps"] = maps.sketched(config, made.checked, made.pair, made.tokenizer)
    forget = trainer.teachers.get("forget")
    if forget and forget.need.variance:
        trainer.target_variance = maps.variances_of(forget, made.sequences["forget"], made.pad_id)
    found = probe(trainer)
    if config.fits_maps and mapped:
        mapped.maps = None
    seconds["training, without evaluation"] = found.seconds * passes
    return {"no_gradient": found.no_gradient, "seconds": seconds, "scale": found.scale}


def teachers_plan(made: Prepared, epochs: float, checks: int = 0) -> dict[str, str]:
    """By text, whether its teacher's outputs are computed live or come from a cache, and why.

    `checks`: how often the held-out text is read.
    """
    plan = {}
    for text, teacher in made.trainer.teachers.items():
        dataset: Any = made.trainer.train_dataset
        seen = epochs * len(dataset) / len(made.sequences[text]) if text != HELD_OUT else checks
        to_be_fitted = made.config.fits_maps and teacher.need.mapped and teacher.maps is None
        plan[text] = teacher_cache.choose(made.config.teacher_cache, teacher, made.sequences[text], seen, to_be_fitted)
    return plan


def cache_teachers(run: Run, made: Prepared) -> None:
    """Open or build the caches. A resumed run has the teachers that it began with."""
    plan = run.record["plan"]
    chosen = distributed.from_first(lambda: run.record.get("teachers") or teachers_plan(made, plan["epochs"], checks_of(plan)))
    for text, how in chosen.items():
        if how.startswith("cached"):
            teacher, lengths = made.trainer.teachers[text], list(map(len, made.sequences[text]))
            name = f"{teacher.need.teacher}_forward"
            cost.book(run, f"{text} teacher", {name: sum(lengths)}, teacher.flops(lengths))
            teacher.cache = teacher_cache.open_or_build(teacher, text, made.sequences[text])
            if teacher.cache is None:
                chosen[text] = "live: a cache could not be written"
                cost.book(run, f"{text} teacher", {}, 0)
    run.update(teachers=chosen, plan={"teachers": chosen})


def _warnings(config: Method, plan: dict[str, Any]) -> list[str]:
    """Warnings about settings that may be a mistake."""
    found = []
    if unreached := plan["no_gradient"]:
        found.append(
            f"{len(unreached)} trainable tensors get no gradient from any loss ({unreached[0]}, …): they will not be trained"
        )
    if not plan["memory"]:
        found.append("memory: it cannot be estimated for this model, so watch it; a run that needs more than there is fails")
    if config.teacher_dtype not in {None, config.dtype}:
        found.append(f"teachers in {config.teacher_dtype} beside a {config.dtype} model: the losses also measure rounding")
    if config.optimizer == "muon" and config.lora:
        found.append("muon orthogonalises the updates of A and B, the two matrices of an adapter, separately")
    if newton_schulz_dtype(config.newton_schulz_dtype) == torch.bfloat16 and not torch.cuda.is_available():
        found.append("newton_schulz_dtype: bfloat16 matmuls are about a hundred times slower than float32 on a CPU")
    return found + budget.warnings(plan) + warning(plan["scale"], config) + config.warnings(plan)
