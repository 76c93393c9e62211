"""Check of tasks before an evaluation, or a run that evaluates. Nothing here imports torch: faults are refused at once."""

from __future__ import annotations

from lethe.config import CheckpointsConfig, CompareConfig, EvalSettings, EvaluateConfig
from lethe.evaluation import tasks
from lethe.evaluation.tasks import data


def check_tasks(settings: EvalSettings | EvaluateConfig | CheckpointsConfig | CompareConfig) -> None:
    """Find the tasks, and read the local files in place of their data.

    Raises:
        LetheError: a task is unknown, or a file has broken rows.
    """
    data.read(settings.task_data, tasks.locate(settings.tasks))
