"""Log-likelihoods are lm-eval's own, whatever trees the questions are joined in, and whatever memory is free."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import PLAIN
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made_up import QUESTIONS, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe.errors import LetheError
from lethe.evaluation import scoring, token_trees
from lethe.evaluation.accuracy import Scorer, evaluate_model

pytestmark = pytest.mark.usefixtures("own_home")

MODELS = [(name, name in {"llama", "olmo2", "gpt_neox_sequential"}) for name in PLAIN] + [("llama", False)]
"""Architectures, and whether their tokenizer begins each text with <s>."""


@pytest.fixture(scope="module", params=MODELS, ids=[f"{name}-{'bos' if bos else 'plain'}" for name, bos in MODELS])
def loaded(request, make_model, make_tokenizer, tmp_path_factory):
    name, bos = request.param
    folder = make_model(name, tmp_path_factory.mktemp("model"), tokenizer=make_tokenizer(bos))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ran(monkeypatch) -> list[token_trees.Tree]:
    """The trees that models run."""
    trees, run = [], Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, batch, requests: trees.extend(batch) or run(self, batch, requests))
    return trees


def requests(folder: Path) -> list:
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["made_up"])["tasks"]["made_up"]
    task.build_all_requests()
    return task.instances


def compare(model, tokenizer, instances: list, batch_size: int = 1) -> None:
    """The same log-likelihood as lm-eval's within rounding, the same greedy flag, for each request."""
    scorer = Scorer(model, tokenizer)
    ours = scorer.score(scorer.encode([instance.args for instance in instances]))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size).loglikelihood(instances, disable_tqdm=True)
    assert len(ours) == len(theirs) == len(instances)
    for (value, greedy), (expected, flag), instance in zip(ours, theirs, instances, strict=True):
        assert abs(value - expected) <= max(1e-4, 1e-5 * abs(expected)), instance.args
        assert greedy == flag, instance.args
    assert len({round(value, 3) for value, _ in ours}) > 0.9 * len(ours)  # a constant would agree with nothing


@pytest.mark.parametrize(("delimiter", "batch_size"), [(" ", 1), ("", 5)], ids=["space", "glued"])
def test_log_likelihoods_are_those_of_lm_eval(loaded, tmp_path, cache, delimiter, batch_size):
    questions = QUESTIONS if delimiter == " " else [q for q in QUESTIONS if q.get("glue")]
    compare(*loaded, requests(write_task(tmp_path, questions, delimiter)), batch_size)


@pytest.mark.parametrize(
    "start", ["", "The following are questions about the river of Orvane.\n\n"], ids=["bare", "introduced"]
)
def test_questions_that_begin_alike_share_it(loaded, tmp_path, cache, ran, start):
    """One prompt is the beginning of another, one is asked twice; answers have several tokens and begin alike."""
    metals, places = ("copper", "salt", "iron ore", "salt and resin"), ("harbour", "mills", "island")
    ends = ["", *(f" trade for {metal}" for metal in metals)]
    asked = ("Question: what did the founders of the", "Say when the lanterns of the")
    prompts = [f"{question} {place}{end}" for question in asked for place in places for end in ends] + [f"{asked[0]} mills"]
    questions = [
        {"prompt": start + prompt, "choices": ["fish oil", "fish", f"fish oil and {metals[i % 4]}", "x"], "answer": 0}
        for i, prompt in enumerate(prompts)
    ]
    instances = requests(write_task(tmp_path, questions))
    compare(*loaded, instances, batch_size=8)
    scorer = Scorer(*loaded)
    ran.clear()  # the first evaluation compares some trees with separate inputs
    scorer.loglikelihood(instances)
    contexts = {tuple(context) for context, _ in scorer.encode([one.args for one in instances])}
    assert len(ran) < len(contexts) / 2
    assert sum(tree.context - tree.prefix for tree in ran) < sum(map(len, contexts)) / 2
    assert all((tree.prefix > 8) == bool(start) for tree in ran)


def test_a_long_passage_is_run_once_for_its_questions_and_many_answers_to_one_are_several_trees(gpt2, monkeypatch):
    """What a question does not see of its tree stays short, whether that is others' contexts or others' answers."""
    rng = random.Random(0)
    words = lambda n: [rng.randrange(3, 300) for _ in range(n)]  # noqa: E731
    passages = [words(20) for _ in range(2)]
    monkeypatch.setattr(token_trees, "MAX_HIDDEN", 24)
    asked = [(passage + words(4), words(2)) for passage in passages for _ in range(6)]
    asked += [([5], words(rng.randint(4, 9))) for _ in range(30)]
    made = token_trees.make_trees(asked, 64)
    sizes = [len(tree.tokens) for tree in made]
    assert sum(sizes) < sum(len(c) + len(a) - 1 for c, a in asked) / 1.5 and max(sizes) <= 64 + 24
    assert sorted(number for tree in made for number, _ in tree.reads) == list(range(len(asked)))
    for tree in made:
        _, seen = tree.attention()
        for _, where in tree.reads:
            assert len(tree.tokens) - seen[where[-1]].sum() <= 24 + 24 + 9
    found = Scorer(*gpt2).score(asked)
    plain = HFLM(pretrained=gpt2[0], tokenizer=gpt2[1], batch_size=1)
    expected = [plain._loglikelihood_tokens([(("", ""), *one)], disable_tqdm=True)[0] for one in asked]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("in_trees", [True, False], ids=["trees", "separately"])
def test_requests_of_all_forms_are_scored_as_each_by_itself(gpt2, monkeypatch, in_trees):
    """Few different tokens, so that requests share prefixes and are equal but for the place where the answer begins."""
    plain = HFLM(pretrained=gpt2[0], tokenizer=gpt2[1], batch_size=1)
    monkeypatch.setattr(Scorer, "_supports", lambda *_: in_trees)
    for seed in range(8):
        rng = random.Random(seed)
        words = lambda n: [rng.randrange(3, 8) for _ in range(n)]  # noqa: E731, B023
        start = words(rng.choice([0, 9]))
        contexts = [start + words(rng.randint(1, rng.choice([4, 30, 70]))) for _ in range(8)]
        asked = [(context, words(rng.randint(1, 5))) for context in contexts for _ in range(3)]
        expected = [plain._loglikelihood_tokens([(("", ""), *one)], disable_tqdm=True)[0] for one in asked]
        found = Scorer(*gpt2).score(asked)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_make_no_number_of_a_float16_model_with_very_negative_scores(make_model, tmp_path, attention):
    """Every score of a token with another is below −16, where float16's lowest number less that is minus infinity."""
    folder = make_model("qwen2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation=attention).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attend, size = layer.self_attn, layer.self_attn.head_dim
            for projection, sign in ((attend.q_proj, 1), (attend.k_proj, -1)):
                projection.bias.zero_()
                for start in range(0, projection.bias.numel(), size):  # the slowest pair, which positions hardly turn
                    projection.bias[start + size // 2 - 1] = projection.bias[start + size - 1] = 8.0 * sign
    rng = random.Random(1)
    words = lambda n: [rng.randrange(3, 300) for _ in range(n)]  # noqa: E731
    beginning = words(6)
    asked = [(beginning + words(rng.randint(1, 9)), words(rng.randint(1, 4))) for _ in range(12)]
    asked += [(words(30), words(1)), (words(30), words(5))]
    scorer = Scorer(model, AutoTokenizer.from_pretrained(folder))
    assert not any(math.isnan(value) for value, _ in scorer.score(asked))
    assert all(takes for takes, *_ in scoring._supported[model].values())


def test_a_model_that_computes_something_else_for_trees_is_found_out(gpt2, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scoring, "_supported", {})
    contexts = Scorer._run_contexts
    wrong = {"attention_mask": None}  # as a model would that ignores the mask
    monkeypatch.setattr(Scorer, "_run_contexts", lambda self, batch, rest: contexts(self, batch, rest) | wrong)
    compare(*gpt2, requests(write_task(tmp_path, QUESTIONS)))
    assert not all(supports for supports, *_ in scoring._supported[gpt2[0]].values())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("no")]
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(gpt2, tmp_path, cache, monkeypatch, error):
    instances = requests(write_task(tmp_path, QUESTIONS))
    expected = Scorer(*gpt2).loglikelihood(instances)
    run, sizes = Scorer._run, []

    def small(self, batch, asked):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise error
        return run(self, batch, asked)

    monkeypatch.setattr(Scorer, "_run", small)
    found = Scorer(*gpt2).loglikelihood(instances)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert sizes[0] > 2 and sizes[-1] <= 2


@pytest.mark.parametrize(("device", "cap"), [("cpu", 2048), ("cuda", 16384)])
def test_a_batch_is_what_free_memory_holds(gpt2, tmp_path, cache, monkeypatch, device, cap):
    """Of 4 blocks of width 32 in float32 a token takes 4 · 32 · 30 bytes."""
    free = {"reserved": 300, "allocated": 100}
    monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["bytes"]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free["bytes"] - 200, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: free["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: free["allocated"])
    sizes = []
    for free["bytes"] in (10**12, 3840 * 800, 3840 * 80, 0):
        sizes.append(scoring.batch_sizes(gpt2[0], torch.device(device)))
    assert sizes == [(cap, 2**27), (300, 96000), (30, 9600), (1, 0)]


def test_numbers_do_not_hang_on_the_memory_that_is_free(gpt2, tmp_path, cache, monkeypatch):
    instances = requests(write_task(tmp_path, QUESTIONS))
    found = []
    for free in (10**12, 3840 * 400, 3840):
        monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found.append([value for value, _ in Scorer(*gpt2).loglikelihood(instances)])
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("in_trees", [True, False])
def test_one_question_that_does_not_fit_is_a_refusal_and_another_error_is_not_swallowed(gpt2, monkeypatch, in_trees):
    for error, expected in ((MemoryError(), "does not fit into memory"), (RuntimeError("shapes"), "shapes")):
        for kind, name in ((Scorer, "_run"), (HFLM, "_loglikelihood_tokens")):
            monkeypatch.setattr(kind, name, lambda *_, error=error, **given: (_ for _ in ()).throw(error))
        monkeypatch.setattr(Scorer, "_supports", lambda *_: in_trees)
        with pytest.raises((LetheError, RuntimeError), match=expected):
            Scorer(*gpt2).score([([5, 6], [7])])


def test_greedy_is_true_where_the_answer_is_what_the_model_would_say(loaded):
    model, tokenizer = loaded
    ids = tokenizer("the river", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    row, n = ids[0].tolist(), ids.shape[1] - 3
    requests = [(("", ""), row[:n], row[n:]), (("", ""), row[:n], row[n : n + 1]), (("", ""), row[:n], [*row[n:-1], 3])]
    scorer, hflm = Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = scorer._loglikelihood_tokens(requests)
    assert [flag for _, flag in found] == [True, True, row[-1] == 3]
    for (value, flag), (expected, theirs) in zip(found, hflm._loglikelihood_tokens(requests, disable_tqdm=True), strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert flag == theirs


def test_an_empty_context_is_scored_after_the_prefix_token(loaded):
    from lm_eval.api.instance import Instance

    compare(*loaded, [Instance("loglikelihood", {}, ("", text), 0) for text in ("the river", "copper", "salt and resin")])


@pytest.mark.parametrize("answer", [[], [8] * 70], ids=["no token", "longer than the window"])
def test_an_answer_that_cannot_be_scored_is_an_error_as_in_lm_eval(gpt2, answer):
    """The log-likelihood of no token would be 0, the best there is."""
    request = [(("context", ""), [5, 6, 7], answer)]
    with pytest.raises(AssertionError):
        HFLM(pretrained=gpt2[0], tokenizer=gpt2[1], batch_size=1)._loglikelihood_tokens(request, disable_tqdm=True)
    with pytest.raises(LetheError, match=rf"an answer has {len(answer)} tokens"):
        Scorer(*gpt2)._loglikelihood_tokens(request)


def test_bfloat16_models_are_scored_in_trees_too(make_model, known, tmp_path):
    folder = make_model("llama", tmp_path / "model")
    tokenizer, name = AutoTokenizer.from_pretrained(folder), known()
    samples: dict[str, list] = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    evaluate_model(model, tokenizer, [name], samples=samples)
    assert all(takes for takes, *_ in scoring._supported[model].values())
    exact: dict[str, list] = {}
    evaluate_model(AutoModelForCausalLM.from_pretrained(folder), tokenizer, [name], samples=exact)
    for a, b in zip(samples[name], exact[name], strict=True):
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], rel=0.05, abs=0.5)
