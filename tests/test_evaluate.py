"""Numbers are lm-eval's own: the same log-likelihoods, the same accuracies, the same standard errors; and measuring a
model changes nothing about it."""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest, norm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import evaluate as evaluate_function
from lethe.config import EvaluateConfig
from lethe.errors import LetheError
from lethe.evaluation import scoring, tasks, token_trees
from lethe.evaluation.accuracy import Scorer, evaluate_model, measure, value_of
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.runs.run import Run

MODELS = [
    ("gpt2", False),
    ("llama", True),
    ("llama", False),
    ("qwen2", False),
    ("olmo2", True),
    ("gpt_neox", False),
    ("gpt_neox_sequential", True),
]
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


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """Requests are kept away from the user's own."""
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """datasets' cache, away from the user's."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module", params=MODELS, ids=[f"{name}-{'bos' if bos else 'plain'}" for name, bos in MODELS])
def loaded(request, make_model, make_tokenizer, tmp_path_factory):
    name, bos = request.param
    folder = make_model(name, tmp_path_factory.mktemp("model"), tokenizer=make_tokenizer(bos))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2(make_model, tmp_path_factory):
    """A model with dropout in many places."""
    folder = make_model("gpt2", tmp_path_factory.mktemp("gpt2"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def known(monkeypatch, tmp_path, cache):
    """known(questions): `made_up` becomes a task that Lethe finds."""

    def make(questions: list[dict] = QUESTIONS) -> str:
        folder = write_task(tmp_path / "task", questions)
        monkeypatch.setattr(tasks, "locate", lambda names: dict.fromkeys(names, folder))
        return "made_up"

    return make


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


def test_accuracy_stderr_and_facts_are_those_of_simple_evaluate(loaded, known, tmp_path):
    model, tokenizer = loaded
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


def test_a_right_and_a_wrong_answer_are_told_apart(gpt2, known):
    """The right answer is set to what the model prefers, then to what it does not."""
    model, tokenizer = gpt2
    samples: dict[str, list] = {}
    name = known()
    evaluate_model(model, tokenizer, [name], samples=samples)
    preferred = [int(np.argmax(s["log_likelihoods"])) for s in sorted(samples[name], key=lambda s: s["doc_id"])]
    right = [q | {"answer": best} for q, best in zip(QUESTIONS, preferred, strict=True)]
    wrong = [q | {"answer": (best + 1) % len(q["choices"])} for q, best in zip(QUESTIONS, preferred, strict=True)]
    assert evaluate_model(model, tokenizer, [known(right)])[name]["acc"] == 1
    assert evaluate_model(model, tokenizer, [known(wrong)])[name]["acc"] == 0


def test_limit_asks_the_first_questions(gpt2, known):
    model, tokenizer = gpt2
    samples: dict[str, list] = {}
    assert evaluate_model(model, tokenizer, [known()], limit=3, samples=samples)["made_up"]["n"] == 3
    assert sorted(s["doc_id"] for s in samples["made_up"]) == [0, 1, 2]


# --- requests are built once -----------------------------------------------------------------------------------------


@pytest.fixture
def building(monkeypatch):
    """How many questions were built, in a list that grows; `forget()` is what a new process is."""
    from lm_eval.api.task import ConfigurableTask

    built: list[int] = []
    construct = ConfigurableTask.construct_requests

    def counting(self, doc, ctx, **given):
        built.append(given["metadata"][1])
        return construct(self, doc, ctx, **given)

    monkeypatch.setattr(ConfigurableTask, "construct_requests", counting)
    return built, importlib.import_module("lethe.evaluation.questions")._loaded.clear


def test_requests_are_built_once_a_process_and_once_a_disk(gpt2, known, building):
    model, tokenizer = gpt2
    (built, forget), name = building, known()
    first: dict[str, list] = {}
    results = evaluate_model(model, tokenizer, [name], samples=first)
    assert built == list(range(len(QUESTIONS)))
    for new_process in (False, True):
        if new_process:
            forget()
        samples: dict[str, list] = {}
        assert evaluate_model(model, tokenizer, [name], samples=samples) == results
        assert samples == first
    assert len(built) == len(QUESTIONS)


def test_requests_are_built_again_when_what_they_depend_on_has_changed(gpt2, known, building, make_tokenizer, tmp_path):
    model, tokenizer = gpt2
    (built, forget), name = building, known()

    def count(questions: list[dict] = QUESTIONS, words: Any = tokenizer, **asked: Any) -> int:
        known(questions)
        forget()
        before = len(built)
        evaluate_model(model, words, [name], **asked)
        return len(built) - before

    n = len(QUESTIONS)
    assert [count(), count()] == [n, 0]
    assert count([QUESTIONS[0] | {"answer": 3}, *QUESTIONS[1:]]) == n
    assert count(limit=3) == 3
    assert count(limit=n) == 0
    assert count(num_fewshot=1) == n
    assert count(words=make_tokenizer(True)) == n
    assert count(words=make_tokenizer(False)) == 0
    yaml = tmp_path / "task" / "made_up.yaml"
    before = len(built)
    yaml.write_text(yaml.read_text().replace("{{prompt}}", "Say: {{prompt}}"))
    evaluate_model(model, tokenizer, [name])  # in the same process
    assert len(built) - before == n


def test_a_tokenizers_hash_is_of_what_it_does(make_tokenizer, tmp_path):
    from lethe.evaluation.questions import tokenizer_hash

    first = make_tokenizer()
    expected = tokenizer_hash(first)
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(again) == expected
    assert tokenizer_hash(make_tokenizer(True)) != expected
    assert tokenizer_hash(make_tokenizer(words=("other words altogether",))) != expected


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


@pytest.mark.parametrize("damage", [lambda text: text[:100], lambda text: text[:-9] + "[]", lambda text: "[]", lambda text: ""])
def test_a_damaged_file_of_requests_is_made_again(gpt2, known, building, home, damage):
    model, tokenizer = gpt2
    (built, forget), name = building, known()
    results = evaluate_model(model, tokenizer, [name])
    (file,) = (home / "requests").glob("*.json")
    file.write_text(damage(file.read_text()))
    forget()
    assert evaluate_model(model, tokenizer, [name]) == results
    assert len(built) == 2 * len(QUESTIONS)


# --- what is left behind ---------------------------------------------------------------------------------------------


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


@pytest.fixture
def mixed(gpt2):
    """The model with some modules in training mode and some not; put back after."""
    model, tokenizer = gpt2
    model.train()
    model.transformer.h[1].eval()
    model.transformer.h[2].attn.eval()
    yield model, tokenizer
    model.eval()


def modes(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_modes_settings_and_random_state_are_as_before(mixed, known):
    model, tokenizer = mixed
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before = (
        modes(model),
        states(),
        model.config.to_dict(),
        torch.is_grad_enabled(),
        tokenizer.padding_side,
        tokenizer.pad_token,
    )
    results = evaluate_model(model, tokenizer, [known()])
    assert len(set(before[0].values())) == 2
    after = modes(model), states(), model.config.to_dict(), torch.is_grad_enabled(), tokenizer.padding_side, tokenizer.pad_token
    assert after == before
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())
    model.eval()
    assert evaluate_model(model, tokenizer, ["made_up"]) == results  # there was no dropout


def test_modes_and_random_state_are_restored_after_an_exception(mixed, known, monkeypatch):
    model, tokenizer = mixed

    def fail(*_: object, **__: object) -> None:
        assert not model.transformer.h[0].training
        torch.rand(1)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Scorer, "_logits", fail)
    before = modes(model), states()
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate_model(model, tokenizer, [known()])
    assert (modes(model), states()) == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_training_goes_on_after_an_evaluation(mixed, known):
    model, tokenizer = mixed
    evaluate_model(model, tokenizer, [known()])
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0
    model.zero_grad()


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
    z, p = norm.ppf(0.975), right / n  # and by the formula
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (result["low"], result["high"]) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-9
    )
    assert (result["acc"], result["n"]) == (pytest.approx(p), n)


def test_stderr_is_that_of_lm_eval():
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert measure([question(v) for v in values])["stderr"] == pytest.approx(mean_stderr(values))


def test_a_log_likelihood_task_has_no_chance_and_no_positions():
    """Its accuracy says whether the model would have said the answer; there is nothing to guess from."""
    result = measure([question(float(i % 2), choices=1) | {"choices": None} for i in range(30)])
    assert result["acc"] == 0.5
    assert not {"chance", "answers", "degenerate"} & set(result)


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


def test_one_answer_nearly_always_is_degenerate():
    def share(same: int, n: int = 100) -> dict:
        return measure([question(0.25, 0 if i < same else 1 + i % 3, right=(i % 4,)) for i in range(n)])

    assert share(100)["degenerate"]
    assert share(100)["answers"] == {"0": 100}
    assert share(95)["degenerate"]
    assert not share(40)["degenerate"]
    assert sum(share(40)["answers"].values()) == 100
    assert not share(5, 5)["degenerate"]  # too few to say


@pytest.mark.parametrize("right", [0, 3])
def test_a_perfect_model_is_not_degenerate_where_all_right_answers_stand_in_one_place(right):
    """As in BLiMP and TruthfulQA MC1. One that says the same although right answers are spread is."""
    assert not measure([question(1.0, right, right=(right,)) for _ in range(100)])["degenerate"]
    assert measure([question(0.0, right, right=(1 + i % 2,)) for i in range(100)])["degenerate"]
    mostly = [question(1.0, right, right=(right,) if i < 95 else (1,)) for i in range(100)]
    assert not measure(mostly)["degenerate"]
    half = [question(0.5, right, right=(right,) if i < 50 else (1, 2)) for i in range(100)]
    assert measure(half)["degenerate"]


GOLDS = {
    "numbers": ("doc_to_target: golds", [[0], [1, 2], [3, 0], [0, 1, 2, 3], [2, 2]]),
    "a list in a template": ("doc_to_target: '{{golds}}'", [[0, 1], [1, 2], [3, 0], [2], [0, 1, 2]]),
    "one number": ("doc_to_target: golds", [0, 1, 2, 3, 1]),
    "one text": ("doc_to_target: golds", ["a0", "b1", "c2", "a3", "b4"]),
    "a number in a template": ("doc_to_target: '{{golds}}'", [0, 1, 2, 1, 0]),
    "out of range": ("doc_to_target: golds", [[0], [7], [1, 9], [-1], [2]]),
    "one out of range": ("doc_to_target: golds", [0, 7, -1, 2, 1]),
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


def test_degenerate_is_marked_on_a_real_model_that_always_says_the_same(gpt2, known):
    """Choices A, B, C, D and a bias that makes the model say B: accuracy at chance, and marked."""
    model, tokenizer = gpt2
    questions = [
        {"prompt": f"Question {i}: which?\nAnswer:", "choices": ["A", "B", "C", "D"], "answer": i % 4} for i in range(24)
    ]
    head = model.lm_head.weight.data.clone()
    token = tokenizer.encode("A B")[-1]
    try:
        model.lm_head.weight = torch.nn.Parameter(head.clone())
        hook = model.lm_head.register_forward_hook(lambda m, a, out: out + 100 * (torch.arange(out.shape[-1]) == token))
        result = evaluate_model(model, tokenizer, [known(questions)])["made_up"]
    finally:
        hook.remove()
        model.tie_weights()
    assert result["acc"] == 0.25
    assert result["answers"] == {"1": 24}
    assert result["degenerate"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_weights_are_not_numbers_has_no_accuracy(make_model, known, tmp_path):
    """All log-likelihoods are nan: answering "the first" would look like an unlearned model at 25 %."""
    folder = make_model("llama", tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.model.norm.weight.data.fill_(math.nan)
    try:
        result = evaluate_model(model, tokenizer, [known()])["made_up"]
    except LetheError:
        return
    assert result.get("acc") is None or math.isnan(result["acc"])


def test_fingerprint_is_of_the_prompts_and_not_of_the_model(make_model, known, tmp_path):
    def fingerprint(seed: int, questions: list[dict]) -> str:
        folder = make_model("llama", tmp_path / f"{seed}", seed=seed)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return evaluate_model(model, tokenizer, [known(questions)])["made_up"]["fingerprint"]

    first = fingerprint(0, QUESTIONS)
    assert fingerprint(1, QUESTIONS) == first
    changed = [QUESTIONS[0] | {"prompt": "Another question?\nAnswer:"}, *QUESTIONS[1:]]
    assert fingerprint(0, changed) != first
    assert fingerprint(0, [QUESTIONS[0] | {"choices": ["a", "b", "c", "e"]}, *QUESTIONS[1:]]) != first
    assert fingerprint(0, QUESTIONS[:-1]) != first


def test_the_right_answer_is_part_of_the_fingerprint(gpt2, known):
    """The same prompts with another key are another test."""
    model, tokenizer = gpt2
    first = evaluate_model(model, tokenizer, [known()])["made_up"]["fingerprint"]
    other = [QUESTIONS[0] | {"answer": 3}, *QUESTIONS[1:]]
    assert evaluate_model(model, tokenizer, [known(other)])["made_up"]["fingerprint"] != first


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
    assert table.rows == [["made_up", *["-"] * 6]] and table.notes[0].startswith("made_up was not measured: ")


@pytest.mark.parametrize("change", [{"tasks": ["lab_forgot"]}, {"tasks": []}, {"model": "nowhere"}])
def test_an_unknown_model_or_task_is_refused_before_anything_is_written(make_model, tmp_path, change):
    folder = make_model("llama", tmp_path / "model")
    with pytest.raises(LetheError):
        evaluate_function(
            EvaluateConfig(**({"model": str(folder), "tasks": ["lab_forget"], "out": str(tmp_path / "runs")} | change))
        )
    assert not (tmp_path / "runs").exists()
