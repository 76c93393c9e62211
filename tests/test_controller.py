"""What a sweep's controller does with its trials. A launcher makes results up at once: no model is trained."""

from __future__ import annotations

import math

import pytest
from optuna.trial import TrialState, create_trial
from sweeping import TASKS, config, trials

from lethe.config import ResumeConfig, SweepStatusConfig
from lethe.launching import launchers
from lethe.results.regimes import Estimate
from lethe.runs.run import Run
from lethe.sweeps.boundary import plateau
from lethe.sweeps.controller import Sweep, status, sweep
from lethe.sweeps.pareto import is_clearly_worse
from lethe.sweeps.planner import advice
from lethe.sweeps.resuming import resume

LR = {"low": 1e-4, "high": 1.0, "log": True}


class MadeUp:
    """A launcher whose runs are done when they are started, which it notices only when it waits.

    Accuracies fall from 1 to chance as lr rises, forget a little before retain.
    """

    busy = False

    def room(self) -> int:
        return 0 if self.busy else 1

    def start(self, name, folders):
        self.busy = True
        for folder in folders:
            run = Run.open(folder)
            run.update(status="complete", evals=self.evals(run.record["config"].get("lr", 0)))
        return {"host": "here", "pid": 0, "born": 0.0, "since": run.record["created"]}

    def evals(self, lr: float) -> dict:
        found = {}
        for task, half in zip(TASKS, (1e-2, 3e-2), strict=True):
            acc = 0.25 + 0.75 / (1 + (lr / half) ** 4)
            found[task] = {"acc": acc, "low": acc - 0.02, "high": acc + 0.02, "n": 100, "chance": 0.25}
        return found

    def lost(self, owned):
        return [None for _ in owned]

    def wait(self, seconds: float) -> None:
        self.busy = False

    def stop(self) -> None:
        pass


@pytest.fixture
def made_up(lab, monkeypatch):
    monkeypatch.setattr(launchers, "make", lambda *_: MadeUp())


def test_a_sweep_is_not_over_while_a_worker_has_yet_to_say_that_it_is_done(made_up, tmp_path):
    """The last run's record is complete, nobody has room, and nothing is in the queue: more is still to be proposed."""
    bisected = sweep(config(tmp_path / "a", kind="boundary", vary={"lr": LR}, width=4.0))
    assert len(bisected.record["trials"]) > 5 and all("wider than" not in said for said in bisected.record["conclusions"])
    spent = sweep(config(tmp_path / "b", kind="pareto", vary={"lr": LR}, max_runs=6))
    assert len(trials(spent)) == 7


def test_pareto_begins_evenly_over_the_axes_and_repeats_itself_with_one_job(made_up, tmp_path):
    axes = {"lr": LR, "lora.r": [4, 16]}
    points = []
    for name in ("a", "b"):
        run = sweep(config(tmp_path / name, kind="pareto", vary=axes, max_runs=10))
        points.append([trial["point"] for trial in run.record["trials"] if not trial["reference"]])
    assert points[0] == points[1] and len(points[0]) == 10
    first = points[0][:4]
    assert {point["lora.r"] for point in first} == {4, 16}
    assert {int(4 + math.log10(point["lr"])) // 2 for point in first} == {0, 1}  # both halves of the axis


def test_pareto_ends_when_every_setting_has_been_run(made_up, tmp_path):
    run = sweep(config(tmp_path, kind="pareto", vary={"lr": [1e-3, 1e-1], "lora.r": [4, 16]}, max_runs=9))
    assert run.status == "complete" and run.record["counts"] == {"complete": 5}
    assert len(trials(run)) == 5


def test_pareto_with_a_condition_on_an_axis_runs_only_what_the_condition_allows(made_up, tmp_path):
    axes = {"optimizer": ["adamw", "muon"], "lr": LR, "lora.r": {"values": [4, 16], "when": {"optimizer": "adamw"}}}
    run = sweep(config(tmp_path, kind="pareto", vary=axes, max_runs=10))
    points = [trial["point"] for trial in run.record["trials"] if not trial["reference"]]
    assert len(points) == 10
    assert {("lora.r" in point) == (point["optimizer"] == "adamw") for point in points} == {True}


def test_settings_that_fail_are_not_proposed_over_and_over(made_up, tmp_path, monkeypatch):
    plain = MadeUp.evals
    monkeypatch.setattr(MadeUp, "evals", lambda self, lr: plain(self, lr) if lr < 1e-2 else {})
    run = sweep(config(tmp_path, kind="pareto", vary={"lr": LR}, max_runs=12))
    failed = sorted(math.log10(t["point"]["lr"]) for t in run.record["trials"] if t["status"] == "failed")
    assert failed and len([t for t in run.record["trials"] if not t["reference"]]) == 12
    assert len({round(10 * x) for x in failed}) == len(failed)  # each at a rate of its own, a tenth of a decade apart


def measured(run: Run) -> list[tuple[float, str]]:
    return sorted((trial["point"]["lr"], trial["regime"]) for trial in run.record["trials"] if not trial["reference"])


def rate(half: float, share: float) -> float:
    """The lr at which `MadeUp` leaves this share of a task's accuracy above chance."""
    return half * (1 / share - 1) ** 0.25


def test_a_boundary_is_bracketed_where_the_regimes_change(made_up, tmp_path):
    run = sweep(config(tmp_path, kind="boundary", vary={"lr": LR}, width=2.0))
    half_an_interval = 0.02 / 0.75
    neither, both = rate(1e-2, 0.9 - half_an_interval), rate(3e-2, 0.1 + half_an_interval)
    for truth, holds in ((neither, lambda regime: regime == "neither"), (both, lambda regime: regime != "both")):
        low = max(lr for lr, regime in measured(run) if holds(regime))
        high = min(lr for lr, regime in measured(run) if not holds(regime))
        assert low < truth < high and high / low <= 2
    said = " ".join(run.record["conclusions"])
    assert all(words in said for words in ("Neither task fell up to", "Both tasks are at chance from", "One seed"))


@pytest.mark.parametrize(
    ("vary", "words", "other"),
    [
        ({"lr": {"low": 1e-4, "high": 2e-3}}, "from lr", "max_steps"),
        ({"max_steps": {"low": 2, "high": 8}}, "from max_steps 2 on nothing changes", "lr"),
    ],
)
def test_an_axis_that_does_not_reach_both_is_not_bracketed_and_names_the_next(made_up, tmp_path, vary, words, other):
    run = sweep(config(tmp_path, kind="boundary", vary=vary))
    said = " ".join(run.record["conclusions"])
    assert "Not bracketed" in said and words in said and f"Try another axis: {other}." in said
    assert len(run.record["trials"]) == 3


def test_the_largest_rate_that_retains_enough_is_found(made_up, tmp_path):
    run = sweep(config(tmp_path, kind="boundary", find="retained", within=0.1, vary={"lr": LR}, width=1.5))
    largest = max(lr for lr, _ in measured(run) if lr < rate(3e-2, 0.65 / 0.75))
    said = f"Retain accuracy (lab_retain) is at most 10 points below baseline up to lr {largest:g}, and no longer at"
    assert run.record["conclusions"][0].startswith(said)


def test_a_sweep_of_an_earlier_version_is_resumed(made_up, tmp_path):
    """Its record has old names of settings, and its study a trial that waits."""
    run = sweep(config(tmp_path, vary={"lr": LR | {"steps": 2}}))
    settings = run.record["config"]
    settings["kept_threshold"], settings["prune"] = 0.75, settings.pop("stop_early")
    del settings["retained_threshold"]
    run.update(status="cancelled")
    made = Sweep.open(str(run.path), str(tmp_path))
    assert made.config.retained_threshold == 0.75
    plan = made.planner.plan({"lr": 0.5}, [0])
    made.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=plan.attributes()))
    resumed = resume(ResumeConfig(str(run.path), str(tmp_path)))
    assert resumed.record["counts"] == {"complete": 4} and trials(resumed)["lr0.5"]["status"] == "complete"


def test_pareto_starts_from_known_runs_beside_its_budget_and_can_be_opened_again(made_up, tmp_path):
    known = sweep(config(tmp_path / "known", vary={"lr": [1e-3, 1e-2]}))
    run = sweep(config(tmp_path / "a", kind="pareto", vary={"lr": LR}, max_runs=2, warm_start=[str(tmp_path / "known")]))
    found = [trial for trial in run.record["trials"] if not trial["reference"]]
    assert {trial["name"] for trial in found if trial["reused"]} == {
        trial["name"] for trial in known.record["trials"] if not trial["reference"]
    }
    new = [trial["point"]["lr"] for trial in found if not trial["reused"]]
    assert len(new) == 2 and all(1e-4 <= lr <= 1 for lr in new)
    assert any(sentence.startswith("Front of") for sentence in run.record["conclusions"])
    assert status(SweepStatusConfig(str(run.path), str(tmp_path))).record["trials"] == run.record["trials"]


def test_every_setting_is_run_with_every_seed_and_pareto_takes_means(made_up, tmp_path, monkeypatch):
    run = sweep(config(tmp_path / "grid", vary={"lr": [1e-3]}, seeds=[3, 4]))
    assert [(t["name"], t["seed"]) for t in run.record["trials"][1:]] == [("lr0.001_seed3", 3), ("lr0.001_seed4", 4)]
    runs = [Run.open(next((tmp_path / "grid").glob(f"*-{t['runs'][0]}"))) for t in run.record["trials"][1:]]
    assert [made.record["config"]["seed"] for made in runs] == [3, 4]
    plain, lost = MadeUp.evals, iter([0.0, 0.02, 0.06])  # of the baseline and of two seeds
    monkeypatch.setattr(MadeUp, "evals", lambda self, lr: lower(plain(self, lr), next(lost)))
    run = sweep(config(tmp_path / "pareto", kind="pareto", vary={"lr": LR}, seeds=2, max_runs=1))
    (trial,) = run.record["trials"][1:]
    for task, mean in lower(plain(MadeUp(), trial["point"]["lr"]), 0.04).items():
        assert trial["evals"][task]["acc"] == pytest.approx(mean["acc"])
    assert len(trial["runs"]) == 2


def lower(evals: dict, by: float) -> dict:
    return {task: result | {"acc": result["acc"] - by} for task, result in evals.items()}


def test_a_plateau_is_where_nothing_changes_beyond_the_intervals():
    def shares(values):
        return {float(x): [Estimate(v, v - 0.05, v + 0.05) for v in pair] for x, pair in values.items()}

    measured = shares({1: (0.95, 1.0), 2: (0.7, 1.0), 4: (0.41, 0.98), 8: (0.4, 0.99), 16: (0.39, 0.98)})
    assert plateau(measured) == 4.0
    assert plateau({1 / x: each for x, each in measured.items()}) == 0.25
    assert plateau(shares({1: (0.9, 1.0), 2: (0.5, 1.0)})) is None


def test_a_run_is_hopeless_only_when_two_were_better_in_both_beyond_the_intervals():
    def results(*values, half=0.02):
        return tuple({"acc": value, "low": value - half, "high": value + half} for value in values)

    worse, better = results(0.8, 0.6), results(0.5, 0.9)
    assert is_clearly_worse(worse, [better, better])
    for other in (results(0.5, 0.6), results(0.78, 0.63), ()):
        assert not is_clearly_worse(worse, [better, other])
    assert not is_clearly_worse(worse, [])


@pytest.mark.parametrize(
    ("regimes", "words"),
    [
        (["neither", "neither"], "raise lr"),
        (["both"], "lower lr, raise retain_coef"),
        (["neither", "partial"], "lower lr a little and raise remove_coef"),
        (["neither", "both"], "between neither and both"),
        (["selective", "both"], "attack"),
        (["inverted"], "retain"),
        ([], "no run was measured"),
    ],
)
def test_advice_follows_the_rules_of_thumb(regimes, words):
    assert words in advice(regimes)
