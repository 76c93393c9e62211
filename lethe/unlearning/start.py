"""The weights that a run starts from, where they are not the model's: moved towards the source, or towards noise.

    rewind     θ ← (1 − ρ) θ + ρ θ_source                        all weights, or those with the highest scores (`scores.py`)
    corrupt    θ ← (1 − α) θ + α β N for matrices, (1 − α) θ for vectors; N is Xavier-uniform

`prepare` calls `move_start` before it adds adapters. What was rewound is recorded in run.json under `rewound`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import distributed
from lethe.config.unlearning import CorruptSettings
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.methods.method import Method
from lethe.models.flops import Flops
from lethe.objectives.losses import wide
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.training import cost
from lethe.training.optimizers import layer_of, routes
from lethe.unlearning import scores
from lethe.unlearning.check import Checked
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.scores import Highest


def move_start(
    run: Run,
    config: Method,
    checked: Checked,
    model: PreTrainedModel,
    source: Frozen | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Move the model's weights to where the recipe starts, and record which of them were rewound."""
    if config.corrupt:
        corrupt(model, config.corrupt, config.seed)
    if not config.rewind or source is None:
        return
    if config.rewind_weights == "all":
        rewind(model, source, config.rewind)
        return
    file = checked.scores or _fisher(run, config, checked, model, tokenizer)
    chosen = Highest(file, dict(model.named_parameters()), config.rewind_share)
    shares = rewind(model, source, config.rewind, chosen)
    run.update(rewound={"threshold": chosen.threshold} | shares)


def _fisher(run: Run, config: Method, checked: Checked, model: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The file of the Fisher scores, the run's artifact `scores`. A resumed run uses those that it has written.

    `lethe check` scores one batch of each text, and estimates the time of all.
    """
    file, recorded = run.path / scores.FILE, (run.record.get("artifacts") or {}).get("scores") or {}
    if distributed.from_first(lambda: bool(recorded) and file.is_file() and sha256(file) == recorded["sha256"]):
        return file
    most = scores.BATCH if run.record["kind"] == "check" else scores.DOCUMENTS
    documents = {"forget": checked.forget, "retain": checked.retain}
    texts = {name: corpora.tokenise(some[:most], tokenizer, config.max_length) for name, some in documents.items()}
    began = time.monotonic()
    scores.fisher(model, texts, tokenizer.pad_token_id, file)  # type: ignore[arg-type]
    seconds = time.monotonic() - began
    seconds *= sum(min(len(some), scores.DOCUMENTS) for some in documents.values()) / sum(map(len, texts.values()))
    count, lengths = Flops(model), [len(row) for rows in texts.values() for row in rows]  # fisher leaves all weights trained
    times = len(scores.groups(dict(model.named_parameters())))
    passes = count.forward(lengths, 0, True) + count.backward(lengths, 0, True)
    tokens = dict.fromkeys(("model_forward", "model_backward"), times * sum(lengths))
    cost.book(run, "scoring weights", tokens, times * passes)
    run.update(
        artifacts={"scores": {"path": file.name, "sha256": distributed.from_first(lambda: sha256(file))}},
        rewound={"tokens": sum(len(row) for rows in texts.values() for row in rows), "seconds": round(seconds, 3)},
    )
    return file


@torch.no_grad()
def rewind(model: Any, source: Frozen, share: float, chosen: Highest | None = None) -> dict[str, Any]:
    """θ ← (1 − share) θ_model + share θ_source, weight by weight, in place; with `chosen`, only these weights.

    Returns:
        The share of the weights that was rewound: of all (`share`), by block (`by_layer`) and by kind (`by_role`).

    Raises:
        LetheError: a weight of the source is not finite.
    """
    layers, roles = layer_of(model), {route.name: route.role for route in routes(model, "adamw")}
    counts: dict[str, dict[str, list[int]]] = {"by_layer": defaultdict(lambda: [0, 0]), "by_role": defaultdict(lambda: [0, 0])}
    with source.weights() as weight:
        for name, parameter in model.named_parameters():
            theirs = distributed.whole(weight(name))
            if not theirs.isfinite().all():
                raise LetheError(f"source: {name} is not finite, so the source diverged or is damaged; give another")
            mask = None if chosen is None else chosen.of(name)
            _move(parameter, theirs, share, mask)
            moved = parameter.numel() if mask is None else int(mask.sum())
            for count in (counts["by_layer"][layers[name]], counts["by_role"][roles[name]]):
                count[:] = count[0] + moved, count[1] + parameter.numel()
    moved, total = map(sum, zip(*counts["by_layer"].values(), strict=True))
    return {"share": moved / total} | {by: {key: a / b for key, (a, b) in found.items()} for by, found in counts.items()}


@torch.no_grad()
def corrupt(model: nn.Module, settings: CorruptSettings, seed: int) -> None:
    """θ ← (1 − α) θ + α β N for matrices, and (1 − α) θ for vectors, in place. α is `share`, β is `noise`.

    N is uniform between ±√(6 / (inputs + outputs)) of each matrix (Glorot & Bengio, 2010). Embeddings are matrices. Experts
    that are stored together are matrices of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        target = torch.zeros((), dtype=wide(parameter.new_empty(0)).dtype).expand(parameter.shape)
        if parameter.ndim > 1:
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            noise = torch.empty(parameter.shape, dtype=target.dtype).uniform_(-bound, bound, generator=generator)
            target = settings.noise * noise
        _move(parameter, target, settings.share)


def _move(parameter: Tensor, target: Tensor, share: float, chosen: Tensor | None = None) -> None:
    """θ ← (1 − share) θ + share · target, in place; with `chosen`, where it is true. Both tensors are whole."""

    def part(value: Tensor) -> Tensor:
        return distributed.own(distributed.put(value, parameter)).to(parameter.device)

    ours, theirs = distributed.own(parameter), part(target.to(parameter.dtype))
    if chosen is None:
        ours.lerp_(theirs, share)
    else:
        ours.copy_(torch.where(part(chosen), ours.lerp(theirs, share), ours))
