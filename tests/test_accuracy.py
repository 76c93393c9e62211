"""Results are those of lm-eval, their questions are built once, and an evaluation changes nothing about the model."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made_up import QUESTIONS
from scipy.stats import binomtest, norm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import evaluate as evaluate_function
from lethe.config import EvaluateConfig
from lethe.errors import LetheError
from lethe.evaluation.accuracy import Scorer, evaluate_model, measure, value_of
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.runs.run import Run

pytestmark = pytest.mark.usefixtures("own_home")


def test_accuracy_stderr_and_facts_are_those_of_simple_evaluate(gpt2, known, tmp_path):
    model, tokenizer = gpt2
    name = known()
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[name],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
    )["results"][name]
    ours = evaluate_model(model, tokenizer, [name])[name]
    assert ours["acc"] == pytest.approx(theirs["acc,none"])
    assert ours["stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert (ours["n"], ours["version"], ours["num_fewshot"]) == (len(QUESTIONS), 3, 0)
    assert ours["chance"] == pytest.approx(np.mean([1 / len(q["choices"]) for q in QUESTIONS]))


# --- questions are built once -----------------------------------------------------------------------------------------


def test_questions_are_built_once_a_process_and_again_when_what_they_depend_on_has_changed(gpt2, known, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    construct, built = ConfigurableTask.construct_requests, []
    monkeypatch.setattr(
        ConfigurableTask, "construct_requests", lambda self, *some, **more: built.append(1) or construct(self, *some, **more)
    )

    def count(**asked: Any) -> int:
        built.clear()
        evaluate_model(*gpt2, ["made_up"], **asked)
        return len(built)

    n = len(QUESTIONS)
    known()
    assert [count(), count(), count(limit=3), count(limit=n), count(num_fewshot=1)] == [n, 0, 3, 0, n]
    known([QUESTIONS[0] | {"answer": 3}, *QUESTIONS[1:]])
    assert [count(), count()] == [n, 0]
    yaml = tmp_path / "task" / "made_up.yaml"
    yaml.write_text(yaml.read_text().replace("{{prompt}}", "Say: {{prompt}}"))
    assert count() == n


def test_a_tokenizers_hash_is_of_what_it_does(make_tokenizer, tmp_path):
    from lethe.evaluation.requests import tokenizer_hash

    first = make_tokenizer()
    expected = tokenizer_hash(first)
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(again) == expected
    assert tokenizer_hash(make_tokenizer(True)) != expected
    assert tokenizer_hash(make_tokenizer(words=("other words altogether",))) != expected


# --- what is left behind ---------------------------------------------------------------------------------------------


def modes(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def state(model, tokenizer) -> tuple:
    randomness = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tokenizer.padding_side, tokenizer.pad_token
    return modes(model), randomness, model.config.to_dict(), flags, [p.requires_grad for p in model.parameters()]


def test_modes_settings_weights_and_random_state_are_as_before_also_after_an_exception(gpt2, known, monkeypatch):
    model, tokenizer = gpt2
    weights = {name: p.clone() for name, p in model.named_parameters()}
    results = evaluate_model(model, tokenizer, [known()])
    model.train()
    model.transformer.h[1].eval()
    model.transformer.h[2].attn.eval()
    before = state(model, tokenizer)
    assert evaluate_model(model, tokenizer, ["made_up"]) == results  # there was no dropout
    assert state(model, tokenizer) == before

    def fail(*_: object, **__: object) -> None:
        assert not model.transformer.h[0].training
        torch.rand(1)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Scorer, "_logits", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate_model(model, tokenizer, ["made_up"])
    assert state(model, tokenizer) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.eval()


def test_a_peft_model_scores_as_the_merged_one(make_model, known, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = make_model("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    name = known()
    plain: dict[str, list] = {}
    evaluate_model(base, tokenizer, [name], samples=plain)
    torch.manual_seed(0)
    names = ["q_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False, lora_dropout=0.5)).train()
    before, samples = modes(model), {}
    result = evaluate_model(model, tokenizer, [name], samples=samples)[name]
    assert modes(model) == before
    merged: dict[str, list] = {}
    expected = evaluate_model(model.merge_and_unload().eval(), tokenizer, [name], samples=merged)[name]

    def values(rows: dict[str, list]) -> list[float]:
        return [v for s in rows[name] for v in s["log_likelihoods"]]

    assert values(samples) == pytest.approx(values(merged), abs=1e-3)
    assert values(samples) != pytest.approx(values(plain), abs=0.1)
    assert (result["acc"], result["answers"]) == (expected["acc"], expected["answers"])


# --- what is computed from the answers -------------------------------------------------------------------------------


def question(acc: float, chosen: int = 0, choices: int = 4, right: tuple[int, ...] = (0,)) -> dict:
    responses = [(-1.0 if i == chosen else -2.0, False) for i in range(choices)]
    arguments = [("prompt", f" {i}") for i in range(choices)]
    return {"acc": acc, "arguments": arguments, "filtered_resps": responses, "choices": choices, "right": right}


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 25), (250, 1000), (1, 1)])
def test_interval_is_wilsons(right, n):
    result = measure([question(float(i < right), i % 4) for i in range(n)])
    interval = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high))
    assert (result["acc"], result["n"]) == (pytest.approx(right / n), n)


def test_a_probability_has_the_normal_interval_and_no_chance():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    questions = [{k: v for k, v in question(0).items() if k != "acc"} | {"correct_prob": v} for v in values]
    result = measure(questions)
    half = norm.ppf(0.975) * np.std(values, ddof=1) / math.sqrt(50)
    assert result["correct_prob"] == pytest.approx(np.mean(values))
    assert (result["low"], result["high"]) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-6)
    assert "acc" not in result
    assert "chance" not in result
    assert value_of(result) == result["correct_prob"]


@pytest.mark.parametrize(
    ("n", "chosen", "right", "degenerate"),
    [
        (100, lambda i: 0, lambda i: (i % 4,), True),
        (100, lambda i: 0 if i < 95 else 1 + i % 3, lambda i: (i % 4,), True),
        (100, lambda i: 0 if i < 40 else 1 + i % 3, lambda i: (i % 4,), False),
        (5, lambda i: 0, lambda i: (i % 4,), False),
        (100, lambda i: 3, lambda i: (3,), False),
        (100, lambda i: 3, lambda i: (3,) if i < 95 else (1,), False),
        (100, lambda i: 3, lambda i: (3,) if i < 50 else (1, 2), True),
        (100, lambda i: 3, lambda i: (1 + i % 2,), True),
    ],
    ids=[
        "one",
        "95 %",
        "40 %",
        "too few to say",
        "all right in one place",
        "95 % right there",
        "half right there",
        "none right",
    ],
)
def test_one_answer_nearly_always_is_degenerate_unless_it_is_right(n, chosen, right, degenerate):
    """In BLiMP and TruthfulQA MC1 all right answers stand in one place."""
    result = measure([question(0.25, chosen(i), right=right(i)) for i in range(n)])
    assert result["degenerate"] == degenerate
    assert result["answers"] == {str(place): count for place, count in sorted(Counter(map(chosen, range(n))).items())}


GOLDS = {
    "numbers": ("doc_to_target: golds", [[0], [1, 2], [3, 0], [0, 1, 2, 3], [2, 2]]),
    "one number": ("doc_to_target: golds", [0, 1, 2, 3, 1]),
    "one text": ("doc_to_target: golds", ["a0", "b1", "c2", "a3", "b4"]),
    "out of range": ("doc_to_target: golds", [[0], [7], [1, 9], [-1], [2]]),
    "none of the texts": ("doc_to_target: golds", ["a0", "nothing", "c2", "a3", "b4"]),
}


@pytest.mark.parametrize("mutual", [False, True], ids=["", "mutual information"])
@pytest.mark.parametrize(("target", "golds"), GOLDS.values(), ids=GOLDS)
def test_chance_is_the_accuracy_of_answers_drawn_at_random(gpt2, known, tmp_path, target, golds, mutual):
    """As lm-eval itself marks each answer: one question after the other is asked with every choice as the winner."""
    counts = [4, 3, 4, 4, 3]
    questions = [
        {"prompt": f"Q{i}", "choices": [f"{c}{i}" for c in "abcd"[:n]], "answer": golds[i]} for i, n in enumerate(counts)
    ]
    name = known(questions)
    file = tmp_path / "task" / "made_up.yaml"
    text = file.read_text().replace("doc_to_target: answer", target.replace("golds", "answer"))
    file.write_text(text.replace("  - metric: acc\n", "  - metric: acc_mutual_info\n  - metric: acc\n") if mutual else text)
    if mutual and isinstance(golds[0], list):  # lm-eval has no mutual information of several right answers
        with pytest.raises(LetheError, match="no prompt for row"):
            evaluate_model(*gpt2, [name])
        return
    task = TaskManager(include_path=str(file.parent), include_defaults=False).load([name])["tasks"][name]
    expected = []
    for doc, n in zip(task.test_docs(), counts, strict=True):
        answers = [[(float(j == i), False) for j in range(n)] + [(-1.0, False)] * n * mutual for i in range(n)]
        expected.append(sum(task.process_results(doc, some)["acc"] for some in answers) / n)
    result = evaluate_model(*gpt2, [name])[name]
    assert result["chance"] == pytest.approx(sum(expected) / len(expected))
    assert 0 < result["chance"] < 1


def test_chance_of_a_function_of_the_tasks_own_is_what_it_makes_of_each_choice(gpt2, known, tmp_path):
    """TruthfulQA MC2: the share of probability on true answers, of which there are several; its target says nothing of them."""
    name = known([q | {"answer": 0} for q in QUESTIONS[:3]])
    file = tmp_path / "task" / "made_up.yaml"
    file.write_text(file.read_text() + "process_results: !function mc2.results\n")
    (file.parent / "mc2.py").write_text(
        "import math\n"
        "def results(doc, answers):\n"
        "    p = [math.exp(value) for value, _ in answers]\n"
        "    return {'acc': sum(p[:2]) / sum(p)}\n"
    )
    with trust_task_code():
        result = evaluate_model(*gpt2, [name])[name]
    assert result["chance"] == pytest.approx((2 / 4 + 2 / 4 + 2 / 3) / 3)


def test_fingerprint_is_of_the_prompts_and_right_answers_and_not_of_the_model(make_model, known, tmp_path):
    def fingerprint(seed: int, questions: list[dict]) -> str:
        folder = make_model("llama", tmp_path / f"{seed}", seed=seed)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return evaluate_model(model, tokenizer, [known(questions)])["made_up"]["fingerprint"]

    first, rest = fingerprint(0, QUESTIONS), QUESTIONS[1:]
    assert fingerprint(1, QUESTIONS) == first
    for change in ({"prompt": "Another question?\nAnswer:"}, {"choices": ["a", "b", "c", "e"]}, {"answer": 3}):
        assert fingerprint(0, [QUESTIONS[0] | change, *rest]) != first
    assert fingerprint(0, QUESTIONS[:-1]) != first


# --- as a run --------------------------------------------------------------------------------------------------------


def test_evaluate_keeps_a_run_with_samples_and_the_models_hash(make_model, known, tmp_path):
    folder = make_model("llama", tmp_path / "model")
    run = evaluate_function(EvaluateConfig(str(folder), [known()], samples=True, out=str(tmp_path / "runs")))
    record = Run.open(run.path).record
    assert (record["kind"], record["status"]) == ("evaluate", "complete")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert record["evals"] == evaluate_model(model, tokenizer, ["made_up"])
    assert record["parents"]["model"]["ref"] == str(folder)
    rows = run.rows("samples.jsonl")
    assert len(rows) == len(QUESTIONS)
    right = [int(np.argmax(row["log_likelihoods"])) == int(row["target"]) for row in rows]
    assert np.mean(right) == pytest.approx(record["evals"]["made_up"]["acc"])


@pytest.mark.filterwarnings("ignore")
def test_a_number_that_could_not_be_measured_is_absent_with_its_reason(make_model, known, tmp_path):
    from lethe.report.tables import evals_table

    folder = make_model("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(LetheError, match="not numbers"):
        evaluate_function(EvaluateConfig(str(folder), [known()], out=str(tmp_path / "runs")))
    (path,) = (tmp_path / "runs").iterdir()
    record = Run.open(path).record
    assert (record["status"], record["evals"]) == ("failed", {})
    assert "not numbers" in record["evals_missing"]["made_up"] and "not numbers" in record["reason"]
    table = evals_table({}, missing=record["evals_missing"])
    assert table.rows == [["made_up"]] and table.notes[0].startswith("made_up was not measured: ")
