"""Lethe: make a language model forget a topic, and prove how well that worked.

The public names are loaded when they are first used: importing lethe imports neither torch nor transformers. Some
functions have the name of their module (`unlearn`, `tamper`, …): as an attribute of the package it is the function.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lethe.attacks.tampering import tamper
    from lethe.config import (
        AffineConfig,
        AffineScoreConfig,
        CheckpointsConfig,
        CompareConfig,
        EvalSettings,
        EvaluateConfig,
        LoraSettings,
        SuiteConfig,
        SweepConfig,
        TamperConfig,
        TextSource,
        UnlearnConfig,
    )
    from lethe.errors import LetheError
    from lethe.evaluation.accuracy import evaluate, evaluate_model
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.evaluation.comparison import compare
    from lethe.evaluation.tasks.consent import trust_task_code
    from lethe.maps.affine import AffineMap, fit_affine, score_affine
    from lethe.runs.run import Run, find_runs
    from lethe.sweeps.controller import sweep
    from lethe.unlearning.pipeline import unlearn

_HOME = {
    "affine": ["AffineMap", "fit_affine", "score_affine"],
    "checkpoints": ["checkpoints"],
    "compare": ["compare"],
    "config": [
        "AffineConfig",
        "AffineScoreConfig",
        "CheckpointsConfig",
        "CompareConfig",
        "EvalSettings",
        "EvaluateConfig",
        "LoraSettings",
        "SuiteConfig",
        "SweepConfig",
        "TamperConfig",
        "TextSource",
        "UnlearnConfig",
    ],
    "errors": ["LetheError"],
    "evaluate": ["evaluate", "evaluate_model"],
    "ledger": ["Run", "find_runs"],
    "sweep": ["sweep"],
    "tamper": ["tamper"],
    "tasks.consent": ["trust_task_code"],
    "unlearn": ["unlearn"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)  # noqa: PLE0605


class _Package(ModuleType):
    """Loads public names on first use, and keeps the import system from putting a module where its function belongs."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE:
            raise AttributeError(f"module 'lethe' has no attribute '{name}'")
        return getattr(importlib.import_module(f"lethe.{_MODULE[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _MODULE and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
