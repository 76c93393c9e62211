"""Lethe: make a language model forget a topic, and prove how well that worked.

The public names are loaded when they are first used: importing lethe imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
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
    )
    from lethe.errors import LetheError
    from lethe.evaluation.accuracy import evaluate_model
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.evaluation.comparison import compare
    from lethe.evaluation.evaluating import evaluate
    from lethe.evaluation.tasks.consent import trust_task_code
    from lethe.maps.affine import AffineMap, fit_affine, score_affine
    from lethe.methods.distill import Distill
    from lethe.methods.npo import NPO
    from lethe.methods.transfer import Transfer
    from lethe.runs.run import Run, find_runs
    from lethe.sweeps.controller import sweep
    from lethe.unlearning.pipeline import unlearn

_HOME = {
    "maps.affine": ["AffineMap", "fit_affine", "score_affine"],
    "evaluation.checkpoint_sweep": ["checkpoints"],
    "evaluation.comparison": ["compare"],
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
    ],
    "errors": ["LetheError"],
    "methods.distill": ["Distill"],
    "methods.npo": ["NPO"],
    "methods.transfer": ["Transfer"],
    "evaluation.accuracy": ["evaluate_model"],
    "evaluation.evaluating": ["evaluate"],
    "runs.run": ["Run", "find_runs"],
    "sweeps.controller": ["sweep"],
    "attacks.tampering": ["tamper"],
    "evaluation.tasks.consent": ["trust_task_code"],
    "unlearning.pipeline": ["unlearn"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'lethe' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lethe.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
