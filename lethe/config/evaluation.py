"""Settings of evaluation: tasks, the commands that evaluate models, and evaluation during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lethe.config.checks import Amount, Count, Dtype, Positive, RunName, Settings, must_be

LAB_TASKS = ["lab_forget", "lab_forget_robust", "lab_forget_cloze", "lab_retain", "lab_retain_stem"]


@dataclass(kw_only=True)
class TaskSettings(Settings):
    """The settings of every command that evaluates on tasks."""

    limit: Count = 0
    """Number of questions per task, from the first one (0: all). More questions give narrower intervals."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Local files (.jsonl) to read instead of a task's data set on the hub, such as wmdp_bio_robust=FILE.jsonl."""
    num_fewshot: Count | None = None
    """Solved examples in each prompt; null: the number that each task names."""
    suites: dict[str, list[str]] = field(default_factory=dict)
    """Your own names for lists of tasks, which you can then use in tasks: {biothreat: [wmdp_bio_robust, wmdp_bio_cloze]}."""

    def __post_init__(self) -> None:
        """Task names without commas, and the tasks of a suite in its place; each name once."""
        super().__post_init__()
        this: Any = self  # `tasks` is declared below, each with its own default
        names = [name.strip() for word in this.tasks for name in word.split(",") if name.strip()]
        this.tasks = list(dict.fromkeys(task for name in names for task in self.suites.get(name, [name])))


@dataclass
class EvalSettings(TaskSettings):
    """Evaluation during and after a run."""

    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """Tasks or groups of lm-eval, folders of task files, or names from suites."""
    every: Count = 0
    """Updates between two evaluations (0: evaluate at the end only). A smaller number gives a finer curve and takes longer."""


@dataclass
class CheckpointsConfig(TaskSettings):
    """Evaluate a model's pretraining checkpoints and name the latest one that is still ignorant of the topic."""

    model: str
    """The final model, such as lab:final, or a folder that holds global_step…, step… or checkpoint-… folders."""
    checkpoints: str | None = None
    """The folder or hub repository that has the checkpoints; null: the model's own."""
    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """Tasks or groups of lm-eval, folders of task files, or names from suites. The first one decides which checkpoint is
    ignorant."""
    search: Literal["bisect", "all"] = "bisect"
    """bisect: bisect for the latest ignorant checkpoint, and evaluate its neighbours too; all: evaluate every checkpoint."""
    source: str | None = None
    """The checkpoint that you use as the source now (name or model reference). The table marks it."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    time_limit: Amount = 0.0
    """Hours after which the run stops with status failed (0: no limit)."""
    out: str = "runs"
    """Folder of runs."""
    name: RunName = "checkpoints"
    """Name of the run."""


@dataclass
class EvaluateConfig(TaskSettings):
    """Evaluate a model on lm-eval tasks."""

    model: str
    """The model: any model reference, such as lab:final or run:ID."""
    tasks: list[str] = field(default_factory=lambda: list(LAB_TASKS))
    """Tasks or groups of lm-eval, folders of task files, or names from suites."""
    samples: bool = False
    """Write the log-likelihoods of every question to samples.jsonl, so that `lethe compare` can read them."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    devices: Positive | None = None
    """Number of processes to start on this machine, each with a GPU of its own if there are any. Each scores a part of the
    questions. null: one process, or those that torchrun, accelerate or Slurm started."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole model; fsdp: each holds a shard of every weight; auto: ddp if the model fits into the
    memory of one device, else fsdp."""
    time_limit: Amount = 0.0
    """Hours after which the run stops with status failed (0: no limit)."""
    out: str = "runs"
    """Folder of runs."""
    name: RunName = "eval"
    """Name of the run."""


@dataclass
class CompareConfig(TaskSettings):
    """Compare two models on the same questions: the difference, an exact McNemar test, and which answers changed."""

    models: Annotated[list[str], must_be("two references or runs", lambda models: len(models) == 2)]
    """Two model references, or evaluate runs. An evaluate run with samples is read, not evaluated again."""
    tasks: list[str] = field(default_factory=list)
    """Tasks or groups of lm-eval, folders of task files, or suites; []: those of the runs; without runs, the lab's."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    out: str = "runs"
    """Folder in which runs are looked up."""
