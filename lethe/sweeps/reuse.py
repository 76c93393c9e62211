"""Which complete runs stand in for runs of a sweep: those of the same settings, made from the same weights, text and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.config.parse import build
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.launching.worker import SETTINGS
from lethe.maps.folder import WEIGHTS, find_maps
from lethe.methods.method import HELD_OUT, Method
from lethe.methods.user_file import is_file
from lethe.models import refs
from lethe.results.listing import is_imported
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.unlearning.check import held_out

NO_EFFECT_ON_NUMBERS = {"name", "out", "report_to", "time_limit", "save_every", "teacher_cache", "fast"}
"""Settings that do not change what a run measures."""
AS_BEFORE = [
    ("cb_scale", "raw"),
    ("affine_examples", c.MAPPED),
    ("method", "transfer"),
    ("forget_kl_coef", 0.0),
    ("layered", None),
    ("budget", None),
]
"""Settings that earlier versions lacked, with the value that stands for their behaviour: their runs count as equal."""


def complete_runs(out: Path) -> dict[str, list[Run]]:
    """The complete runs in a folder, by key, oldest first."""
    found: dict[str, list[Run]] = {}
    for run in find_runs(out):
        kind = run.record["kind"]
        if kind in {"unlearn", "tamper", "evaluate"} and run.record["status"] == "complete" and not is_imported(run):
            found.setdefault(key_of(kind, run.record["config"]), []).append(run)
    return found


def key_of(kind: str, settings: Mapping[str, Any]) -> str:
    """Equal for runs of the same kind whose numbers must be equal."""
    text = json.dumps([kind, that_matter(kind, settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def that_matter(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as its record has them."""
    settings = Method.of_record(settings) if kind == "unlearn" else settings
    found = {
        name: value for name, value in settings.items() if name not in NO_EFFECT_ON_NUMBERS and (name, value) not in AS_BEFORE
    }
    if kind == "unlearn":  # evaluations on the way do not change how the run ends
        found["eval"] = {name: value for name, value in found["eval"].items() if name != "every"}
    return json.loads(json.dumps(found, default=str), parse_int=float)  # 5 and 5.0 are one setting


def made_from_the_same(run: Run, processes: int | None) -> bool:
    """Whether a run was made from what the sweep's own run would be made from: weights, text, maps and local tasks.

    Its updates must have as many documents, too. `processes`: how many Slurm starts for a run; None if its settings say that.
    """
    try:
        if not _has_batch_of(run, processes or run.record["config"].get("devices") or 1):
            return False
        if inputs(run.record["config"], run.path.parent) != (run.record.get("inputs") or {}):
            return False
        parents = (run.record.get("parents") or {}).items()
        return all(_is_the_same(run, role, parent) for role, parent in parents if role != "affine")
    except (LetheError, OSError):
        return False


def _has_batch_of(run: Run, processes: int) -> bool:
    """Whether its updates have as many documents as those of so many processes. Without training it has no updates."""
    batch, settings = (run.record.get("plan") or {}).get("effective_batch"), run.record["config"]
    if batch is None:
        return True
    return batch == settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes


def inputs(settings: dict[str, Any], out: str | Path) -> dict[str, str]:
    """SHA-256 of the files that a run reads beside models and text: given maps, tasks in folders, local data of tasks."""
    evaluation = settings.get("eval") or settings
    files = {str(file): [Path(file)] for file in (evaluation.get("task_data") or {}).values()}
    for task in evaluation.get("tasks") or []:
        folder = next((path for path in (Path(task), Path(task).parent) if path.is_dir() and str(path) != "."), None)
        if folder is not None:
            files[task] = [file for file in folder.rglob("*") if file.is_file()]
    if is_file(settings.get("method")):
        files[settings["method"]] = [Path(settings["method"])]
    if settings.get("affine") not in {None, "fit", "none"}:
        files[settings["affine"]] = [find_maps(settings["affine"], str(out)) / WEIGHTS]
    return {name: sha256(*paths) for name, paths in files.items()}


def _is_the_same(run: Run, role: str, parent: dict[str, Any]) -> bool:
    if "documents" not in parent:
        return refs.record(refs.resolve(parent["ref"], run.path.parent))["sha256"] == parent["sha256"]
    settings = build(SETTINGS[run.record["kind"]], run.record["config"])
    attacks = run.record["kind"] == "tamper"
    end, most = ("back", c.ATTACKED) if attacks else ("front", c.UNLEARNED)

    def trained_on(text: str) -> list[corpora.Document]:
        return corpora.select(getattr(settings, text), settings.num_train_examples, end, f"{text} text", most)  # type: ignore[arg-type]

    if role == HELD_OUT:
        documents = held_out(settings, settings.budget, {d.id for text in ("forget", "retain") for d in trained_on(text)})
    else:
        documents = trained_on(role)
    return corpora.fingerprint(documents) == parent["sha256"]
