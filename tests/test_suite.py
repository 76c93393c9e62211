"""Suites of attacks on the nano lab, run by the controller of sweeps; what cannot work is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeping import TASKS, trials

from lethe import cli
from lethe.config import SuiteConfig, TamperConfig
from lethe.config.parse import build
from lethe.errors import LetheError
from lethe.results.study import Study
from lethe.runs.finding import find_runs
from lethe.sweeps.controller import sweep
from lethe.sweeps.suite import Suite, spelled_out

COMMON = {"eval": {"tasks": TASKS, "every": 4, "limit": 40}, "num_train_examples": 32, "per_device_train_batch_size": 4}
ATTACKS = {
    "full": {"max_steps": 8, "lr": 1e-3},
    "harmless": {"max_steps": 4, "forget": "lab:retain", "save_model": True},
    "then-forget": {"after": "harmless", "max_steps": 4, "lr": 1e-3},
}


def config(out: Path, **changes) -> SuiteConfig:
    settings = {"models": ["lab:global_step120"], "attacks": ATTACKS, "common": COMMON, "controls": ["lab:filtered"]}
    return SuiteConfig(**(settings | {"out": str(out)} | changes))


@pytest.mark.slow
def test_every_attack_runs_on_every_model_with_every_seed_and_chains_start_from_the_saved_model(lab, tmp_path):
    run = sweep(config(tmp_path, seeds=2, jobs=2, general_bound=0.2))
    found = trials(run)
    assert sorted(found) == sorted(
        f"{attack} on {model}, seed {seed}"
        for attack in ("full", "harmless")
        for model in ("lab:global_step120", "lab:filtered")
        for seed in (0, 1)
    )
    assert run.record["counts"] == {"complete": 8}
    runs = {r.id: r for r in find_runs(tmp_path) if r.record["kind"] == "tamper"}
    assert len(runs) == 12
    for name, trial in found.items():
        first, *rest = (runs[i] for i in trial["runs"])
        assert first.record["suite"]["general_bound"] == 0.2 and first.record["config"]["seed"] == trial["seed"]
        if name.startswith("harmless"):
            assert rest[0].record["config"]["model"] == f"run:{first.id}" and rest[0].record["suite"]["attack"] == "then-forget"
    study = Study(list(runs.values()))
    assert len(study.worst_cases) == 2 and study.general_bound == 0.2
    for said, case in zip(run.record["conclusions"], study.worst_cases.values(), strict=True):
        assert f"worst case {100 * case.point.value:.1f} %" in said


@pytest.mark.slow
def test_one_attack_with_seeds_is_a_suite_of_one(lab, tmp_path, capsys):
    words = ["lab:filtered", "--max_steps", "3", "--num_train_examples", "16", "--eval.limit", "20", "--name", "thrice"]
    assert cli.main(["tamper", *words, "--seeds", "1", "2", "--out", str(tmp_path), "--json"]) == 0
    made = [run for run in find_runs(tmp_path) if run.record["kind"] == "tamper"]
    assert sorted((run.record["name"], run.record["config"]["seed"]) for run in made) == [("thrice", 1), ("thrice", 2)]
    assert {run.record["config"]["max_steps"] for run in made} == {3}
    (series,) = Study(made).series
    assert len(series.attacks) == 2


def test_the_suite_that_comes_with_lethe_plans_every_attack_and_repeats_only_what_draws(lab, tmp_path):
    suite = Suite(spelled_out(SuiteConfig(models=["lab:final"], suite="standard", seeds=3, out=str(tmp_path))))
    plans = suite.plans
    assert suite.models == ["lab:final", "lab:filtered", "random:lab:final"]
    stages = [settings for plan in plans for _, settings in plan.stages]
    assert all(build(TamperConfig, settings) for settings in stages)
    by_attack = {name: [s["seed"] for s in stages if s["name"] == name] for name in suite.config.attacks}
    assert {name: len(seeds) for name, seeds in by_attack.items()} == {
        name: 3 if name in {"quantize", "prune"} else 9 for name in suite.config.attacks
    }
    assert len({plan.key for plan in plans}) == len(plans)


def test_an_attack_that_draws_nothing_is_repeated_where_one_that_follows_it_draws(lab, tmp_path):
    cut = {"attack": "prune", "strengths": [0.3], "save_model": True}
    common = {"eval": COMMON["eval"] | {"every": 0}}
    plans = Suite(config(tmp_path, attacks={"cut": cut, "then": {"after": "cut"}}, seeds=2, controls=[], common=common)).plans
    assert [[settings["seed"] for _, settings in plan.stages] for plan in plans] == [[0, 0], [0, 1]]
    alone = config(tmp_path, attacks={"cut": cut}, seeds=2, controls=[], common=common)
    assert len(Suite(alone).plans) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": {}, "suite": "standrad"}, "did you mean 'standard'"),
        ({"attacks": {}, "suite": "nowhere.yaml"}, "there is no suite"),
        ({"attacks": {}}, "suite: name a suite"),
        ({"models": []}, "models: name the models"),
        ({"models": ["lab:filtered", "lab:filtered"]}, "twice"),
        ({"models": ["lab:nothing"]}, "lab:nothing"),
        ({"attacks": {"full": {"max_stepz": 3}}}, "full: .*max_steps"),
        ({"attacks": {"full": {"lr": -1}}}, "full: lr"),
        ({"attacks": {"full": {}, "second": {"after": "fool"}}}, "did you mean 'full'"),
        ({"attacks": {"full": {}, "second": {"after": "full"}}}, "save_model: true"),
        ({"general_bound": 1.5}, "general_bound"),
        ({"attacks": {"one": {}, "two": {"eval": {"limit": 9}}}}, "eval.limit: one has 40, two has 9"),
        ({"attacks": {"one": {"lr": 1e-3}, "two": {"lr": 1e-3}}}, "attacks: two has the settings of one"),
        (
            {"attacks": {"one": {"save_model": True}, "two": {"after": "one"}, "three": {"after": "one"}}},
            "attacks: three has the settings of two",
        ),
        ({"common": COMMON | {"after": "full"}}, "full: there is no setting 'after'"),
        ({"attacks": {"full": {"model": "lab:final"}}}, "full: model: lab:final has no effect in a sweep; leave it out"),
        ({"common": COMMON | {"seed": 3}}, r"full: seed: 3 has no effect in a sweep; give seeds: \[3\]"),
        ({"attacks": {"full": 5}}, "attacks: full: expected settings of `lethe tamper`, got 5"),
        ({"suite": "standard"}, "no effect beside attacks"),
        ({"seeds": 1000, "models": [f"lab:filtered{'/' * i}" for i in range(20)]}, "runs, at most 10000 are allowed"),
        ({"attacks": {}, "suite": "standard", "only": ["fw"]}, "did you mean 'few'"),
    ],
)
def test_a_suite_that_cannot_work_is_refused_in_one_line_and_leaves_nothing(lab, tmp_path, changes, words):
    with pytest.raises(LetheError, match=words) as refused:
        sweep(config(tmp_path / "runs", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_no_suite_is_refused(tmp_path):
    for text, words in (
        ("attacks: [", "cannot be read"),
        ("attacks: {a: {lr: 1, lr: 2}}", "'lr' is written twice"),
        ("common: {}", "names no attacks"),
        ("attacks: {a: {}}\nboundd: 1", "boundd"),
        ("attacks: {a: {}}\nseeds: 3", "sets seeds; a suite has attacks, common"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(LetheError, match=words):
            spelled_out(SuiteConfig(models=["lab:final"], suite=str(tmp_path / "mine.yaml")))


def test_a_seed_beside_seeds_is_refused(lab, tmp_path, capsys):
    assert cli.main(["tamper", "lab:filtered", "--seed", "3", "--seeds", "2", "--out", str(tmp_path)]) == 2
    assert "seed: 3 has no effect beside seeds" in capsys.readouterr().err
