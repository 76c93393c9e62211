"""lm-eval's index of a task folder, with local files in place of data sets; and its errors as messages for a user."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lethe.errors import LetheError
from lethe.evaluation import tasks
from lethe.evaluation.lm_eval_api import TaskManager, load_yaml
from lethe.evaluation.tasks import data


def manager_of(name: str, folder: Path, local: dict[str, data.LocalData], num_fewshot: int | None) -> TaskManager:
    """lm-eval's index of the folder of the task or group `name`, with local files in place of data sets."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    index = manager.task_index
    for one in local.values():
        if one.like in index:
            entry = index[one.like]
            definition = load_yaml(entry.yaml_path, resolve_func=True) | _local_source(one)
            if num_fewshot is not None:
                definition["num_fewshot"] = num_fewshot
            _refuse_missing_examples(one, definition)
            index[one.task] = dataclasses.replace(entry, name=one.task, yaml_path=None, cfg=definition)
    if local and name in index and name not in local:
        _leave_out_empty(name, folder, local, index)
    if name not in index:  # lm-eval would treat the name as a path
        raise LetheError(
            f"tasks: lm-eval cannot read the file of '{name}' in '{folder}'; compare it with lm-eval's own "
            "(tag: a name or a list of names), and put it into no folder named __pycache__"
        )
    return manager


def _local_source(one: data.LocalData) -> dict[str, Any]:
    """The fields of a definition that read a task's rows from a local file."""
    from datasets import Dataset

    splits = one.splits

    def rows(**_: Any) -> dict[str, Any]:
        return {split: Dataset.from_list(some) for split, some in splits.items() if some}

    settings: dict[str, Any] = {"task": one.task, "custom_dataset": rows, "dataset_path": None, "dataset_kwargs": None}
    return settings | {"test_split": one.test_split, "validation_split": None, "training_split": None}


def _refuse_missing_examples(one: data.LocalData, definition: dict[str, Any]) -> None:
    """Refuse few-shot prompts if the local file has no examples for them. Without examples, no other split is read."""
    split = (definition.get("fewshot_config") or {}).get("split") or definition.get("fewshot_split")
    if split is None or one.splits.get(split):
        return
    if definition.get("num_fewshot"):
        raise LetheError(
            f"task_data: '{one.task}' takes its {definition['num_fewshot']} examples from the split {split}, "
            f'of which \'{one.file}\' has no rows; mark some with "split": "{split}", or set num_fewshot to 0'
        )
    definition["fewshot_split"] = one.test_split
    if definition.get("fewshot_config"):
        definition["fewshot_config"] = definition["fewshot_config"] | {"split": one.test_split}


def _leave_out_empty(name: str, folder: Path, local: dict[str, data.LocalData], index: dict[str, Any]) -> None:
    """Remove tasks without local rows from a group, so that their data set is not downloaded."""
    known = tasks.definitions(folder)
    members = tasks.leaves(name, known)
    with_rows = [leaf for leaf in members if leaf in local]
    if with_rows and known.get(name, {}).get("group") == name:
        index[name] = dataclasses.replace(
            index[name], yaml_path=None, cfg={**known[name], "task": with_rows, "metadata": known[name].get("metadata") or {}}
        )


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
