"""Checks before an evaluation. No model is loaded: what is refused here is refused at once."""

from __future__ import annotations

from lethe.config import CheckpointsConfig, CompareConfig, EvalSettings, EvaluateConfig
from lethe.evaluation import tasks
from lethe.evaluation.tasks import data
from lethe.files import refuse_run_folder
from lethe.models import refs


def check_tasks(settings: EvalSettings | EvaluateConfig | CheckpointsConfig | CompareConfig) -> None:
    """Find the tasks, and read the local files in place of their data.

    Raises:
        LetheError: a task is unknown, or a file has broken rows.
    """
    data.read(settings.task_data, tasks.locate(settings.tasks))


def check_model(config: EvaluateConfig) -> refs.ModelRef:
    """The model of an evaluation, after a check of its files and of the tasks.

    Raises:
        LetheError: the model or a task is unknown, or `out` is a run.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    ref = refs.resolve(config.model, config.out)
    refs.verify(ref)
    return ref
