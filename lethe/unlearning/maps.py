"""The affine maps of an unlearning run, and the variance of the mapped activations.

given(…)     maps that the recipe names, scored first          fitted(…)      maps fitted before training, on retain text
sketched(…)  maps from a few documents, for the plan alone     variances(…)   of the mapped activations, by layer
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe import distributed
from lethe.config import AffineConfig
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.maps.affine import (
    AffineMap,
    LayerScores,
    activation_pairs,
    fit,
    fit_on_text,
    fit_once,
    load_maps,
    mean_r2,
    score_maps,
)
from lethe.maps.folder import WEIGHTS
from lethe.maps.ridge import Score
from lethe.methods.method import Maps, Method
from lethe.models.loading import device
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import cost
from lethe.unlearning.check import Checked
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.view import Teacher

SCORED_DOCUMENTS = 64
WORSE = 2.0
BATCH = 8
"""Documents per forward pass while maps are scored."""
VARIANCE_TOKENS = 4096
"""The variance of a target is computed from at least this many tokens of forget text, if there are so many."""
Pair = Callable[[], AbstractContextManager[tuple[nn.Module, nn.Module]]]
"""The reference and the source, in memory inside the context."""


def given(
    run: Run, config: Method, wanted: Maps, folder: Path, checked: Checked, pair: Pair, tokenizer: PreTrainedTokenizerBase
) -> tuple[AffineMap, str, list[str]]:
    """The maps that the recipe names (`wanted`, in `folder`), their description for the plan, and warnings.

    The maps are scored first, beside the score without a map. Maps without a record are scored by each possible convention
    of numbering layers.

    Raises:
        LetheError: they are no better than no map: they belong to another pair or other layers, or are damaged.
    """
    name, asked = str(wanted.given), wanted.convention
    run.set_parents(affine={"ref": name, "sha256": sha256(folder / WEIGHTS)})
    sequences = corpora.tokenise(checked.retain[-SCORED_DOCUMENTS:], tokenizer, config.max_length)
    pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
    with pair() as (model, source):
        scored = score_maps(folder, checked.conventions, model, source, sequences, pad_id, BATCH, config.layers)
    convention = scored.convention if asked == "auto" else asked
    scores = scored.by_convention[convention]
    _refuse_useless(name, scores)
    found = ", ".join(f"{way} {mean_r2(s):.3f}" for way, s in scored.by_convention.items())
    known = "recorded for this pair" if scored.recorded else f"without a record, read as {convention}"
    better = [f"affine_convention: {convention} as set, but the maps fit better as {scored.convention} ({found})"]
    run.update(scores=scores)
    maps = load_maps(folder, config.layers, convention).to(device())
    said = f"{name} ({known}; mean R² {found}; without map {mean_r2(scores, 'no_map_r2'):.3f})"
    return maps, said, better if convention != scored.convention else []


def _refuse_useless(name: str, scores: LayerScores) -> None:
    """Refuse maps that are on average no better than no map, or at one layer have `WORSE` times its error."""
    mapped, plain = mean_r2(scores), mean_r2(scores, "no_map_r2")
    where = "" if mapped > plain else f"on average (mean R² {mapped:.3f}, without {plain:.3f})"
    for layer, score in scores.items():
        if not where and not score["mse"] < WORSE * score["no_map_mse"]:
            where = f"at layer {layer} (R² {score['r2']:.3f}, without {score['no_map_r2']:.3f})"
    if where:
        raise LetheError(
            f"affine: the maps in '{name}' predict no better than no map {where}; they belong to other weights or layers, "
            f"or are damaged: fit maps for this pair, lethe affine fit"
        )


def fitted(run: Run, config: Method, checked: Checked, pair: Pair, tokenizer: PreTrainedTokenizerBase) -> AffineMap:
    """Fit maps on retain text and save them as the run's artifact `affine`. A resumed run loads the maps that it has fitted.

    The models run only if neither the run nor the cache has the maps.
    """
    weights, recorded = run.path / "affine" / WEIGHTS, run.record.get("artifacts", {}).get("affine")
    if distributed.from_first(lambda: recorded and weights.is_file() and sha256(weights) == recorded["sha256"]):
        return load_maps(run.path / "affine", config.layers).to(device())
    parents = {role: run.record["parents"][role] for role in ("model", "source")}
    settings = settings_of(config)

    def fit_them() -> AffineMap:
        with pair() as models:
            return fit_on_text(*models, tokenizer, checked.mapped, settings, config.retain)

    maps = fit_once(fit_them, tokenizer, checked.mapped, settings, parents)
    maps.save(run.path / "affine")
    written = distributed.from_first(lambda: sha256(weights))
    run.update(artifacts={"affine": {"path": "affine", "sha256": written}}, scores=maps.record["scores"])
    return maps


def book(run: Run, maps: AffineMap, documents: int, reference: Frozen, source: Frozen) -> None:
    """Record what a fit costs: a pass of both models over the text, and the sums XᵀX and XᵀY of each layer.

    Documents count as equally long.
    """
    tokens = maps.record["tokens"] + maps.record["held_out_tokens"]
    lengths = [tokens // documents + (n < tokens % documents) for n in range(documents)]
    passes = sum(model.flops.forward(lengths, max(maps.layers) + 1, False) for model in (reference, source))
    sums = sum(4 * tokens * weight.numel() for weight in maps.weight.values())
    cost.book(run, "maps", {"reference_forward": tokens, "source_forward": tokens}, passes + sums)


def settings_of(config: Method) -> AffineConfig:
    """How maps are fitted for a recipe."""
    return AffineConfig(
        config.model,
        config.source,
        layers=list(config.mapped_layers),
        max_length=config.max_length,
        dtype=config.teacher_dtype or config.dtype,
    )


def sketched(config: Method, checked: Checked, pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[AffineMap, float]:
    """Maps from a few documents (four tokens per dimension), and the estimated seconds of the whole fit."""
    width = checked.model.width
    documents = checked.mapped[: 4 * width]
    sequences = first(corpora.tokenise(documents, tokenizer, config.max_length), 4 * width)
    layers, pad_id = list(config.mapped_layers), tokenizer.pad_token_id
    with pair() as (model, source):
        started = time.monotonic()
        pairs = list(activation_pairs(model, source, sequences, layers, BATCH, pad_id, lambda done: None))  # type: ignore[arg-type]
        seconds = time.monotonic() - started
    return fit(pairs, settings_of(config).alpha), seconds * len(checked.mapped) / len(sequences)


def variances(run: Run, teacher: Teacher, sequences: list[list[int]], pad_id: int) -> dict[int, float]:
    """By layer, the variance of the target of `cb_loss`, as the run has recorded it or from the first sequences of forget text.

        v = 1 / (n d) · Σ_t Σ_j (a_tj − mean_j)²

    a = W c + b is the target, j one of its d dimensions, t one of n tokens. It is always computed by the live teacher.

    Raises:
        LetheError: a target does not vary.
    """
    if found := run.record.get("target_variance"):
        return {int(layer): value for layer, value in found.items()}
    values = variances_of(teacher, sequences, pad_id)
    run.update(target_variance={str(layer): value for layer, value in values.items()})
    return values


def variances_of(teacher: Teacher, sequences: list[list[int]], pad_id: int) -> dict[int, float]:
    """As `variances`, from the sequences alone."""
    sequences, sums = first(sequences, VARIANCE_TOKENS), {layer: Score() for layer in teacher.need.layers}
    for start in range(0, len(sequences), BATCH):
        ids, mask = (t.to(device()) for t in corpora.pad(sequences[start : start + BATCH], pad_id))
        for layer, values in teacher.live(ids).activations.items():
            sums[layer].add(values[mask.bool()], values[mask.bool()])
    found = {layer: total.variance() for layer, total in sums.items()}
    for layer, value in found.items():
        if not (math.isfinite(value) and value > 0):
            raise LetheError(f"cb_scale: the target of layer {layer} has variance {value:g}; use cb_scale raw")
    return found


def tokens_of(documents: list[corpora.Document], tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The estimated number of tokens in documents, from the first of them."""
    some = documents[:SCORED_DOCUMENTS]
    return sum(map(len, corpora.tokenise(some, tokenizer, max_length))) * len(documents) // len(some) if some else 0


def first(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """The first sequences that together have this many tokens, or all."""
    count = total = 0
    while count < len(sequences) and total < tokens:
        total, count = total + len(sequences[count]), count + 1
    return sequences[:count]
