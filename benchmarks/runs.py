"""How long `lethe runs` and `lethe report` take over many runs.

    python benchmarks/runs.py [COUNT]

Makes COUNT (5,000) runs of the usual kinds and statuses in a temporary folder. Each has a full run.json and a metrics.jsonl of
500 lines, and each attack a curve of six evaluations. Times the commands themselves: a list, a selected and sorted list, JSON,
and a report, with its CPU seconds, peak memory and the size of the page. With Chromium: how long it takes to load the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.methods.transfer import Transfer
from lethe.runs.run import now

KINDS = (("unlearn", 6), ("tamper", 2), ("evaluate", 2))
STATUSES = (("complete", 16), ("failed", 1), ("running", 1), ("queued", 1), ("diverged", 1))
COMMANDS = {
    "list": [],
    "chosen": ["--where", "kind=unlearn", "status=complete", "retain_coef<=5", "--sort", "lab_retain", "--reverse"],
    "columns": ["--columns", "id", "lr", "cb_loss", "lab_retain", "evals.lab_forget.acc", "--sort", "config.lr"],
    "json": ["--json"],
}


def record(rng: random.Random, number: int) -> dict[str, Any]:
    """A run's record, of the size that a real one has."""
    kind, status = (rng.choices(*zip(*weighted, strict=True))[0] for weighted in (KINDS, STATUSES))
    settings: Any = {"unlearn": Transfer, "tamper": c.TamperConfig, "evaluate": c.EvaluateConfig}[kind]
    models = {
        "unlearn": ["lab:final"],
        "tamper": ["lab:filtered", *3 * [f"run:{number - 1:08x}"]],
        "evaluate": ["lab:final", f"org/model-{number}"],
    }
    refs = {"model": rng.choice(models[kind])} | ({"source": "lab:global_step900"} if kind == "unlearn" else {})
    rates = [1e-4, 3e-4, 1e-3] if kind == "tamper" else [10 ** rng.uniform(-5, -3)]
    config = c.to_dict(settings(**refs)) | {"retain_coef": rng.choice([1, 2, 5, 10, 20]), "lr": rng.choice(rates)}
    done = status in {"complete", "diverged"}
    layers = {f"layers.{n}": {"distance": rng.random(), "stable_rank": rng.random()} for n in range(8)}
    agreement = {"forget_with_source": rng.random(), "retain_with_reference": rng.random()}
    parents = {role: {"ref": ref, "sha256": hashlib.sha256(ref.encode()).hexdigest()} for role, ref in refs.items()}
    return {
        "id": f"{number:08x}",
        "kind": kind,
        "name": f"ret{config['retain_coef']}-{number}",
        "status": status,
        "reason": None,
        "job_id": None,
        "launcher": "local",
        "created": now(),
        "started": now(),
        "finished": None,
        "heartbeat": now(),
        "config": config,
        "plan": {"steps": 500, "forward_passes": 4000, "effective_batch": 32, "tokens": 1e6},
        "losses": {"cb_loss": rng.random(), "retain_kl_loss": rng.random()} if done else {},
        "evals": evals(rng) if done else {},
        "parents": parents,
        "update_by_layer": layers,
        "agreement": agreement,
        "environment": {"host": "node", "pid": 1, "seconds": 60.0},
    }


def evals(rng: random.Random) -> dict[str, Any]:
    """Results on all tasks of the lab."""
    found = {}
    for task in c.LAB_TASKS:
        acc = rng.uniform(0.1, 0.9)
        result = {
            "acc": acc,
            "stderr": 0.015,
            "low": acc - 0.03,
            "high": acc + 0.03,
            "n": 1024,
            "chance": 0.25,
            "num_fewshot": 0,
        }
        print_of = hashlib.sha256(task.encode()).hexdigest()
        answers = dict.fromkeys("0123", 256)
        found[task] = result | {"version": 1, "fingerprint": print_of, "answers": answers, "degenerate": False}
    return found


def make(folder: Path, count: int) -> None:
    """`count` runs in a folder's runs/."""
    rng = random.Random(0)
    terms = {"loss": 1.0, "cb_loss": 0.5, "retain_kl_loss": 0.01, "grad_norm": 1.0, "tokens_per_second": 9999.9}
    metrics = "".join(json.dumps({"step": step} | terms | {"attack_tokens": 1000}) + "\n" for step in range(1, 501))
    (folder / "metrics.jsonl").write_text(metrics)
    for number in range(count):
        made = record(rng, number)
        path = folder / "runs" / f"{made['kind']}-{made['name']}-{made['id']}"
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps(made, indent=2))
        if made["status"] != "queued":
            shutil.copy(folder / "metrics.jsonl", path)
        if made["kind"] == "tamper" and made["evals"]:
            lines = [{"step": step, "evals": evals(rng)} for step in range(0, 500, 100)]
            lines.append({"step": 500, "evals": made["evals"]})
            (path / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: str, words: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory (MB) of a command."""
    start = time.perf_counter()
    done = subprocess.Popen([sys.executable, "-m", "lethe.cli", *words], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(done.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def load(page: Path) -> float | None:
    """Milliseconds until Chromium has loaded a page, by the page's own clock; None without Chromium."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        return None
    report = "setTimeout(() => { document.title = `loaded:${Math.round(performance.now())}:` })"
    clock = f"<script>addEventListener('load', () => {report})</script>"
    timed = page.with_name("timed.html")
    timed.write_text(page.read_text().replace("<title>", clock + "<title>"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --timeout=60000 --dump-dom"
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, *flags.split(), f"--user-data-dir={profile}", timed.as_uri()]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"loaded:(\d+):", shown)
    return float(found[1]) if found else None


def main() -> None:
    """Make the runs, time the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=5000, help="how many runs to make (default: 5000)")
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), count)
        for name, words in COMMANDS.items():
            times = [run(folder, ["runs", "runs", *words])[0] for _ in range(3)]
            print(f"{name:<8} {count} runs: {min(times):.2f} to {max(times):.2f} s")
        wall, used, memory = run(folder, ["report", "runs", "--out", "report"])
        page = Path(folder) / "report" / "index.html"
        size = page.stat().st_size / 1e6
        print(f"report   {count} runs: {wall:.1f} s, {used:.1f} CPU s, {memory:.0f} MB; page {size:.1f} MB")
        if (ms := load(page)) is not None:
            print(f"page     {count} runs: loaded in {ms / 1000:.2f} s")


if __name__ == "__main__":
    main()
