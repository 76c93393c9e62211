"""Two models on the same questions: `lethe compare A B`.

Both answered the same questions, so what counts are those that one has right and the other wrong: the exact McNemar test
asks whether they fall to either side alike. A or B is a model reference, which is evaluated here, or an evaluate run that was
made with samples, which is read. Questions that differ are refused: their difference would be the questions', not the models'.
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
Answers = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


def compare(config: CompareConfig) -> dict[str, Any]:
    """Difference B − A a task, with its interval, p, and the questions that flipped.

    Returns:
        `models`, and by task `a`, `b` (each model's value), `difference`, `low`, `high` (95 %), `p` (exact McNemar), `n`,
        `lost` (questions that A has right and B wrong) and `gained`, each with `subtask`, `doc_id`, `target`, and what A and B
        chose.
        The mean probability of the right answer has a difference and an interval, but no p.

    Raises:
        LetheError: a model or a task is not known, a run has no samples, or the questions differ.
    """
    runs = [_evaluation(name, config.out) for name in config.models]
    first = next((run for run in runs if run), None)
    if first:
        config = _as_asked(config, first)
    if first and not config.tasks:
        shared = [task for task in first.record["evals"] if all(task in run.record["evals"] for run in runs if run)]
        config = replace(config, tasks=shared)
    elif not config.tasks:
        config = replace(config, tasks=list(DEFAULT_TASKS))
    if not config.tasks:
        raise LetheError(f"compare: '{config.models[0]}' and '{config.models[1]}' have no task in common")
    if not all(runs):
        check_tasks(config)
    models = [None if run else refs.resolve(name, config.out) for name, run in zip(config.models, runs, strict=True)]
    for ref in models:
        if ref is not None:
            refs.verify(ref)
    answers = [
        _recorded(run, config.tasks) if run else _evaluated(model, config) for run, model in zip(runs, models, strict=True)
    ]
    tasks = [task for task in answers[0] if task in answers[1]]
    return {"models": config.models, "tasks": {task: _compared(task, answers[0][task], answers[1][task]) for task in tasks}}


def _as_asked(config: CompareConfig, run: Run) -> CompareConfig:
    """The settings of the evaluation that is there already: the other model is to be asked the same."""
    usual = CompareConfig(config.models)
    asked: dict[str, Any] = {}
    for key in ("limit", "task_data", "num_fewshot"):
        given, made = getattr(config, key), run.record["config"].get(key)
        asked[key] = getattr(usual, key) if made is None else made  # no examples are a number of examples
        if given not in (getattr(usual, key), asked[key]):
            raise LetheError(
                f"{key}: {given} has no effect, since '{run.path}' was made with {asked[key]}; leave it out, or evaluate again"
            )
    return replace(config, **asked)


def _evaluation(name: str, out: str) -> Run | None:
    """The evaluate run that a name means; None for a model."""
    run = refs.run_of(name, out)
    return run if run and run.record["kind"] == "evaluate" else None


def _recorded(run: Run, tasks: list[str]) -> Answers:
    evals, samples = run.record.get("evals") or {}, run.rows("samples.jsonl")
    if not samples or "subtask" not in samples[0]:
        raise LetheError(f"compare: '{run.path}' keeps no samples of its questions; evaluate again with --samples true")
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
    evals = evaluate_model(
        model,
        tokenizer,
        config.tasks,
        config.limit,
        f"Evaluating {ref.name}",
        samples,
        config.task_data,
        config.num_fewshot,
    )
    return {task: (evals[task], samples[task]) for task in evals}


def _compared(
    task: str, a: tuple[dict[str, Any], list[dict[str, Any]]], b: tuple[dict[str, Any], list[dict[str, Any]]]
) -> dict[str, Any]:
    differ = [f"{key} {a[0].get(key)} and {b[0].get(key)}" for key in PROVENANCE if a[0].get(key) != b[0].get(key)]
    pairs = list(zip(a[1], b[1], strict=False))
    if not differ and (len(a[1]) != len(b[1]) or any(x["doc_hash"] != y["doc_hash"] for x, y in pairs)):
        differ = ["the questions in their samples"]
    if differ:
        raise LetheError(
            f"compare: {task} was asked in two ways: they differ in {', '.join(differ)}; evaluate one of them again"
        )
    if "acc" not in a[0]:
        values = [[row["correct_prob"] for row in rows] for rows in (a[1], b[1])]
        found = regimes.paired_means(*values)
        return {"a": a[0]["correct_prob"], "b": b[0]["correct_prob"], "n": len(pairs)} | {
            "difference": found.value,
            "low": found.low,
            "high": found.high,
        }
    right = [[bool(row["acc"]) for row in rows] for rows in (a[1], b[1])]
    flips = {
        name: [_flip(x, y) for x, y, p, q in zip(a[1], b[1], *right, strict=True) if (p, q) == which]
        for name, which in (("lost", (True, False)), ("gained", (False, True)))
    }
    return {"a": a[0]["acc"], "b": b[0]["acc"]} | asdict(regimes.mcnemar(*right)) | flips


def _flip(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    offered = [row["log_likelihoods"][: row.get("choices")] for row in (a, b)]  # mutual information has more of them
    chosen = [values.index(max(values)) for values in offered]
    return {"subtask": a["subtask"], "doc_id": a["doc_id"], "target": a["target"], "a": chosen[0], "b": chosen[1]}
