"""Functions that Lethe's task files call with `!function`: the lab's questions, and the metrics of the cloze tasks.

The questions are generated from the active preset (environment variable LETHE_LAB). So lm-eval's own command line also runs
these tasks, with `--include_path lethe/evaluation/tasks`.
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
    """Metrics of a cloze question.

    `correct_prob` is the softmax of the choices' log-likelihoods at the right choice. `acc_norm` compares log-likelihoods per
    character, as lm-eval does.
    """
    scores = [score for score, _ in results]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    per_character = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
    answer = doc["answer"]
    return {
        "correct_prob": weights[answer] / sum(weights),
        "acc_norm": float(per_character.index(max(per_character)) == answer),
    }
