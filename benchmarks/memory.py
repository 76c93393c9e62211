"""The estimate of peak memory beside the peak of the process, for recipes on one model.

    python benchmarks/memory.py MODEL SOURCE [--width 64] [--batch 4] [--small] [--only full adamw live]
    python benchmarks/memory.py MODEL SOURCE --small --only adamw live false --devices 2 --parallel fsdp

Each run is a process of its own with three updates. Its peak is VmHWM, which the run records as `environment.peak_memory`; of
several processes it is that of rank 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LORA = {"lora": ["{r: 16, alpha: 16, dropout: 0.0}"], "full": ["null"]}


def measured(model: str, source: str, settings: dict[str, str]) -> dict[str, Any]:
    """The record of one run in a process of its own."""
    out = tempfile.mkdtemp()
    words = ["--model", model, "--source", source, "--max_steps", "3", "--out", out]
    words += [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "lethe", "unlearn", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"} | dict(os.environ), check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    (record,) = (json.loads(file.read_text()) for file in Path(out).glob("*/run.json"))
    shutil.rmtree(out)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("--width", default="64", help="tokens of a document")
    parser.add_argument("--batch", default="4", help="documents in a batch")
    parser.add_argument("--layers", nargs="+", default=["0", "2", "4"])
    parser.add_argument("--small", action="store_true", help="fewer documents and questions, for a model that is slow")
    parser.add_argument("--only", nargs="+", default=[], help="only rows that have all these words in their first columns")
    parser.add_argument("--devices", default="1", help="processes of a run")
    parser.add_argument("--parallel", default="auto", help="how they divide it: ddp or fsdp")
    given = parser.parse_args()
    documents, mapped, questions = ("16", "64", "4") if given.small else ("64", "400", "16")
    print("| recipe | optimizer | teachers | checkpointing | peak, MB | estimate / peak | phase | parts, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    axes = (("lora", "full"), ("adamw", "muon"), ("live", "cached"), ("false", "true"))
    for kind, optimizer, cache, again in itertools.product(*axes):
        if not set(given.only) <= {kind, optimizer, cache, again}:
            continue
        settings = {
            "devices": given.devices, "parallel": given.parallel,
            "lora": LORA[kind][0], "optimizer": optimizer, "teacher_cache": cache, "gradient_checkpointing": again,
            "max_length": given.width, "per_device_train_batch_size": given.batch, "layers": f"[{', '.join(given.layers)}]",
            "num_train_examples": documents, "affine_examples": mapped, "eval.limit": questions, "lr": "1e-4",
        }  # fmt: skip
        record = measured(given.model, given.source, settings)
        peak, parts = record["environment"]["peak_memory"], record["plan"]["memory"]
        phases = record["plan"]["memory_by_phase"]
        ratio = sum(parts.values()) / peak
        shown = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
        phase = max(phases, key=phases.__getitem__)
        print(f"| {kind} | {optimizer} | {cache} | {again} | {peak / 1e6:,.0f} | {ratio:.2f} | {phase} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
