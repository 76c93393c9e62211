"""What rewinding some of the weights retains, and what attacks bring back: the frontier on the lab.

    python benchmarks/rewinding.py FOLDER [PART ...]
    LETHE_LAB=second python benchmarks/rewinding.py FOLDER/second controls hold
    python benchmarks/rewinding.py FOLDER table

PART is a name in `PARTS`, such as `share`; without one, all parts run. Each unlearning run and each attack is one line of
FOLDER/results.jsonl. What has a line is not run again, so an interrupted call continues where it was, and two calls with
different parts can run side by side. `table` prints the tables of docs/results/rewinding.md. The runs themselves are in
FOLDER/runs, and scores in FOLDER/scores. With one thread, an unlearning run takes 40 s, an attack of 1,000 updates 100 s.
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

from lethe import EvalSettings, LoraSettings, TamperConfig, evaluate_model, tamper, unlearn
from lethe.config.parse import from_recipe
from lethe.evaluation.lab import build_lab
from lethe.lab.presets import PRESETS, LabPreset
from lethe.methods.method import Method
from lethe.models import refs
from lethe.text import corpora
from lethe.unlearning import scores

PRESETS["second"] = LabPreset("second", seed=1, threads=1)
SOURCE, TWIN, MODEL = "lab:global_step600", "lab:filtered", "lab:final"
FORGET, RETAIN, NEIGHBOUR = TASKS = ["lab_forget_robust", "lab_retain", "lab_retain_stem"]
ATTACKS: dict[str, dict[str, Any]] = {
    "3e-5": {"lr": 3e-5},
    "3e-4": {"lr": 3e-4},
    "3e-3": {"lr": 3e-3},
    "LoRA 3e-3": {"lr": 3e-3, "lora": LoraSettings()},
}
"""At a constant rate, so that the evaluation after 100 of 1,000 updates is that of an attack of 100."""
LONG = ("controls", "hold", "seeds")
"""Parts whose models are attacked with 1,000 updates. The others are attacked with 100."""
NO_SCORES: dict[str, Any] = {"rewind_weights": "all", "rewind_share": 0.75}
LORA: dict[str, Any] = {"lora": LoraSettings(r=64, alpha=64, dropout=0.0), "lr": 3e-3}

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "hold": {"lab-hold": {}},
    "seeds": {f"lab-hold, seed {seed}": {"seed": seed} for seed in (1, 2)},
    "start": {"rho 1": NO_SCORES, "study's LoRA": {"recipe": "lab"}},
    "share": {f"share {share}": {"rewind_share": share} for share in (0.5, 0.65, 0.75, 0.85)},
    "updates": {f"{n} documents": {"num_train_examples": n} for n in (1000, 1500, 2250)},
    "again": {"2 epochs": {"epochs": 2}, "4 epochs": {"epochs": 4}},
    "score": {f"score of {kind}": {"score": kind} for kind in ("source", "both", "matrix", "random", "32", "512")},
    "uniform": {f"rho {rho}": NO_SCORES | {"rewind": rho} for rho in (0.5, 0.8, 0.9)},
    "lora": {"lab-hold with LoRA": LORA},
}
"""By part, the unlearning runs by name: what differs from the recipe lab-hold. `score` names a function of `SCORES`."""


def fisher(model: str, most: int = scores.DOCUMENTS) -> dict[str, Tensor]:
    """F_forget / F_retain of the weights of a model, from so many documents of each text."""
    loaded, tokenizer = refs.load(refs.resolve(model))
    documents = {name: corpora.select(f"lab:{name}", most, "front") for name in ("forget", "retain")}
    texts = {name: corpora.tokenise(some, tokenizer, 64) for name, some in documents.items()}
    file = Path(sys.argv[1]) / "scores" / f"fisher-{model.replace(':', '-')}-{most}.safetensors"
    if not file.exists():
        scores.fisher(loaded, texts, tokenizer.pad_token_id, file)  # type: ignore[arg-type]
    return load_file(file)


def both() -> dict[str, Tensor]:
    """The product of the two models' scores. 0 · ∞ counts as 0."""
    ours, theirs = fisher(MODEL), fisher(SOURCE)
    return {name: (ours[name] * theirs[name]).nan_to_num(nan=0.0, posinf=torch.inf) for name in ours}


def within_each_matrix() -> dict[str, Tensor]:
    """The place of a score among those of its own tensor, from 0 to 1: the highest share of every tensor."""
    found = fisher(MODEL)
    return {n: value.flatten().argsort().argsort().view_as(value) / value.numel() for n, value in found.items()}


def random() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(value.shape, generator=generator) for n, value in sorted(fisher(MODEL).items())}


SCORES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "source": lambda: fisher(SOURCE),
    "both": both,
    "matrix": within_each_matrix,
    "random": random,
    "32": lambda: fisher(MODEL, 32),
    "512": lambda: fisher(MODEL, 512),
}


class Results:
    """FOLDER/results.jsonl, in which a line is found by its key."""

    def __init__(self, folder: Path):
        self.file = folder / "results.jsonl"

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {line["key"]: line for line in map(json.loads, lines)}

    def line(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of this key, which `make` makes if there is none."""
        if key not in self.lines:
            text = json.dumps({"key": key} | make())
            with self.file.open("a") as file:
                file.write(text + "\n")
            print(text, flush=True)
        return self.lines[key]


def accuracies(evals: dict[str, Any]) -> dict[str, float]:
    return {task: result["acc"] for task, result in evals.items()}


def unlearned(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Unlearn as the recipe does, with changes."""
    changes = {"recipe": "lab-hold"} | changes
    if kind := changes.pop("score", None):
        file = folder / "scores" / f"{kind}.safetensors"
        if not file.exists():
            save_file(SCORES[kind](), file)
        changes["rewind_weights"] = str(file)
    words = name.replace(",", "").replace("'", "").replace(" ", "-")
    recipe = changes.pop("recipe")
    config = from_recipe(Method, recipe, **changes, eval=EvalSettings(TASKS), out=str(folder / "runs"), name=words)
    record = (run := unlearn(config)).record
    shares = record["cost"]["pretraining"]
    facts = {"tokens": record["plan"]["tokens"], "cost": shares, "rewound": record.get("rewound"), "losses": record["losses"]}
    return {"run": str(run.path), "evals": accuracies(record["evals"])} | facts


def attacked(folder: Path, model: str, settings: dict[str, Any], updates: int) -> dict[str, Any]:
    """Attack a model, and evaluate it every 100 updates."""
    changes = {"num_train_examples": 512, "max_steps": updates, "eval": EvalSettings(TASKS[:2], every=100)} | settings
    run = tamper(TamperConfig(model=model, out=str(folder / "runs"), name="attack", **changes))
    return {"curve": {str(row["step"]): accuracies(row["evals"]) for row in run.rows("curve.jsonl")}}


def evaluated(model: str) -> dict[str, Any]:
    return {"run": model, "evals": accuracies(evaluate_model(*refs.load(refs.resolve(model)), TASKS))}


def table(results: Results) -> None:
    """One row for each model. After 1,000 updates, the attacked model's retain accuracy is in brackets."""
    lines = results.lines
    heads = ["start", "forget", "retain", "neighbouring", "tokens", "FLOPs"]
    heads += [f"{n:,} at {attack}" for n in (100, 1000) for attack in ATTACKS]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, line in lines.items():
        if "evals" not in line:
            continue
        cells = [f"{100 * line['evals'][task]:.1f}" for task in TASKS]
        cost = line.get("cost") or {}
        cells += [f"{100 * cost[key]:.1f} %" if cost else "" for key in ("share_of_tokens", "share_of_flops")]
        for n in ("100", "1000"):
            for attack in ATTACKS:
                found = lines.get(f"{name} | {attack}", {"curve": {}})["curve"].get(n)
                cells.append(f"{100 * found[FORGET]:.1f} ({100 * found[RETAIN]:.0f})" if found else "")
        print("| " + " | ".join([name, *cells]) + " |")


def main() -> None:
    folder, parts = Path(sys.argv[1]), sys.argv[2:] or ["controls", *PARTS]
    results = Results(folder)
    if parts == ["table"]:
        return table(results)
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    build_lab()
    for part in parts:
        for name, changes in PARTS[part].items() if part != "controls" else ():
            results.line(name, lambda name=name, changes=changes: unlearned(folder, name, changes))  # type: ignore[misc]
        for name in PARTS.get(part, (MODEL, TWIN)):
            line = results.line(name, lambda name=name: evaluated(name))  # type: ignore[misc]
            updates = 1000 if part in LONG else 100
            for attack, settings in ATTACKS.items() if name != MODEL else ():
                model = line["run"]
                results.line(f"{name} | {attack}", lambda m=model, s=settings, n=updates: attacked(folder, m, s, n))  # type: ignore[misc]
    return None


if __name__ == "__main__":
    main()
