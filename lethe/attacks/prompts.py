"""Attack by prompt: documents of the topic stand before each question, and the model's weights stay as they are.

All questions get the same documents, drawn by seed from the attacker's text, each cut at `max_length` tokens. A stronger
attack begins with the documents of the weaker ones. They stand before the question's text, as a description does in lm-eval.
"""

from __future__ import annotations

import random

from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe.config import EvalSettings, TamperConfig
from lethe.errors import LetheError
from lethe.evaluation.accuracy import Scorer, load_tasks
from lethe.text.corpora import Document, tokenise

GAP = "\n\n"


def prompts(config: TamperConfig, documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> dict[float, str]:
    """The text before the questions, by strength (a number of documents); it ends in an empty line."""
    order = list(range(len(documents)))
    random.Random(config.seed).shuffle(order)
    chosen = [documents[i] for i in order[: int(max(config.strengths))]]
    rows = tokenise(chosen, tokenizer, config.max_length)
    cut = [f"{tokenizer.decode(row, skip_special_tokens=True)}{GAP}" for row in rows]
    return {strength: "".join(cut[: int(strength)]) for strength in config.strengths}


def refuse_too_long(
    before: dict[float, str], settings: EvalSettings, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse prompts that do not fit into the model's window together with the longest question: they would be cut.

    Raises:
        LetheError: names the number of documents that fits no more.
    """
    scorer = Scorer(model, tokenizer)
    loaded = load_tasks(settings.tasks, settings.task_data, settings.num_fewshot)
    questions = [q for leaves in loaded.values() for leaf in leaves for q in leaf.encoded(scorer, settings.limit)]
    longest = max(len(context) + len(answer) for requests in questions for context, answer in requests)
    for count, text in before.items():
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens + longest > scorer.max_length + 1:
            raise LetheError(
                f"strengths: {count:g} documents ({tokens} tokens) and the longest question ({longest}) exceed the model's "
                f"window of {scorer.max_length}; use fewer, or lower max_length"
            )
