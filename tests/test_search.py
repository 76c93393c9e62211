"""Bisection finds what an exhaustive look along the axis finds, with few measurements."""

from __future__ import annotations

import math
import random

import pytest

from lethe.results.regimes import Estimate
from lethe.sweeps import axes, search


def axis(low=0.01, high=100.0, log=True, name="remove_coef"):
    (made,) = axes.parse({name: {"low": low, "high": high, "log": log}})
    return made


def bisect(verdicts_of, along, width, most=100, seeds=1):
    """Measure the next values until there are none. `verdicts_of(value)`: the seeds' verdicts for each boundary."""
    edges: list[dict] = []
    measured = 0
    while measured < most:
        edges = edges or [{} for _ in verdicts_of(along.at(0))]
        wanted = search.next_values(along, edges, width)
        if not wanted:
            break
        for value in wanted[: most - measured]:
            measured += 1
            for edge, said in zip(edges, verdicts_of(value), strict=True):
                edge[value] = said
    return edges, measured


@pytest.mark.parametrize("seed", range(20))
def test_two_boundaries_are_found_within_the_width_in_few_measurements(seed):
    chosen = random.Random(seed)
    first, second = sorted(10 ** chosen.uniform(-2, 2) for _ in range(2))
    along = axis()
    edges, measured = bisect(lambda x: [[x < first], [x >= second]], along, 2.0)
    for verdicts, truth, before in zip(edges, (first, second), (True, False), strict=True):
        found = search.bracket(along, verdicts, 2.0)
        assert found.status == "found" and found.before is before and found.monotone
        assert found.below < truth <= found.above and found.factor <= 2.0
    assert measured <= 2 + 2 * math.ceil(math.log2(math.log(1e4) / math.log(2)))


def test_an_axis_may_run_against_the_strength_of_unlearning():
    along = axis()
    edges, _ = bisect(lambda x: [[x >= 3.0]], along, 1.5)
    found = search.bracket(along, edges[0], 1.5)
    assert found.before is False and found.below < 3.0 <= found.above


def test_an_axis_on_which_nothing_changes_is_not_bracketed_and_takes_two_measurements():
    along = axis()
    edges, measured = bisect(lambda x: [[True]], along, 1.5)
    assert measured == 2
    assert search.bracket(along, edges[0], 1.5) == search.Bracket("not bracketed", before=True)


def test_where_seeds_disagree_the_boundary_is_no_sharper():
    along = axis(0.1, 10.0)

    def verdicts(x):
        return [[x < threshold for threshold in (0.8, 1.0, 1.25)]]  # three seeds, three boundaries

    edges, measured = bisect(verdicts, along, 1.2)
    found = search.bracket(along, edges[0], 1.2)
    assert found.status == "found"
    assert found.below <= 0.8 and found.above >= 1.25  # never inside of the spread
    assert found.disagreeing and all(0.8 < x <= 1.25 for x in found.disagreeing)
    assert measured < 14


def test_a_verdict_that_changes_back_is_not_monotone():
    along = axis(1.0, 16.0)
    measured = {1.0: [True], 2.0: [False], 4.0: [True], 8.0: [False], 16.0: [False]}
    found = search.bracket(along, measured, 2.0)
    assert (found.below, found.above, found.monotone) == (1.0, 2.0, False)


def test_a_value_that_failed_is_gone_around():
    along = axis(1.0, 100.0)
    edges, _ = bisect(lambda x: [None if 9 < x < 11 else [x < 30]], along, 1.5)
    found = search.bracket(along, edges[0], 1.5)
    assert found.status == "found" and found.below < 30 <= found.above


def test_an_end_where_seeds_disagree_or_that_failed_has_no_verdict():
    along = axis(1.0, 100.0)
    found = search.bracket(along, {1.0: [True, False], 100.0: [False, False]}, 1.5)
    assert found == search.Bracket("undecided", disagreeing=(1.0,))
    edges, measured = bisect(lambda x: [None if x == 100 else [True]], along, 1.5)
    assert search.bracket(along, edges[0], 1.5).status == "not measured" and measured == 2


def test_whole_numbers_are_bisected_to_neighbours():
    along = axis(1, 64, name="max_steps")
    edges, _ = bisect(lambda x: [[x < 23]], along, 1.0001)
    found = search.bracket(along, edges[0], 1.0001)
    assert (found.status, found.below, found.above) == ("found", 22, 23)


def test_a_boundary_near_0_is_looked_for_down_to_a_hundredth_of_the_axis():
    along = axis(0, 100, log=False, name="retain_coef")
    for boundary, ends in ((0.7, (0, 0.781)), (5, (4.688, 6.25))):
        (edge,), measured = bisect(lambda value, boundary=boundary: [[value >= boundary]], along, 1.5)
        found = search.bracket(along, edge, 1.5)
        assert (found.status, found.below, found.above) == ("found", *ends)
        assert measured <= 10


def test_a_plateau_is_where_nothing_changes_beyond_the_intervals():
    def estimates(values):
        return {float(x): Estimate(v, v - 0.05, v + 0.05) for x, v in values.items()}

    forget = estimates({1: 0.95, 2: 0.7, 4: 0.41, 8: 0.4, 16: 0.39})
    retain = estimates({1: 1.0, 2: 1.0, 4: 0.98, 8: 0.99, 16: 0.98})
    assert search.plateau(forget, retain, towards_high=True) == 4.0
    assert search.plateau(estimates({1: 0.9, 2: 0.5}), estimates({1: 1.0, 2: 1.0}), towards_high=True) is None
    mirrored = {1 / x: v for x, v in forget.items()}, {1 / x: v for x, v in retain.items()}
    assert search.plateau(*mirrored, towards_high=False) == 0.25


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
    assert search.next_axis(varied) == axis_next


def test_a_run_is_hopeless_only_when_two_were_better_in_both_beyond_the_intervals():
    def result(value, half=0.02):
        return {"acc": value, "low": value - half, "high": value + half}

    worse = (result(0.8), result(0.6))
    better = (result(0.5), result(0.9))
    mixed = (result(0.5), result(0.6))
    near = (result(0.78), result(0.63))
    assert search.is_clearly_worse(worse, [better, better])
    assert not search.is_clearly_worse(worse, [better, mixed])
    assert not search.is_clearly_worse(worse, [better, near])
    assert not search.is_clearly_worse(worse, [])


@pytest.mark.parametrize(
    ("regimes", "words"),
    [
        (["neither", "neither"], "raise lr"),
        (["both"], "lower lr, raise retain_coef"),
        (["neither", "partial"], "a little less lr with more remove_coef"),
        (["neither", "both"], "between neither and both"),
        (["selective", "both"], "attack"),
        (["inverted"], "retain"),
        ([], "nothing was measured"),
    ],
)
def test_advice_follows_the_rules_of_thumb(regimes, words):
    assert words in search.advice(regimes)
