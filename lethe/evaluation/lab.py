"""`lethe lab build`: pretrain the built-in lab and evaluate its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe.config import LAB_TASKS
from lethe.lab.presets import is_built, lab_path


def build_lab() -> Path:
    """Build the active preset's lab unless it exists, with its checkpoints evaluated on its five tasks. Returns its folder."""
    if is_built():
        return lab_path()
    from lethe.lab.pretrain import build

    return build(_evaluated)


def _evaluated(folder: Path) -> dict[str, Any]:
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from lethe.evaluation.accuracy import evaluate_model

    model, tokenizer = GPTNeoXForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return evaluate_model(model, tokenizer, LAB_TASKS)
