"""The whole job through the command line on the nano lab: killed in the middle, started again, and what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lethe.runs.finding import find_runs

COMMAND = [sys.executable, "-m", "lethe.cli", "demo", "--out"]


@pytest.mark.slow
def test_a_killed_demo_goes_on_where_it_was_and_prints_what_its_runs_hold(lab, tmp_path):
    out = tmp_path / "demo"
    process = subprocess.Popen([*COMMAND, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("runs/unlearn-*/metrics.jsonl")):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {run.id: run.status for run in find_runs(out)}
    assert list(before.values()).count("complete") == 4

    done = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, check=True)
    after = {run.id: run for run in find_runs(out)}
    assert [i for i, status in before.items() if status == "complete" and after[i].status != "complete"] == []
    kinds = [run.record["kind"] for run in after.values() if run.status == "complete"]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "checkpoints": 1,
        "evaluate": 2,
        "affine": 1,
        "unlearn": 2,
        "tamper": 4,
    }

    assert "Baseline" in done.stdout and str(out / "report" / "index.html") in done.stdout
    for run in after.values():
        if run.record["kind"] == "unlearn" and run.status == "complete":
            row = re.search(rf"^\| {run.id} \|.*$", done.stdout, re.MULTILINE)
            assert row and all(f"{loss:.4f}" in row[0] for loss in run.record["losses"].values())
            assert f"{100 * run.record['evals']['lab_forget_robust']['acc']:.2f} %" in row[0]
    assert json.loads((next(Path(out).glob("runs/tamper-filtered-*")) / "run.json").read_text())["status"] == "complete"

    started = time.time()
    again = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
    assert all(run.path.stat().st_mtime < started for run in find_runs(out))
