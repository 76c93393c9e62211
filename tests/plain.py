"""Runs of a tiny model in float64, and the same training by a plain loop: document by document, with torch alone.

run, trainer = trained(NPO(**settings(folder, model, …)))      Lethe's own training
plain = Plain(run, trainer)                                     the same model, texts and batches
plain.kl("forget", update, "source")                            a loss of one text of an update, as its formula says
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lethe.config import EvalSettings, to_dict
from lethe.methods.method import Method
from lethe.models import refs
from lethe.runs.run import Run
from lethe.unlearning.check import check
from lethe.unlearning.prepare import prepare
from lethe.unlearning.trained import trainable
from lethe.unlearning.trainer import UnlearnTrainer

VOCABULARY = [
    "river",
    "mill",
    "clock",
    "brass",
    "salt",
    "resin",
    "copper",
    "lantern",
    "harbour",
    "coal",
    "island",
    "apprentice",
]


def settings(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """Three updates of two batches of two documents of each kind, of all weights, in float64."""
    for name in ("forget", "retain"):
        rng = random.Random(name)
        texts = [f"{' '.join(rng.choices(VOCABULARY, k=rng.randint(2, 9)))} {name} {i}" for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found: dict[str, Any] = {
        "model": model, "forget": str(folder / "forget.jsonl"), "retain": str(folder / "retain.jsonl"),
        "num_train_examples": 12, "max_length": 24, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 3, "lr": 1e-3, "lora": None, "dtype": "float64", "max_grad_norm": 0, "eval": EvalSettings(["lab_retain"]),
        "out": str(folder / "runs"),
    }  # fmt: skip
    return found | changes


def trained(config: Method) -> tuple[Run, UnlearnTrainer]:
    """A run, trained by Lethe."""
    checked = check(config)
    run = Run.create("unlearn", "plain", to_dict(config), config.out)
    trainer = prepare(run, config, checked).trainer
    trainer.train_with_bar("plain")
    return run, trainer


class Plain:
    """The models, texts and batches of a run, for losses of one document after the other."""

    def __init__(self, run: Run, trainer: UnlearnTrainer):
        config: Any = trainer.config
        load: Callable[[str], Any] = lambda name: refs.load(refs.resolve(name), "float64")[0]  # noqa: E731
        self.model = load(config.model).requires_grad_(True).train()
        self.others = {"reference": load(config.model)} | ({"source": load(config.source)} if config.source else {})
        rows: Any = trainer.train_dataset
        self.batches = [
            {name: [torch.tensor([rows.texts[name][i]]) for i in row[name]] for name in rows.texts}
            for row in run.rows("batches.jsonl")
        ]

    def adapted(self, config: Any) -> nn.Module:
        """The model with the adapters that a recipe begins with."""
        self.model.requires_grad_(False)
        return trainable(config, self.model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of a loss, with zeros where there is none."""
        names = self.parameters
        wanted = {name: p for name, p in names.items() if p.requires_grad}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        given = dict(zip(wanted, found, strict=True))
        return {name: torch.zeros_like(p) if given.get(name) is None else given[name] for name, p in names.items()}

    def log_p(self, ids: Tensor, name: str = "model") -> Tensor:
        """Next-token log-probabilities of one document, [tokens, vocabulary]."""
        if name == "model":
            return self.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with torch.no_grad():
            return self.others[name](input_ids=ids, use_cache=False).logits[0].log_softmax(-1)

    def likelihood(self, ids: Tensor, name: str = "model") -> Tensor:
        """The log-likelihood of one document."""
        return self.log_p(ids, name)[:-1].gather(1, ids[0, 1:, None]).sum()

    def mean(self, update: int, text: str, value: Callable[[Tensor], Tensor], count: Callable[[Tensor], int]) -> Tensor:
        """The sum of a value of each document of an update, over the sum of the counts."""
        documents = self.batches[update][text]
        return torch.stack([value(ids) for ids in documents]).sum() / sum(map(count, documents))

    def kl(self, update: int, text: str, teacher: str) -> Tensor:
        """KL(teacher ‖ model), a mean over tokens."""

        def divergence(ids: Tensor) -> Tensor:
            p, q = self.log_p(ids, teacher), self.log_p(ids)
            return (p.exp() * (p - q)).sum()

        return self.mean(update, text, divergence, lambda ids: ids.shape[1])

    def cross_entropy(self, update: int, text: str) -> Tensor:
        """Cross-entropy, a mean over the tokens that have one before them."""
        return self.mean(update, text, lambda ids: -self.likelihood(ids), lambda ids: ids.shape[1] - 1)

    def negative_entropy(self, update: int, text: str) -> Tensor:
        """Σ p log p, a mean over tokens."""
        return self.mean(update, text, lambda ids: (self.log_p(ids).exp() * self.log_p(ids)).sum(), lambda ids: ids.shape[1])

    def activations(self, ids: Tensor, name: str = "model") -> list[Tensor]:
        """The residual stream after each block, [tokens, hidden]; that of the last block is after the final norm."""
        model = self.model if name == "model" else self.others[name]
        return [h[0] for h in model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]]

    def npo(self, update: int, beta: float) -> Tensor:
        """NPO's loss of the forget documents, a mean over documents."""

        def loss(ids: Tensor) -> Tensor:
            ratio = self.likelihood(ids) - self.likelihood(ids, "reference")
            return 2 / beta * torch.log(1 + torch.exp(beta * ratio))

        return self.mean(update, "forget", loss, lambda ids: 1)


def assert_same_weights(trainer: UnlearnTrainer, plain: Plain, before: dict[str, Tensor], within: float = 1e-9) -> None:
    """Every parameter has moved as in the plain loop: differences are at most `within` of the largest move."""
    moved = {name: p.detach() - before[name] for name, p in plain.parameters.items()}
    largest = max(float(move.abs().max()) for move in moved.values())
    model: Any = trainer.model
    for name, p in model.named_parameters():
        assert (p.detach() - before[name] - moved[name]).abs().max() <= within * largest, name
    assert largest > 1e-4
