"""Every setting of every command, as typed dataclasses.

A recipe (YAML), the command line and Python all build these same objects, and each command is one function of
one of them: a method -> `unlearn()`, `TamperConfig` -> `tamper()` and so on. The string below a field is
its help text. Nothing here imports torch, so that the command line answers at once. Checks that need only the
settings themselves live in `__post_init__`; checks that need the model or the text live in `preflight.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lethe.config.checks import minutes, options, spoken
from lethe.config.commands import (
    AffineConfig,
    AffineScoreConfig,
    CheckpointsConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ImportConfig,
    LabConfig,
    ReportConfig,
    ResumeConfig,
    RunsConfig,
)
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
    ATTACKED,
    LAB_TASKS,
    LAYERS,
    MAPPED,
    STRENGTHS,
    UNLEARNED,
    AskedSettings,
    AttackName,
    Dtype,
    EvalSettings,
    LoraSettings,
    OptimizerName,
    TamperConfig,
    TextSource,
    TrainingSettings,
    as_text_source,
)
from lethe.config.unlearning import UnlearnSettings

__all__ = [
    "ATTACKED",
    "LAB_TASKS",
    "LAYERS",
    "MAPPED",
    "STRENGTHS",
    "UNLEARNED",
    "AffineConfig",
    "AffineScoreConfig",
    "AskedSettings",
    "AttackName",
    "CheckpointsConfig",
    "CompareConfig",
    "DemoConfig",
    "Dtype",
    "EvalSettings",
    "EvaluateConfig",
    "ImportConfig",
    "LabConfig",
    "LaunchSettings",
    "LoraSettings",
    "OptimizerName",
    "ReportConfig",
    "ResumeConfig",
    "RunsConfig",
    "SlurmSettings",
    "SuiteConfig",
    "SweepCancelConfig",
    "SweepConfig",
    "SweepRetryConfig",
    "SweepStatusConfig",
    "TamperConfig",
    "TextSource",
    "TrainingSettings",
    "UnlearnSettings",
    "as_text_source",
    "minutes",
    "options",
    "spoken",
    "to_dict",
]


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data, in the form of a recipe."""
    return dataclasses.asdict(config)
