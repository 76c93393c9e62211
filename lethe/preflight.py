"""What a run would do, and what cannot work: found out before any compute is spent and before anything is written.

`check` resolves models, text, maps and tasks of a recipe, refuses what does not fit together and returns the plan.
Most is refused without importing torch, in less than a second; whether a model's parts fit together is tried last.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe.config import (
    ATTACKED,
    MAPPED,
    UNLEARNED,
    AffineConfig,
    AffineScoreConfig,
    CheckpointsConfig,
    CompareConfig,
    EvalSettings,
    EvaluateConfig,
    TamperConfig,
    TrainingSettings,
    UnlearnConfig,
    as_text_source,
)
from lethe.errors import LetheError, nearest, printable
from lethe.evaluation import tasks
from lethe.evaluation.tasks import data
from lethe.maps.folder import check_maps, facts_of, find_maps, layers_of
from lethe.models import refs
from lethe.runs.run import Run, refuse_run_folder
from lethe.text import corpora


@dataclass
class Checked:
    """A recipe's resolved parts."""

    model: refs.ModelRef
    source: refs.ModelRef
    affine: Path | None
    conventions: list[str]
    forget: list[corpora.Document]
    retain: list[corpora.Document]
    mapped: list[corpora.Document]
    """Documents that maps are to be fitted on; none where they are given, or there are none."""


def check(config: UnlearnConfig) -> Checked:
    """Resolve a recipe.

    Raises:
        LetheError: something in it cannot work; the message is one line and says what to do.
    """
    refuse_run_folder(config.out)
    check_tasks(config.eval)
    layers = config.layers if config.reads_layers else [0]
    model, source = _pair(config.model, config.model if config.finds_source else config.source, layers, config.out)
    same = len({(ref.path, ref.revision, ref.adapter, ref.random) for ref in (model, source)}) == 1
    if same and not config.finds_source:
        raise LetheError(
            f"source: '{config.source}' is the model itself; the source is a checkpoint that never learned the topic"
        )
    if model.adapter:
        raise LetheError(f"model: '{config.model}' is an adapter kept apart from its model; merge it into a model first")
    _refuse_length(config, model, source)
    affine, conventions = _maps(config, model, source)
    forget = corpora.select(config.forget, config.num_train_examples, "front", "forget text", UNLEARNED)
    retain = corpora.select(config.retain, config.num_train_examples, "front", "retain text", UNLEARNED)
    if {d.id for d in forget} & {d.id for d in retain}:
        raise LetheError("forget and retain text share documents; the retain term would hold what the forget term removes")
    _refuse_types(config)
    _refuse_unavailable(config)
    _refuse_rank(config, model)
    if config.packing == "none":
        plan(config, max(len(forget), len(retain)))
    mapped = []
    if config.fits_maps:
        mapped = corpora.select(config.retain, None if config.affine_examples else 0, "front", "retain", config.affine_examples)
        split(mapped, AffineConfig.held_out)
    _verify(model, source)
    return Checked(model, source, affine, conventions, forget, retain, mapped)


def check_tasks(settings: EvalSettings | EvaluateConfig | CheckpointsConfig | CompareConfig) -> None:
    """Find the tasks to evaluate on, and read the local files that take the place of their data.

    Raises:
        LetheError: a task is not known, or a file has broken rows.
    """
    data.read(settings.task_data, tasks.locate(settings.tasks))


def check_model(config: EvaluateConfig) -> refs.ModelRef:
    """Resolve a model and tasks to evaluate it on.

    Raises:
        LetheError: one of them is not known, or `out` is a run.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    ref = refs.resolve(config.model, config.out)
    _verify(ref)
    return ref


def check_affine(config: AffineConfig) -> tuple[refs.ModelRef, refs.ModelRef, list[corpora.Document]]:
    """Resolve a fit of maps: model, source, and the documents to fit and score on.

    Raises:
        LetheError: the models do not fit together, or the text cannot be used.
    """
    refuse_run_folder(config.out)
    model, source = _pair(config.model, config.source, config.layers, config.out)
    _refuse_length(config, model, source)
    if as_text_source(config.text).source == "lab:forget":
        raise LetheError("text: maps are never fitted on forget text, that would map the topic back in; give retain text")
    documents = corpora.select(config.text, config.num_examples, "front", "text", MAPPED)
    split(documents, config.held_out)
    _verify(model, source)
    return model, source, documents


@dataclass
class CheckedScore:
    """The resolved parts of a scoring of maps: their folder, the conventions to read them by, documents they have not seen."""

    folder: Path
    conventions: list[str]
    model: refs.ModelRef
    source: refs.ModelRef
    documents: list[corpora.Document]


def check_affine_score(config: AffineScoreConfig) -> CheckedScore:
    """Resolve a scoring of maps.

    Raises:
        LetheError: there are no maps, they belong to another pair, or the models or the text cannot be used.
    """
    folder = find_maps(config.affine)
    facts = facts_of(folder)
    model, source = _pair(config.model, config.source, [0], "runs")
    _refuse_length(config, model, source)
    conventions = check_maps(folder, model, source)
    for convention in conventions:
        refs.refuse_layers(source, layers_of(facts, convention, model.depth))
    fitted = set(facts.get("fitted_ids", []))
    unseen = [document for document in corpora.read(config.text) if document.id[:16] not in fitted]
    if not unseen:
        raise LetheError("text: the maps were fitted on all of its documents; give other text")
    documents = corpora.take(unseen, config.num_examples, "back", "text the maps were not fitted on")
    _verify(model, source)
    return CheckedScore(folder, conventions, model, source, documents)


def _pair(model: str, source: str, layers: list[int], out: str) -> tuple[refs.ModelRef, refs.ModelRef]:
    """Model and source, if their activations can be compared at these layers."""
    pair = refs.resolve(model, out), refs.resolve(source, out)
    refs.refuse_mismatch(*pair)
    for ref in pair:
        refs.refuse_layers(ref, layers)
    return pair


def _verify(*models: refs.ModelRef) -> None:
    """Refuse models whose parts do not fit together."""
    for ref in models:
        refs.verify(ref)


def split(documents: list[corpora.Document], held_out: float) -> tuple[list[corpora.Document], list[corpora.Document]]:
    """The documents to fit on and those to score on: the last ones in order of content, a share of `held_out`."""
    count = max(1, round(held_out * len(documents)))
    if count >= len(documents):
        raise LetheError(f"affine: {len(documents)} documents are too few to hold {held_out:.0%} out; give more text")
    return documents[:-count], documents[-count:]


@dataclass
class CheckedAttack:
    """An attack's resolved parts."""

    model: refs.ModelRef
    documents: list[corpora.Document]
    plan: dict[str, Any]
    used_in_unlearning: int | None


def check_tamper(config: TamperConfig) -> CheckedAttack:
    """Resolve an attack; `used_in_unlearning`: its documents that the attacked run was unlearned with (None: no such run).

    Raises:
        LetheError: a part of it cannot work, or it would train on documents that were used to unlearn.
    """
    refuse_run_folder(config.out)
    check_tasks(config.eval)
    ref = refs.resolve(config.model, config.out)
    if not config.reads_text:
        _verify(ref)
        return CheckedAttack(ref, [], {"steps": len(config.strengths)}, None)
    _refuse_length(config, ref)
    _refuse_unavailable(config)
    _refuse_rank(config, ref)
    everything = corpora.read(config.forget)
    documents = corpora.take(everything, config.num_train_examples, "back", "forget text", ATTACKED)
    if config.attack == "prompt" and max(config.strengths) > len(documents):
        raise LetheError(f"strengths: {max(config.strengths):g} documents are asked for, there are {len(documents)}; lower it")
    if config.adapter == "train" and not ref.adapter:
        raise LetheError(f"adapter: '{config.model}' is no adapter on another model, so there is none to train; leave it out")
    used = _documents_unlearned(config, everything)
    shared = None if used is None else sum(d.id in used for d in documents)
    if shared and config.overlap == "refuse":
        left = len(documents) - shared
        lower = f"lower num_train_examples to {left}, give other text" if left else "no other is left: give other text"
        raise LetheError(
            f"forget: {shared} of the attack's {len(documents)} documents were used to unlearn '{config.model}'; "
            f"{lower}, or set overlap to allow"
        )
    _verify(ref)
    steps = {"steps": len(config.strengths), "unique_examples": len(documents)}
    return CheckedAttack(ref, documents, plan(config, len(documents)) if config.attack == "finetune" else steps, shared)


def _documents_unlearned(config: TamperConfig, everything: list[corpora.Document]) -> set[str] | None:
    """The documents among `everything` that the attacked run was unlearned with, as forget or as retain text.

    A model that an attack has saved was unlearned with what the attacked one was; a folder in a run's is that run's.
    """
    model, out = config.model, config.out
    run = refs.run_of(model, out)
    if run is None and (Path(model).parent / "run.json").exists():
        run = Run.open(Path(model).parent)
    while run is not None and run.record["kind"] == "tamper":
        run = refs.run_of(run.record["config"]["model"], run.path.parent)
    parents = (run.record.get("parents") or {}) if run else {}
    texts = [parents[role] for role in ("forget", "retain") if role in parents]
    fronts = [everything[: text["documents"]] for text in texts]
    used = [front for front, text in zip(fronts, texts, strict=True) if corpora.fingerprint(front) == text["sha256"]]
    return {document.id for front in used for document in front} if used else None


def coefficients(
    schedule: str, remove_coef: float, retain_coef: float, steps_done: int, first_epoch_steps: int
) -> tuple[float, float]:
    """remove_coef(t) and retain_coef(t) after `steps_done` optimizer updates.

    `ramp`: with s = min(1, steps done / steps of the first epoch), retain_coef · s and remove_coef · (1 − 0.25 s).
    `constant`: the coefficients themselves.
    """
    if schedule == "constant":
        return remove_coef, retain_coef
    s = min(1.0, steps_done / first_epoch_steps)
    return remove_coef * (1 - 0.25 * s), retain_coef * s


def plan(config: TrainingSettings, examples: int) -> dict[str, Any]:
    """How long a run is: `steps` are optimizer updates, `forward_passes` batches, on one device.

    `unique_examples` is the number of documents of each kind (of the larger kind, when they differ).
    """
    batches = math.ceil(examples / config.per_device_train_batch_size)
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
    if config.warmup_steps >= steps:
        raise LetheError(f"warmup_steps: {config.warmup_steps} of {steps} updates never reach lr {config.lr:g}; lower it")
    whole, rest = divmod(steps, per_epoch)
    return {
        "unique_examples": examples,
        "steps": steps,
        "forward_passes": whole * batches + min(batches, rest * config.gradient_accumulation_steps),
        "effective_batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "epochs": steps / per_epoch,
        "first_epoch_steps": per_epoch,
    }


def coefficients_over(config: UnlearnConfig, plan: dict[str, Any]) -> dict[str, list[float]]:
    """[remove_coef(t), retain_coef(t)] at the first, the middle and the last update."""
    moments = {"start": 0, "middle": plan["steps"] // 2, "end": plan["steps"] - 1}
    settings = config.schedule, config.remove_coef, config.retain_coef
    return {name: list(coefficients(*settings, done, plan["first_epoch_steps"])) for name, done in moments.items()}


def _refuse_types(config: UnlearnConfig) -> None:
    """Refuse types of weights with which a loss would measure rounding, or an update would be lost to it."""
    if config.dtype == "bfloat16" and config.teacher_dtype == "float32":
        raise LetheError("teacher_dtype: float32 teachers of a bfloat16 model measure the model's rounding; leave it at null")
    if config.dtype == "bfloat16" and config.optimizer == "adamw_8bit" and config.lora is None:
        raise LetheError(
            "optimizer: adamw_8bit keeps no float32 weights, so full-rank updates in bfloat16 would be lost to rounding; "
            "use adamw or muon, which do, or dtype float32"
        )


def _refuse_length(config: TrainingSettings | AffineConfig | AffineScoreConfig, *models: refs.ModelRef) -> None:
    """Refuse rows that are longer than one of the models was made for."""
    for model in models:
        if model.window is not None and config.max_length > model.window:
            raise LetheError(
                f"max_length: {config.max_length} is beyond the window of '{model.name}', {model.window} tokens; lower it"
            )


def _refuse_rank(config: UnlearnConfig | TamperConfig, model: refs.ModelRef) -> None:
    """Refuse adapters of a higher rank than the model's activations can have; a huge one would fail when it is made."""
    if config.lora is not None and config.lora.r > model.width:
        raise LetheError(
            f"lora.r: {config.lora.r} is above the width of '{model.name}', {model.width}, which no rank exceeds; lower it"
        )


REPORTERS: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")
}
REPORTERS |= {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What transformers can log to, and the packages of which each needs one."""


def _refuse_unavailable(config: TrainingSettings) -> None:
    """Refuse what needs a library that is not installed."""

    def missing(*packages: str) -> bool:
        return not any(map(importlib.util.find_spec, packages))

    if config.optimizer == "adamw_8bit" and missing("torchao", "bitsandbytes"):
        raise LetheError("optimizer: adamw_8bit needs torchao or bitsandbytes, and neither is installed; pip install torchao")
    for name in config.report_to:
        if name not in REPORTERS:
            raise LetheError(
                f"report_to: '{printable(name, 80)}' is nothing that transformers logs to{nearest(name, REPORTERS)}"
            )
        if missing(*REPORTERS[name]):
            raise LetheError(f"report_to: '{name}' is not installed; pip install {REPORTERS[name][0]}, or leave it out")


def _maps(config: UnlearnConfig, model: refs.ModelRef, source: refs.ModelRef) -> tuple[Path | None, list[str]]:
    """The folder of given maps (None: to be fitted, or none) and the conventions by which they may be read."""
    if config.affine == "none":
        return None, []
    if config.affine == "fit":
        sources = config.retain if isinstance(config.retain, list) else [as_text_source(config.retain)]
        if any(source.source == "lab:forget" for source in sources):
            raise LetheError("retain: this is forget text, and maps are fitted on the retain text; give retain text")
        return None, []
    folder = find_maps(config.affine, config.out)
    return folder, check_maps(folder, model, source, config.layers, config.affine_convention)
