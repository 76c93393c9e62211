"""Rules of thumb on the runs of a sweep: plateau, early stop, advice."""

from __future__ import annotations

import pytest

from lethe.results.regimes import Estimate
from lethe.sweeps.boundary import plateau
from lethe.sweeps.pareto import is_clearly_worse
from lethe.sweeps.planner import advice


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
