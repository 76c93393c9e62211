"""Sweeps on the nano lab, with real runs in real worker processes. No fault loses or repeats work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeping import TASKS, at_work, config, recipe, start, trials, until, weights

from lethe import cli
from lethe.config import ResumeConfig, SweepCancelConfig, SweepRetryConfig, SweepStatusConfig
from lethe.errors import LetheError
from lethe.results import regimes
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.controller import Controller, Sweep, cancel, retry, status, sweep
from lethe.sweeps.resuming import resume

# -- refused before anything is run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tamper": {"model": "lab:final"}}, "tamper: model: lab:final has no effect in a sweep"),
        ({"unlearn": recipe(name="x")}, "unlearn: name: x has no effect in a sweep"),
        ({"vary": {"lora": [{"rank": 4}]}}, "there is no setting 'lora.rank'"),
        (
            {"vary": {n: {"low": 1, "high": 2, "steps": 99} for n in ("lr", "retain_coef", "remove_coef")}},
            "runs, at most 10000 are allowed",
        ),
        ({"vary": {}}, "vary: name at least one setting"),
        ({"vary": {"retain_coef": [1, -1]}}, "at retain_coef -1: retain_coef: must be at least 0"),
        ({"vary": {"layers": [[0, 1], [0, 99]]}}, "99"),
        ({"unlearn": {"recipe": "nowhere.yaml"}}, "cannot be read"),
        ({"unlearn": {"config": "lab"}}, "unlearn: there is no setting 'config'"),
        ({"unlearn": {"lerning_rate": 1}}, "lerning_rate"),
        ({"kind": "boundary"}, "takes one axis"),
        ({"kind": "pareto"}, "max_runs: a pareto sweep needs a budget"),
        ({"max_runs": 5}, "max_runs: 5 has no effect with kind grid"),
        ({"find": "retained", "within": 0.01}, "find: retained has no effect with kind grid"),
        ({"kind": "boundary", "find": "retained", "vary": {"lr": {"low": 1e-4, "high": 1}}}, "within: find retained needs"),
        ({"kind": "boundary", "vary": {"lr": {"low": 1e-4, "high": 1}}, "reference": "0.4"}, "reference: 0.4 has no effect"),
        ({"width": 1.0}, "width: must be above 1"),
        ({"seeds": 0}, "seeds"),
        ({"storage": "nosuchdatabase://here"}, "storage: 'nosuchdatabase://here' cannot be opened"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"name": "ret{retian_coef}"}, "retain_coef"),
        ({"unlearn": recipe(source="auto")}, "lethe checkpoints"),
        ({"unlearn": recipe(eval={"tasks": ["lab_retain"]})}, "forget_task"),
        ({"tamper": {"max_stepz": 3}}, "max_steps"),
        ({"tamper": {"eval": {"tasks": ["lab_retain"]}}}, "lacks lab_forget_robust"),
        ({"unlearn": recipe(seed=5)}, r"give seeds: \[5\]"),
        ({"forget_task": "lab_forget"}, "not among unlearn.eval.tasks"),
        ({"forget_task": "lab_retain"}, "retain_task: 'lab_retain' is the forget task"),
        ({"name": "ret{"}, "name: .*brace"),
        ({"vary": {"eval.limit": [10, 20]}}, "changes how runs are measured"),
        ({"name": "r{retain_coef:.1f}"}, "no setting 'retain_coef:.1f'"),
        ({"kind": "boundary", "vary": {"lr": {"low": 1e-4, "high": 1}}, "max_runs": 3, "seeds": 2}, "too few for both ends"),
        ({"kind": "pareto", "max_runs": 1, "warm_start": ["x"], "tamper": {}}, "warm_start: has no effect with an attack"),
        ({"kind": "pareto", "max_runs": 1, "warm_start": ["nowhere"]}, "warm_start: 'nowhere' has no complete run"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_and_leaves_nothing(lab, tmp_path, changes, words):
    with pytest.raises(LetheError, match=words) as refused:
        sweep(config(tmp_path / "runs", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


# -- what the kinds do


@pytest.fixture(scope="module")
def grid(lab, tmp_path_factory) -> Run:
    """A grid of four settings, two at a time, with an attack on each."""
    out = tmp_path_factory.mktemp("grid") / "runs"
    attack = {"max_steps": 4, "num_train_examples": 16, "eval": {"tasks": TASKS, "every": 2, "limit": 40}}
    return sweep(
        config(
            out,
            goal="Does more retain weight keep more?",
            name="ret{retain_coef}_rm{remove_coef}",
            vary={"retain_coef": [1, 10], "remove_coef": [5, 50]},
            tamper=attack,
            jobs=2,
        )
    )


@pytest.mark.slow
def test_a_grid_runs_every_combination_once_and_attacks_each(grid, capsys):
    found = trials(grid)
    assert list(found) == ["baseline", "ret1_rm5", "ret1_rm50", "ret10_rm5", "ret10_rm50"]
    assert grid.status == "complete" and grid.record["counts"] == {"complete": 5}
    storage = JournalStorage(JournalFileBackend(str(grid.path / "study.journal")))
    optunas = {t.user_attrs["name"]: t for t in optuna.load_study(study_name=f"grid {grid.id}", storage=storage).trials}
    before = Run.open(next(grid.path.parent.glob("evaluate-*"))).record["evals"]
    for name, trial in found.items():
        runs = [Run.open(next(grid.path.parent.glob(f"*-{i}"))) for i in trial["runs"]]
        assert [run.record["kind"] for run in runs] == (["evaluate"] if name == "baseline" else ["unlearn", "tamper"])
        assert all(run.status == "complete" for run in runs)
        assert all(run.record["sweep"] == {"id": grid.id, "trial": name} for run in runs)
        if name != "baseline":
            evals = runs[0].record["evals"]
            assert runs[1].record["config"]["model"] == f"run:{runs[0].id}"
            assert {n: runs[0].record["config"][n] for n in trial["point"]} == trial["point"] == optunas[name].params
            curve = [row["evals"]["lab_forget_robust"]["acc"] for row in runs[1].rows("curve.jsonl")]
            assert trial["after_attack"] == max(curve)
            assert optunas[name].values == [*(evals[task]["acc"] for task in TASKS), max(curve)]
            shares = [regimes.retained_share(evals[task], before[task]) for task in TASKS]
            assert trial["regime"] == regimes.regime(*shares)
            assert trial["selectivity"]["value"] == regimes.selectivity(*shares).value
    assert cli.main(["sweep", "status", str(grid.path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("Does more retain weight keep more?") < shown.index("ret10_rm50") < shown.index("Next:")


@pytest.mark.slow
def test_a_trial_is_what_its_own_command_would_have_made(grid, tmp_path):
    """The same configuration through `lethe unlearn`: the same weights."""
    run = Run.open(next(grid.path.parent.glob("unlearn-ret10_rm5-*")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(run.record["config"]))
    words = [sys.executable, "-m", "lethe.cli", "unlearn", "--json", "--config", str(recipe), "--out", str(tmp_path / "runs")]
    alone = subprocess.run(words, capture_output=True, text=True, check=True)
    ours, theirs = weights(run), weights(Run.open(json.loads(alone.stdout)["path"]))
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours | theirs)


@pytest.mark.slow
def test_what_was_measured_before_is_not_run_again(grid):
    """A larger grid in the same folder: the old settings are taken over, the new ones are run."""
    before = {run.id for run in find_runs(grid.path.parent)}
    attack = grid.record["config"]["tamper"]
    larger = sweep(
        config(
            grid.path.parent,
            name="ret{retain_coef}_rm{remove_coef}",
            vary={"retain_coef": [1, 10, 100], "remove_coef": [5]},
            tamper=attack,
        )
    )
    found = trials(larger)
    assert [name for name, trial in found.items() if trial["reused"]] == ["baseline", "ret1_rm5", "ret10_rm5"]
    assert len({run.id for run in find_runs(grid.path.parent)} - before) == 3  # the sweep, one unlearning run, one attack
    assert found["ret1_rm5"]["evals"] == trials(grid)["ret1_rm5"]["evals"]


@pytest.mark.slow
def test_a_hopeless_run_is_stopped_early_and_has_no_number(lab, tmp_path):
    """Two finished runs are known that were far better at the first evaluation; the third is stopped there."""
    long = recipe(max_steps=1500, num_train_examples=480, lr=1e-6, eval={"tasks": TASKS, "every": 5})
    sweep(config(tmp_path, unlearn=long | {"max_steps": 5}, vary={"retain_coef": [1, 2]}))
    for run in find_runs(tmp_path):
        if run.record["kind"] == "unlearn":  # plant what good runs of 1,500 steps would have measured at every fifth
            run.record["config"]["max_steps"] = run.record["plan"]["steps"] = 1500
            row = run.rows("curve.jsonl")[0]
            for task, value in zip(TASKS, (0.1, 1.0), strict=True):
                row["evals"][task] |= {"acc": value, "low": value - 0.001, "high": value + 0.001}
            lines = [json.dumps(row | {"step": step}) for step in range(5, 1505, 5)]
            (run.path / "curve.jsonl").write_text("\n".join(lines) + "\n")
            run.update(evals=row["evals"])
    axis = {"retain_coef": {"low": 1, "high": 4}}
    second = config(tmp_path, kind="pareto", unlearn=long, vary=axis, max_runs=1, warm_start=[str(tmp_path)])
    stopped = sweep(second)
    (found,) = [t for t in stopped.record["trials"] if not t["reference"] and not t["reused"]]
    assert found["status"] == "stopped early" and found["reason"].startswith("stopped early at step") and found["evals"] == {}
    assert Sweep.open(str(stopped.path), str(tmp_path)).study.trials[-1].values is None
    run = Run.open(next(tmp_path.glob(f"unlearn-*-{found['runs'][0]}")))
    assert run.status == "cancelled" and run.rows("metrics.jsonl")[-1]["step"] < 1500


# -- faults


@pytest.mark.slow
def test_a_run_that_diverges_or_fails_is_a_status_and_the_sweep_goes_on(lab, tmp_path):
    run = sweep(
        config(tmp_path, vary={"lr": [1e-2, 1e15]}, unlearn=recipe(max_steps=30, num_train_examples=120, schedule="constant"))
    )
    found = trials(run)
    assert run.status == "complete" and run.record["counts"] == {"complete": 2, "diverged": 1}
    lost = found["lr1e+15"]
    assert lost["status"] == "diverged" and "lower lr" in lost["reason"] and lost["evals"] == {}
    study = Sweep.open(str(run.path), str(tmp_path)).study
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL"] and study.trials[1].values is None


def four_runs() -> dict:
    """A sweep of four runs that take some seconds each."""
    long = recipe(max_steps=40, num_train_examples=64, save_every=5)
    return {"unlearn": long, "vary": {"retain_coef": [1, 10], "remove_coef": [5, 50]}}


@pytest.fixture
def slow_sweep(lab, tmp_path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(four_runs()))
    return path


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> dict[str, Run]:
    """The runs of `slow_sweep`, made without any fault."""
    out = tmp_path_factory.mktemp("undisturbed")
    sweep(config(out, **four_runs(), jobs=2))
    return {run.record["name"]: run for run in find_runs(out) if run.record["kind"] == "unlearn"}


def same_as(undisturbed: dict[str, Run], out: Path) -> None:
    """Every run was made once, and ended in the same weights and metrics."""
    runs = [run for run in find_runs(out) if run.record["kind"] == "unlearn"]
    assert sorted(run.record["name"] for run in runs) == sorted(undisturbed)
    for run in runs:
        other = undisturbed[run.record["name"]]
        assert run.status == "complete"
        assert all(bool((x == weights(other)[name]).all()) for name, x in weights(run).items())
        steps = [row["step"] for row in run.rows("metrics.jsonl")]
        assert steps == list(range(1, 41))


@pytest.mark.slow
def test_killed_workers_and_controllers_lose_nothing_and_repeat_nothing(slow_sweep, undisturbed, tmp_path):
    out = tmp_path / "runs"
    first = start("sweep", "--config", str(slow_sweep), "--jobs", "2", out=out)
    run = until(lambda: at_work(out))[0]
    os.kill(run.record["environment"]["pid"], signal.SIGKILL)  # a worker
    until(lambda: (r := at_work(out)) and r[0].record["environment"]["pid"] != run.record["environment"]["pid"])
    first.kill()  # the controller; its workers finish what they have
    first.wait()
    (made,) = out.glob("sweep-*")
    second = start("resume", str(made), out=out)
    assert second.wait(200) == 0
    same_as(undisturbed, out)
    assert Run.open(made).status == "complete"


@pytest.mark.slow
def test_two_controllers_share_a_sweep_and_no_trial_is_run_twice(slow_sweep, undisturbed, tmp_path):
    out = tmp_path / "runs"
    first = start("sweep", "--config", str(slow_sweep), out=out)
    made = until(lambda: list(out.glob("sweep-*/study.journal")))[0].parent
    until(lambda: at_work(out))
    second = start("resume", str(made), out=out)
    until(lambda: len(at_work(out)) == 2)
    assert first.wait(200) == 0 and second.wait(200) == 0
    same_as(undisturbed, out)
    workers = {run.record["environment"]["pid"] for run in find_runs(out) if run.record["kind"] == "unlearn"}
    assert len(workers) == 2


@pytest.mark.slow
def test_a_stopped_controller_stops_its_workers_and_can_be_resumed(slow_sweep, undisturbed, tmp_path):
    out = tmp_path / "runs"
    first = start("sweep", "--config", str(slow_sweep), "--jobs", "2", out=out)
    run = until(lambda: at_work(out))[0]
    first.terminate()
    assert first.wait(60) == 143
    assert not psutil.pid_exists(run.record["environment"]["pid"])
    (made,) = out.glob("sweep-*")
    assert Run.open(made).status == "cancelled" and "lethe resume" in Run.open(made).record["reason"]
    resume(ResumeConfig(str(made), str(out)))
    same_as(undisturbed, out)


@pytest.mark.slow
def test_cancelled_runs_are_a_status_and_retry_restarts_them(slow_sweep, undisturbed, tmp_path):
    out = tmp_path / "runs"
    first = start("sweep", "--config", str(slow_sweep), "--jobs", "2", out=out)
    until(lambda: at_work(out))
    (made,) = out.glob("sweep-*")
    cancel(SweepCancelConfig(str(made), str(out)))
    assert first.wait(60) == 143, (tmp_path / "controller.log").read_text()
    found = trials(status(SweepStatusConfig(str(made), str(out))))
    assert {t["status"] for n, t in found.items() if n != "baseline"} == {"cancelled"}
    assert all("lethe sweep cancel" in t["reason"] for n, t in found.items() if n != "baseline")
    with pytest.raises(LetheError, match="nothing to cancel"):
        cancel(SweepCancelConfig(str(made), str(out)))
    retry(SweepRetryConfig(str(made), str(out)))
    same_as(undisturbed, out)
    with pytest.raises(LetheError, match="no failed or cancelled run"):
        retry(SweepRetryConfig(str(made), str(out)))


@pytest.mark.slow
def test_a_missing_study_is_an_error_and_loses_no_run(grid, tmp_path):
    journal = grid.path / "study.journal"
    journal.rename(tmp_path / "kept")
    before = {run.id for run in find_runs(grid.path.parent)}
    try:
        with pytest.raises(LetheError, match="restore it"):
            Controller(Sweep.open(str(grid.path), "runs")).prepare()
        assert {run.id for run in find_runs(grid.path.parent)} == before
    finally:
        for file in grid.path.glob("study.journal*"):
            file.unlink()
        (tmp_path / "kept").rename(journal)


@pytest.mark.slow
def test_runs_that_were_deleted_are_missed_by_none_and_made_anew_by_retry(grid, tmp_path):
    copy = tmp_path / "runs" / grid.path.name
    shutil.copytree(grid.path.parent, copy.parent)
    for run in find_runs(copy.parent):
        if run.record["name"] in {"baseline", "ret1_rm5"}:
            shutil.rmtree(run.path)
    named = str(copy), str(copy.parent)
    found = {trial["name"]: trial for trial in status(SweepStatusConfig(*named)).record["trials"]}
    assert found["ret1_rm5"]["evals"] == {} and found["ret10_rm5"]["evals"] and not found["ret10_rm5"]["regime"]
    (trial,) = [trial for trial in Sweep.open(*named).trials() if trial.get("name") == "ret1_rm5"]
    trial.study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=trial.frozen.user_attrs))
    retry(SweepRetryConfig(*named))
    assert Run.open(copy).record["trials"][-1]["evals"]


@pytest.mark.slow
def test_a_run_is_not_taken_over_when_a_file_that_it_reads_has_changed(lab, tmp_path):
    rows = [{"question": f"{i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(8)]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    how = {"tasks": ["lab_forget_robust", "wmdp_bio"], "limit": 8, "task_data": {"wmdp_bio": str(data)}}
    made = config(tmp_path / "runs", vary={"retain_coef": [1]}, unlearn=recipe(max_steps=2, eval=how), retain_task="wmdp_bio")
    sweep(made)
    assert trials(sweep(made))["retain_coef1"]["reused"]
    data.write_text("\n".join(map(json.dumps, rows[1:])))
    assert not trials(sweep(made))["retain_coef1"]["reused"]


@pytest.mark.slow
def test_a_failed_run_that_is_retried_begins_anew(lab, tmp_path):
    """It failed by its own time limit. With that raised in its record, it resumes from its save."""
    long = recipe(max_steps=200, num_train_examples=64, save_every=5, time_limit=0.0005)
    with pytest.raises(LetheError, match="time limit reached"):
        sweep(config(tmp_path, vary={"retain_coef": [1]}, unlearn=long))
    (made,) = tmp_path.glob("sweep-*")
    run = next(run for run in find_runs(tmp_path) if run.record["kind"] == "unlearn")
    assert run.status == "failed"
    run.update(config={"time_limit": 0.0})
    retry(SweepRetryConfig(str(made), str(tmp_path)))
    assert Run.open(run.path).status == "complete" and len(run.rows("metrics.jsonl")) == 200
