"""`lethe lab build`: pretrain the built-in lab and evaluate its checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lethe.lab.presets import TASKS, ProgressFactory, is_built, lab_path


def build_lab(progress: ProgressFactory | None = None) -> Path:
    """Build the active preset's lab unless it exists, with its checkpoints evaluated on its five tasks. Returns its folder.

    Args:
        progress: called as `lethe.progress.bar`; None: no progress bar.
    """
    if is_built():
        return lab_path()
    from lethe.lab import pretrain

    return pretrain.build(_evaluated, progress or _silent)


def _evaluated(folder: Path) -> dict[str, Any]:
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from lethe.evaluation.accuracy import evaluate_model

    model, tokenizer = GPTNeoXForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return evaluate_model(model, tokenizer, list(TASKS))


def _silent(description: str, total: float, unit: str = "") -> AbstractContextManager[Any]:
    return nullcontext(lambda work=1, note=None: None)
