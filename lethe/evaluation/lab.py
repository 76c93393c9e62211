"""`lethe lab build`: pretrain the built-in lab and evaluate its checkpoints."""

from __future__ import annotations

from pathlib import Path

from lethe.config import LAB_TASKS
from lethe.lab.presets import is_built, lab_path


def build_lab() -> Path:
    """Build the active preset's lab unless it exists, with its checkpoints evaluated on its five tasks. Returns its folder."""
    if is_built():
        return lab_path()
    from lethe.evaluation.accuracy import evaluate_model
    from lethe.lab.pretrain import build

    return build(lambda model, tokenizer: evaluate_model(model, tokenizer, LAB_TASKS))
