"""Accuracies, each with its uncertainty and its provenance.

lm-eval defines tasks, prompts and tokenisation, so that numbers compare with everybody's; the scoring is ours and
runs on a model that is already in memory, in the middle of training too: `Scorer` is lm-eval's own `hf` model with
its inner loop replaced by one that runs each distinct input once, without padding masks, and computes logits only
where an answer is read. Evaluation mode is set for each evaluation and the model is left as it was found.

`evaluate_model` scores a model; `evaluate` does so for a model reference and keeps the result as a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lethe import refs, tasks
from lethe.config import EvaluateConfig, to_dict
from lethe.errors import LetheError
from lethe.ledger import Run
from lethe.progress import bar

logger = logging.getLogger(__name__)
TOKENS_PER_BATCH = 4096
DEGENERATE_SHARE = 0.9


class NotNumbersError(LetheError):
    """The model answers nothing: there is no accuracy to record, not even that of guessing."""


class Scorer(HFLM):
    """lm-eval's `hf` model around a model in memory, with an inner loop of our own."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, description: str | None = None):
        plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        super().__init__(pretrained=plain, tokenizer=tokenizer, backend="causal", batch_size=1)
        self._forward = plain
        self._description = description
        self._keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters

    def loglikelihood(self, requests, disable_tqdm=False):  # type: ignore[no-untyped-def]
        """As lm-eval's, without its bar of tokenising."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):  # type: ignore[no-untyped-def]
        """Log-likelihood and greediness of each continuation; requests with the same input share one row."""
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise LetheError(
                    f"an answer has {len(continuation)} tokens, 1 to {self.max_length} can be scored: {text[1][:60]!r}"
                )
            rows[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(i)
        results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(bar(self._description, len(ordered), "rows")) if self._description else None
            for batch in _batches(ordered):
                for row, logits in self._answer_logits(batch, [rows[r] for r in batch], requests):
                    for i in rows[row]:
                        results[i] = _score(logits, requests[i][2])
                if advance:
                    advance(len(batch))
        return results

    def _answer_logits(self, batch, indices, requests) -> Iterator[tuple[tuple[int, ...], Tensor]]:  # type: ignore[no-untyped-def]
        """For each row, the logits at its last positions: as many as its longest continuation has tokens."""
        width = len(batch[0])
        needed = [max(len(requests[i][2]) for i in group) for group in indices]
        first = min(len(row) - n for row, n in zip(batch, needed, strict=True))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for k, row in enumerate(batch):
            ids[k, : len(row)] = torch.tensor(row)
        keep = {"logits_to_keep": torch.arange(first, width, device=self.device)} if self._keeps else {}
        logits = self._forward(input_ids=ids.to(self.device), use_cache=False, **keep).logits
        offset = first if self._keeps else 0
        for row, n, row_logits in zip(batch, needed, logits, strict=True):
            yield row, row_logits[len(row) - n - offset : len(row) - offset]


def _batches(rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Rows of like length together, at most TOKENS_PER_BATCH tokens a batch. `rows` come longest first."""
    start = 0
    while start < len(rows):
        size = max(1, TOKENS_PER_BATCH // max(1, len(rows[start])))
        yield rows[start : start + size]
        start += size


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities, and whether each of its tokens is the most likely one."""
    target = torch.tensor(continuation, device=logits.device)
    log_probs = logits[-len(continuation) :].float().log_softmax(-1)
    value = log_probs.gather(-1, target[:, None]).sum().item()
    if math.isnan(value):
        raise NotNumbersError("the model's log-likelihoods are not numbers; its weights are broken or it diverged")
    return value, bool((log_probs.argmax(-1) == target).all())


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task_names: list[str],
    limit: int = 0,
    description: str | None = None,
    samples: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in memory, zero-shot unless a task says otherwise.

    Args:
        model: a transformers causal language model, or a PEFT model around one. Its training mode, its cache setting
            and the random state are as before when this returns.
        task_names: names of lm-eval tasks or groups; of a group the questions are pooled.
        limit: ask only the first so many questions of each task; 0 asks all.
        description: text of a progress bar; None shows none.
        samples: filled with each question's log-likelihoods by task name, if given.

    Returns:
        by task name: `acc` (or `correct_prob`), `stderr`, `low` and `high` (95 %), `n`, `chance`, `num_fewshot`,
        `version`, `fingerprint` (of all prompts and answers), `answers` (how often each position was chosen) and
        `degenerate` (one position chosen nearly always).

    Raises:
        LetheError: a task is not known.
    """
    with _evaluation_mode(model), torch.inference_mode():
        loaded = load_tasks(task_names)
        scorer = Scorer(model, tokenizer, description)
        output = lm_eval_evaluate(scorer, loaded, limit=limit or None, bootstrap_iters=0)
    if output is None:
        return {}
    results = {}
    for name in task_names:
        leaves = _leaves(name, loaded)
        questions = [sample for leaf in leaves for sample in output["samples"][leaf]]
        facts = {
            "num_fewshot": loaded["tasks"][leaves[0]].config.num_fewshot or 0,
            "version": output["versions"].get(name, output["versions"].get(leaves[0])),
        }
        results[name] = measure(questions) | facts
        if samples is not None:
            samples[name] = [_sample(q) for q in questions]
    return results


def measure(questions: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from lm-eval's per-question samples of a multiple-choice or log-likelihood task.

    `stderr` is the sample standard deviation of the per-question values over √n; the interval of an accuracy is
    Wilson's at 95 %, that of a mean probability is the normal one.
    """
    n = len(questions)
    key = "correct_prob" if "correct_prob" in questions[0] else "acc"
    values = [float(q[key]) for q in questions]
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
    stderr = math.sqrt(variance / n)
    result: dict[str, Any] = {key: mean, "stderr": stderr}
    if key == "acc":
        interval = binomtest(round(math.fsum(values)), n).proportion_ci(0.95, method="wilson")
        result |= {"low": float(interval.low), "high": float(interval.high)}
        result["chance"] = math.fsum(1 / len(q["arguments"]) for q in questions) / n
    else:
        result |= {"low": mean - 1.959964 * stderr, "high": mean + 1.959964 * stderr}
    if "acc_norm" in questions[0]:
        result["acc_norm"] = math.fsum(float(q["acc_norm"]) for q in questions) / n
    chosen = Counter(_chosen(q) for q in questions)
    result["n"] = n
    result["answers"] = {str(position): chosen[position] for position in sorted(chosen)}
    result["degenerate"] = n >= 20 and max(chosen.values()) > DEGENERATE_SHARE * n
    prompts = json.dumps([[q["arguments"], q.get("target")] for q in questions], ensure_ascii=False, default=str)
    result["fingerprint"] = hashlib.sha256(prompts.encode()).hexdigest()[:16]
    return result


def value_of(result: dict[str, Any]) -> float:
    """The number that a result stands for: its accuracy, or the mean probability of the right answer."""
    return result["acc"] if "acc" in result else result["correct_prob"]


def evaluate(config: EvaluateConfig) -> Run:
    """Evaluate a model reference on tasks and keep the result as a run.

    Raises:
        LetheError: the model or a task is not known; raised before anything is written.
    """
    ref = refs.resolve(config.model, config.out)
    load_tasks(config.tasks)
    run = Run.create("evaluate", config.name, to_dict(config), config.out)
    with run.running():
        model, tokenizer = refs.load(ref, config.dtype)
        samples: dict[str, list[dict[str, Any]]] | None = {} if config.samples else None
        evals = evaluate_model(model, tokenizer, config.tasks, config.limit, f"Evaluating {config.model}", samples)
        for task, rows in (samples or {}).items():
            for row in rows:
                run.append("samples.jsonl", {"task": task} | row)
        run.update(evals=evals, parents={"model": refs.record(ref)})
    return run


def load_tasks(task_names: list[str]) -> dict[str, Any]:
    """lm-eval's task objects, read from the folders that define them; datasets' own progress bars are kept quiet.

    Raises:
        LetheError: a task is not known, or its data cannot be loaded.
    """
    import datasets

    folders = sorted({str(folder) for folder in tasks.locate(task_names).values()})
    datasets.disable_progress_bars()
    try:
        loaded: dict[str, Any] = TaskManager(include_path=folders, include_defaults=False).load(list(task_names))  # type: ignore[assignment]
    except Exception as error:  # data sets, their scripts and the network fail in a dozen ways; each means the same here
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"tasks: the data of {', '.join(task_names)} cannot be loaded ({why})") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _leaves(name: str, loaded: dict[str, Any]) -> list[str]:
    if name in loaded["tasks"]:
        return [name]
    if name in loaded["groups"]:
        return [task.task_name for task in loaded["groups"][name].get_all_tasks()]
    return list(loaded["tasks"])


def _likelihoods(question: dict[str, Any]) -> list[float]:
    return [float(response[0]) for response in question["filtered_resps"]]


def _chosen(question: dict[str, Any]) -> int:
    values = _likelihoods(question)
    return values.index(max(values))


def _sample(question: dict[str, Any]) -> dict[str, Any]:
    return {
        "doc_id": question["doc_id"],
        "doc_hash": question["doc_hash"],
        "target": question["target"],
        "log_likelihoods": _likelihoods(question),
    }


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each one's own mode and the random state restored after."""
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
