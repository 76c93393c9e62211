"""Affine maps from the source's activations to the model's: per layer, ridge regression y ≈ W x + b.

    x = source activation, y = model activation, same tokens, padding left out

Fitting streams: only the sums Σ x xᵀ, Σ y xᵀ, Σ x, Σ y are kept, so memory does not grow with the text. Products are
taken in float32, about the mean of the first tokens and in a basis where those are uncorrelated, and summed in float64:
means many times the spread, or a massive direction, would lose the others to rounding otherwise. Text is split by
document before anything is fitted, and the maps are scored on the part held out, beside the score of no map at all.

Saved as `affine_transforms.safetensors` (`layer_N.weight`, `layer_N.bias`) and `metadata.json`. A map belongs to one
pair of weights, and says which.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lethe.config import AffineConfig, AffineScoreConfig, to_dict
from lethe.errors import LetheError
from lethe.evaluation.questions import tokenizer_hash
from lethe.files import sha256
from lethe.home import evict, lethe_home
from lethe.maps.check import check_affine, check_affine_score, split
from lethe.maps.folder import CONVENTIONS, HASH, METADATA, WEIGHTS, facts_of, layers_of, recorded_convention, refuse_altered
from lethe.models import refs
from lethe.models.activations import CONVENTION, blocks, residuals
from lethe.models.support import refuse_unreadable
from lethe.progress import bar
from lethe.runs.locks import building
from lethe.runs.machine import say_if_busy
from lethe.runs.run import Run
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
        """Write weights and metadata into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer_{n}.weight": w.contiguous() for n, w in self.weight.items()}
        tensors |= {f"layer_{n}.bias": b.contiguous() for n, b in self.bias.items()}
        save_file(tensors, folder / WEIGHTS)
        hidden = len(next(iter(self.bias.values())))
        facts = {"layer_indices": self.layers, "hidden_dim": hidden} | self.record | {HASH: sha256(folder / WEIGHTS)}
        (folder / METADATA).write_text(json.dumps(facts, indent=2))


def load_maps(folder: Path, layers: list[int] | None = None, convention: str = CONVENTION) -> AffineMap:
    """The maps in `folder`, of all its layers or of `layers`, their indices read by `convention`.

    Raises:
        LetheError: the file is damaged, was altered, lacks a layer, or holds what is no finite number.
    """
    facts = facts_of(folder)
    refuse_altered(folder, facts.get(HASH))
    offset = CONVENTIONS[convention]
    wanted = layers_of(facts, convention, max(facts["layer_indices"]) + 1) if layers is None else layers
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise LetheError(f"affine: '{folder / WEIGHTS}' cannot be read ({error}); fit the maps again") from error
    names = {n: (f"layer_{n + offset}.weight", f"layer_{n + offset}.bias") for n in wanted}
    if missing := [key for pair in names.values() for key in pair if key not in tensors]:
        raise LetheError(f"affine: '{folder / WEIGHTS}' lacks {', '.join(missing)}; fit the maps again")
    if broken := [key for pair in names.values() for key in pair if not tensors[key].isfinite().all()]:
        raise LetheError(f"affine: {broken[0]} in '{folder / WEIGHTS}' holds values that are not finite; fit the maps again")
    weight = {n: tensors[name].float() for n, (name, _) in names.items()}
    return AffineMap(weight, {n: tensors[name].float() for n, (_, name) in names.items()}, facts)


BLOCK = 4096
"""Tokens whose products are taken at one time, at least; twice the hidden size, if that is more."""
PANEL = 256
"""Columns of a matrix worked on at one time, where half of the matrix is enough."""
FLOOR = 1e-8
"""Share of a dimension's variance below which what the dimensions before it do not explain counts as rounding."""


class RidgeSums:
    """Sums for one layer's ridge regression, in a basis in which float32 products lose nothing that matters.

    `add` takes x and y, both [tokens, hidden]. `solve(alpha)` returns W and b that minimise
    Σ |y − W x − b|² + alpha |W|² (the bias is not penalised; as scikit-learn's Ridge).

    Tokens are gathered into blocks, [y | x]. The first gives a centre c and, from the Cholesky factor of its covariance
    C = L Lᵀ, found in float64, a basis T = L⁻ᵀ. In that basis, z = Tᵀ (x − c), the covariance is near the identity, so
    that no direction, however massive, drowns another in float32. Each block's float32 products are added to sums in
    float64. The solution is W = V Tᵀ, where V minimises Σ |y − V z − b|² + alpha |V Tᵀ|².
    """

    def __init__(self) -> None:
        self.n = 0
        self.held = 0
        self.basis: Tensor | None = None

    def add(self, x: Float[Tensor, "tokens hidden"], y: Float[Tensor, "tokens hidden"]) -> None:
        if self.n == 0:
            self.block = x.new_empty(max(BLOCK, 2 * x.shape[1]), y.shape[1] + x.shape[1], dtype=torch.float32)
            self.y, self.x = slice(0, y.shape[1]), slice(y.shape[1], None)
            self.centre = self.block.new_zeros(self.block.shape[1])
        start = 0
        while start < len(x):
            count = min(len(x) - start, len(self.block) - self.held)
            for given, columns in ((x, self.x), (y, self.y)):
                block = self.block[self.held : self.held + count, columns]
                torch.sub(given[start : start + count], self.centre[columns], out=block)
            start, self.held, self.n = start + count, self.held + count, self.n + count
            if self.held == len(self.block):
                self._sum_block()

    def _sum_block(self) -> None:
        """Add the tokens that are held to the sums."""
        block = self.block[: self.held]
        self.held = 0
        basis = self._begin(block) if self.basis is None else self.basis
        x = block[:, self.x]
        for panel in reversed(_panels(len(basis))):  # T is upper triangular: a panel takes no column after its own
            x[:, panel] = x[:, : panel.stop] @ basis[: panel.stop, panel]
        _add_products(self.products, block)
        self.sums += block.sum(0)

    def _begin(self, block: Tensor) -> Tensor:
        """Centre the first block, and find the basis from it."""
        self.centre = block.mean(0, dtype=torch.float64).float()
        block -= self.centre
        width = len(self.centre[self.x])
        x = block[:: 2 if len(block) >= 4 * width else 1, self.x].double()  # twice the width is enough for a basis
        gram = x.new_zeros(width, width)
        _add_products(gram, x)
        self.basis = _whitening(_symmetric(gram) / len(x)).float()
        self.products, self.sums = x.new_zeros(block.shape[1], width), x.new_zeros(block.shape[1])
        return self.basis

    def solve(self, alpha: float) -> tuple[Float[Tensor, "hidden hidden"], Float[Tensor, " hidden"]]:
        if self.n == 0:
            raise LetheError("affine: no token to fit on; give more text")
        if self.held:
            self._sum_block()
        basis = self.basis.double()  # type: ignore[union-attr]
        mean_y, mean_z = (self.sums[columns] / self.n for columns in (self.y, self.x))
        gram = _symmetric(self.products[self.x]) - self.n * torch.outer(mean_z, mean_z) + alpha * basis.T @ basis
        cross = self.products[self.y] - self.n * torch.outer(mean_y, mean_z)
        try:
            solution = torch.linalg.solve(gram, cross, left=False)
        except torch.linalg.LinAlgError as error:
            raise LetheError("affine: the activations do not span all dimensions; set alpha above 0") from error
        weight = solution @ basis.T
        bias = self.centre[self.y].double() + mean_y - solution @ mean_z - weight @ self.centre[self.x].double()
        return weight.float(), bias.float()


def sums_bytes(width: int, layers: int) -> int:
    """Bytes that fitting maps of so many layers takes: blocks, bases and sums of all, and the solution of one at a time."""
    held = 4 * max(BLOCK, 2 * width) * 2 * width + 4 * width**2 + 8 * 2 * width**2
    return layers * (held + 4 * width**2) + 6 * 8 * width**2 if layers else 0


def _panels(width: int) -> list[slice]:
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


def _add_products(total: Tensor, block: Tensor) -> None:
    """Add the products of `block`'s columns with its last ones; what lies below the diagonal panels follows by symmetry."""
    first = len(total) - total.shape[1]
    for panel in _panels(total.shape[1]):
        stop = first + panel.stop
        total[:stop, panel] += block[:, :stop].T @ block[:, first + panel.start : stop]


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


def _whitening(covariance: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """An upper triangular T with Tᵀ C T near the identity, of bounded size where C is singular."""
    spread = covariance.diagonal().sqrt()
    spread = spread.clamp(min=1e-6 * float(spread.max()) or 1.0)
    correlation = covariance / torch.outer(spread, spread)
    correlation.diagonal().add_(FLOOR)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if failed:
        raise LetheError("affine: the activations are not finite; use a dtype of wider range")
    inverse = torch.linalg.solve_triangular(factor.T, torch.eye(len(factor)).to(factor), upper=True)
    return inverse / spread[:, None]


class Score:
    """Sums for R² and MSE of a prediction, in float64.

    MSE is the mean over tokens and dimensions of (y − ŷ)²; R² = 1 − Σ(y − ŷ)² / Σ(y − mean y)², both sums over all
    tokens and dimensions, the mean taken per dimension over the scored tokens.
    """

    def __init__(self) -> None:
        self.n = 0
        self.error = 0.0
        self.centre: Tensor | None = None

    def add(self, y: Float[Tensor, "tokens hidden"], predicted: Float[Tensor, "tokens hidden"]) -> None:
        y = y.double()
        if self.centre is None:
            self.centre = y.mean(0)
            self.sum, self.squares = torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        self.n += len(y)
        self.error += (y - predicted.double()).square().sum().item()
        self.sum += (y - self.centre).sum(0)
        self.squares += (y - self.centre).square().sum(0)

    def variance(self) -> float:
        """The variance of y: a mean over tokens and dimensions, like the MSE."""
        return (self.squares - self.sum.square() / self.n).sum().item() / (self.n * len(self.sum))

    def result(self) -> dict[str, float]:
        """`mse` and `r2`."""
        mse, variance = self.error / (self.n * len(self.sum)), self.variance()
        return {"mse": mse, "r2": 1 - mse / variance if variance > 0 else math.nan}


Pairs = Iterable[dict[int, tuple[Tensor, Tensor]]]


def fit(pairs: Pairs, alpha: float) -> AffineMap:
    """Maps fitted on a stream of batches, each a dict of layer -> (x, y), both [tokens, hidden]."""
    sums: dict[int, RidgeSums] = {}
    for batch in pairs:
        for layer, (x, y) in batch.items():
            sums.setdefault(layer, RidgeSums()).add(x, y)
    solved = {layer: s.solve(alpha) for layer, s in sums.items()}
    return AffineMap({n: w for n, (w, _) in solved.items()}, {n: b for n, (_, b) in solved.items()})


def score(pairs: Pairs, maps: AffineMap) -> dict[str, dict[str, float]]:
    """Per layer `mse` and `r2` of the maps and `no_map_mse`, `no_map_r2` of taking x for y."""
    mapped: dict[int, Score] = {}
    plain: dict[int, Score] = {}
    for batch in pairs:
        for layer, (x, y) in batch.items():
            mapped.setdefault(layer, Score()).add(y, maps({layer: x})[layer])
            plain.setdefault(layer, Score()).add(y, x)
    return {
        str(n): mapped[n].result() | {f"no_map_{key}": value for key, value in plain[n].result().items()}
        for n in sorted(mapped)
    }


def activation_pairs(
    model: nn.Module,
    source: nn.Module,
    rows: list[list[int]],
    layers: list[int],
    batch_size: int,
    pad_id: int,
    done: Callable[[int], None],
) -> Pairs:
    """Batches of (source activation, model activation) at every token of `rows`; `done` is told the rows of each batch."""
    device = next(model.parameters()).device
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        ids, mask = (t.to(device) for t in corpora.pad(ordered[start : start + batch_size], pad_id))
        keep = mask.bool()
        with torch.inference_mode():
            x, y = residuals(source, ids, layers), residuals(model, ids, layers)
        yield {layer: (x[layer][keep], y[layer][keep]) for layer in layers}
        done(len(ids))


def fit_affine(config: AffineConfig, run: Run | None = None) -> Run:
    """Fit maps for a pair of models and keep them as a run; artifacts: `affine`. `run` is an interrupted one, to be done again.

    Raises:
        LetheError: the models do not fit together, or the text cannot be used; raised before anything is written.
    """
    model_ref, source_ref, documents = check_affine(config)
    model, tokenizer = refs.load(model_ref, config.dtype)
    refuse_unreadable(model, config.model, config.max_length)
    source, _ = refs.load(source_ref, config.dtype)
    refuse_unreadable(source, config.source, config.max_length)
    run = run or Run.create("affine", config.name, to_dict(config), config.out)
    with run.running():
        say_if_busy()
        maps = fit_on_text(model, source, tokenizer, documents, config, config.text)
        maps.record |= {"model": refs.record(model_ref), "source": refs.record(source_ref)}
        maps.save(run.path / "affine")
        run.update(
            scores=maps.record["scores"],
            parents={"model": maps.record["model"], "source": maps.record["source"], "text": maps.record["text"]},
            artifacts={"affine": {"path": "affine", "sha256": sha256(run.path / "affine" / WEIGHTS)}},
        )
    return run


def fit_on_text(
    model: nn.Module, source: nn.Module, tokenizer: Any, documents: list[corpora.Document], config: AffineConfig, text: Any
) -> AffineMap:
    """Fit on part of the documents and score on the rest; the maps' record says which text, how much and how well."""
    fitted, held = split(documents, config.held_out)
    rows = [corpora.tokenise(part, tokenizer, config.max_length) for part in (fitted, held)]

    def pairs(part: list[list[int]]) -> Pairs:
        return activation_pairs(model, source, part, config.layers, config.batch_size, tokenizer.pad_token_id, advance)

    with bar("Fitting maps", len(documents), "documents") as advance:
        maps = fit(pairs(rows[0]), config.alpha)
        scores = score(pairs(rows[1]), maps)
    maps.record = {
        "alpha": config.alpha,
        "convention": CONVENTION,
        "text": corpora.record(text, fitted),
        "held_out": corpora.record(text, held),
        "fitted_ids": [document.id[:16] for document in fitted],
        "tokens": sum(map(len, rows[0])),
        "held_out_tokens": sum(map(len, rows[1])),
        "scores": scores,
    }
    return maps


def fit_once(
    model: nn.Module,
    source: nn.Module,
    tokenizer: Any,
    documents: list[corpora.Document],
    config: AffineConfig,
    text: Any,
    parents: dict[str, dict[str, str]],
) -> AffineMap:
    """As `fit_on_text`, but maps of the same weights (`parents`), text and settings are fitted once, by whoever comes first.

    They are kept under $LETHE_HOME/maps; where that cannot be written, or what is there is damaged, they are fitted anew.
    """
    settings = (config.layers, config.alpha, config.held_out, config.max_length, config.batch_size, config.dtype, CONVENTION)
    weights = {role: parent["sha256"] for role, parent in parents.items()}
    content = json.dumps([settings, weights, corpora.fingerprint(documents), tokenizer_hash(tokenizer)], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = lethe_home() / "maps" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with building(folder):
            if (maps := _kept(folder, config.layers)) is None:
                maps = fit_on_text(model, source, tokenizer, documents, config, text)
                partial = folder.with_name(f".{key}.partial")
                for rest in (folder, partial):
                    shutil.rmtree(rest, ignore_errors=True)
                maps.save(partial)
                partial.rename(folder)
                evict(folder.parent)
            else:
                with contextlib.suppress(OSError):  # another user's: `home.py` sees it as older than it is
                    os.utime(folder)
    except OSError as error:
        logger.warning("fitted maps cannot be kept in %s (%s)", folder.parent, error.strerror or error)
        maps = fit_on_text(model, source, tokenizer, documents, config, text)
    device = next(model.parameters()).device
    maps.record |= parents
    return maps.to(device)


def _kept(folder: Path, layers: list[int]) -> AffineMap | None:
    """Maps that were fitted before; None where there are none, or they are damaged."""
    try:
        return load_maps(folder, layers) if HASH in facts_of(folder) else None
    except LetheError:
        return None


LayerScores = dict[str, dict[str, float]]


@dataclass
class MapScores:
    """Scores of fitted maps: by convention and layer, and the convention by which they are better."""

    recorded: bool
    by_convention: dict[str, LayerScores]

    @property
    def convention(self) -> str:
        return max(self.by_convention, key=lambda name: mean_r2(self.by_convention[name]))

    @property
    def scores(self) -> LayerScores:
        return self.by_convention[self.convention]


def mean_r2(scores: LayerScores, key: str = "r2") -> float:
    """Mean over layers of `r2` (or `no_map_r2`)."""
    return math.fsum(layer[key] for layer in scores.values()) / len(scores)


def score_affine(config: AffineScoreConfig) -> MapScores:
    """Score maps on text, per layer, beside no map; maps that do not record their convention at both.

    Raises:
        LetheError: there are no maps, they belong to another pair, or the models or the text cannot be used.
    """
    checked = check_affine_score(config)
    model, tokenizer = refs.load(checked.model, config.dtype)
    source, _ = refs.load(checked.source, config.dtype)
    rows = corpora.tokenise(checked.documents, tokenizer, config.max_length)
    return score_maps(checked.folder, checked.conventions, model, source, rows, tokenizer.pad_token_id, config.batch_size)


def score_maps(
    folder: Path,
    conventions: list[str],
    model: Any,
    source: nn.Module,
    rows: list[list[int]],
    pad_id: int,
    batch_size: int,
    layers: list[int] | None = None,
) -> MapScores:
    """Score the maps in `folder` on rows of tokens, read by each of `conventions`, at all their layers or at `layers`."""
    facts = facts_of(folder)
    found: dict[str, LayerScores] = {}
    with bar("Scoring maps", len(rows) * len(conventions), "documents") as advance:
        for convention in conventions:
            maps = load_maps(folder, layers or layers_of(facts, convention, len(blocks(model))), convention).to(model.device)
            found[convention] = score(activation_pairs(model, source, rows, maps.layers, batch_size, pad_id, advance), maps)
    return MapScores(recorded_convention(facts) is not None, found)
