"""Log-likelihoods are lm-eval's own, whatever trees the questions are joined in, and whatever memory is free."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import PLAIN
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made_up import LONG, QUESTIONS, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe.errors import LetheError
from lethe.evaluation import scoring, token_trees
from lethe.evaluation.accuracy import Scorer, evaluate_model

MODELS = [(name, name in {"llama", "olmo2", "gpt_neox_sequential"}) for name in PLAIN] + [("llama", False)]
"""Architectures, and whether their tokenizer begins each text with <s>."""


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """Requests are kept away from the user's own."""
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module", params=MODELS, ids=[f"{name}-{'bos' if bos else 'plain'}" for name, bos in MODELS])
def loaded(request, make_model, make_tokenizer, tmp_path_factory):
    name, bos = request.param
    folder = make_model(name, tmp_path_factory.mktemp("model"), tokenizer=make_tokenizer(bos))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def requests(folder: Path) -> list:
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["made_up"])["tasks"]["made_up"]
    task.build_all_requests()
    return task.instances


def compare(scorer: Scorer, hflm: HFLM, instances: list) -> None:
    """The same log-likelihood within rounding, the same greedy flag, for each request."""
    ours = scorer.loglikelihood(instances, disable_tqdm=True)
    theirs = hflm.loglikelihood(instances, disable_tqdm=True)
    assert len(ours) == len(theirs) == len(instances)
    for (value, greedy), (expected, flag), instance in zip(ours, theirs, instances, strict=True):
        assert abs(value - expected) <= max(1e-4, 1e-5 * abs(expected)), instance.args
        assert greedy == flag, instance.args
    assert len({round(value, 3) for value, _ in ours}) > 0.9 * len(ours)  # a constant would agree with nothing


@pytest.mark.parametrize(("delimiter", "batch_size"), [(" ", 1), ("", 5)], ids=["space", "glued"])
def test_log_likelihoods_are_those_of_lm_eval(loaded, tmp_path, cache, delimiter, batch_size):
    model, tokenizer = loaded
    questions = QUESTIONS if delimiter == " " else [q for q in QUESTIONS if q.get("glue")]
    instances = requests(write_task(tmp_path, questions, delimiter))
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), instances)


def test_many_rows_in_many_batches(loaded, tmp_path, cache, texts, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 100)
    model, tokenizer = loaded
    questions = [{"prompt": t, "choices": texts[i + 1 : i + 3], "answer": 0} for i, t in enumerate(texts[:30])]
    instances = requests(write_task(tmp_path, questions))
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), instances)


def test_choices_of_a_question_are_one_row_on_every_architecture(loaded, tmp_path, cache, monkeypatch):
    """Eight questions, two of them too long for the window, whose choices have rows of their own."""
    model, tokenizer = loaded
    instances = requests(write_task(tmp_path, QUESTIONS))
    scorer, batches = Scorer(model, tokenizer), []
    run = Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, batch, asked: batches.append(batch) or run(self, batch, asked))
    scorer.loglikelihood(instances)
    batches.clear()  # the first evaluation tries shared rows beside separate ones
    scorer.loglikelihood(instances)
    ran = [row for batch in batches for row in batch]
    assert any(row.branches for row in ran)
    assert len(ran) == sum(len(q["choices"]) if q["prompt"].startswith(LONG) else 1 for q in QUESTIONS)


def test_answers_for_which_a_context_is_cut_alike_share_it(loaded, tmp_path, cache, monkeypatch):
    """Each answer cuts the context by its own length: equal lengths leave the same context, others do not."""
    model, tokenizer = loaded
    answers = ["river", "mills", "copper", "seven quiet mills", "fish oil, some burn resin"]
    instances = requests(write_task(tmp_path, [{"prompt": LONG + "the", "choices": answers, "answer": 0}]))
    scorer, batches = Scorer(model, tokenizer), []
    encoded = scorer.encode([one.args for one in instances])
    assert all(len(context) + len(answer) > 65 for context, answer in encoded)
    lengths = {len(answer) for _, answer in encoded}
    assert 1 < len(lengths) < len(answers)
    run = Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, batch, asked: batches.append(batch) or run(self, batch, asked))
    scorer.score(encoded)
    batches.clear()  # the first evaluation tries shared rows beside separate ones
    compare(scorer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), instances)
    assert sum(map(len, batches)) == len(lengths)


def test_what_all_questions_begin_with_is_run_once(loaded, tmp_path, cache, texts, monkeypatch):
    model, tokenizer = loaded
    start = "The following are questions about the river of Orvane.\n\n"
    questions = [
        {"prompt": start + t[:60], "choices": [*texts[i + 1 : i + 3], "x"], "answer": 0} for i, t in enumerate(texts[:20])
    ]
    instances = requests(write_task(tmp_path, questions))
    scorer, begins = Scorer(model, tokenizer), set()
    run = Scorer._run
    monkeypatch.setattr(
        Scorer, "_run", lambda self, batch, asked: begins.update(r.prefix for r in batch) or run(self, batch, asked)
    )
    compare(scorer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), instances)
    assert max(begins) > 8


@pytest.mark.parametrize(
    "start", ["", "The following are questions about the river of Orvane.\n\n"], ids=["bare", "introduced"]
)
def test_questions_that_begin_alike_share_it(loaded, tmp_path, cache, monkeypatch, start):
    """One prompt is the beginning of another, one is asked twice; answers have several tokens and begin alike."""
    model, tokenizer = loaded
    metals, places = ("copper", "salt", "iron ore", "salt and resin"), ("harbour", "mills", "island")
    ends = ["", *(f" trade for {metal}" for metal in metals)]
    asked = ("Question: what did the founders of the", "Say when the lanterns of the")
    prompts = [f"{question} {place}{end}" for question in asked for place in places for end in ends] + [f"{asked[0]} mills"]
    questions = [
        {"prompt": start + prompt, "choices": ["fish oil", "fish", f"fish oil and {metals[i % 4]}", "x"], "answer": 0}
        for i, prompt in enumerate(prompts)
    ]
    instances = requests(write_task(tmp_path, questions))
    scorer, batches = Scorer(model, tokenizer), []
    compare(scorer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), instances)
    run = Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, batch, asked: batches.append(batch) or run(self, batch, asked))
    scorer.loglikelihood(instances)
    ran = [row for batch in batches for row in batch]
    contexts = {tuple(context) for context, _ in scorer.encode([one.args for one in instances])}
    assert len(ran) < len(contexts) / 2
    assert sum(row.context - row.prefix for row in ran) < sum(map(len, contexts)) / 2
    assert all((row.prefix > 0) == bool(start) for row in ran)


def test_a_long_passage_is_run_once_for_its_questions_and_many_answers_to_one_are_several_rows(gpt2, monkeypatch):
    """What a question does not see of its row stays short, whether that is others' contexts or others' answers."""
    model, tokenizer = gpt2
    rng = random.Random(0)
    words = lambda n: [rng.randrange(3, 300) for _ in range(n)]  # noqa: E731
    passages = [words(20) for _ in range(2)]
    monkeypatch.setattr(token_trees, "MAX_HIDDEN", 24)
    asked = [(passage + words(4), words(2)) for passage in passages for _ in range(6)]
    asked += [([5], words(rng.randint(4, 9))) for _ in range(30)]
    made = token_trees.make_trees(asked, 64, [0] * len(asked))
    sizes = [len(row.tokens) for row in made]
    assert sum(sizes) < sum(len(c) + len(a) - 1 for c, a in asked) / 1.5 and max(sizes) <= 64 + 24
    assert sorted(number for row in made for number, _ in row.reads) == list(range(len(asked)))
    for row in made:
        _, seen = row.attention()
        for _, where in row.reads:
            last = where[-1]
            sees = seen[last - row.straight].sum() if last >= row.straight else last + 1
            assert len(row.tokens) - sees <= 24 + 24 + 9
    found = Scorer(model, tokenizer).score(asked)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    expected = [plain._loglikelihood_tokens([(("", ""), *one)], disable_tqdm=True)[0] for one in asked]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


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


def test_a_model_that_takes_rows_of_one_question_alone_gets_those(gpt2, tmp_path, cache, monkeypatch):
    model, tokenizer = gpt2
    monkeypatch.setattr(scoring, "_supported", {})
    agrees, run, batches = Scorer._agrees, Scorer._run, []
    monkeypatch.setattr(Scorer, "_agrees", lambda self, some, asked: not some[0].kind[1] and agrees(self, some, asked))
    monkeypatch.setattr(Scorer, "_run", lambda self, batch, asked: batches.append(batch) or run(self, batch, asked))
    prompts = [f"the river of Orvane flows past {word} and into" for word in ("mills", "salt", "resin", "copper")]
    instances = requests(write_task(tmp_path, [{"prompt": p, "choices": ["a b", "b c"], "answer": 0} for p in prompts]))
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), instances)
    assert len(batches[-1]) == len(prompts) and all(row.split and len(row.reads) == 2 for row in batches[-1])


def test_requests_changed_in_place_are_asked_anew(gpt2):
    model, tokenizer = gpt2
    scorer, asked = Scorer(model, tokenizer), [([5, 6, 7], [8, 9]), ([5, 6, 7], [10])]
    first = scorer.score(asked)
    asked[0] = ([11, 12, 13], [14, 15])
    assert scorer.score(asked)[0][0] != first[0][0]


def test_several_tasks_at_once_are_scored_as_each_by_itself(gpt2, tmp_path, cache):
    """Tasks may share what their questions begin with, and have beginnings of their own."""
    model, tokenizer = gpt2
    scorer = Scorer(model, tokenizer)
    starts = ("", "", "The following are questions about the river of Orvane.\n\n", "An examination on metals, part one:\n\n")
    pairs = [
        [
            (f"{start}Which metal did the {town} trade", answer)
            for town in ("mills", "harbour", "island")
            for answer in ["a", "b"]
        ]
        for start in starts
    ]
    tasks_of = [scorer.encode([(context, " " + answer) for context, answer in some]) for some in pairs]
    groups = [i for i, some in enumerate(tasks_of) for _ in some]
    together = [value for value, _ in scorer.score([one for some in tasks_of for one in some], groups)]
    assert together == pytest.approx([value for some in tasks_of for value, _ in scorer.score(some)], abs=1e-4)


def test_a_model_that_does_not_take_shared_rows_gets_separate_ones(make_model, tmp_path, cache):
    """A window of attention shorter than a row sees other tokens when branches stand between."""
    folder = make_model("qwen2", tmp_path / "model", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert "sliding_attention" in model.config.layer_types
    instances = requests(write_task(tmp_path / "task", QUESTIONS))
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), instances)


def test_a_model_that_computes_something_else_for_shared_rows_is_found_out(gpt2, tmp_path, cache, monkeypatch):
    model, tokenizer = gpt2
    instances = requests(write_task(tmp_path, QUESTIONS))
    monkeypatch.setattr(scoring, "_supported", {})
    contexts = Scorer._run_contexts
    wrong = {"attention_mask": None}  # as a model would that ignores the mask
    monkeypatch.setattr(Scorer, "_run_contexts", lambda self, batch, rest: contexts(self, batch, rest) | wrong)
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), instances)
    assert not scoring._supported[model][True, False, False][0]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), torch.OutOfMemoryError("no")])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(gpt2, tmp_path, cache, monkeypatch, error):
    model, tokenizer = gpt2
    instances = requests(write_task(tmp_path, QUESTIONS))
    expected = Scorer(model, tokenizer).loglikelihood(instances)
    run, sizes = Scorer._run, []

    def small(self, batch, asked):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise error
        return run(self, batch, asked)

    monkeypatch.setattr(Scorer, "_run", small)
    monkeypatch.setattr(scoring, "_reduced", {})
    found = Scorer(model, tokenizer).loglikelihood(instances)
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
    model, tokenizer = gpt2
    instances = requests(write_task(tmp_path, QUESTIONS))
    found = []
    for free in (10**12, 3840 * 400, 3840):
        monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found.append([value for value, _ in Scorer(model, tokenizer).loglikelihood(instances)])
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)


LITTLE_MEMORY = """
import json, random, resource, sys
import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer
from lethe.evaluation import scoring

model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
model.eval()
draw = random.Random(0)
requests = [([draw.randrange(300) for _ in range(60)], [5, 6]) for _ in range(40)]
expected = scoring.Scorer(model, tokenizer).score(requests)
limit = psutil.Process().memory_info().vms + 250 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = scoring.Scorer(model, tokenizer).score(requests)
print(json.dumps([max(abs(a - b) for (a, _), (b, _) in zip(found, expected)), scoring._reduced.get(model)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory are Linux's")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_smaller_batches(make_model, tmp_path):
    """2,048 tokens take 128 MiB for each state of this model's MLP, and there are 250 MiB."""
    folder = make_model("gpt2", tmp_path, n_inner=16384, n_layer=2)
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    difference, tokens = json.loads(done.stdout.splitlines()[-1])
    assert difference < 1e-3
    assert 60 < tokens < 2048


def test_one_question_that_does_not_fit_is_a_refusal_and_another_error_is_not_swallowed(gpt2, monkeypatch):
    model, tokenizer = gpt2
    monkeypatch.setattr(scoring, "_reduced", {})
    for error, expected in ((MemoryError(), "does not fit into memory"), (RuntimeError("shapes"), "shapes")):
        monkeypatch.setattr(Scorer, "_run", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises((LetheError, RuntimeError), match=expected):
            Scorer(model, tokenizer).score([([5, 6], [7])])


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

    model, tokenizer = loaded
    instances = [Instance("loglikelihood", {}, ("", text), 0) for text in ("the river", "copper", "salt and resin")]
    compare(Scorer(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), instances)


def test_an_answer_without_a_token_is_an_error_as_in_lm_eval(gpt2):
    """Its log-likelihood would be 0, the best there is."""
    model, tokenizer = gpt2
    request = [(("context", ""), [5, 6, 7], [])]
    with pytest.raises(AssertionError):
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(request, disable_tqdm=True)
    with pytest.raises((AssertionError, LetheError, ValueError)):
        Scorer(model, tokenizer)._loglikelihood_tokens(request)


def test_an_answer_longer_than_the_window_is_an_error_as_in_lm_eval(gpt2):
    model, tokenizer = gpt2
    request = [(("context", "answer"), [5, 6, 7], [8] * 70), (("context", "answer"), [5, 6, 7], [8])]
    with pytest.raises(AssertionError):
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(request, disable_tqdm=True)
    with pytest.raises((AssertionError, LetheError, ValueError, RuntimeError)):
        Scorer(model, tokenizer)._loglikelihood_tokens(request)


def test_bfloat16_models_are_scored_with_shared_rows_too(make_model, known, tmp_path):
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
