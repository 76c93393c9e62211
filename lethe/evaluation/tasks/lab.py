"""Functions that task files name with `!function`: the lab's questions, and the metrics of the cloze tasks.

The questions come from the active preset (environment variable LETHE_LAB), generated on the spot: lm-eval's own command
line needs nothing but `--include_path lethe/tasks`.
"""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset

from lethe.lab.presets import active_preset
from lethe.lab.questions import questions


def dataset(lab_task: str, **_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(questions(lab_task, active_preset()))}


def cloze_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """`correct_prob`: softmax over the choices' log-likelihoods, at the right one. `acc_norm`: per character, as in lm-eval."""
    scores = [score for score, _ in results]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    per_character = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
    answer = doc["answer"]
    return {
        "correct_prob": weights[answer] / sum(weights),
        "acc_norm": float(per_character.index(max(per_character)) == answer),
    }
