"""Attacks without training: changed weights (`weights.py`), or documents of the topic before each question.

All questions get the same documents, drawn by seed from the attacker's text, each cut at `max_length` tokens. A stronger
attack begins with the documents of the weaker ones. They stand before the question's text, as a description does in lm-eval.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe.attacks.weights import SCHEMES, disturb
from lethe.config import EvalSettings, TamperConfig, to_dict
from lethe.errors import LetheError
from lethe.evaluation.accuracy import Scorer, load_tasks, refuse_unscorable
from lethe.models import refs
from lethe.models.adapters import merged
from lethe.runs.run import Run
from lethe.text.corpora import Document, tokenise
from lethe.training.saves import save_artifact
from lethe.training.trainer import Evaluation, keep_threads

if TYPE_CHECKING:
    from lethe.attacks.tampering import CheckedAttack

GAP = "\n\n"


def disturb_or_prompt(config: TamperConfig, checked: CheckedAttack, run: Run | None) -> Run:
    """An attack at each of its strengths, on the model as it was loaded."""
    model: Any
    model, tokenizer = _fresh(checked)
    refuse_unscorable(model, tokenizer, config.eval)
    before: dict[float, str] = {}
    if config.attack == "prompt":
        before = prompts(config, checked.documents, tokenizer)
        refuse_too_long(before, config.eval, model, tokenizer)
    run = run or Run.create("tamper", config.name, to_dict(config), config.out)
    with run.running():
        keep_threads(run)
        run.set_parents(**checked.parents(config))
        run.update(plan=checked.plan | ({} if before else {"scheme": SCHEMES[config.attack]}))
        evaluation = Evaluation(run, tokenizer, config.eval)
        disturbed = False
        for step, strength in enumerate([0.0, *config.strengths]):
            if not evaluation.known(step) or (config.save_model and step == len(config.strengths)):
                if disturbed:
                    del model
                    model, _ = _fresh(checked)
                if strength and not before:
                    run.update(plan={"matrices": disturb(model, config.attack, strength, config.seed)})
                    disturbed = True
                text = before.get(strength, "")
                tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
                title = f"{config.attack} {strength:g} on {config.model}" if step else "Evaluating before the attack"
                evaluation.at(step, model, title, {"strength": strength, "tokens": tokens}, text)
            if run.diverged and step >= run.record["divergence"]["step"]:
                break
        run.update(evals=evaluation.last[1] if evaluation.last else {})
        if config.save_model and not run.diverged:
            save_artifact(run, "model", model, tokenizer)
    return run


def _fresh(checked: CheckedAttack) -> tuple[Any, Any]:
    """The model under attack in float32, an adapter merged, and its tokenizer."""
    model, tokenizer = refs.load(checked.model, "float32")
    return (merged(model) if isinstance(model, PeftModel) else model), tokenizer


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
