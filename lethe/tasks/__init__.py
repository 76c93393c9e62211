"""Task definitions in lm-eval's own YAML format, and where to find a task by name without importing lm-eval.

lm-eval indexes some 14,000 YAML files before it can load one task. Here a task's folder is found by the files that are named
like it, else by all files' first words, and only that folder is given to lm-eval. A folder of one's own is named by its path.
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
from typing import Any

import yaml

from lethe.errors import LetheError, nearest
from lethe.kept import keep
from lethe.lab import lethe_home

OWN = Path(__file__).parent
_NAME = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?\s*:\s*[\"']?([\w.\-+]+)[\"']?\s*$", re.MULTILINE)


def locate(tasks: Iterable[str]) -> dict[str, Path]:
    """The folder that defines each task: Lethe's own tasks first, then lm-eval's.

    FOLDER stands for all tasks whose YAML files are in it, FOLDER/NAME for one of them (or a group, or a tag).

    Raises:
        LetheError: no task has that name.
    """
    own = {path.stem: OWN for path in OWN.glob("*.yaml")}
    folders: dict[str, Path] = {}
    for name in tasks:
        folder, _, inner = name.rpartition("/")
        if Path(name).is_dir():
            folders |= dict.fromkeys(_tasks_in(Path(name)), Path(name))
            continue
        if folder and Path(folder).is_dir():
            known = definitions(Path(folder))
            if inner.removesuffix(".yaml") not in {*known, *_tags(known)}:
                raise LetheError(f"tasks: '{folder}' defines no task '{inner}'{nearest(inner, known)}")
            folders[inner.removesuffix(".yaml")] = Path(folder)
            continue
        found = own.get(name) or _named_like(name) or _lm_eval_tasks().get(name)
        if found is None:
            near = [known for known in (*own, *_lm_eval_tasks()) if known[:2] == name[:2] and abs(len(known) - len(name)) < 4]
            alike = near if near and len(near) < 2000 else list(own)  # comparing all 14,000 takes seconds
            raise LetheError(f"tasks: there is no task '{name}'{nearest(name, alike)}")
        folders[name] = found
    if not folders:
        raise LetheError("tasks: name at least one task, such as lab_forget_robust")
    return folders


def is_lm_evals(folder: Path) -> bool:
    """Whether a folder belongs to the installed lm-eval, whose version says what is in it."""
    root = _lm_eval_root()
    return root is not None and folder.is_relative_to(root)


def definitions(folder: Path) -> dict[str, dict[str, Any]]:
    """What the YAML files below a folder define, by name of task or group; functions stay as text, includes are merged.

    Raises:
        LetheError: a file is not YAML.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("**/*.yaml")):
        content = _definition(file)
        for kind in ("group", "task"):
            if isinstance(content.get(kind), str):
                found.setdefault(content[kind], content)
                break
    return found


def leaves(name: str, known: dict[str, dict[str, Any]]) -> list[str]:
    """The tasks that a name stands for: itself, or all those below a group or a tag."""
    definition = known.get(name)
    if definition is None:
        return sorted(task for task, other in known.items() if name in _tags({task: other}))
    if definition.get("group") != name:
        return [name]
    children = [child if isinstance(child, str) else child.get("task") or child.get("group") for child in definition["task"]]
    return [leaf for child in children if isinstance(child, str) for leaf in leaves(child, known)]


def _tasks_in(folder: Path) -> list[str]:
    found = [name for name, content in definitions(folder).items() if content.get("task") == name]
    if not found:
        raise LetheError(f"tasks: '{folder}' has no YAML file that defines a task")
    return found


def _tags(known: dict[str, dict[str, Any]]) -> set[str]:
    tags = [content.get("tag") or [] for content in known.values()]
    return {tag for some in tags for tag in ([some] if isinstance(some, str) else some)}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads lm-eval's YAML without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def _definition(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LetheError(f"tasks: '{file}' cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        return {}
    included = content.pop("include", None) or []
    base: dict[str, Any] = {}
    for path in [included] if isinstance(included, str) else included:
        base |= _definition(file.parent / path)
    return base | content


def _lm_eval_root() -> Path | None:
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.submodule_search_locations[0]) / "tasks" if spec and spec.submodule_search_locations else None


def _named_like(task: str) -> Path | None:
    """The folder of lm-eval's file that is named like a task, or lies in a folder so named, and defines it.

    Which files there are stands in the list that came with the installation: no folder is walked.
    """
    root = _lm_eval_root()
    listed = root and importlib.metadata.distribution("lm_eval").read_text("RECORD")
    if root is None or not listed:
        return None
    likely = re.compile(rf"^lm_eval/tasks/((?:.*/)?(?:_*{re.escape(task)}|{re.escape(task)}/[^/\n]*)\.yaml),", re.MULTILINE)
    for file in map(root.joinpath, sorted(likely.findall(listed))):
        with contextlib.suppress(OSError):
            if task.encode() in _NAME.findall(file.read_bytes()):
                return file.parent
    return None


@functools.cache
def _lm_eval_tasks() -> dict[str, Path]:
    """Name -> folder of every task, group and tag that lm-eval ships; found once a version, then kept in $LETHE_HOME."""
    root = _lm_eval_root()
    if root is None:
        return {}
    kept = lethe_home() / "tasks" / f"lm-eval-{importlib.metadata.version('lm_eval')}.json"
    try:
        found = json.loads(kept.read_text())
    except (OSError, ValueError):
        found = _scan(root)
        keep(kept, json.dumps(found))
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
