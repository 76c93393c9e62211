"""The checkpoint sweep: evaluate a model's pretraining checkpoints and find the latest that does not know the topic.

Such a checkpoint is *ignorant*: on the first task, the lower end of its accuracy's 95 % interval is not above chance. (Accuracy
far below chance is no knowledge either.) The other tasks are reported beside it. A model learns a topic once, so `search`
evaluates few checkpoints: the last one, then the middle of the remaining range, and at the end both neighbours of the answer.
Results that contradict a single moment of learning are reported.

Results are cached in $LETHE_HOME by a hash of everything that they depend on, so a sweep that was killed resumes.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe.config import CheckpointsConfig, to_dict
from lethe.errors import LetheError, nearest
from lethe.evaluation.check import check_tasks
from lethe.files import refuse_run_folder
from lethe.home import cache_key, lethe_home, store, stored
from lethe.models import refs
from lethe.models.checkpoint_folders import checkpoint_folders, step_of
from lethe.models.hub import hub
from lethe.progress import bar
from lethe.results.regimes import at_chance
from lethe.runs.run import Run

if TYPE_CHECKING:
    from lethe.evaluation.requests import Leaf

FORMAT = 1
GIVE_UP = 3


def checkpoints(config: CheckpointsConfig, run: Run | None = None) -> Run:
    """Find the latest ignorant checkpoint. `run`: an interrupted sweep to resume.

    The record of the run has `latest_ignorant` (a model reference), `checkpoints` (a row for each, in order of step),
    `evaluations` (how many were done, and how many come from the cache) and `not_monotone` (results that contradict a single
    moment of learning). A row has `name`, `step`, `ref` and `note`. If the checkpoint was evaluated, it also has `sha256` and
    `evals`. If it could not be evaluated, it has the `reason`.

    Raises:
        LetheError: there are no checkpoints, a task is unknown or has no chance level; raised before anything is written.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    found = find_checkpoints(config)
    rows: list[dict[str, Any]] = [
        {"name": name, "step": step_of(name), "ref": ref.name, "evals": {}, "note": ""} for name, ref in found.items()
    ]
    source = _source(config.source, rows)
    from lethe.evaluation.requests import load_tasks  # imports torch: what is refused above is refused at once

    loaded = load_tasks(config.tasks, config.task_data, config.num_fewshot, config.limit)
    first = next(iter(loaded))
    if any(not leaf.multiple_choice or "acc" not in leaf.task._metric_fn_list for leaf in loaded[first]):
        raise LetheError(f"tasks: '{first}' has no chance level, so it cannot show ignorance; name another task first")
    run = run or Run.create("checkpoints", config.name, to_dict(config), config.out)
    with run.running(), bar("Evaluating checkpoints", _most(len(rows), config.search), "checkpoints") as advance:
        counts = {"done": 0, "cached": 0}

        def ignorant(i: int) -> bool | None:
            row = rows[i]
            if not row["evals"] and "reason" not in row:
                _measure(row, found[row["name"]], config, loaded, counts)
                run.update(checkpoints=rows, evaluations=counts)
                advance(1, row.get("reason") or f"{row['name']} {first} {row['evals'][first]['acc']:.3f}")
                _refuse_hopeless(rows)
            return at_chance(row["evals"][first]) if row["evals"] else None

        if config.search == "bisect":
            search(len(rows), ignorant)
        else:
            for i in range(len(rows)):
                ignorant(i)
        latest = annotate(rows, first, source)
        run.update(
            checkpoints=rows,
            latest_ignorant=latest["ref"] if latest else None,
            not_monotone=not_monotone(rows, first),
            parents={row["name"]: {"ref": row["ref"], "sha256": row["sha256"]} for row in rows if row["evals"]},
        )
    return run


def search(count: int, ignorant: Callable[[int], bool | None]) -> None:
    """Evaluate as few of `count` checkpoints as determine the latest ignorant one and its neighbours.

    The last checkpoint comes first, then the middle of the remaining range: at most 9 evaluations of 119 checkpoints.
    `ignorant(i)` returns None for a checkpoint that cannot be evaluated. The one before it then answers for it.
    """

    def knows(i: int) -> bool:
        answer = ignorant(i)
        while answer is None and i > 0:
            i -= 1
            answer = ignorant(i)
        return answer is False

    latest = count - 1
    if knows(latest):
        latest = bisect.bisect_left(range(latest), True, key=knows) - 1
    while latest >= 0 and ignorant(latest) is None:  # the one before it has answered for it
        latest -= 1
    while latest > 0 and ignorant(latest - 1) is None:
        latest -= 1


def find_checkpoints(config: CheckpointsConfig) -> dict[str, refs.ModelRef]:
    """The checkpoints' references by name, in order of step.

    Raises:
        LetheError: there are none.
    """
    where = config.checkpoints or config.model
    if where.startswith("lab:"):
        refs.resolve(where, config.out)
        folder = refs.lab_folder() / "checkpoints"
        return {name: refs.resolve(f"lab:{name}", config.out) for name in checkpoint_folders(folder)}
    if Path(where).is_dir():  # files are checked later, so that a damaged checkpoint does not hide the others
        names = checkpoint_folders(Path(where))
        found = {name: refs.ModelRef(f"{where}@{name}", str(Path(where) / name)) for name in names}
    elif where.count("/") == 1:
        found = {name: refs.ModelRef(f"{where}@{name}", where, name) for name in _branches(where)}
    else:
        raise LetheError(f"checkpoints: '{where}' is not a folder; give one, a repository of the hub, or lab:final")
    if not found:
        wanted = "folders or branches global_step…, step… or checkpoint-…"
        raise LetheError(f"checkpoints: '{where}' has no checkpoints ({wanted}); name where they are: --checkpoints")
    return found


def annotate(rows: list[dict[str, Any]], task: str, source: str | None = None) -> dict[str, Any] | None:
    """Set each row's `note`, and return the latest ignorant row, if any. `source`: name of the checkpoint in use as source."""
    ignorant = [bool(row["evals"]) and at_chance(row["evals"][task]) for row in rows]
    latest = max((i for i, is_so in enumerate(ignorant) if is_so), default=None)
    after = next((i for i, row in enumerate(rows) if latest is not None and i > latest and row["evals"]), None)
    for i, row in enumerate(rows):
        notes = ["Current source"] if source is not None and row.get("name") == source else []
        if ignorant[i]:
            notes.append("~Random (latest viable)" if i == latest else "~Random")
        elif i == after:
            notes.append("Learning starts")
        notes += [f"not measured: {row['reason']}"] if row.get("reason") else []
        row["note"] = "; ".join(notes)
    return None if latest is None else rows[latest]


def not_monotone(rows: list[dict[str, Any]], task: str) -> list[str]:
    """Sentences about results that contradict an accuracy that only rises.

    Either a later checkpoint is at chance after an earlier one was not, or its interval lies below that of the earlier one.
    """
    measured = [row for row in rows if row["evals"]]
    found = []
    for i, later in enumerate(measured[1:], 1):
        earlier = max(measured[:i], key=lambda row: row["evals"][task]["low"])
        before, after = earlier["evals"][task], later["evals"][task]
        if before["low"] > after["high"] or (not at_chance(before) and at_chance(after)):
            values = f"{earlier['name']} has {100 * before['acc']:.2f} %, {later['name']} {100 * after['acc']:.2f} %"
            found.append(f"{values}" + (" and is at chance again" if at_chance(after) else ""))
    return found


def _measure(
    row: dict[str, Any], ref: refs.ModelRef, config: CheckpointsConfig, loaded: dict[str, list[Leaf]], counts: dict[str, int]
) -> None:
    """Fill a row's `sha256` and `evals`, from the cache or by an evaluation; or its `reason`, if that fails."""
    from lethe.evaluation.accuracy import evaluate_model

    try:
        record = refs.record(refs.checked(ref))
        file = _cache_file(ref, record["sha256"], config, loaded)
        if text := stored(file):
            evals = {name: json.loads(text)["evals"][name] for name in loaded}
        else:
            model, tokenizer = refs.load(ref, config.dtype)
            data, shots = config.task_data, config.num_fewshot
            evals = evaluate_model(model, tokenizer, config.tasks, config.limit, task_data=data, num_fewshot=shots)
            store(file, json.dumps({"ref": ref.name, "evals": evals}))
        counts["cached" if text else "done"] += 1
    except LetheError as error:
        row["reason"] = str(error)
        return
    row |= record | {"evals": evals}


def _cache_file(ref: refs.ModelRef, weights: str, config: CheckpointsConfig, loaded: dict[str, list[Leaf]]) -> Path:
    """The cache file of a checkpoint's results, named by a hash of its files, the questions and the versions of libraries."""
    from lethe.evaluation.requests import tokenizer_hash

    questions = {name: [leaf.definition for leaf in leaves] for name, leaves in loaded.items()}
    versions = [importlib.metadata.version(name) for name in ("lethe-lm", "lm_eval", "tokenizers", "torch", "transformers")]
    tokens = tokenizer_hash(refs.tokenizer(ref))
    key = cache_key(FORMAT, versions, weights, ref.config, tokens, questions, config.limit, config.dtype)
    return lethe_home() / "evaluations" / f"{key}.json"


def _refuse_hopeless(rows: list[dict[str, Any]]) -> None:
    """Stop if no checkpoint can be evaluated, because the network is down or a setting suits none of them."""
    failed = [row for row in rows if row.get("reason")]
    if len(failed) >= min(GIVE_UP, len(rows)) and not any(row["evals"] for row in rows):
        raise LetheError(f"checkpoints: none of the {len(failed)} tried could be evaluated ({failed[-1]['reason']})")


def _source(source: str | None, rows: list[dict[str, Any]]) -> str | None:
    """The name of the checkpoint in use as source."""
    if source is None:
        return None
    for row in rows:
        if source in {row["name"], row["ref"]} or source.endswith((f"@{row['name']}", f":{row['name']}")):
            return row["name"]
    raise LetheError(f"source: '{source}' is not one of the checkpoints{nearest(source, [row['name'] for row in rows])}")


def _most(count: int, search: str) -> int:
    """The largest number of evaluations: the last checkpoint, the bisection, and the earlier neighbour of the answer."""
    return count if search == "all" else min(count, 2 + math.ceil(math.log2(max(1, count))))


def _branches(repository: str) -> list[str]:
    from huggingface_hub import list_repo_refs

    with hub(f"checkpoints: the repository '{repository}' of the hub cannot be read"):
        branches = [branch.name for branch in list_repo_refs(repository).branches]
    steps = [name for name in branches if step_of(name) is not None]
    return sorted(steps, key=lambda name: step_of(name) or 0)
