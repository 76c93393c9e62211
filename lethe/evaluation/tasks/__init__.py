"""Tasks in lm-eval's YAML format: Lethe's own, and how to find a task by name without importing lm-eval.

    name, or path of a task folder -> locate -> folder -> definitions -> leaves (the tasks of a group or a tag)

lm-eval would index 14,000 YAML files before it loads one task. Lethe gives it only the folder of the task, from an index of
names that it makes once. The files of a user's task folder are read here before lm-eval reads them, and refused if they would
run Python without consent (see `consent`).
"""

from __future__ import annotations

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

from lethe.errors import LetheError, nearest, printable
from lethe.evaluation.tasks.consent import TaskLoader, python_in, trusts_task_code
from lethe.files import UnreadableError, text_of, yaml_of
from lethe.home import lethe_home, store, stored

OWN = Path(__file__).parent
MOST_TASKS = 100_000
MOST_NESTED = 50
LONGEST_NAME = 120
_NAME = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?\s*:\s*[\"']?([\w.\-+]+)[\"']?\s*$", re.MULTILINE)


def locate(tasks: Iterable[str]) -> dict[str, Path]:
    """The folder that defines each task. Lethe's own tasks come before those of lm-eval.

    FOLDER means all tasks that its YAML files define, FOLDER/NAME one of these tasks, groups or tags.

    Raises:
        LetheError: there is no task of that name, or a folder would run Python without consent.
    """
    own = {path.stem: OWN for path in OWN.glob("*.yaml")}
    folders: dict[str, Path] = {}
    for name in tasks:
        folder, _, inner = name.rpartition("/")
        if os.path.isdir(name):  # Path.is_dir raises for a name that is too long
            folders |= dict.fromkeys(_tasks_in(Path(name)), Path(name))
            continue
        if folder and os.path.isdir(folder):
            known = definitions(Path(folder))
            if inner.removesuffix(".yaml") not in {*known, *_tags(known)}:
                raise LetheError(f"tasks: '{folder}' defines no task '{inner}'{nearest(inner, known)}")
            folders[inner.removesuffix(".yaml")] = Path(folder)
            continue
        found = own.get(name) or _lm_eval_tasks().get(name)
        if found is None or not _is_trusted(found):
            near = [known for known in (*own, *_lm_eval_tasks()) if known[:2] == name[:2] and abs(len(known) - len(name)) < 4]
            similar = near if near and len(near) < 2000 else list(own)  # a comparison with all 14,000 takes seconds
            raise LetheError(f"tasks: there is no task '{name}'{nearest(name, similar)}")
        folders[name] = found
    if not folders:
        raise LetheError("tasks: name at least one task, such as lab_forget_robust")
    return folders


def is_lm_evals(folder: Path) -> bool:
    """Whether a folder belongs to the installed lm-eval."""
    root = _lm_eval_root()
    return root is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root))


def _is_trusted(folder: Path) -> bool:
    return is_lm_evals(folder) or os.path.realpath(folder) == os.path.realpath(OWN)


def definitions(folder: Path) -> dict[str, dict[str, Any]]:
    """The definitions in the YAML files below a folder, by task or group. Includes are merged, functions remain text.

    Raises:
        LetheError: a file cannot be read, would run Python without consent, or has an unusable definition.
    """
    trusted = _is_trusted(folder)
    found: dict[str, dict[str, Any]] = {}
    try:
        files = sorted(folder.glob("**/*.yaml"))
    except OSError as error:
        raise LetheError(f"tasks: '{folder}' cannot be read ({error}); name a folder of task files alone") from error
    for file in files:
        content = _definition(file, trusted, set()) or {}
        name = content.get("group", content.get("task"))
        if isinstance(name, str):
            found.setdefault(name, content)
        elif name is not None and not isinstance(name, list | dict) and not trusted:  # lm-eval skips those
            raise LetheError(f"tasks: '{file}' names {printable(repr(name), 80)}; the name of a task is text")
    for name in () if trusted else found:
        if name != printable(name) or len(name) > LONGEST_NAME or set(name) & set("/\\"):
            raise LetheError(f"tasks: '{folder}' names a task '{name}'; use letters, digits, '_', '-' and '.'")
        leaves(name, found)
    return found


def leaves(name: str, known: dict[str, dict[str, Any]], above: tuple[str, ...] = ()) -> list[str]:
    """The tasks of a name: the task itself, or all tasks of a group or a tag. `above`: the groups around it.

    Raises:
        LetheError: a group contains itself, or something that is not a task.
    """
    if name in above or len(above) > MOST_NESTED:
        raise LetheError(f"tasks: a group contains itself ({' > '.join([*above[:5], name])}); remove it from its own tasks")
    definition = known.get(name)
    if definition is None:
        return sorted(task for task, other in known.items() if name in _tags({task: other}))
    if definition.get("group") != name:
        return [name]
    found: list[str] = []
    members = definition.get("task") or []
    for child in members if isinstance(members, list) else [members]:
        inner = child
        if isinstance(child, dict):
            inner = child.get("group") or child.get("task")
            known = {child["group"]: child, **known} if "group" in child else known
        below = leaves(inner, known, (*above, name)) if isinstance(inner, str) else []
        if not isinstance(inner, str) or (child == inner and not below):
            raise LetheError(
                f"tasks: the group '{name}' has {printable(repr(child), 80)} among its tasks, which no file there defines; "
                "name tasks one by one instead of the group, or correct it"
            )
        found += below
        if len(found) > MOST_TASKS:
            raise LetheError(f"tasks: the group '{name}' holds more than {MOST_TASKS:,} tasks; name each group once")
    return found


def _tasks_in(folder: Path) -> list[str]:
    found = [name for name, content in definitions(folder).items() if content.get("task") == name]
    if not found:
        raise LetheError(f"tasks: '{folder}' has no YAML file that defines a task")
    return found


def _tags(known: dict[str, dict[str, Any]]) -> set[str]:
    tags = [content.get("tag") for content in known.values()]
    return {tag for some in tags for tag in (some if isinstance(some, list) else [some]) if isinstance(tag, str)}


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads lm-eval's YAML without importing the functions in it. For trusted files only: libyaml overflows on deep nesting."""


_FastLoader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def _definition(file: Path, trusted: bool, seen: set[str]) -> dict[str, Any] | None:
    """A file's settings, merged over those of the files that it includes; None: it has no settings.

    Includes are found as lm-eval finds them. `seen`: the real paths of the files read so far, since lm-eval reads each once.
    """
    try:
        real = os.path.realpath(os.path.expanduser(file))
        if real in seen or len(seen) > MOST_NESTED:
            raise UnreadableError("it includes itself, or is included twice")
        seen.add(real)
        if os.path.exists(real) and not os.path.isfile(real):
            raise UnreadableError("it is not a file")
        content = yaml_of(text_of(file), _FastLoader if trusted else TaskLoader)
        python = None if trusted else python_in(content)
    except (UnreadableError, ValueError) as error:  # ValueError: a NUL in an included path
        raise LetheError(f"tasks: '{file}' cannot be read ({error}); correct it, or leave it out") from error
    if python and not trusts_task_code():
        raise LetheError(
            f"tasks: '{file}' runs Python ({printable(python, 120)}) with all your permissions; read it, and if you trust it, "
            "add --trust_task_code true (in Python: with lethe.trust_task_code():)"
        )
    if not isinstance(content, dict):
        return None
    included = content.pop("include", [])
    base: dict[str, Any] = {}
    for path in included if isinstance(included, list) else [included]:
        inner = _definition(Path(real).parent / os.path.expanduser(path), trusted, seen) if isinstance(path, str) else None
        if inner is None:
            raise LetheError(f"tasks: '{file}' includes {path}, which has no settings; name a task file there")
        base |= inner
    return base | content


def _lm_eval_root() -> Path | None:
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.submodule_search_locations[0]) / "tasks" if spec and spec.submodule_search_locations else None


@functools.cache
def _lm_eval_tasks() -> dict[str, Path]:
    """The folder of every task, group and tag of lm-eval, cached in $LETHE_HOME for each version of lm-eval."""
    root = _lm_eval_root()
    if root is None:
        return {}
    file = lethe_home() / "tasks" / f"lm-eval-{importlib.metadata.version('lm_eval')}.json"
    text = stored(file)
    found: dict[str, str] = json.loads(text) if text is not None else _scan(root)
    if text is None:
        store(file, json.dumps(found))
    return {name: root / folder for name, folder in found.items()}


def _scan(root: Path) -> dict[str, str]:
    """Folder below `root` by name of all tasks, groups and tags, from the first lines of 14,000 files."""
    found: dict[str, str] = {}
    for folder, _, files in os.walk(root):
        for file in sorted(files):
            if file.endswith(".yaml"):
                for name in _NAME.findall((Path(folder) / file).read_bytes()):
                    found.setdefault(name.decode(), os.path.relpath(folder, root))
    return found
