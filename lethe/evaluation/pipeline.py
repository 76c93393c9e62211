"""Evaluate a model reference as a run: `lethe evaluate MODEL`."""

from __future__ import annotations

from typing import Any

from lethe import distributed
from lethe.config import EvaluateConfig, to_dict
from lethe.evaluation.check import check_tasks
from lethe.evaluation.tasks.consent import trusts_task_code
from lethe.files import refuse_run_folder
from lethe.models import refs
from lethe.runs.run import Run
from lethe.runs.together import is_for_several, work_together

TAKEN = {"bfloat16": 2.6, "float32": 5.2, "float64": 10.4}
"""Bytes per weight that an evaluation takes, with a reserve."""


def evaluate(config: EvaluateConfig, run: Run | None = None) -> Run:
    """Evaluate a model reference on tasks, as a run. `run`: an interrupted run, which starts again.

    Raises:
        LetheError: the model or a task is unknown; raised before anything is written.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    ref = refs.resolve(config.model, config.out)
    refs.verify(ref)
    from lethe.evaluation.accuracy import NotNumbersError, evaluate_model, refuse_unscorable  # imports torch
    from lethe.evaluation.requests import load_tasks
    from lethe.models.loading import divided

    load_tasks(config.tasks, config.task_data, config.num_fewshot, config.limit)
    if is_for_several(config.devices, run is not None):
        run = run or Run.create("evaluate", config.name, to_dict(config), config.out)
        return work_together(run, config.devices, trusts_task_code())  # type: ignore[arg-type]
    sharded = divided(lambda: refs.outline(ref), config.parallel, TAKEN[config.dtype])
    model, tokenizer = refs.load(ref, config.dtype, sharded=sharded)
    refuse_unscorable(model, tokenizer, config)
    run = run or Run.create("evaluate", config.name, to_dict(config), config.out)
    with run.running():
        run.set_parents(model=refs.record(ref))
        distributed.from_first(lambda: (run.path / "samples.jsonl").unlink(missing_ok=True))
        samples: dict[str, list[dict[str, Any]]] = {}
        missing: dict[str, str] = {}
        title, data, shots = f"Evaluating {config.model}", config.task_data, config.num_fewshot
        evals = evaluate_model(model, tokenizer, config.tasks, config.limit, title, samples, data, shots, missing)
        for task, some in samples.items() if config.samples else ():
            for sample in some:
                run.append("samples.jsonl", {"task": task} | sample)
        run.update(evals=evals)
        if missing:
            run.update(evals_missing=missing)
        if not evals:
            raise NotNumbersError(next(iter(missing.values())))
    return run
