"""Folders of runs as a study leaves them, made without any model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lethe.report.tables import all_tables
from lethe.results.study import Study
from lethe.runs.finding import find_runs
from lethe.runs.run import Run

FORGET, RETAIN, CLOZE = "lab_forget_robust", "lab_retain", "lab_forget_cloze"
TARGET = {"ref": "lab:final", "sha256": "a" * 64}
SOURCE = {"ref": "lab:global_step900", "sha256": "b" * 64}


def accuracy(task: str, acc: float, half: float = 0.02, **changes: Any) -> dict[str, Any]:
    facts = {"n": 400, "chance": 0.25, "num_fewshot": 0, "version": 1, "fingerprint": f"of-{task}", "degenerate": False}
    return {"acc": acc, "stderr": half / 2, "low": acc - half, "high": acc + half} | facts | changes


def evals(forget: float, retain: float, **changes: Any) -> dict[str, Any]:
    return {FORGET: accuracy(FORGET, forget, **changes), RETAIN: accuracy(RETAIN, retain)}


def cloze(value: float) -> dict[str, Any]:
    result = accuracy(CLOZE, value)
    result["correct_prob"] = result.pop("acc")
    del result["chance"]
    return {CLOZE: result}


class Folder:
    """A folder of runs, each a second younger than the one before."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0

    def add(self, kind: str, name: str, config: dict[str, Any], status: str = "complete", **fields: Any) -> Run:
        run = Run.create(kind, name, {"name": name, "out": str(self.path)} | config, self.path)
        self.count += 1
        run.update(status=status, created=f"2026-01-01T{self.count // 60:02d}:{self.count % 60:02d}:00+00:00", **fields)
        return run

    def unlearn(self, name: str, results: dict[str, Any] | None, status: str = "complete", **config: Any) -> Run:
        """An unlearning run; without results it has no losses either."""
        settings = {"model": "lab:final", "source": SOURCE["ref"], "retain_loss": "kl", "retain_coef": 5.0, "remove_coef": 20.0}
        settings |= {"lora": {"r": 16, "alpha": 16.0, "dropout": 0.05}, "lr": 1e-3, "layers": [0, 2]}
        fields: dict[str, Any] = {"parents": {"model": TARGET, "source": SOURCE}, "plan": {"steps": 128}}
        if results is not None:
            fields |= {"losses": {"cb_loss": 0.73456, "retain_kl_loss": 0.01239}, "evals": results}
        run = self.add("unlearn", name, settings | config, status, **fields)
        for step in range(1, 6):
            run.append("metrics.jsonl", {"step": step, "loss": 1.0, "cb_loss": 1 / step, "retain_kl_loss": 0.01 * step})
        return run

    def attack(self, name: str, ref: str, rows: list[Any], status: str = "complete", **config: Any) -> Run:
        """An attack, evaluated every 10 steps or at its strengths; rows are forget accuracies or (forget, retain)."""
        rows = [row if isinstance(row, tuple) else (row, 0.8) for row in rows]
        sha = {"lab:filtered": "e" * 64, SOURCE["ref"]: SOURCE["sha256"]}.get(ref, "f" * 64)
        strengths = config.get("strengths", [])
        settings = {"model": ref, "lr": 3e-4, "seed": 0} | config
        run = self.add("tamper", name, settings, status, parents={"model": {"ref": ref, "sha256": sha}})
        for i, row in enumerate(rows):
            facts = {"strength": [0, *strengths][i], "tokens": 0} if strengths else {}
            run.append("curve.jsonl", {"step": i if strengths else 10 * i} | facts | {"evals": evals(*row)})
            if i and not strengths:
                run.append("metrics.jsonl", {"step": 10 * i, "attack_tokens": 1000})
        if status == "complete":
            run.update(losses={"attack_loss": 0.5, "lost_updates": 0.125}, evals=evals(*rows[-1]))
        return run

    def named(self, name: str) -> Run:
        """The run of this name."""
        return next(run for run in find_runs(self.path) if run.record["name"] == name)

    def load(self) -> Study:
        return Study.load([str(self.path)])

    def tables(self) -> str:
        """What tables.md holds below its summary."""
        return "\n".join(table.markdown() for table in all_tables(self.load()))

    def table(self, title: str) -> dict[str, dict[str, str]]:
        """The rows of a table by their first cell, each by column."""
        header, *rows = grid(self.tables(), title)
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def whole_study(path: Path) -> Folder:
    """Sweep, baseline, source, maps, a LoRA and a full-rank run, an attack on the first and two controls."""
    folder = Folder(path)
    curve = [(700, 0.24, 0.5, "~Random"), (900, 0.26, 0.6, "~Random (latest viable)"), (1000, 0.5, 0.7, "Learning starts")]
    rows = [
        {"name": f"global_step{step}", "ref": f"lab:global_step{step}", "step": step, "evals": evals(f, r), "note": note}
        for step, f, r, note in curve
    ]
    folder.add("checkpoints", "sweep", {"model": "lab:final"}, checkpoints=rows, latest_ignorant=SOURCE["ref"])
    lora = folder.unlearn("lora", evals(0.2625, 0.7975) | cloze(0.21236))
    folder.unlearn("full", evals(0.3, 0.81), lora=None, lr=2e-4)
    scores = {str(n): {"r2": 0.9 - n / 10, "mse": 0.1, "no_map_r2": 0.2, "no_map_mse": 0.5} for n in (0, 2)}
    folder.add("affine", "maps", {"source": SOURCE["ref"]}, parents={"model": TARGET, "source": SOURCE}, scores=scores)
    folder.add("evaluate", "src", {"model": SOURCE["ref"]}, parents={"model": SOURCE}, evals=evals(0.26, 0.6))
    folder.add("evaluate", "base", {"model": "lab:final"}, parents={"model": TARGET}, evals=evals(0.9525, 0.8325) | cloze(0.8))
    folder.attack("hit", f"run:{lora.id}", [0.2625, 0.5, 0.9, 0.94])
    folder.attack("twin", "lab:filtered", [0.25, 0.26, 0.3, 0.4])
    folder.attack("fresh", "random:lab:final", [0.25, 0.25, 0.25, 0.24])
    return folder


def grid(markdown: str, title: str) -> list[list[str]]:
    """The cells of a markdown table, header first."""
    body = next(part for part in re.split(r"^## ", markdown, flags=re.M) if part.startswith(title))
    lines = [line for line in body.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert all(re.fullmatch(r"-{3,}[-:]", cell) for cell in cells[1])
    return [cells[0], *cells[2:]]
