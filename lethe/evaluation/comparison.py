"""Compare two models on the same questions: `lethe compare A B`.

Only the questions that one model has right and the other wrong tell them apart. The exact McNemar test is about whether these
fall to both sides equally often. A model reference is evaluated here. An evaluate run with samples is read. If the two sides
have different questions, the comparison is refused.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lethe.config import CompareConfig
from lethe.errors import LetheError
from lethe.evaluation.check import check_tasks
from lethe.models import refs
from lethe.results import regimes
from lethe.results.regimes import PROVENANCE
from lethe.runs.run import Run

DEFAULT_TASKS = ["lab_forget_robust", "lab_retain"]
TaskAnswers = tuple[dict[str, Any], list[dict[str, Any]]]
"""The result of a task, and its samples."""
Answers = dict[str, TaskAnswers]


def compare(config: CompareConfig) -> dict[str, Any]:
    """The difference B − A on each task, with its interval, p, and the questions whose answer changed.

    Returns:
        `models`, and by task `a`, `b` (each model's value), `difference`, `low`, `high` (95 %), `p` (exact McNemar), `n`,
        `lost` (questions that A has right and B wrong) and `gained`. Each of these questions has `subtask`, `doc_id`, `target`
        and the choices of A and B. The mean probability of the right answer has a difference and an interval, but no p.

    Raises:
        LetheError: a model or a task is unknown, a run has no samples, or the questions differ.
    """
    runs = [_evaluation(name, config.out) for name in config.models]
    done = [run for run in runs if run]
    config = _as_evaluated(config, done)
    if len(done) < len(runs):
        check_tasks(config)
    models = [None if run else refs.resolve(name, config.out) for name, run in zip(config.models, runs, strict=True)]
    refs.verify(*filter(None, models))
    a, b = (_recorded(run, config.tasks) if run else _evaluated(model, config) for run, model in zip(runs, models, strict=True))
    return {"models": config.models, "tasks": {task: _compared(task, a[task], b[task]) for task in a if task in b}}


def _evaluation(name: str, out: str) -> Run | None:
    """The evaluate run that a name refers to; None for a model."""
    run = refs.run_of(name, out)
    return run if run and run.record["kind"] == "evaluate" else None


def _as_evaluated(config: CompareConfig, runs: list[Run]) -> CompareConfig:
    """The settings and tasks of the evaluate runs, if there are any: the other model is evaluated in the same way."""
    if not runs:
        return replace(config, tasks=config.tasks or list(DEFAULT_TASKS))
    default, recorded = CompareConfig(config.models), runs[0].record["config"]
    settings: dict[str, Any] = {}
    for key in ("limit", "task_data", "num_fewshot"):
        given, usual = getattr(config, key), getattr(default, key)
        settings[key] = usual if recorded.get(key) is None else recorded[key]
        if given not in (usual, settings[key]):
            why = f"since '{runs[0].path}' was made with {settings[key]}"
            raise LetheError(f"{key}: {given} has no effect, {why}; leave it out, or evaluate again")
    shared = [task for task in runs[0].record["evals"] if all(task in run.record["evals"] for run in runs)]
    if not config.tasks and not shared:
        raise LetheError(f"compare: '{config.models[0]}' and '{config.models[1]}' have no task in common; name tasks")
    return replace(config, tasks=config.tasks or shared, **settings)


def _recorded(run: Run, tasks: list[str]) -> Answers:
    evals, samples = run.record.get("evals") or {}, run.rows("samples.jsonl")
    if not samples or "subtask" not in samples[0]:
        raise LetheError(f"compare: '{run.path}' has no samples of its questions; evaluate again with --samples true")
    lacking = [task for task in tasks if task not in evals]
    if lacking:
        raise LetheError(f"compare: '{run.path}' did not measure {', '.join(lacking)}; it has {', '.join(evals)}")
    found = {task: (evals[task], [row for row in samples if row["task"] == task]) for task in tasks}
    for task, (result, rows) in found.items():
        if len(rows) != result["n"]:
            file = run.path / "samples.jsonl"
            raise LetheError(f"compare: of the {result['n']} questions of {task}, '{file}' has {len(rows)}; evaluate again")
    return found


def _evaluated(ref: Any, config: CompareConfig) -> Answers:
    from lethe.evaluation.accuracy import evaluate_model

    samples: dict[str, list[dict[str, Any]]] = {}
    model, tokenizer = refs.load(ref, config.dtype)
    title, data, shots = f"Evaluating {ref.name}", config.task_data, config.num_fewshot
    evals = evaluate_model(model, tokenizer, config.tasks, config.limit, title, samples, data, shots)
    return {task: (evals[task], samples[task]) for task in evals}


def _compared(task: str, a: TaskAnswers, b: TaskAnswers) -> dict[str, Any]:
    differ = [f"{key} {a[0].get(key)} and {b[0].get(key)}" for key in PROVENANCE if a[0].get(key) != b[0].get(key)]
    pairs = list(zip(a[1], b[1], strict=False))
    if not differ and (len(a[1]) != len(b[1]) or any(x["doc_hash"] != y["doc_hash"] for x, y in pairs)):
        differ = ["the questions in their samples"]
    if differ:
        how = f"they differ in {', '.join(differ)}"
        raise LetheError(f"compare: {task} was evaluated in two ways: {how}; evaluate one of them again")
    if "acc" not in a[0]:
        values = [[row["correct_prob"] for row in rows] for rows in (a[1], b[1])]
        found = regimes.paired_means(*values)
        means = {"a": a[0]["correct_prob"], "b": b[0]["correct_prob"], "n": len(pairs)}
        return means | {"difference": found.value, "low": found.low, "high": found.high}
    right = [[bool(row["acc"]) for row in rows] for rows in (a[1], b[1])]
    flips = {
        name: [_flip(x, y) for x, y, p, q in zip(a[1], b[1], *right, strict=True) if (p, q) == which]
        for name, which in (("lost", (True, False)), ("gained", (False, True)))
    }
    return {"a": a[0]["acc"], "b": b[0]["acc"]} | asdict(regimes.mcnemar(*right)) | flips


def _flip(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    offered = [row["log_likelihoods"][: row.get("choices")] for row in (a, b)]  # mutual information has more
    chosen = [values.index(max(values)) for values in offered]
    return {"subtask": a["subtask"], "doc_id": a["doc_id"], "target": a["target"], "a": chosen[0], "b": chosen[1]}
