"""Comparing two models on the same questions: the exact McNemar test, the difference, and which questions flipped."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lethe import compare, evaluate
from lethe.cli import main
from lethe.config import CompareConfig, EvaluateConfig
from lethe.errors import LetheError
from lethe.results import regimes

SOURCE = "lab:global_step20"


def answers(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(("b", "c"), [(1, 9), (9, 1), (0, 5), (3, 3), (0, 0), (12, 40)])
def test_p_is_the_exact_binomial_one(b, c):
    """2 Σ_{k ≤ min} C(b + c, k) / 2^(b + c), at most 1."""
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    found = regimes.mcnemar(*answers(20, b, c, 7))
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert found.n == 27 + b + c
    assert found.difference == pytest.approx((c - b) / found.n)
    assert found.low < found.difference < found.high


def test_the_interval_of_a_difference_holds_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    chances, n, truth = [0.5, 0.2, 0.08, 0.22], 80, 0.08 - 0.2
    held = 0
    for counts in rng.multinomial(n, chances, size=2000):
        found = regimes.mcnemar(*answers(*map(int, counts)))
        held += found.low <= truth <= found.high
    assert 0.935 < held / 2000 < 0.97


def test_paired_means_are_those_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40)
    found = regimes.paired_means(a.tolist(), b.tolist())
    half = 1.959964 * np.std(b - a, ddof=1) / math.sqrt(40)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(b - a), np.mean(b - a) - half, np.mean(b - a) + half))


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory) -> list[str]:
    """Evaluations of the last checkpoint and of an early one."""
    out = str(tmp_path_factory.mktemp("runs"))
    tasks = ["lab_forget_robust", "lab_forget_cloze"]
    return [
        str(evaluate(EvaluateConfig(name, tasks, samples=True, out=out, name=name[4:])).path) for name in ("lab:final", SOURCE)
    ]


def test_runs_and_models_compare_alike(runs, tmp_path, monkeypatch):
    by_run = compare(CompareConfig(runs))
    found = by_run["tasks"]["lab_forget_robust"]
    samples = [[json.loads(line) for line in open(f"{run}/samples.jsonl")] for run in runs]  # noqa: SIM115
    right = [
        {s["doc_id"]: int(np.argmax(s["log_likelihoods"])) == s["target"] for s in some if s["task"] == "lab_forget_robust"}
        for some in samples
    ]
    assert {flip["doc_id"] for flip in found["lost"]} == {i for i in right[0] if right[0][i] and not right[1][i]}
    assert {flip["doc_id"] for flip in found["gained"]} == {i for i in right[0] if right[1][i] and not right[0][i]}
    assert found["difference"] == pytest.approx(np.mean(list(right[1].values())) - np.mean(list(right[0].values())))
    assert all(flip["a"] == flip["target"] != flip["b"] for flip in found["lost"])
    assert "p" not in by_run["tasks"]["lab_forget_cloze"]
    by_model = compare(CompareConfig(["lab:final", runs[1]], out=str(tmp_path)))
    assert by_model["tasks"] == by_run["tasks"]


def test_the_command_prints_a_table_or_json(runs, capsys):
    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "exact McNemar" in text and "right in A, wrong in B: " in text
    assert main(["compare", *runs, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["tasks"]) == {"lab_forget_robust", "lab_forget_cloze"}


def test_different_questions_are_refused(runs, lab, tmp_path):
    other = evaluate(EvaluateConfig(SOURCE, ["lab_forget_robust"], limit=20, samples=True, out=str(tmp_path)))
    with pytest.raises(LetheError, match=r"lab_forget_robust was evaluated in two ways: .* n \d+ and 20, fingerprint"):
        compare(CompareConfig([runs[0], str(other.path)]))


def test_a_model_is_asked_as_the_run_beside_it_was_and_other_settings_are_refused(runs, lab, tmp_path):
    few = str(
        evaluate(EvaluateConfig(SOURCE, ["lab_forget_robust"], limit=20, samples=True, num_fewshot=0, out=str(tmp_path))).path
    )
    assert compare(CompareConfig([few, "lab:final"], num_fewshot=0))["tasks"]["lab_forget_robust"]["n"] == 20
    for tasks in ([], ["lab_forget_robust"]):
        assert compare(CompareConfig([few, "lab:final"], tasks, limit=20))["tasks"]["lab_forget_robust"]["n"] == 20
        assert compare(CompareConfig(["lab:final", few], tasks))["tasks"]["lab_forget_robust"]["n"] == 20
    for settings in ({"limit": 30}, {"num_fewshot": 3}):
        with pytest.raises(LetheError, match=f"{next(iter(settings))}: .* has no effect"):
            compare(CompareConfig([few, runs[0]], **settings))


def test_a_run_without_samples_and_a_third_model_are_refused(runs, lab, tmp_path):
    bare = evaluate(EvaluateConfig(SOURCE, ["lab_forget_robust"], limit=5, out=str(tmp_path)))
    with pytest.raises(LetheError, match="--samples true"):
        compare(CompareConfig([runs[0], str(bare.path)]))
    with pytest.raises(LetheError, match="models: must be two references or runs"):
        CompareConfig(["a", "b", "c"])
