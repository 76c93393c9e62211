"""Writes the tables of docs/scaling.md, from the formulas of `lethe.unlearning.memory` and `lethe.unlearning.scaling`.

    python scripts/scaling.py

A table stands between two comments, `<!-- table NAME -->` and `<!-- end -->`. tests/test_memory.py compares the page with
what this program would write, so that it cannot become outdated.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, LlamaConfig

from lethe.config import UNLEARNED
from lethe.config.parse import from_recipe
from lethe.methods.method import Method
from lethe.models.loading import on_meta
from lethe.unlearning.fit import three_copies
from lethe.unlearning.memory import Estimate, Load, Phases, choose_parallel
from lethe.unlearning.scaling import H100, Cost, cost

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
RECIPE = "deep-ignorance-7b/lora"
DEVICES = (1, 4, 8, 64)
CONFIGS: dict[str, Any] = {
    "7B": GPTNeoXConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=16384, num_attention_heads=32, vocab_size=50304,
        max_position_embeddings=2048, tie_word_embeddings=False,
    ),
    "13B": GPTNeoXConfig(
        num_hidden_layers=40, hidden_size=5120, intermediate_size=20480, num_attention_heads=40, vocab_size=50304,
        max_position_embeddings=2048, tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {"LoRA": {}, "all weights": {"lora": None}}


def recipe(model: str, run: str, devices: int) -> Method:
    """The study's recipe with gradient checkpointing, every fifth layer, and its effective batch as far as possible."""
    layers = list(range(4, CONFIGS[model].num_hidden_layers - 2, 5))
    accumulation = max(1, 8 // devices)
    changes = {"layers": layers, "gradient_checkpointing": True, "gradient_accumulation_steps": accumulation} | RUNS[run]
    return dataclasses.replace(from_recipe(Method, RECIPE), **changes)


@functools.cache
def phases_of(model: str, run: str, accumulates: bool) -> Phases:
    """The simulated passes of a run. Whether gradients are accumulated is all that depends on the number of devices."""
    config = recipe(model, run, 1 if accumulates else 8)
    tokens = dict.fromkeys(config.needs(), UNLEARNED * config.max_length)
    return Phases(config, lambda: on_meta(CONFIGS[model], torch.bfloat16), Load(config.max_length, tokens, gpu=True))


@functools.cache
def planned(model: str, run: str, devices: int) -> tuple[str, Estimate, Cost]:
    """How a run is distributed, the memory of each device, and what it costs."""
    phases, config = phases_of(model, run, devices < 8), recipe(model, run, devices)
    ddp = phases.estimate(devices, "ddp")
    parallel = choose_parallel(ddp, H100.memory) if devices > 1 else "ddp"
    found = ddp if parallel == "ddp" else phases.estimate(devices, "fsdp")
    return parallel, found, cost(config, phases, devices, parallel, UNLEARNED)


def memory_table() -> str:
    """Memory of one device, by part, in the phase that takes most."""
    parts = ("weights", "teachers", "gradients", "optimizer", "activations")
    lines = [["model", "trained", "devices", "parallel", *parts, "other", "peak", "fits"]]
    for model, run, devices in cases():
        parallel, found, _ = planned(model, run, devices)
        sizes = [found.parts.get(part, 0) for part in parts]
        end = [*sizes, found.total - sum(sizes), found.total]
        fits = "yes" if found.total <= H100.memory else "**no**"
        lines.append(
            [model, run, str(devices), parallel if devices > 1 else "-", *(f"{size / 2**30:.1f}" for size in end), fits]
        )
    return table(lines)


def cost_table() -> str:
    """Computation, traffic and hours."""
    lines = [["model", "trained", "devices", "updates", "PFLOP", "GB sent in an update", "hours", "bound by"]]
    for model, run, devices in cases():
        _, found, costs = planned(model, run, devices)
        fits = found.total <= H100.memory
        hours, bound = (f"{costs.hours:.2g}", costs.bound) if fits else ("-", "memory")
        numbers = [f"{costs.flops / 1e15:,.0f}", f"{costs.traffic / 1e9:,.1f}", hours, bound]
        lines.append([model, run, str(devices), str(costs.updates), *numbers])
    return table(lines)


def disk_table() -> str:
    """Caches of both teachers on all documents."""
    lines = [["model", "source on the forget text, GB", "reference on the retain text, GB"]]
    for model in CONFIGS:
        passes = phases_of(model, "LoRA", True).passes
        count = UNLEARNED * passes.config.max_length
        lines.append([model, *(f"{count * passes.token_bytes(need) / 1e9:,.0f}" for need in passes.needs.values())])
    return table(lines)


def copies_table() -> str:
    """The 7B recipe with three whole models in memory, and as Lethe holds them."""
    lines = [["part", "three copies, GiB", "Lethe, `teacher_cache: live`, GiB"]]
    found = planned("7B", "LoRA", 1)[1]
    before, now = three_copies(found), found.phases["training"]
    for part in before:
        lines.append([part, *(f"{parts.get(part, 0) / 2**30:.1f}" for parts in (before, now))])
    lines.append(["sum", *(f"{sum(parts.values()) / 2**30:.1f}" for parts in (before, now))])
    return table(lines)


TABLES = {"memory": memory_table, "cost": cost_table, "disk": disk_table, "copies": copies_table}


def cases() -> list[tuple[str, str, int]]:
    """Every row of a table."""
    return [(model, run, devices) for model in CONFIGS for run in RUNS for devices in DEVICES]


def table(lines: list[list[str]]) -> str:
    """A table in markdown."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def updated(page: str) -> str:
    """The text of a page with its tables computed anew."""

    def replaced(found: re.Match[str]) -> str:
        return f"<!-- table {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", replaced, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
