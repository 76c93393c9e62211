"""What a pareto sweep finds beside random search, and what the controller of a sweep costs.

    python benchmarks/sweep.py [pareto | trivial]

`pareto`: on the lab, for seeds 0 to 4, a sweep of 20 real runs with the default sampler and one with random search. Each front
is measured by the area between it and the worst point, (1, 1) in (forget accuracy, 1 - retain accuracy).
`trivial`: 200 runs of one update each, two at a time, from the command to its end.

With the lab's preset `nano` (LETHE_LAB=nano) a run of `pareto` takes about 2 s.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from lethe.config import SweepConfig
from lethe.lab.presets import active_preset
from lethe.sweeps.controller import sweep

RUNS, SEEDS, TRIVIAL = 20, range(5), 200
TASKS = ["lab_forget_robust", "lab_retain"]
RECIPE: dict[str, Any] = {
    "affine": "none",
    "layers": [0, 2, 4],
    "max_steps": 20,
    "num_train_examples": 80,
    "per_device_train_batch_size": 4,
    "eval": {"tasks": TASKS},
}
AXES = {
    "lr": {"low": 1e-3, "high": 0.2, "log": True},
    "retain_coef": {"low": 0.1, "high": 100, "log": True},
    "remove_coef": {"low": 1, "high": 100, "log": True},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """The unlearning run that is varied."""
    return RECIPE | {"source": f"lab:global_step{active_preset().onset}"} | changes


def area(sampler: Any, seed: int) -> float:
    """The area that a sweep's front encloses."""
    with tempfile.TemporaryDirectory() as out:
        config = SweepConfig(
            kind="pareto", unlearn=recipe(), vary=AXES, sampler=sampler, seeds=[seed], max_runs=RUNS, jobs=2, out=out
        )
        trials = [trial["evals"] for trial in sweep(config).record["trials"] if not trial["reference"]]
    assert len(trials) == RUNS
    forget, retain = TASKS
    return hypervolume((evals[forget]["acc"], 1 - evals[retain]["acc"]) for evals in trials if evals)


def hypervolume(points: Iterable[tuple[float, float]], worst: tuple[float, float] = (1.0, 1.0)) -> float:
    """The area between a front of pairs (both to be small) and the worst point."""
    area, height = 0.0, worst[1]
    for x, y in sorted(p for p in points if p[0] < worst[0] and p[1] < worst[1]):
        if y < height:
            area += (worst[0] - x) * (height - y)
            height = y
    return area


def pareto() -> None:
    """Both samplers, seed by seed."""
    found: dict[str, list[float]] = {"gp": [], "random": []}
    for seed in SEEDS:
        for sampler, areas in found.items():
            areas.append(area(sampler, seed))
            print(f"seed {seed}  {sampler:<6}  {areas[-1]:.4f}", flush=True)
    for sampler, areas in found.items():
        print(f"mean    {sampler:<6}  {statistics.mean(areas):.4f}  ({min(areas):.4f} to {max(areas):.4f})")


def trivial() -> None:
    """The seconds of many runs that do next to nothing."""
    least = {"max_steps": 1, "num_train_examples": 4, "layers": [0, 2], "eval": {"tasks": TASKS, "limit": 4}}
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        axis = {"low": 1e-4, "high": 0.1, "log": True, "steps": TRIVIAL}
        run = sweep(SweepConfig(unlearn=recipe(**least), vary={"lr": axis}, jobs=2, out=out))
        took = time.perf_counter() - start
    print(f"{TRIVIAL} trivial runs: {took:.0f} s  {run.record['counts']}", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ["trivial", "pareto"]:
        {"pareto": pareto, "trivial": trivial}[part]()
