"""Every setting of every command, as typed dataclasses.

A recipe (YAML), the command line and Python all build these same objects, and each command is one function of
one of them: a method -> `unlearn()`, `TamperConfig` -> `tamper()` and so on. The string below a field is
its help text. Nothing here imports torch, so that the command line answers at once. The range of a setting stands in
its type, a check of several settings in `__post_init__`. Checks that need the model or the text stand at the beginning
of the command's own function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lethe.config.attacks import ATTACKED, STRENGTHS, AttackName, TamperConfig
from lethe.config.checks import Dtype, memory_bytes, minutes, options, spoken
from lethe.config.commands import (
    AffineConfig,
    AffineScoreConfig,
    DemoConfig,
    ImportConfig,
    LabConfig,
    RecipesConfig,
    ReportConfig,
    ResumeConfig,
    RunsConfig,
)
from lethe.config.evaluation import LAB_TASKS, CheckpointsConfig, CompareConfig, EvalSettings, EvaluateConfig, TaskSettings
from lethe.config.sweeps import (
    LaunchSettings,
    SlurmSettings,
    SuiteConfig,
    SweepCancelConfig,
    SweepConfig,
    SweepRetryConfig,
    SweepStatusConfig,
)
from lethe.config.training import (
    LAYERS,
    MAPPED,
    UNLEARNED,
    LoraSettings,
    OptimizerName,
    TextSource,
    TrainingSettings,
    as_text_source,
)
from lethe.config.unlearning import BudgetSettings, CheckSettings, LayeredSettings, UnlearnSettings


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data, in the form of a recipe."""
    return dataclasses.asdict(config)
