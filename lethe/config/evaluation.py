"""Settings of evaluation: tasks, the commands that evaluate models, and evaluation during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lethe.config.checks import Dtype, at_least, check_types
from lethe.errors import LetheError

LAB_TASKS = ["lab_forget", "lab_forget_robust", "lab_forget_cloze", "lab_retain", "lab_retain_stem"]


@dataclass(kw_only=True)
class TaskSettings:
    """The settings of every command that evaluates on tasks."""

    prefix: ClassVar[str] = ""
    """What the names of these settings begin with, for messages."""

    limit: int = 0
    """Number of questions per task, from the first one (0: all). More questions give narrower intervals."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Local files (.jsonl) to read instead of a task's data set on the hub, such as wmdp_bio_robust=FILE.jsonl."""
    num_fewshot: int | None = None
    """Solved examples in each prompt; null: the number that each task names."""
    suites: dict[str, list[str]] = field(default_factory=dict)
    """Your own names for lists of tasks, which you can then use in tasks: {biothreat: [wmdp_bio_robust, wmdp_bio_cloze]}."""

    def __post_init__(self) -> None:
        """Split task names at commas, and write the tasks of a suite in its place; each name once.

        Raises:
            LetheError: a setting is out of range.
        """
        check_types(self, self.prefix)
        for name in ("limit", "num_fewshot", "every", "time_limit"):
            at_least(f"{self.prefix}{name}", getattr(self, name, 0) or 0, 0)
        given: list[str] = vars(self)["tasks"]  # a setting of each command, with its own default
        names = [name.strip() for word in given for name in word.split(",") if name.strip()]
        self.tasks = list(dict.fromkeys(task for name in names for task in self.suites.get(name, [name])))


@dataclass
class EvalSettings(TaskSettings):
    """Evaluation during and after a run."""

    prefix: ClassVar[str] = "eval."

    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """Tasks or groups of lm-eval, folders of task files, or suites."""
    every: int = 0
    """Updates between two evaluations (0: evaluate at the end only). A smaller number gives a finer curve and takes longer."""


@dataclass
class CheckpointsConfig(TaskSettings):
    """Evaluate a model's pretraining checkpoints and name the latest one that is still ignorant of the topic."""

    model: str
    """The final model, such as lab:final, or a folder that holds global_step…, step… or checkpoint-… folders."""
    checkpoints: str | None = None
    """The folder or hub repository that has the checkpoints; null: the model's own."""
    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """Tasks or groups of lm-eval, folders of task files, or suites. The first task decides which checkpoint is ignorant."""
    search: Literal["bisect", "all"] = "bisect"
    """bisect: bisect for the latest ignorant checkpoint, and evaluate its neighbours too; all: evaluate every checkpoint."""
    source: str | None = None
    """The checkpoint that you use as the source now (name or model reference). The table marks it."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    time_limit: float = 0.0
    """Hours after which the run stops with status failed (0: no limit)."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "checkpoints"
    """Name of the run."""


@dataclass
class EvaluateConfig(TaskSettings):
    """Evaluate a model on lm-eval tasks."""

    model: str
    """The model: any model reference, such as lab:final or run:ID."""
    tasks: list[str] = field(default_factory=lambda: list(LAB_TASKS))
    """Tasks or groups of lm-eval, folders of task files, or suites."""
    samples: bool = False
    """Write the log-likelihoods of every question to samples.jsonl, so that `lethe compare` can read them."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    time_limit: float = 0.0
    """Hours after which the run stops with status failed (0: no limit)."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "eval"
    """Name of the run."""


@dataclass
class CompareConfig(TaskSettings):
    """Compare two models on the same questions: the difference, an exact McNemar test, and which answers changed."""

    models: list[str]
    """Two model references, or evaluate runs. An evaluate run with samples is read, not evaluated again."""
    tasks: list[str] = field(default_factory=list)
    """Tasks or groups of lm-eval, folders of task files, or suites; []: those of the runs; without runs, the lab's."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    out: str = "runs"
    """Folder in which runs are looked up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.models) != 2:
            raise LetheError(f"models: expected two references or runs, got {len(self.models)}")
