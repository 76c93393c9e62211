"""Finding runs: all in a folder, or one by its id or name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lethe.errors import LetheError
from lethe.files import RUN
from lethe.runs.run import Run, say_once


def find_runs(folder: str | Path) -> list[Run]:
    """Every run in `folder` (or in its `runs/`), oldest first. `folder` may be a run itself, or a sweep with its runs."""
    folder = Path(folder)
    if os.path.exists(folder / RUN):
        first = Run.open(folder)
        return [first, *_readable(folder.parent / name for name in first.record.get("runs") or [])]
    runs = _readable(file.parent for file in (*folder.glob(f"*/{RUN}"), *folder.glob(f"runs/*/{RUN}")))
    return sorted(runs, key=lambda run: (run.record.get("created") or "", run.id))


def _readable(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders. One that cannot be read is logged and left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(Run.open(folder))
        except LetheError as error:
            say_once(f"{error}; left out")
    return runs


def find_run(run_id: str, out: str | Path = "runs") -> Run:
    """The run of this id, unique part of a folder's name, or folder. Looks in `out`, `runs/` and `*/runs/`.

    Raises:
        LetheError: there is none, or more than one.
    """
    if not run_id:
        raise LetheError("run: names no run; write run:ID")
    if os.path.exists(Path(run_id) / RUN):
        return Run.open(run_id)
    files = [*Path(out).glob("*/run.json"), *Path("runs").glob("*/run.json"), *Path().glob("*/runs/*/run.json")]
    folders = {file.parent.resolve(): file.parent for file in files}
    exact = [path for path in folders.values() if path.name.endswith(f"-{run_id}")]
    found = exact or [path for path in folders.values() if run_id in path.name]
    if len(found) == 1:
        return Run.open(found[0])
    if found:
        raise LetheError(
            f"run:{run_id} matches {len(found)} runs ({', '.join(sorted(p.name for p in found)[:4])}); give the whole id"
        )
    raise LetheError(f"run:{run_id} is not in '{out}', runs/ or */runs/; `lethe runs FOLDER` lists the runs of a folder")
