"""Task definitions in lm-eval's own YAML format, and where to find a task by name without importing lm-eval.

lm-eval indexes some 14,000 YAML files before it can load one task. Here a task's folder is found by reading the
files' first words, and only that folder is given to lm-eval.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from lethe.errors import LetheError, nearest
from lethe.lab import lethe_home
from lethe.ledger import write_atomically

OWN = Path(__file__).parent
_NAME = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?\s*:\s*[\"']?([\w.\-+]+)[\"']?\s*$", re.MULTILINE)


def locate(tasks: Iterable[str]) -> dict[str, Path]:
    """The folder that defines each task: Lethe's own tasks first, then lm-eval's.

    Raises:
        LetheError: no task has that name.
    """
    own = {path.stem: OWN for path in OWN.glob("*.yaml")}
    folders: dict[str, Path] = {}
    for name in tasks:
        found = own.get(name) or _lm_eval_tasks().get(name)
        if found is None:
            alike = [known for known in (*own, *_lm_eval_tasks()) if known[:2] == name[:2]]
            raise LetheError(f"tasks: there is no task '{name}'{nearest(name, alike if len(alike) < 2000 else own)}")
        folders[name] = found
    if not folders:
        raise LetheError("tasks: name at least one task, such as lab_forget_robust")
    return folders


@functools.cache
def _lm_eval_tasks() -> dict[str, Path]:
    """Name -> folder of every task, group and tag that lm-eval ships; found once a version, then kept in $LETHE_HOME."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    kept = lethe_home() / f"lm-eval-{importlib.metadata.version('lm_eval')}-tasks.json"
    try:
        found = json.loads(kept.read_text())
    except (OSError, ValueError):
        found = _scan(root)
        with contextlib.suppress(OSError):  # a home that cannot be written costs the scan each time, nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(found))
    return {name: root / folder for name, folder in found.items()}


def _scan(root: Path) -> dict[str, str]:
    """Name -> folder below `root` of all tasks, groups and tags (14,000 files: 0.3 s, more where the disk is cold)."""
    found: dict[str, str] = {}
    for folder, _, files in os.walk(root):
        for file in sorted(files):
            if file.endswith(".yaml"):
                for name in _NAME.findall((Path(folder) / file).read_bytes()):
                    found.setdefault(name.decode(), os.path.relpath(folder, root))
    return found
