"""Whether a complete run can stand in for a run of a sweep: made from the same weights, text and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.config.parse import build
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.launching.worker import SETTINGS
from lethe.maps.folder import WEIGHTS, find_maps
from lethe.models import refs
from lethe.runs.run import Run
from lethe.text import corpora


def made_from_the_same(run: Run) -> bool:
    """Whether the weights, text, maps and local tasks that a run was made from are still what they were."""
    try:
        if inputs(run.record["config"], run.path.parent) != (run.record.get("inputs") or {}):
            return False
        parents = (run.record.get("parents") or {}).items()
        return all(_is_the_same(run, role, parent) for role, parent in parents if role != "affine")
    except (LetheError, OSError):
        return False


def inputs(settings: dict[str, Any], out: str | Path) -> dict[str, str]:
    """SHA-256 of the files that a run reads beside models and text: given maps, tasks in folders, local data of tasks."""
    evaluation = settings.get("eval") or settings
    files = {str(file): [Path(file)] for file in (evaluation.get("task_data") or {}).values()}
    for task in evaluation.get("tasks") or []:
        folder = next((path for path in (Path(task), Path(task).parent) if path.is_dir() and str(path) != "."), None)
        if folder is not None:
            files[task] = [file for file in folder.rglob("*") if file.is_file()]
    if settings.get("affine") not in {None, "fit", "none"}:
        files[settings["affine"]] = [find_maps(settings["affine"], str(out)) / WEIGHTS]
    return {name: sha256(*paths) for name, paths in files.items()}


def _is_the_same(run: Run, role: str, parent: dict[str, Any]) -> bool:
    if "documents" not in parent:
        return refs.record(refs.resolve(parent["ref"], run.path.parent))["sha256"] == parent["sha256"]
    settings = build(SETTINGS[run.record["kind"]], run.record["config"])
    attacks = run.record["kind"] == "tamper"
    end, most = ("back", c.ATTACKED) if attacks else ("front", c.UNLEARNED)
    documents = corpora.select(getattr(settings, role), settings.num_train_examples, end, f"{role} text", most)  # type: ignore[arg-type]
    return corpora.fingerprint(documents) == parent["sha256"]
