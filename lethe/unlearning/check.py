"""What a run would do, and what cannot work: found out before any compute is spent and before anything is written.

`check` resolves models, text, maps and tasks of a recipe, refuses what does not fit together and returns the plan.
Most is refused without importing torch, in less than a second; whether a model's parts fit together is tried last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe.config import (
    UNLEARNED,
    AffineConfig,
    UnlearnConfig,
    as_text_source,
)
from lethe.errors import LetheError
from lethe.evaluation.check import check_tasks
from lethe.files import refuse_run_folder
from lethe.maps.check import pair_of, split
from lethe.maps.folder import check_maps, find_maps
from lethe.models import refs
from lethe.text import corpora
from lethe.training.check import plan, refuse_rank, refuse_unavailable


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
    model, source = pair_of(config.model, config.model if config.finds_source else config.source, layers, config.out)
    same = len({(ref.path, ref.revision, ref.adapter, ref.random) for ref in (model, source)}) == 1
    if same and not config.finds_source:
        raise LetheError(
            f"source: '{config.source}' is the model itself; the source is a checkpoint that never learned the topic"
        )
    if model.adapter:
        raise LetheError(f"model: '{config.model}' is an adapter kept apart from its model; merge it into a model first")
    refs.refuse_length(config.max_length, model, source)
    affine, conventions = _maps(config, model, source)
    forget = corpora.select(config.forget, config.num_train_examples, "front", "forget text", UNLEARNED)
    retain = corpora.select(config.retain, config.num_train_examples, "front", "retain text", UNLEARNED)
    if {d.id for d in forget} & {d.id for d in retain}:
        raise LetheError("forget and retain text share documents; the retain term would hold what the forget term removes")
    _refuse_types(config)
    refuse_unavailable(config)
    refuse_rank(config, model)
    if config.packing == "none":
        plan(config, max(len(forget), len(retain)))
    mapped = []
    if config.fits_maps:
        mapped = corpora.select(config.retain, None if config.affine_examples else 0, "front", "retain", config.affine_examples)
        split(mapped, AffineConfig.held_out)
    refs.verify(model, source)
    return Checked(model, source, affine, conventions, forget, retain, mapped)


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
