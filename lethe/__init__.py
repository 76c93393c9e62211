"""Lethe: make a language model forget a topic, and prove how well that worked.

The functions, which need torch, are loaded when they are first used: importing lethe imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lethe.config import (
    AffineConfig,
    AffineScoreConfig,
    BudgetSettings,
    CheckpointsConfig,
    CompareConfig,
    EvalSettings,
    EvaluateConfig,
    LayeredSettings,
    LoraSettings,
    SuiteConfig,
    SweepConfig,
    TamperConfig,
    TextSource,
)
from lethe.errors import LetheError
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.methods.circuit_breaker import CircuitBreaker
from lethe.methods.distill import Distill
from lethe.methods.grad_diff import GradDiff
from lethe.methods.max_entropy import MaxEntropy
from lethe.methods.mudman import MUDMAN
from lethe.methods.npo import NPO
from lethe.methods.repselect import RepSelect
from lethe.methods.rmu import RMU
from lethe.methods.sequential import Sequential
from lethe.methods.simnpo import SimNPO
from lethe.methods.tar import TAR
from lethe.methods.transfer import Transfer
from lethe.methods.tuned_lens import TunedLens
from lethe.methods.undo import Undo
from lethe.runs.finding import find_runs
from lethe.runs.run import Run

if TYPE_CHECKING:
    from lethe.attacks.tampering import tamper
    from lethe.evaluation.accuracy import evaluate_model
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.evaluation.comparison import compare
    from lethe.evaluation.pipeline import evaluate
    from lethe.maps.affine import AffineMap
    from lethe.maps.pipeline import fit_affine, score_affine
    from lethe.sweeps.controller import sweep
    from lethe.unlearning.pipeline import unlearn

_LATER = {
    "AffineMap": "maps.affine",
    "checkpoints": "evaluation.checkpoint_sweep",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.pipeline",
    "evaluate_model": "evaluation.accuracy",
    "fit_affine": "maps.pipeline",
    "score_affine": "maps.pipeline",
    "sweep": "sweeps.controller",
    "tamper": "attacks.tampering",
    "unlearn": "unlearning.pipeline",
}


_OWN = [name for name, value in globals().items() if str(getattr(value, "__module__", "")).startswith("lethe.")]
__all__ = sorted({*_LATER, *_OWN})  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'lethe' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lethe.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
