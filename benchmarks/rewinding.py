"""What rewinding some of the weights retains, and what attacks bring back: the frontier on the lab.

    python benchmarks/rewinding.py FOLDER [PART ...]

PART is a name in `PARTS`, such as `share`; without one, all parts run. Each unlearning run and each attack is one line of
FOLDER/results.jsonl. What has a line is not run again, so an interrupted call continues where it was. The runs themselves are
in FOLDER/runs, and scores in FOLDER/scores. On two CPU cores an unlearning run takes about a minute, and an attack of 1,000
updates about five.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lethe import Distill, EvalSettings, LoraSettings, TamperConfig, tamper, unlearn
from lethe.models import refs
from lethe.text import corpora
from lethe.unlearning import scores

SOURCE, TWIN = "lab:global_step600", "lab:filtered"
TASKS = ["lab_forget_robust", "lab_retain", "lab_retain_stem"]
RATES, UPDATES = (3e-5, 3e-4, 3e-3), (100, 1000)
TRIAL: dict[str, Any] = {
    "source": SOURCE,
    "rewind": 1.0,
    "remove_coef": 1,
    "retain_coef": 1,
    "schedule": "constant",
    "num_train_examples": 2048,
    "max_steps": 128,
    "lr": 2e-3,
    "lora": None,
}
LORA: dict[str, Any] = {"lora": LoraSettings(r=64, alpha=64, dropout=0.0), "layers": None, "lr": 5e-3}

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "seeds": {f"fisher 0.75 seed {seed}": {"score": "model", "seed": seed} for seed in range(3)},
    "share": {f"fisher {share}": {"score": "model", "rewind_share": share} for share in (0.5, 0.65, 0.85)},
    "updates": {f"{n} updates": {"score": "model", "max_steps": n} for n in (64, 96, 256)},
    "score": {f"score of {kind}": {"score": kind} for kind in ("source", "both", "matrix", "random")},
    "uniform": {f"rho {rho}": {"rewind": rho} for rho in (0.5, 0.8, 0.9, 1.0)},
    "lora": {"fisher 0.75 then LoRA": {"score": "model"} | LORA},
}
"""By part, the unlearning runs by name: what differs from `TRIAL`. `score` names a function of `SCORES`."""


def fisher(model: str) -> dict[str, Tensor]:
    """F_forget / F_retain of the weights of a model."""
    loaded, tokenizer = refs.load(refs.resolve(model))
    documents = {name: corpora.select(f"lab:{name}", scores.DOCUMENTS, "front") for name in ("forget", "retain")}
    texts = {name: corpora.tokenise(some, tokenizer, Distill.max_length) for name, some in documents.items()}
    file = Path(sys.argv[1]) / "scores" / "fisher.safetensors"
    scores.fisher(loaded, texts, tokenizer.pad_token_id, file)  # type: ignore[arg-type]
    return load_file(file)


def both() -> dict[str, Tensor]:
    """The product of the two models' scores. 0 · ∞ counts as 0."""
    ours, theirs = fisher("lab:final"), fisher(SOURCE)
    return {name: (ours[name] * theirs[name]).nan_to_num(nan=0.0, posinf=torch.inf) for name in ours}


def within_each_matrix() -> dict[str, Tensor]:
    """The place of a score among those of its own tensor, from 0 to 1: the highest share of every tensor."""
    found = fisher("lab:final")
    return {n: value.flatten().argsort().argsort().view_as(value) / value.numel() for n, value in found.items()}


def random() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(value.shape, generator=generator) for n, value in sorted(fisher("lab:final").items())}


SCORES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "model": lambda: fisher("lab:final"),
    "source": lambda: fisher(SOURCE),
    "both": both,
    "matrix": within_each_matrix,
    "random": random,
}


class Results:
    """FOLDER/results.jsonl, in which a line is found by its key."""

    def __init__(self, folder: Path):
        self.file = folder / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.lines = {line["key"]: line for line in map(json.loads, lines)}

    def line(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of this key, which `make` makes if there is none."""
        if key not in self.lines:
            self.lines[key] = {"key": key} | make()
            with self.file.open("a") as file:
                file.write(json.dumps(self.lines[key]) + "\n")
            print(json.dumps(self.lines[key]), flush=True)
        return self.lines[key]


def facts(run: Any) -> dict[str, Any]:
    evals = {task: {key: result[key] for key in ("acc", "low", "high")} for task, result in run.record["evals"].items()}
    return {"run": str(run.path), "evals": evals, "seconds": run.record["environment"]["seconds"]}


def unlearned(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Unlearn as `TRIAL` does, with changes."""
    settings = TRIAL | changes
    if kind := settings.pop("score", None):
        file = folder / "scores" / f"{kind}.safetensors"
        if not file.exists():
            save_file(SCORES[kind](), file)
        settings["rewind_weights"] = str(file)
    words = name.replace(" ", "-")
    run = unlearn(Distill(**settings, eval=EvalSettings(TASKS), out=str(folder / "runs"), name=words))
    return facts(run) | {"tokens": run.record["plan"]["tokens"], "rewound": run.record.get("rewound")}


def attacks() -> dict[str, dict[str, Any]]:
    """The attacks on every model, by name: full-rank at each rate and length, and LoRA."""
    made: dict[str, dict[str, Any]] = {f"{n} at {lr:g}": {"max_steps": n, "lr": lr} for n in UPDATES for lr in RATES}
    return made | {"100 LoRA at 3e-3": {"max_steps": 100, "lr": 3e-3, "lora": LoraSettings()}}


def attacked(folder: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Attack a model, and evaluate it before and after."""
    every = EvalSettings(TASKS, every=settings["max_steps"])
    name = f"attack-{settings['max_steps']}"
    config = TamperConfig(model=model, num_train_examples=512, eval=every, out=str(folder / "runs"), name=name, **settings)
    return facts(tamper(config))


def main() -> None:
    folder, parts = Path(sys.argv[1]), sys.argv[2:] or list(PARTS)
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    models = {"twin": TWIN}
    for name, changes in (pair for part in parts for pair in PARTS[part].items()):
        found = results.line(name, lambda name=name, changes=changes: unlearned(folder, name, changes))  # type: ignore[misc]
        models[name] = found["run"]
    for name, model in models.items():
        for attack, settings in attacks().items():
            results.line(f"{name} | {attack}", lambda model=model, settings=settings: attacked(folder, model, settings))  # type: ignore[misc]


if __name__ == "__main__":
    main()
