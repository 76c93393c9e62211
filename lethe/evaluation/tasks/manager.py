"""Tasks loaded by lm-eval, with local files in place of data sets; and its errors as messages for a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe.errors import LetheError
from lethe.evaluation import tasks
from lethe.evaluation.lm_eval_api import TaskManager
from lethe.evaluation.tasks import data


def load(name: str, folder: Path, local: dict[str, data.LocalData], num_fewshot: int | None) -> list[Any]:
    """The task objects of lm-eval of a task, group or tag in a folder. Local files stand in for data sets.

    If a group has local files, its tasks without one are left out, so that nothing is downloaded.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if name not in manager.task_index:  # lm-eval would treat the name as a path
        raise LetheError(
            f"tasks: lm-eval cannot read the file of '{name}' in '{folder}'; compare it with lm-eval's own "
            "(tag: a name or a list of names), and put it into no folder named __pycache__"
        )
    known = tasks.definitions(folder)
    given = [local[task] for task in dict.fromkeys([name, *tasks.leaves(name, known)]) if task in local]
    if not given:
        return list(manager.load([name])["tasks"].values())
    members = [{"task": one.like} | _local_settings(one, known[one.like], num_fewshot) for one in given]
    found = manager.load([{"group": name, "task": members}])["tasks"]
    for one in given:
        found[one.like].set_config(key="task", value=one.task)
    return list(found.values())


def _local_settings(one: data.LocalData, definition: dict[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """The settings of a task that read its rows from a local file, and no other split.

    Raises:
        LetheError: the file has no examples for few-shot prompts.
    """
    from datasets import Dataset

    splits = one.splits

    def rows(**_: Any) -> dict[str, Any]:
        return {split: Dataset.from_list(some) for split, some in splits.items() if some}

    settings: dict[str, Any] = {"custom_dataset": rows, "dataset_path": None, "dataset_kwargs": None}
    settings |= {"test_split": one.test_split, "validation_split": None, "training_split": None}
    shots = definition.get("num_fewshot") if num_fewshot is None else num_fewshot
    split = (definition.get("fewshot_config") or {}).get("split") or definition.get("fewshot_split")
    if split is not None and not splits.get(split):
        if shots:
            raise LetheError(
                f"task_data: '{one.task}' takes its {shots} examples from the split {split}, "
                f'of which \'{one.file}\' has no rows; mark some with "split": "{split}", or set num_fewshot to 0'
            )
        settings |= {"fewshot_split": one.test_split, "fewshot_config": None}
    return settings | {"num_fewshot": shots}


def data_sets(definitions: list[dict[str, Any]]) -> str:
    """The data sets of tasks and their files, for a message."""
    paths = sorted({str(one["dataset_path"]) for one in definitions if one.get("dataset_path")})
    options = [one.get("dataset_kwargs") for one in definitions]
    files = sorted({text for given in options if isinstance(given, dict) for text in texts_in(given.get("data_files"))})
    shown = f" ({', '.join(files[:5])})" if files else ""
    return f"the data set {', '.join(paths)}{shown}" if paths else "the data"


def texts_in(value: Any) -> list[str]:
    """All texts in a value of YAML."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for one in inner for text in texts_in(one)]


def reason(error: BaseException) -> str:
    """The first line of a library's error, as a message for a user."""
    if isinstance(error, KeyError) and " " not in str(error):
        return f"there is no {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
