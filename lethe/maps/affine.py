"""Affine maps from the source's activations to the model's activations: one ridge regression y ≈ W x + b per layer.

    x = source activation, y = model activation, at the same token; padding is left out

    documents -> activation_pairs -> fit -> AffineMap -> save -> load_maps -> score

Documents are split before the fit. The maps are scored on the held-out part, beside the score without a map (taking x for y).
A folder of maps has `affine_transforms.safetensors` (`layer_N.weight`, `layer_N.bias`) and `metadata.json`. Maps belong to one
pair of weights, and the metadata records which.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lethe import distributed
from lethe.config import AffineConfig
from lethe.distributed import device
from lethe.errors import LetheError
from lethe.evaluation.requests import tokenizer_hash
from lethe.files import sha256
from lethe.home import cache_key, lethe_home, use
from lethe.maps.folder import CONVENTIONS, HASH, METADATA, WEIGHTS, facts_of, layers_of, recorded_convention, refuse_altered
from lethe.maps.ridge import RidgeSums, Score
from lethe.models.activations import CONVENTION, blocks, read
from lethe.progress import bar
from lethe.runs.locks import build_once
from lethe.text import corpora

logger = logging.getLogger(__name__)


@dataclass
class AffineMap:
    """One affine map per layer: `weight[L]` is W, [hidden, hidden], and `bias[L]` is b, [hidden]."""

    weight: dict[int, Float[Tensor, "hidden hidden"]]
    bias: dict[int, Float[Tensor, " hidden"]]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted(self.weight)

    def __call__(self, activations: dict[int, Tensor]) -> dict[int, Tensor]:
        """W x + b for each layer of `activations`."""
        return {
            layer: x.to(self.weight[layer].dtype) @ self.weight[layer].T + self.bias[layer] for layer, x in activations.items()
        }

    def to(self, device: torch.device | str) -> AffineMap:
        move = {layer: w.to(device) for layer, w in self.weight.items()}
        return AffineMap(move, {layer: b.to(device) for layer, b in self.bias.items()}, self.record)

    def save(self, folder: Path) -> None:
        """Write the maps and their metadata into `folder`."""
        distributed.from_first(lambda: self._write(folder))

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer_{n}.weight": w.contiguous() for n, w in self.weight.items()}
        tensors |= {f"layer_{n}.bias": b.contiguous() for n, b in self.bias.items()}
        save_file(tensors, folder / WEIGHTS)
        hidden = len(next(iter(self.bias.values())))
        facts = {"layer_indices": self.layers, "hidden_dim": hidden} | self.record | {HASH: sha256(folder / WEIGHTS)}
        (folder / METADATA).write_text(json.dumps(facts, indent=2))


def load_maps(folder: Path, layers: list[int] | None = None, convention: str = CONVENTION) -> AffineMap:
    """The maps in `folder` for `layers` (None: for all its layers); `convention` says how layers are numbered there.

    Raises:
        LetheError: the maps cannot be read, were altered, lack a layer, or have values that are not finite.
    """
    facts, offset = facts_of(folder), CONVENTIONS[convention]
    have = layers_of(refuse_altered(folder, facts.get(HASH)), convention)
    wanted = have if layers is None else layers
    if missing := sorted(set(wanted) - set(have)):
        raise LetheError(f"affine: '{folder / WEIGHTS}' lacks layers {missing}; fit the maps again")
    tensors = load_file(folder / WEIGHTS)
    weight, bias = (
        {n: tensors[f"layer_{n + offset}.{part}"].to(torch.float32, copy=True) for n in wanted} for part in ("weight", "bias")
    )
    if broken := [n for n in wanted if not (weight[n].isfinite().all() and bias[n].isfinite().all())]:
        raise LetheError(f"affine: layer {broken[0]} in '{folder}' holds values that are not finite; fit the maps again")
    return AffineMap(weight, bias, facts)


Pairs = Iterable[dict[int, tuple[Tensor, Tensor]]]


def fit(pairs: Pairs, alpha: float) -> AffineMap:
    """Fit maps on batches, each a dict of layer -> (x, y), both [tokens, hidden]."""
    sums: dict[int, RidgeSums] = {}
    for batch in pairs:
        for layer, (x, y) in batch.items():
            sums.setdefault(layer, RidgeSums()).add(x, y)
    for one in sums.values():
        one.join()
    solved = {layer: s.solve(alpha) for layer, s in sums.items()}
    return AffineMap({n: w for n, (w, _) in solved.items()}, {n: b for n, (_, b) in solved.items()})


def score(pairs: Pairs, maps: AffineMap) -> dict[str, dict[str, float]]:
    """For each layer `mse` and `r2` of the maps, and `no_map_mse` and `no_map_r2` of taking x for y."""
    mapped: dict[int, Score] = {}
    plain: dict[int, Score] = {}
    for batch in pairs:
        for layer, (x, y) in batch.items():
            mapped.setdefault(layer, Score()).add(y, maps({layer: x})[layer])
            plain.setdefault(layer, Score()).add(y, x)
    for one in (*mapped.values(), *plain.values()):
        one.join()
    return {
        str(n): mapped[n].result() | {f"no_map_{key}": value for key, value in plain[n].result().items()}
        for n in sorted(mapped)
    }


def activation_pairs(
    model: nn.Module,
    source: nn.Module,
    sequences: list[list[int]],
    layers: list[int],
    batch_size: int,
    pad_id: int,
    done: Callable[[int], None],
) -> Pairs:
    """Batches of (source activation, model activation) at every token. `done` is called with the size of each batch.

    The processes share the batches. There are at least as many batches as processes, if need be of fewer sequences. With fewer
    sequences than processes, some have one batch of no tokens: all add up their sums together.
    """
    ordered = sorted(sequences, key=len)
    size = max(1, min(batch_size, len(ordered) // distributed.world()))

    def activations(some: list[list[int]]) -> tuple[Tensor, list[dict[int, Tensor]]]:
        ids, mask = (t.to(device()) for t in corpora.pad(some, pad_id))
        with torch.no_grad():  # not inference_mode: what a model caches then could not be used in training
            return mask.bool(), [read(each, ids, layers).activations for each in (source, model)]

    with distributed.uneven(source, lambda: activations(ordered[:1])):
        own = distributed.share(range(0, len(ordered), size))
        for start in own:
            is_token, (x, y) = activations(ordered[start : start + size])
            yield {layer: (x[layer][is_token], y[layer][is_token]) for layer in layers}
            done(len(is_token) * distributed.world())
        if ordered and not own:
            _, (x, y) = activations(ordered[:1])
            yield {layer: (x[layer][0, :0], y[layer][0, :0]) for layer in layers}


def fit_on_text(
    model: nn.Module, source: nn.Module, tokenizer: Any, documents: list[corpora.Document], config: AffineConfig, text: Any
) -> AffineMap:
    """Fit on part of the documents and score on the others. The maps' record has text, token counts and scores."""
    fitted, held = corpora.split(documents, config.held_out)
    sequences = [corpora.tokenise(part, tokenizer, config.max_length) for part in (fitted, held)]

    def pairs(part: list[list[int]]) -> Pairs:
        return activation_pairs(model, source, part, config.layers, config.batch_size, tokenizer.pad_token_id, advance)

    with bar("Fitting maps", len(documents), "documents") as advance:
        maps = fit(pairs(sequences[0]), config.alpha)
        scores = score(pairs(sequences[1]), maps)
    maps.record = {
        "alpha": config.alpha,
        "convention": CONVENTION,
        "text": corpora.record(text, fitted),
        "held_out": corpora.record(text, held),
        "fitted_ids": [document.id[:16] for document in fitted],
        "tokens": sum(map(len, sequences[0])),
        "held_out_tokens": sum(map(len, sequences[1])),
        "scores": scores,
    }
    return maps


def fit_once(
    fitted: Callable[[], AffineMap],
    tokenizer: Any,
    documents: list[corpora.Document],
    config: AffineConfig,
    parents: dict[str, dict[str, str]],
) -> AffineMap:
    """What `fitted` gives, unless maps of the same weights (`parents`), text and settings are cached in $LETHE_HOME/maps.

    If the cache cannot be written, each process fits.
    """
    settings = (config.layers, config.alpha, config.held_out, config.max_length, config.batch_size, config.dtype, CONVENTION)
    weights = {role: parent["sha256"] for role, parent in parents.items()}
    key = cache_key(settings, weights, corpora.fingerprint(documents), tokenizer_hash(tokenizer))
    folder = lethe_home() / "maps" / key

    def cached() -> AffineMap:
        maps = load_maps(folder, config.layers)
        use(folder, maps)
        return maps

    try:
        maps = build_once(folder, lambda: _is_whole(folder), lambda partial: fitted().save(partial), cached)
    except OSError as error:
        logger.warning("fitted maps cannot be cached in %s (%s)", folder.parent, error.strerror or error)
        maps = fitted()
    maps.record |= parents
    return maps.to(device())


def _is_whole(folder: Path) -> bool:
    """Whether the maps of an earlier fit are there, as they were written."""
    try:
        return bool(refuse_altered(folder, facts_of(folder)[HASH]))
    except (LetheError, KeyError):
        return False


LayerScores = dict[str, dict[str, float]]


@dataclass
class MapScores:
    """Scores of maps by convention of numbering layers, then by layer. `recorded`: the maps name their convention."""

    recorded: bool
    by_convention: dict[str, LayerScores]

    @property
    def convention(self) -> str:
        """The convention with the higher mean R²."""
        return max(self.by_convention, key=lambda name: mean_r2(self.by_convention[name]))

    @property
    def scores(self) -> LayerScores:
        return self.by_convention[self.convention]


def mean_r2(scores: LayerScores, key: str = "r2") -> float:
    """The mean of `r2` (or of `no_map_r2`) over layers."""
    return math.fsum(layer[key] for layer in scores.values()) / len(scores)


def score_maps(
    folder: Path,
    conventions: list[str],
    model: Any,
    source: nn.Module,
    sequences: list[list[int]],
    pad_id: int,
    batch_size: int,
    layers: list[int] | None = None,
) -> MapScores:
    """Score the maps in `folder` by each of `conventions`, at `layers` (None: at all their layers)."""
    tensors = refuse_altered(folder, None)
    found: dict[str, LayerScores] = {}
    with bar("Scoring maps", len(sequences) * len(conventions), "documents") as advance:
        for convention in conventions:
            maps = load_maps(folder, layers or layers_of(tensors, convention, len(blocks(model))), convention).to(device())
            pairs = activation_pairs(model, source, sequences, maps.layers, batch_size, pad_id, advance)
            found[convention] = score(pairs, maps)
    return MapScores(recorded_convention(facts_of(folder)) is not None, found)
