"""Rules of thumb on the runs of a sweep: plateau, next axis, early stop, advice."""

from __future__ import annotations

import pytest

from lethe.results.regimes import Estimate
from lethe.sweeps import rules_of_thumb


def test_a_plateau_is_where_nothing_changes_beyond_the_intervals():
    def estimates(values):
        return {float(x): Estimate(v, v - 0.05, v + 0.05) for x, v in values.items()}

    forget = estimates({1: 0.95, 2: 0.7, 4: 0.41, 8: 0.4, 16: 0.39})
    retain = estimates({1: 1.0, 2: 1.0, 4: 0.98, 8: 0.99, 16: 0.98})
    assert rules_of_thumb.plateau(forget, retain, towards_high=True) == 4.0
    assert rules_of_thumb.plateau(estimates({1: 0.9, 2: 0.5}), estimates({1: 1.0, 2: 1.0}), towards_high=True) is None
    mirrored = {1 / x: v for x, v in forget.items()}, {1 / x: v for x, v in retain.items()}
    assert rules_of_thumb.plateau(*mirrored, towards_high=False) == 0.25


@pytest.mark.parametrize(
    ("varied", "axis_next"),
    [
        ("remove_coef", "max_steps"),
        ("remove_coef / retain_coef", "max_steps"),
        ("max_steps", "lr"),
        ("epochs", "lr"),
        ("lr", "max_steps"),
    ],
)
def test_the_next_axis_is_another_one_and_steps_come_first(varied, axis_next):
    assert rules_of_thumb.next_axis(varied) == axis_next


def test_a_run_is_hopeless_only_when_two_were_better_in_both_beyond_the_intervals():
    def result(value, half=0.02):
        return {"acc": value, "low": value - half, "high": value + half}

    worse = (result(0.8), result(0.6))
    better = (result(0.5), result(0.9))
    mixed = (result(0.5), result(0.6))
    near = (result(0.78), result(0.63))
    assert rules_of_thumb.is_clearly_worse(worse, [better, better])
    assert not rules_of_thumb.is_clearly_worse(worse, [better, mixed])
    assert not rules_of_thumb.is_clearly_worse(worse, [better, near])
    assert not rules_of_thumb.is_clearly_worse(worse, [])


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
    assert words in rules_of_thumb.advice(regimes)
