"""What a run costs: tokens by model, floating-point operations by formula (`lethe.models.flops`), seconds, peak memory.

    pass -> Tally -> `passes` and `flops` in a line of metrics.jsonl -> summary -> `cost` in run.json
    work before the first update -> book -> `cost.before` in run.json

Every update counts once, also if a resumed run repeats it. Work before the first update counts as if this run did it, even
where it finds a cache of another run. So the cost does not depend on what was run before. Evaluation and the trial batch of the
plan are left out. The seconds of evaluation are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lethe.models import refs
from lethe.models.flops import Flops
from lethe.runs.machine import peak_memory
from lethe.runs.run import Run

Tokens = dict[str, int]
"""Tokens of passes, by model and direction: `model_forward`, `model_backward`, `reference_forward`, `source_forward`."""


class Tally:
    """The passes of this process since they were last taken. `counts`: whether passes count; those of a `Filler` do not."""

    def __init__(self) -> None:
        self.counts = True
        self.tokens: Counter[str] = Counter()
        self.flops = 0

    def add(self, name: str, lengths: Sequence[int], flops: int) -> None:
        """Count a pass, such as `model_forward`, over documents of these lengths."""
        if self.counts:
            self.tokens[name] += sum(lengths)
            self.flops += flops

    def take(self) -> tuple[Tokens, int]:
        """All that was counted. The tally is empty afterwards."""
        taken = dict(self.tokens), self.flops
        self.tokens.clear()
        self.flops = 0
        return taken


def together(parts: Iterable[tuple[Tokens, int]]) -> dict[str, Any]:
    """The fields of a line of metrics.jsonl, from the tallies of all processes."""
    parts = list(parts)
    tokens: Counter[str] = Counter()
    for one, _ in parts:
        tokens.update(one)
    return {"passes": dict(sorted(tokens.items())), "flops": float(sum(flops for _, flops in parts))}


def book(run: Run, work: str, tokens: Tokens, flops: float) -> None:
    """Record work that a run does outside its updates, by a name such as `maps`. A name that is booked again is replaced."""
    before = (run.record.get("cost") or {}).get("before") or {}
    run.update(cost={"before": before | {work: {"tokens": tokens, "flops": float(flops)}}})


def seconds(run: Run, name: str) -> float:
    """The seconds that a run has spent on `name`: `training`, `evaluation` or `budget`."""
    return float((run.record.get("environment") or {}).get(f"{name}_seconds") or 0.0)


def add_seconds(run: Run, name: str, more: float) -> None:
    """Add seconds to a total that a resumed run continues."""
    run.update(environment={f"{name}_seconds": round(seconds(run, name) + more, 3)})


def summary(run: Run, rows: list[dict[str, Any]], model: refs.ModelRef, out: str | Path) -> dict[str, Any]:
    """`cost` of run.json. A number that is not known is absent, with the reason under `missing`.

    `share_of_tokens`: tokens that the model passed forward and back, in training and before it, over those of its pretraining.
    `share_of_flops`: all operations of this run over those of the pretraining.
    """
    before = (run.record.get("cost") or {}).get("before") or {}
    tokens: Counter[str] = Counter()
    for part in [*(work["tokens"] for work in before.values()), *(row.get("passes", {}) for row in rows)]:
        tokens.update(part)
    by_work = {"training": sum(row.get("flops", 0.0) for row in rows)} | {name: work["flops"] for name, work in before.items()}
    flops = sum(by_work.values())
    where = run.record.get("environment") or {}
    took = {name: where[f"{name}_seconds"] for name in ("training", "evaluation", "budget") if f"{name}_seconds" in where}
    memory = {"process": peak_memory()} | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})
    found: dict[str, Any] = {"tokens": dict(sorted(tokens.items())), "flops": flops, "flops_by_work": by_work}
    found |= {"seconds": took, "peak_memory": memory}
    known = pretraining(model, out)
    if isinstance(known, str):
        return found | {"missing": {"pretraining": known}}
    shares = {"share_of_tokens": tokens["model_backward"] / known["tokens"], "share_of_flops": flops / known["flops"]}
    return found | {"pretraining": known | shares}


def pretraining(model: refs.ModelRef, out: str | Path) -> dict[str, float] | str:
    """Tokens and operations of the pretraining of a model of the lab, or of one that a run made from it; else why not."""
    unknown = "the model is not one of the lab, so what its pretraining cost is not known"
    if (run := refs.run_of(model.name, out)) and run.record["kind"] != "lab":
        known = (run.record.get("cost") or {}).get("pretraining")
        return {name: known[name] for name in ("tokens", "flops")} if known else unknown
    if not model.name.startswith("lab:"):
        return unknown
    lab = Run.open(refs.lab_folder()).record
    name = Path(model.path).name
    saved = next(each for each in [*lab["checkpoints"], lab["filtered"]] if each["name"] == name)
    length = lab["config"]["sequence_length"]
    count = Flops(refs.outline(model).requires_grad_(True))
    passes = count.forward([length], len(count.matrices), True) + count.backward([length], len(count.matrices), True)
    return {"tokens": saved["tokens"], "flops": float(passes * saved["tokens"] // length)}
