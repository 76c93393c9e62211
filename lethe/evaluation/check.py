"""What an evaluation cannot do, refused before a model is loaded."""

from __future__ import annotations

from lethe.config import (
    CheckpointsConfig,
    CompareConfig,
    EvalSettings,
    EvaluateConfig,
)
from lethe.evaluation import tasks
from lethe.evaluation.tasks import data
from lethe.files import refuse_run_folder
from lethe.models import refs


def check_tasks(settings: EvalSettings | EvaluateConfig | CheckpointsConfig | CompareConfig) -> None:
    """Find the tasks to evaluate on, and read the local files that take the place of their data.

    Raises:
        LetheError: a task is not known, or a file has broken rows.
    """
    data.read(settings.task_data, tasks.locate(settings.tasks))


def check_model(config: EvaluateConfig) -> refs.ModelRef:
    """Resolve a model and tasks to evaluate it on.

    Raises:
        LetheError: one of them is not known, or `out` is a run.
    """
    refuse_run_folder(config.out)
    check_tasks(config)
    ref = refs.resolve(config.model, config.out)
    refs.verify(ref)
    return ref
