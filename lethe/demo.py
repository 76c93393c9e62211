"""The whole job on the built-in lab: `lethe demo`.

    lab -> checkpoint sweep -> baseline and source -> maps -> unlearning (rewinding, LoRA) -> attacks and controls -> report

Each step calls the function of its own command and makes a run under OUT/runs. A step is skipped if a complete run with the
same settings and the same weights exists, so a demo that was killed continues with the step in which it was killed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape

from lethe.config import (
    LAB_TASKS,
    AffineConfig,
    CheckpointsConfig,
    DemoConfig,
    EvaluateConfig,
    ReportConfig,
    TamperConfig,
    to_dict,
)
from lethe.config.parse import from_recipe
from lethe.errors import LetheError, full_disk, printable
from lethe.evaluation.lab import build_lab
from lethe.files import refuse_run_folder
from lethe.methods.method import Method
from lethe.models import refs
from lethe.progress import console
from lethe.report.folder import check_out, report
from lethe.runs.finding import find_runs
from lethe.runs.locks import FolderLock
from lethe.runs.run import Run

TARGET = "lab:final"
CONTROLS = {"filtered": "lab:filtered", "random": f"random:{TARGET}"}


def demo(config: DemoConfig) -> dict[str, Path]:
    """Run the demo and return the paths of its report: `tables`, `page`, `charts`.

    Raises:
        LetheError: `out` is itself a run, another demo works in it, or no checkpoint of the lab is ignorant.
    """
    refuse_run_folder(config.out)
    check_out(Path(config.out) / "report")
    lock = FolderLock(Path(config.out))
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        return _demo(config)
    except OSError as error:
        if full_disk(error):
            raise
        raise LetheError(f"out: cannot write to '{config.out}' ({error.strerror}); choose another folder") from error
    finally:
        lock.release()


def _demo(config: DemoConfig) -> dict[str, Path]:
    console.rule("The lab: pretraining a tiny model family (once; cached)")
    build_lab()
    steps = _Steps(Path(config.out) / "runs")

    from lethe.attacks.tampering import tamper
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.evaluation.pipeline import evaluate
    from lethe.maps.pipeline import fit_affine
    from lethe.unlearning.pipeline import unlearn

    sweep = steps.do(
        "Which checkpoint is the latest still ignorant one?",
        checkpoints,
        CheckpointsConfig(TARGET, search="all", out=steps.out),  # the chart shows the whole history
    )
    source = sweep.record["latest_ignorant"]
    if source is None:
        raise LetheError("demo: no checkpoint of the lab is at chance on forget; remove its folder and build it again")
    steps.do("Baseline", evaluate, EvaluateConfig(TARGET, LAB_TASKS, name="baseline", out=steps.out))
    steps.do(f"Source ({source})", evaluate, EvaluateConfig(source, LAB_TASKS, name="source", out=steps.out))
    maps = steps.do("Affine maps, source to model", fit_affine, AffineConfig(TARGET, source, out=steps.out))
    attacked = {}
    changes = {"source": source, "seed": config.seed, "out": steps.out}
    for recipe, more in (("lab-hold", {}), ("lab", {"affine": f"run:{maps.id}"})):
        settings = from_recipe(Method, recipe, **changes, **more)
        attacked[settings.name] = steps.do(f"Unlearning ({settings.name})", unlearn, settings)
    models = {name: f"run:{run.id}" for name, run in attacked.items()} | CONTROLS
    for name, model in models.items():
        steps.do(f"Attack on {name}", tamper, TamperConfig(model=model, name=name, out=steps.out, seed=config.seed))
    console.rule("Report")
    folder = str(Path(config.out) / "report")
    return report(ReportConfig([str(run.path) for run in steps.runs], folder, title="Lethe on the built-in lab"))


class _Steps:
    """Does each step once: a complete run with the same settings and the same weights is used again."""

    def __init__(self, folder: Path):
        self.out = str(folder)
        self.runs: list[Run] = []
        self._before = find_runs(folder) if folder.is_dir() else []

    def do(self, title: str, function: Callable[[Any], Run], config: Any) -> Run:
        console.rule(escape(title))
        settings = to_dict(config)
        same = [run for run in self._before if run.record["status"] == "complete" and run.record["config"] == settings]
        done = [run for run in same if _weights_unchanged(run)]
        run = done[-1] if done else function(config)
        if done:
            console.print(f"already complete: {printable(run.path)}", markup=False)
        if run.status != "complete":
            raise LetheError(f"demo: the step '{title}' is {run.status} ({run.record['reason']}); see {run.path / 'log.txt'}")
        self.runs.append(run)
        return run


def _weights_unchanged(run: Run) -> bool:
    """Whether the models that a run started from still have the weights that the run recorded."""
    models = [p for role, p in (run.record.get("parents") or {}).items() if role != "affine" and "documents" not in p]
    return all(refs.record(refs.resolve(p["ref"], run.path.parent)) == p for p in models)
