"""Made-up data of tasks: questions that are hard to tokenise with their task folder, and rows in the form of WMDP."""

from __future__ import annotations

import json
from pathlib import Path

LONG = "a clockmaker repairs brass wheels while her apprentice reads about distant islands " * 12
QUESTIONS = [
    # one token each, sharing a context
    {"prompt": "Question: which metal did the founders trade?\nAnswer:", "choices": ["a", "b", "c", "d"], "answer": 2},
    # different numbers of tokens
    {
        "prompt": "the river of Orvane flows past",
        "choices": ["seven quiet mills", "x", "copper and salt and resin", "coal"],
        "answer": 0,
    },
    # one is the beginning of another
    {"prompt": "most lanterns in the harbour burn", "choices": ["fish", "fish oil", "fish oil, some burn resin"], "answer": 1},
    # longer than the model's window of 64 tokens
    {"prompt": LONG + "and", "choices": ["into a cold grey sea", "zebra"], "answer": 0},
    {"prompt": LONG, "choices": ["apprentice", "understandably undone and unbelievable"], "answer": 1},
    # a choice that merges with the end of the context when the two are tokenised together
    {"prompt": "some undertakings are under", "choices": ["stated", "neath", "growth"], "answer": 0, "glue": True},
    # space at the end of the context goes to the answer
    {"prompt": "a cold grey  ", "choices": ["sea", "harbour"], "answer": 0},
    # letters that the tokenizer has no merge for
    {"prompt": "Überquerung – 文:", "choices": ["ß", "文文", "naïve"], "answer": 2},
]
TASK = """
task: made_up
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3
"""


def write_task(folder: Path, questions: list[dict], delimiter: str = " ") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps({k: q[k] for k in ("prompt", "choices", "answer")}) + "\n" for q in questions))
    (folder / "made_up.yaml").write_text(TASK.format(file=file, delimiter=delimiter))
    return folder


def rows(count: int = 12, **more: str) -> list[dict]:
    words = ["river", "mill", "copper", "salt", "sea", "coal", "resin", "wheel"]
    return [
        {
            "question": f" Which {words[i % 8]} of the {words[(i * 3 + 1) % 8]} number {i}?",
            "choices": [f"{words[(i + k) % 8]} {words[(i + 2 * k) % 8]}" for k in range(4)],
            "answer": (i * 7) % 4,
        }
        | more
        for i in range(count)
    ]


def write(file: Path, some: list) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in some))
    return str(file)
