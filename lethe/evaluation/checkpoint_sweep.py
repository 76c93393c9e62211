"""The checkpoint sweep: evaluate a model's pretraining checkpoints and find the latest that is ignorant of the topic.

Ignorant means at chance: the lower end of the accuracy's 95 % interval is not above chance (a model far below chance
knows nothing either). The first task decides; the others are measured beside it. A model learns a topic once, so the history
is halved (`bisect`) rather than measured whole: the last checkpoint, then the middle of what is left, and at the end both
neighbours of the answer. What was measured is looked at for a history that is not so simple, and that is said.

Results are kept in $LETHE_HOME under the hash of all that they depend on: a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
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
from lethe.home import lethe_home, store, stored
from lethe.models import refs
from lethe.progress import bar
from lethe.results.regimes import at_chance
from lethe.runs.machine import say_if_busy
from lethe.runs.run import Run

if TYPE_CHECKING:
    from lethe.evaluation.questions import Leaf

FORMAT = 1
GIVE_UP = 3


def checkpoints(config: CheckpointsConfig, run: Run | None = None) -> Run:
    """Find the latest ignorant checkpoint. The run's `latest_ignorant` is a reference, its `checkpoints` are rows.

    `run` is an interrupted sweep to go on with; what it has measured is kept.

    Rows come in order of step, one for every checkpoint; each has `name`, `step`, `ref` and `note`; a measured one `sha256` and
    `evals` too, one that could not be measured the `reason`. `evaluations` says how many were done and how many taken from
    an earlier sweep, `not_monotone` what speaks against a single moment of learning. The folder has a chart, checkpoints.svg.

    Raises:
        LetheError: there are no checkpoints, a task is not known or has no chance level; raised before anything is written.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    found = find_checkpoints(config)
    rows: list[dict[str, Any]] = [
        {"name": name, "step": refs.step_of(name), "ref": ref.name, "evals": {}, "note": ""} for name, ref in found.items()
    ]
    source = _source(config.source, rows)
    from lethe.evaluation.questions import load_tasks

    loaded = load_tasks(config.tasks, config.task_data, config.num_fewshot, config.limit)
    first = next(iter(loaded))
    if any(not leaf.multiple_choice or "acc" not in leaf.task._metric_fn_list for leaf in loaded[first]):
        raise LetheError(f"tasks: '{first}' has no chance level, so it cannot tell ignorance; name another first")
    run = run or Run.create("checkpoints", config.name, to_dict(config), config.out)
    with run.running(), bar("Evaluating checkpoints", _most(len(rows), config.search), "checkpoints") as advance:
        say_if_busy()
        counts = {"done": 0, "kept": 0}

        def ignorant(i: int) -> bool | None:
            row = rows[i]
            if not row["evals"]:
                _measure(row, found[row["name"]], config, loaded, counts)
                run.update(checkpoints=rows, evaluations=counts)
                advance(1, row.get("reason") or f"{row['name']} {first} {row['evals'][first]['acc']:.3f}")
                _refuse_hopeless(rows)
            return at_chance(row["evals"][first]) if row["evals"] else None

        if config.search == "bisect":
            bisect(len(rows), ignorant)
        else:
            for i in range(len(rows)):
                ignorant(i)
        measured = [row for row in rows if row["evals"]]
        latest = annotate(rows, first, source)
        parents = {row["name"]: {"ref": row["ref"], "sha256": row["sha256"]} for row in measured}
        run.update(
            checkpoints=rows,
            latest_ignorant=latest["ref"] if latest else None,
            not_monotone=not_monotone(rows, first),
            parents=parents,
        )
    return run


def bisect(count: int, ignorant: Callable[[int], bool | None]) -> None:
    """Ask about so few of `count` checkpoints, in order of step, that the latest ignorant one and its neighbours are known.

    Asks about the last, then halves: with 119 at most 9 times. `ignorant` answers None where a checkpoint cannot be
    measured; it is then left out.
    """
    there = list(range(count))

    def ask(place: int) -> bool | None:
        answer = ignorant(there[place])
        if answer is None:
            del there[place]
        return answer

    last = None
    while there and last is None:
        last = ask(len(there) - 1)
    low, high = (len(there) - 1, len(there)) if last else (-1, len(there) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        answer = ask(middle)
        if answer is None:
            high -= 1
        elif answer:
            low = middle
        else:
            high = middle
    while low > 0 and ask(low - 1) is None:
        low -= 1


def find_checkpoints(config: CheckpointsConfig) -> dict[str, refs.ModelRef]:
    """The checkpoints' references by name, in order of step.

    Raises:
        LetheError: there are none.
    """
    where = config.checkpoints or config.model
    if where.startswith("lab:"):
        refs.resolve(where, config.out)
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
            f"checkpoints: '{where}' has none (folders or branches global_step…, step… or checkpoint-…); "
            f"say where they are: --checkpoints"
        )
    if Path(where).is_dir():  # looked at, or fetched, only if it is measured: a damaged one does not hide the others
        return {name: refs.ModelRef(f"{where}@{name}", str(Path(where) / name)) for name in names}
    return {name: refs.ModelRef(f"{where}@{name}", where, name) for name in names}


def annotate(rows: list[dict[str, Any]], task: str, source: str | None = None) -> dict[str, Any] | None:
    """Set each row's `note`, and return the latest ignorant row, if any. `source` names the one in use."""
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
    """What was measured and speaks against accuracy that only rises: a sentence each, none if there is nothing.

    An earlier checkpoint knows the topic and a later one is at chance, or an earlier one's interval lies above a later one's.
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
    """Fill a row's `sha256` and `evals`, from an earlier sweep where they were kept; `reason` if it cannot be measured."""
    from lethe.evaluation.accuracy import evaluate_model

    try:
        record = refs.record(refs.checked(ref))
        file = _kept(ref, record["sha256"], config, loaded)
        evals = _read(file, list(loaded))
        counts["kept"] += evals is not None
        if evals is None:
            model, tokenizer = refs.load(ref, config.dtype)
            evals = evaluate_model(
                model, tokenizer, config.tasks, config.limit, task_data=config.task_data, num_fewshot=config.num_fewshot
            )
            store(file, json.dumps({"ref": ref.name, "evals": evals}))
            counts["done"] += 1
    except LetheError as error:
        row["reason"] = str(error)
        return
    row |= record | {"evals": evals}


def _kept(ref: refs.ModelRef, weights: str, config: CheckpointsConfig, loaded: dict[str, list[Leaf]]) -> Path:
    """Where a checkpoint's results are kept: named by its weights, configuration and tokenizer, the questions and versions."""
    from lethe.evaluation.questions import tokenizer_hash

    asked = {name: [leaf.definition for leaf in leaves] for name, leaves in loaded.items()}
    versions = [importlib.metadata.version(name) for name in ("lethe-lm", "lm_eval", "torch", "transformers")]
    content = [FORMAT, weights, ref.config, tokenizer_hash(refs.tokenizer(ref)), asked, config.limit, config.dtype, versions]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return lethe_home() / "evaluations" / f"{key}.json"


def _read(file: Path, tasks: list[str]) -> dict[str, Any] | None:
    text = stored(file)
    evals = {} if text is None else json.loads(text)["evals"]
    return evals if list(evals) == tasks else None


def _refuse_hopeless(rows: list[dict[str, Any]]) -> None:
    """Give up when nothing can be measured: a network that is down, or a setting that fits none of them."""
    failed = [row for row in rows if row.get("reason")]
    if len(failed) >= min(GIVE_UP, len(rows)) and not any(row["evals"] for row in rows):
        raise LetheError(f"checkpoints: none of the {len(failed)} tried could be measured ({failed[-1]['reason']})")


def _source(source: str | None, rows: list[dict[str, Any]]) -> str | None:
    """The name of the checkpoint that is used as source."""
    if source is None:
        return None
    for row in rows:
        if source in {row["name"], row["ref"]} or source.endswith((f"@{row['name']}", f":{row['name']}")):
            return row["name"]
    raise LetheError(f"source: '{source}' is none of the checkpoints{nearest(source, [row['name'] for row in rows])}")


def _most(count: int, search: str) -> int:
    """The most evaluations that a search needs: the last checkpoint, the halvings, the answer's earlier neighbour."""
    return count if search == "all" else min(count, 2 + math.ceil(math.log2(max(1, count))))


def _branches(repository: str) -> list[str]:
    from huggingface_hub import list_repo_refs

    with refs.hub(f"checkpoints: the hub's '{repository}' cannot be read"):
        branches = [branch.name for branch in list_repo_refs(repository).branches]
    steps = [name for name in branches if refs.step_of(name) is not None]
    return sorted(steps, key=lambda name: refs.step_of(name) or 0)
