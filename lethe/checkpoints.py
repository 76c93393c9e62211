"""The checkpoint sweep: evaluate a model's pretraining checkpoints and find the latest that is ignorant of the topic.

Ignorant means at chance: the lower end of the accuracy's 95 % interval is not above chance (a model far below chance
knows nothing either). The first task decides; the others are measured beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe import refs, tasks
from lethe.config import CheckpointsConfig, to_dict
from lethe.errors import LetheError
from lethe.ledger import Run
from lethe.progress import bar


def checkpoints(config: CheckpointsConfig) -> Run:
    """Evaluate every checkpoint of a model. The run's `latest_ignorant` is a reference, its `checkpoints` are rows.

    Rows come in order of step; each has `name`, `ref`, `step`, `sha256`, `evals` and `note`.

    Raises:
        LetheError: there are no checkpoints, or a task is not known; raised before anything is written.
    """
    tasks.locate(config.tasks)
    found = find_checkpoints(config)
    from lethe.evaluate import evaluate_model, load_tasks

    load_tasks(config.tasks)
    run = Run.create("checkpoints", config.name, to_dict(config), config.out)
    with run.running(), bar("Evaluating checkpoints", len(found), "checkpoints") as advance:
        rows: list[dict[str, Any]] = []
        for name, ref in found.items():
            model, tokenizer = refs.load(ref)
            evals = evaluate_model(model, tokenizer, config.tasks, config.limit)
            if "chance" not in evals[config.tasks[0]]:
                first = config.tasks[0]
                raise LetheError(f"tasks: '{first}' has no chance level, so it cannot tell ignorance; name another first")
            rows.append({"name": name, "step": refs.step_of(name), **refs.record(ref), "evals": evals})
            run.update(checkpoints=rows)
            advance(1, f"{name} {config.tasks[0]} {evals[config.tasks[0]]['acc']:.3f}")
        latest = annotate(rows, config.tasks[0])
        parents = {row["name"]: {"ref": row["ref"], "sha256": row["sha256"]} for row in rows}
        run.update(checkpoints=rows, latest_ignorant=latest["ref"] if latest else None, parents=parents)
    return run


def find_checkpoints(config: CheckpointsConfig) -> dict[str, refs.ModelRef]:
    """The checkpoints' references by name, in order of step.

    Raises:
        LetheError: there are none.
    """
    where = config.checkpoints or config.model
    if where.startswith("lab:"):
        folder = refs.lab_folder() / "checkpoints"
        return {name: refs.resolve(f"lab:{name}", config.out) for name in refs.checkpoint_folders(folder)}
    if Path(where).is_dir():
        names = list(refs.checkpoint_folders(Path(where)))
    elif where.count("/") == 1:
        names = _branches(where)
    else:
        raise LetheError(f"checkpoints: '{where}' is neither lab:final, a folder nor a hub repository")
    if not names:
        raise LetheError(
            f"checkpoints: '{where}' has none (global_step… folders or branches); say where they are: --checkpoints"
        )
    return {name: refs.resolve(f"{where}@{name}", config.out) for name in names}


def at_chance(result: dict[str, Any]) -> bool:
    """Whether an accuracy is statistically at (or below) chance: low ≤ chance."""
    return result["low"] <= result["chance"]


def annotate(rows: list[dict[str, Any]], task: str) -> dict[str, Any] | None:
    """Set each row's `note` as the log does, and return the latest ignorant row, if any."""
    latest = max((i for i, row in enumerate(rows) if at_chance(row["evals"][task])), default=None)
    for i, row in enumerate(rows):
        row["note"] = "~Random" if at_chance(row["evals"][task]) else ""
        if i == latest:
            row["note"] = "~Random (latest viable)"
        elif latest is not None and i == latest + 1:
            row["note"] = "Learning starts"
    return None if latest is None else rows[latest]


def _branches(repository: str) -> list[str]:
    from huggingface_hub import list_repo_refs
    from huggingface_hub.errors import HfHubHTTPError

    try:
        branches = [branch.name for branch in list_repo_refs(repository).branches]
    except (HfHubHTTPError, OSError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LetheError(f"checkpoints: the hub's '{repository}' cannot be read ({why})") from error
    steps = [name for name in branches if refs.step_of(name) is not None]
    return sorted(steps, key=lambda name: refs.step_of(name) or 0)
