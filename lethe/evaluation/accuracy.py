"""Accuracy on tasks, with its uncertainty and its provenance.

    task names -> load_tasks -> questions -> Scorer -> log-likelihoods -> measure -> result

lm-eval defines tasks, prompts and tokenisation (`requests.py`), so numbers are comparable with published ones. Lethe's own
scoring (`scoring.py`) works on a model in memory, also during training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe.config import EvalSettings, EvaluateConfig
from lethe.evaluation.requests import Leaf, Question, load_tasks, tokenizer_hash
from lethe.evaluation.scoring import NotNumbersError, Scorer
from lethe.progress import bar
from lethe.results.regimes import Z

__all__ = ["NotNumbersError", "Scorer", "evaluate_model", "load_tasks", "measure", "value_of"]
SAMPLED = ("doc_id", "doc_hash", "target", "choices", "right")
DEGENERATE_SHARE = 0.9


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task_names: list[str],
    limit: int = 0,
    description: str | None = None,
    samples: dict[str, list[dict[str, Any]]] | None = None,
    task_data: dict[str, str] | None = None,
    num_fewshot: int | None = None,
    missing: dict[str, str] | None = None,
    before: str = "",
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in memory.

    Args:
        model: a transformers causal language model, or a PEFT model around one. Its training mode and the random state are
            restored.
        task_names: names of lm-eval tasks or groups. All questions of a group have the same weight.
        limit: number of questions of each task, from the first; 0: all.
        description: text of a progress bar; None: no bar.
        samples: filled with the log-likelihoods of each question, by task, if given.
        task_data: local files in place of data sets, by task or group.
        num_fewshot: examples in each prompt; None: as the task defines.
        missing: filled with the reason if a task has no result. If not given, the reason is raised.
        before: text before each question, as in a prompt attack. The fingerprint ignores it.

    Returns:
        by task: `acc` (or `correct_prob`), `stderr`, `low` and `high` (95 %), `n`, `chance`, `num_fewshot`, `version`,
        `fingerprint` (of all prompts and answers), `tokenizer` (hash), `answers` (number of choices by position) and
        `degenerate` (see `measure`).

    Raises:
        LetheError: a task is unknown, or its data cannot be loaded.
        NotNumbersError: log-likelihoods are not numbers.
    """
    with evaluation_mode(model):
        loaded = load_tasks(task_names, task_data, num_fewshot)
        leaves = {leaf.definition: leaf for leaves in loaded.values() for leaf in leaves}  # groups may share tasks
        answered = _answered(leaves, Scorer(model, tokenizer), limit, before, description)
    results = {}
    for name, own in loaded.items():
        questions = [question for leaf in own for question in answered[leaf.definition]]
        if any(math.isnan(value) for q in questions for value in _likelihoods(q)):
            why = "the model's log-likelihoods are not numbers; its weights are damaged or it diverged"
            if missing is None:
                raise NotNumbersError(why)
            missing[name] = why
            continue
        facts = {"num_fewshot": own[0].shots, "version": own[0].version, "tokenizer": tokenizer_hash(tokenizer)}
        results[name] = measure(questions) | facts
        if samples is not None:
            samples[name] = [_sample(q) for q in questions]
    return results


def refuse_unscorable(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: EvalSettings | EvaluateConfig) -> None:
    """Tokenise the requests of a later evaluation, so that their faults appear before training.

    Raises:
        LetheError: this model cannot score an answer.
    """
    with evaluation_mode(model):
        scorer = Scorer(model, tokenizer)
        for leaves in load_tasks(settings.tasks, settings.task_data, settings.num_fewshot).values():
            for leaf in leaves:
                scorer.refuse_unscorable([pair for some in leaf.encoded(scorer, settings.limit) for pair in some])


def _answered(
    leaves: dict[str, Leaf], scorer: Scorer, limit: int, before: str, description: str | None
) -> dict[str, list[dict[str, Any]]]:
    """The questions of each task with the model's answers and the task's metrics."""
    encoded = {key: leaf.encoded(scorer, limit, before) for key, leaf in leaves.items()}
    total = sum(len(requests) for some in encoded.values() for requests in some)
    answered = {}
    with bar(description, total, "answers") if description else contextlib.nullcontext(lambda _: None) as advance:
        for key, some in encoded.items():
            found = iter(scorer.score([pair for requests in some for pair in requests], advance))
            responses = [[next(found) for _ in requests] for requests in some]
            pairs = zip(leaves[key].questions(limit), responses, strict=True)
            answered[key] = [_answer(leaves[key], question, each) for question, each in pairs]
    return answered


def _answer(leaf: Leaf, question: Question, responses: list[tuple[float, bool]]) -> dict[str, Any]:
    """A question with the model's answers and the task's metrics, in the form of lm-eval's samples."""
    choices = len(responses) // leaf.requests_a_choice
    broken = any(math.isnan(value) for value, _ in responses)
    metrics = {} if broken else leaf.task.process_results(leaf.docs[question.doc_id], responses)
    return {
        "task": leaf.task.config.task,
        "doc_id": question.doc_id,
        "doc_hash": question.doc_hash,
        "target": question.target,
        "arguments": question.arguments,
        "filtered_resps": responses,
        "choices": choices if leaf.multiple_choice else None,
        "right": question.right,
    } | metrics


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of right answers (Newcombe, Statistics in Medicine 17, 1998, method 3).

    (2 n p + z² ± z √(4 n p (1 − p) + z²)) / (2 (n + z²)), p: the share, z: 1.96
    """
    p = right / n
    whole = 2 * (n + Z**2)
    center, half = (2 * n * p + Z**2) / whole, Z / whole * math.sqrt(4 * n * p * (1 - p) + Z**2)
    return (0.0 if right == 0 else center - half, 1.0 if right == n else center + half)


def measure(questions: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a multiple-choice or log-likelihood task, from lm-eval's samples.

    `stderr` is the sample standard deviation of the values over √n. The 95 % interval of an accuracy is Wilson's, that of a
    mean probability is the normal one. `chance` is the accuracy of random answers: the mean of right answers / choices.
    `degenerate` means that the model chose one position for more than `DEGENERATE_SHARE` of the questions, though it is right
    for no more than that share.
    """
    n = len(questions)
    key = "correct_prob" if "correct_prob" in questions[0] else "acc"
    values = [float(q[key]) for q in questions]
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
    stderr = math.sqrt(variance / n)
    result: dict[str, Any] = {key: mean, "stderr": stderr}
    choosing = all(q["choices"] for q in questions)
    if key == "acc":
        result["low"], result["high"] = wilson(round(math.fsum(values)), n)
        if choosing:
            result["chance"] = math.fsum(len(q["right"]) / q["choices"] for q in questions) / n
    else:
        result |= {"low": mean - 1.959964 * stderr, "high": mean + 1.959964 * stderr}
    if "acc_norm" in questions[0]:
        result["acc_norm"] = math.fsum(float(q["acc_norm"]) for q in questions) / n
    result["n"] = n
    if choosing:
        chosen = Counter(_chosen(q) for q in questions)
        right = Counter(position for q in questions for position in q["right"])
        result["answers"] = {str(position): chosen[position] for position in sorted(chosen)}
        most = DEGENERATE_SHARE * n
        result["degenerate"] = n >= 20 and any(count > most >= right[position] for position, count in chosen.items())
    prompts = json.dumps([[q["arguments"], q.get("target")] for q in questions], ensure_ascii=False, default=str)
    result["fingerprint"] = hashlib.sha256(prompts.encode()).hexdigest()[:16]
    return result


def value_of(result: dict[str, Any]) -> float:
    """The main number of a result: its accuracy, or the mean probability of the right answer."""
    return result["acc"] if "acc" in result else result["correct_prob"]


def _likelihoods(question: dict[str, Any]) -> list[float]:
    return [float(response[0]) for response in question["filtered_resps"]]


def _chosen(question: dict[str, Any]) -> int:
    values = _likelihoods(question)[: question["choices"]]
    return values.index(max(values))


def _sample(question: dict[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl. `subtask` is the question's task; `task` may be a group."""
    known = (*SAMPLED, *(key for key in ("acc", "correct_prob", "acc_norm") if key in question))
    return {"subtask": question["task"]} | {key: question[key] for key in known} | {"log_likelihoods": _likelihoods(question)}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode. Afterwards their modes and the random state are restored."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for module, training in modes.items():
                module.training = training
