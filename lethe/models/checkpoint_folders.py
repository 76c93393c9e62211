"""Folders of checkpoints: `global_step900`, `step900` (the names of Pythia's) and `checkpoint-900` (the names of Trainer's)."""

from __future__ import annotations

import re
from pathlib import Path

from lethe.errors import LetheError, nearest


def checkpoint_folders(folder: Path) -> dict[str, Path]:
    """A folder's checkpoints by name, in order of step."""
    steps = {p.name: p for p in folder.glob("*") if step_of(p.name) is not None and p.is_dir()}
    return dict(sorted(steps.items(), key=lambda item: (step_of(item[0]) or 0, item[0])))


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint; None for any other name."""
    found = re.fullmatch(r"(?:global_step|step|checkpoint-)([0-9]{1,18})", name)
    return int(found[1]) if found else None


def checkpoint_of(folder: Path, name: str) -> Path:
    """The checkpoint of this name, or else the only one of this step: `step900` also finds `checkpoint-900`."""
    known = checkpoint_folders(folder)
    same = [other for other in known if step_of(other) == step_of(name)]
    if name not in known and len(same) != 1:
        raise LetheError(f"model reference '{folder}@{name}': there is no such checkpoint{nearest(name, known)}")
    return known[name if name in known else same[0]]
