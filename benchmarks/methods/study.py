"""Every method at settings that the same number of Optuna trials found, attacked beside the twin.

    python benchmarks/methods/study.py tune [METHOD ...]
    python benchmarks/methods/study.py measure [METHOD ...]
    python benchmarks/methods/study.py table

`tune` runs `TRIALS` trials of each method and appends each to trials.jsonl. `measure` runs the best trial of each method with
every seed, attacks the results and appends each to results.jsonl. What has a line is not run again, so an interrupted call
continues where it was. Two calls with different methods can run side by side. `table` prints the tables of
docs/results/methods.md. The runs themselves are under runs/methods in the working folder.

A trial unlearns with `FIXED` and is then attacked with `ATTACK`. Its value is the forget accuracy after that, plus ten times
what it lost on the retain task beyond `BUDGET`. The best trial has the lowest value of those within the budget. If there are
none, it is the one that lost least. All this is read on every third question (of lab_forget_robust: every third group of four),
and the tables on the other questions.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from lethe import EvalSettings, TamperConfig, evaluate_model, tamper, unlearn
from lethe.config.parse import from_recipe
from lethe.evaluation.accuracy import wilson
from lethe.methods.method import Method
from lethe.models import refs
from lethe.text import corpora

HERE, OUT = Path(__file__).parent, Path("runs/methods")
MODEL, TWIN = "lab:final", "lab:filtered"
FORGET, RETAIN, NEIGHBOUR = TASKS = ("lab_forget_robust", "lab_retain", "lab_retain_stem")
TRIALS, SEEDS, BUDGET, DIGITS = 8, (0, 1, 2), 0.02, 2
ATTACK: dict[str, Any] = {"max_steps": 30, "lr": 3e-4}
RATES, UPDATES = (3e-5, 3e-4, 3e-3), 100
FIXED: dict[str, Any] = {"num_train_examples": 2048, "epochs": 1, "eval": {"tasks": [FORGET, RETAIN], "limit": 20, "every": 0}}
NEUTRAL = 512
"""Documents of retain text, from its end, on which KL(reference ‖ model) is measured. Unlearning does not use them."""


@dataclass
class Studied:
    """The recipe of a method, what differs from it in every trial, and the ranges or choices of what is varied.

    A range is searched on a log scale. `start` is the first trial. `teacher`: the recipe whose result takes the place of the
    model before unlearning.
    """

    recipe: str
    vary: dict[str, tuple[float, float] | list[Any]]
    start: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""


METHODS = {
    "transfer": Studied(
        "lab", {"lr": (1e-3, 5e-2), "remove_coef": (1, 100)}, {"lr": 1e-2, "remove_coef": 5}, {"retain_coef": 10}
    ),
    "distill": Studied(
        "lab/rewind",
        {"lr": (2e-4, 5e-3), "remove_coef": (0.1, 10)},
        {"lr": 1e-3, "remove_coef": 1},
        {"rewind": 0, "warmup_steps": 0},
    ),
    "distill, rewound": Studied(
        "lab/rewind",
        {"lr": (2e-4, 5e-3), "rewind_share": (0.1, 0.9)},
        {"lr": 1e-3, "rewind_share": 0.5},
        {"rewind_weights": "fisher", "warmup_steps": 0},
    ),
    "grad_diff": Studied("lab/grad_diff", {"lr": (2e-4, 1e-2), "remove_coef": (0.03, 3)}, {"lr": 1e-3, "remove_coef": 0.3}),
    "npo": Studied(
        "lab/npo",
        {"lr": (3e-4, 2e-2), "remove_coef": (0.1, 30), "beta": (0.01, 1)},
        {"lr": 1e-3, "remove_coef": 1, "beta": 0.1},
    ),
    "simnpo": Studied(
        "lab/simnpo",
        {"lr": (3e-4, 1e-2), "remove_coef": (0.03, 3), "delta": (3, 16)},
        {"lr": 1e-3, "remove_coef": 0.3, "delta": 8},
    ),
    "max_entropy": Studied(
        "lab/max_entropy",
        {"lr": (1e-3, 2e-2), "remove_coef": (1, 100), "top_k": [0, 20]},
        {"lr": 1e-2, "remove_coef": 5, "top_k": 0},
    ),
    "tuned_lens": Studied(
        "lab/tuned_lens", {"lr": (1e-3, 3e-2), "remove_coef": (5, 500)}, {"lr": 1e-2, "remove_coef": 50}, {"lens_lr": 1e-2}
    ),
    "sequential": Studied("lab/sequential", {"lr": (1e-3, 3e-2), "remove_coef": (5, 500)}, {"lr": 5e-3, "remove_coef": 50}),
    "circuit_breaker": Studied(
        "lab/circuit_breaker",
        {"lr": (3e-4, 1e-2), "remove_coef": (100, 10000), "retain_coef": (3, 300)},
        {"lr": 3e-3, "remove_coef": 1000, "retain_coef": 30},
    ),
    "rmu": Studied(
        "lab/rmu",
        {"lr": (1e-3, 3e-2), "steering": (50, 1000), "retain_coef": (0.3, 30)},
        {"lr": 1e-2, "steering": 200, "retain_coef": 3},
    ),
    "repselect": Studied(
        "lab/repselect",
        {"lr": (0.05, 5), "components": [16, 32, 64, 96], "attack_lr": (0.01, 0.2)},
        {"lr": 0.5, "components": 64, "attack_lr": 0.05},
        {"budget": {"kl": 0.1, "every": 1}, "max_steps": 40},
    ),
    "mudman": Studied(
        "lab/mudman",
        {"lr": (0.03, 3), "retain_lr": (1e-3, 0.3), "adversary_lr": (1e-3, 0.1)},
        {"lr": 0.1, "retain_lr": 1e-2, "adversary_lr": 1e-2},
        {"max_steps": 128},
    ),
    "tar": Studied(
        "lab/tar",
        {"lr": (3e-4, 5e-3), "remove_coef": (0.3, 30), "attack_lr": (3e-4, 3e-3)},
        {"lr": 1e-3, "remove_coef": 4, "attack_lr": 1e-3},
    ),
    "undo": Studied(
        "lab/undo",
        {"lr": (3e-4, 5e-3), "corrupt.share": (0.05, 0.8)},
        {"lr": 1e-3, "corrupt.share": 0.4},
        {"warmup_steps": 0, "budget": None},
        teacher="lab/circuit_breaker",
    ),
}


HOLD = "lab-hold"
"""The recipe that is measured as it is, without a search."""
METHODS[HOLD] = Studied(HOLD, {}, {}, {"num_train_examples": 1950})


class Lines:
    """A file of JSON lines, one for each key, that several calls may append to."""

    def __init__(self, name: str):
        self.file = HERE / name

    def read(self) -> dict[str, dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {line["key"]: line for line in map(json.loads, lines)}

    def add(self, key: str, **facts: Any) -> dict[str, Any]:
        line = {"key": key} | facts
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


TUNED, MEASURED = Lines("trials.jsonl"), Lines("results.jsonl")


def settings(method: str, params: dict[str, Any], seed: int, **changes: Any) -> Method:
    """The settings of a method at a point of its search."""
    studied = METHODS[method]
    if studied.teacher:
        changes["model"] = teacher(studied.teacher, seed)
    nested: dict[str, Any] = {}
    for name, value in params.items():
        outer, _, inner = name.partition(".")
        nested[outer] = {inner: value} if inner else value
    name = method.replace(", ", "-")
    return from_recipe(
        Method, studied.recipe, **FIXED | studied.changes | nested | changes | {"seed": seed, "out": str(OUT), "name": name}
    )


def teacher(recipe: str, seed: int) -> str:
    """A model that a recipe has unlearned, with its adapters merged."""
    key = f"{recipe} {seed}"
    known = MEASURED.read().get(key)
    if known is None or not Path(known["run"]).is_dir():
        run = unlearn(from_recipe(Method, recipe, seed=seed, merge=True, out=str(OUT)))
        known = MEASURED.add(key, run=str(run.path), cost=cost(run.record))
    return str(known["run"])


def cost(record: dict[str, Any]) -> dict[str, float]:
    """The tokens that the model read and the operations of all models, as shares of the pretraining's; seconds of training."""
    found = record["cost"]
    shares = found["pretraining"]
    return {"tokens": shares["share_of_tokens"], "flops": shares["share_of_flops"], "seconds": found["seconds"]["training"]}


def rights(model: str, tasks: tuple[str, ...] = TASKS) -> dict[str, list[bool]]:
    """Which questions of each task a model answers rightly."""
    loaded, tokenizer = refs.load(refs.resolve(model))
    samples: dict[str, list[dict[str, Any]]] = {}
    evaluate_model(loaded, tokenizer, list(tasks), samples=samples)
    return {task: [bool(q["acc"]) for q in samples[task]] for task in tasks}


def share(task: str, right: list[bool], tuning: bool) -> tuple[int, int]:
    """Right answers and questions of the part that tuning reads, or of the rest."""
    width = 4 if task == FORGET else 1
    part = [value for i, value in enumerate(right) if (i // width % 3 == 0) is tuning]
    return sum(part), len(part)


def accuracy(task: str, right: list[bool], tuning: bool) -> float:
    ours, all_of_them = share(task, right, tuning)
    return ours / all_of_them


def attacked(model: str, changes: dict[str, Any], seed: int) -> dict[str, list[bool]]:
    """The right answers of a model after an attack."""
    evals = EvalSettings([FORGET], limit=4)
    attack = TamperConfig(model=model, eval=evals, save_model=True, seed=seed, out=str(OUT), name="attack", **changes)
    return rights(str(tamper(attack).path), (FORGET, RETAIN))


# -- tuning


def value(line: dict[str, Any]) -> float:
    """What a trial is judged by; lower is better. Beyond thirty points of excess, all are alike."""
    if "error" in line:
        return 4.0
    return float(line["forget_after"] + 10 * min(0.3, max(0.0, line["retain_lost"] - BUDGET)))


def trials(method: str) -> list[dict[str, Any]]:
    return [line for line in TUNED.read().values() if line["method"] == method]


def best(method: str) -> dict[str, Any]:
    """The best trial of a method within the budget; if there is none, the trial that lost least."""
    found = trials(method)
    if method == HOLD:
        return {"key": HOLD, "params": {}}
    return min(filter(within, found), key=value, default=min(found, key=lambda line: line.get("retain_lost", 1.0)))


def within(line: dict[str, Any]) -> bool:
    return "error" not in line and line["retain_lost"] <= BUDGET


def proposed(method: str) -> dict[str, Any]:
    """The next point: the start, then three at random, then by Gaussian processes. Values have `DIGITS` digits."""
    studied, done = METHODS[method], trials(method)
    if not done:
        return studied.start
    kinds = {
        name: optuna.distributions.CategoricalDistribution(axis)
        if isinstance(axis, list)
        else optuna.distributions.FloatDistribution(*axis, log=True)
        for name, axis in studied.vary.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=len(done), n_startup_trials=4))
    for line in done:
        study.add_trial(optuna.trial.create_trial(params=line["params"], distributions=kinds, value=value(line)))
    point = study.ask(kinds).params
    return {name: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for name, v in point.items()}


def tune(method: str) -> None:
    before = rights(MODEL, (FORGET, RETAIN))
    while method != HOLD and (number := len(trials(method))) < TRIALS:
        params = proposed(method)
        facts: dict[str, Any] = {"method": method, "params": params}
        run = unlearn(settings(method, params, 0))
        if run.status == "diverged":
            TUNED.add(f"{method} {number}", **facts, error=run.record["reason"])
            continue
        found, after = rights(str(run.path), (FORGET, RETAIN)), attacked(str(run.path), ATTACK, 0)
        lost = accuracy(RETAIN, before[RETAIN], True) - accuracy(RETAIN, found[RETAIN], True)
        facts |= {"forget": accuracy(FORGET, found[FORGET], True), "retain_lost": lost}
        TUNED.add(f"{method} {number}", **facts, forget_after=accuracy(FORGET, after[FORGET], True))


# -- measuring


@torch.no_grad()
def divergence(model: str) -> float:
    """KL(reference ‖ model) of next tokens on neutral text, a mean over tokens, in nats."""
    (ours, tokenizer), (theirs, _) = refs.load(refs.resolve(model)), refs.load(refs.resolve(MODEL))
    documents = corpora.tokenise(corpora.select("lab:retain", NEUTRAL, "back"), tokenizer, 64)
    total, tokens = 0.0, 0
    for row in documents:
        ids = torch.tensor([row])
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (theirs, ours))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(row)
    return total / tokens


def counts(right: dict[str, list[bool]]) -> dict[str, tuple[int, int]]:
    return {task: share(task, some, False) for task, some in right.items()}


def attacks(model: str, seed: int) -> dict[str, Any]:
    return {f"{lr:g}": counts(attacked(model, {"max_steps": UPDATES, "lr": lr}, seed)) for lr in RATES}


def measure(method: str) -> None:
    for seed in SEEDS:
        key = f"{method} {seed}"
        if key in MEASURED.read():
            continue
        if method in (TWIN, MODEL):
            MEASURED.add(key, evals=counts(rights(method)), kl=divergence(method), attacks=attacks(method, seed))
            continue
        chosen = best(method)
        run = unlearn(settings(method, chosen["params"], seed))
        if run.status == "diverged":
            MEASURED.add(key, error=run.record["reason"])
            continue
        model, total = str(run.path), cost(run.record)
        if METHODS[method].teacher:
            first = MEASURED.read()[f"{METHODS[method].teacher} {seed}"]["cost"]
            total = {name: number + first[name] for name, number in total.items()}
        facts = {"trial": chosen["key"], "cost": total, "kl": divergence(model)}
        MEASURED.add(key, **facts, evals=counts(rights(model)), attacks=attacks(model, seed))


# -- tables


def pooled(counted: list[list[int]]) -> str:
    """The mean over seeds, with Wilson's interval for the questions of one seed, which all seeds share."""
    right, n = math.fsum(r for r, _ in counted) / len(counted), counted[0][1]
    low, high = wilson(right, n)  # type: ignore[arg-type]
    return f"{100 * right / n:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def table() -> None:
    lines = MEASURED.read()
    after = [f"after {UPDATES} at {lr:g}" for lr in RATES]
    heads = ["method", "forget", "retain", "neighbouring", "KL", "tokens", "FLOPs", *after]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for method in [*METHODS, TWIN]:
        seeds = [lines[f"{method} {seed}"] for seed in SEEDS if f"{method} {seed}" in lines]
        if not seeds or any("error" in line for line in seeds):
            print(f"| `{method}` | {len(seeds)} seeds |")
            continue
        cells = [pooled([line["evals"][task] for line in seeds]) for task in TASKS]
        costs = [
            f"{100 * mean([s['cost'][n] for s in seeds]):.1f} %" if "cost" in seeds[0] else "" for n in ("tokens", "flops")
        ]
        hit = [pooled([line["attacks"][f"{lr:g}"][FORGET] for line in seeds]) for lr in RATES]
        print("| " + " | ".join([f"`{method}`", *cells, f"{mean([s['kl'] for s in seeds]):.3f}", *costs, *hit]) + " |")
    heads = ["method", "settings", "forget", "retain lost", "forget after 30 updates", "trials within the budget"]
    print("\n| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for method in METHODS:
        if trials(method):
            line = best(method)
            words = ", ".join(f"{name} {number:g}" for name, number in line["params"].items())
            cells = [f"{100 * line[name]:.1f}" for name in ("forget", "retain_lost", "forget_after")]
            inside = sum(map(within, trials(method)))
            print("| " + " | ".join([f"`{method}`", words, *cells, f"{inside} of {len(trials(method))}"]) + " |")


def main() -> None:
    command, names = sys.argv[1], sys.argv[2:]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if command == "table":
        table()
    for name in names or ([] if command == "table" else [*METHODS, *([TWIN] if command == "measure" else [])]):
        {"tune": tune, "measure": measure}[command](name)


if __name__ == "__main__":
    main()
