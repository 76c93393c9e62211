"""scripts/gpu-check.sh runs where there is no GPU, with the packages that the machine with the GPU and the wheels have."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
THERE = "torch numpy psutil pyyaml jinja2 markupsafe tqdm packaging filelock fsspec typing_extensions sympy mpmath networkx"
STAGES = [
    "matmul", "random model", "plain", "cached", "live", "cached, activations stored", "evaluation", "attack", "maps",
    "full-rank, 8-bit AdamW",
]  # fmt: skip


def wheels() -> list[str]:
    """The packages that gpu-wheels.sh downloads."""
    text = (ROOT / "scripts" / "gpu-wheels.sh").read_text()
    found = re.search(r"PACKAGES=\((.*?)\)", text, re.DOTALL)
    assert found
    return [word.split("==")[0] for word in found[1].split()]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that sees no other packages than those that are there and in the wheels."""
    site = tmp_path / "site"
    site.mkdir()
    for name in [*THERE.split(), *wheels(), "hf_xet", "lethe-lm"]:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # torchao, which the tests do not need
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists() and "editable" not in top:
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nPYTHONPATH=$PYTHONPATH:{site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def check(python: Path, folder: Path, **settings: str) -> tuple[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""} | settings
    words = ["bash", str(ROOT / "scripts" / "gpu-check.sh"), "", str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == json.loads((folder / "gpu-check.json").read_text())
    return done.stdout, answer["rows"]


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_without_one_and_without_charts_and_data_sets(python, tmp_path):
    assert subprocess.run([python, "-c", "import datasets"], capture_output=True, check=False).returncode
    printed, rows = check(python, tmp_path / "check", LETHE_GPU_SECONDS="3000")  # a machine may be busy
    assert [row["stage"] for row in rows] == STAGES
    failed = {row["stage"] for row in rows if "reason" in row}
    assert failed <= {"full-rank, 8-bit AdamW"}, printed[-3000:]  # torchao is not among the tests' packages
    by_name = {row["stage"]: row for row in rows}
    numbers = [value for row in rows for value in row.values() if not isinstance(value, str)]
    assert all(math.isfinite(value) for value in numbers)
    for name in ("plain", "cached", "live", "cached, activations stored"):
        assert 0 < by_name[name]["utilisation"] < 1 and by_name[name]["tokens_per_second"] > 0
    for name in ("cached", "live", "cached, activations stored"):
        assert by_name[name]["estimate_GiB"] > 0 and by_name[name]["peak_GiB"] > 0 and by_name[name]["times_plain"] > 0
    assert by_name["cached"]["loss"] == pytest.approx(by_name["live"]["loss"], rel=0.02)
    assert by_name["evaluation"]["times_lm_eval"] > 0
    assert all(stage in printed.split("\n{")[0] for stage in STAGES)


@pytest.mark.slow
def test_the_check_ends_at_its_limit_and_says_what_it_left_out(python, tmp_path):
    _, rows = check(python, tmp_path / "check", LETHE_GPU_SECONDS="5")
    assert [row["stage"] for row in rows] == STAGES
    assert rows[-1]["reason"].startswith("not run: the limit of ")
