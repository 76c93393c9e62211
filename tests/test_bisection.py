"""Bisection finds what an exhaustive look along the axis finds, with few measurements."""

from __future__ import annotations

import math
import random

import pytest

from lethe.sweeps import axes, bisection


def axis(low=0.01, high=100.0, log=True, name="remove_coef"):
    (made,) = axes.parse({name: {"low": low, "high": high, "log": log}})
    return made


def bisect(verdicts_of, along, width, most=100, seeds=1):
    """Measure the next values until there are none. `verdicts_of(value)`: the seeds' verdicts for each boundary."""
    edges: list[dict] = []
    measured = 0
    while measured < most:
        edges = edges or [{} for _ in verdicts_of(along.at(0))]
        wanted = bisection.next_values(along, edges, width)
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
        found = bisection.bracket(along, verdicts, 2.0)
        assert found.status == "found" and found.before is before and found.monotone
        assert found.below < truth <= found.above and found.above / found.below <= 2.0
    assert measured <= 2 + 2 * math.ceil(math.log2(math.log(1e4) / math.log(2)))


@pytest.mark.parametrize(
    ("along", "verdicts", "width", "below", "above"),
    [
        (axis(), lambda x: [x >= 3.0], 1.5, 2.371, 3.162),  # against the strength of unlearning
        (axis(1.0, 100.0), lambda x: None if 9 < x < 11 else [x < 30], 1.5, 27.38, 33.98),  # around a value that failed
        (axis(1, 64, name="max_steps"), lambda x: [x < 23], 1.0001, 22, 23),  # whole numbers to neighbours
        (axis(0, 100, log=False, name="retain_coef"), lambda x: [x >= 0.7], 1.5, 0, 0.781),  # near 0: a hundredth of the axis
        (axis(0, 100, log=False, name="retain_coef"), lambda x: [x >= 5], 1.5, 4.688, 6.25),
    ],
)
def test_a_boundary_is_found(along, verdicts, width, below, above):
    (edge,), measured = bisect(lambda x: [verdicts(x)], along, width)
    found = bisection.bracket(along, edge, width)
    assert (found.status, found.below, found.above) == ("found", below, above) and measured <= 10


def test_an_axis_on_which_nothing_changes_is_not_bracketed_and_takes_two_measurements():
    along = axis()
    edges, measured = bisect(lambda x: [[True]], along, 1.5)
    assert measured == 2
    assert bisection.bracket(along, edges[0], 1.5) == bisection.Bracket("not bracketed", before=True)


def test_where_seeds_disagree_the_boundary_is_no_sharper():
    along = axis(0.1, 10.0)

    def verdicts(x):
        return [[x < threshold for threshold in (0.8, 1.0, 1.25)]]  # three seeds, three boundaries

    edges, measured = bisect(verdicts, along, 1.2)
    found = bisection.bracket(along, edges[0], 1.2)
    assert found.status == "found"
    assert found.below <= 0.8 and found.above >= 1.25  # never inside of the spread
    assert found.disagreeing and all(0.8 < x <= 1.25 for x in found.disagreeing)
    assert measured < 14


def test_a_verdict_that_changes_back_is_not_monotone():
    along = axis(1.0, 16.0)
    measured = {1.0: [True], 2.0: [False], 4.0: [True], 8.0: [False], 16.0: [False]}
    found = bisection.bracket(along, measured, 2.0)
    assert (found.below, found.above, found.monotone) == (1.0, 2.0, False)


def test_an_end_where_seeds_disagree_or_that_failed_has_no_verdict():
    along = axis(1.0, 100.0)
    found = bisection.bracket(along, {1.0: [True, False], 100.0: [False, False]}, 1.5)
    assert found == bisection.Bracket("undecided", disagreeing=(1.0,))
    edges, measured = bisect(lambda x: [None if x == 100 else [True]], along, 1.5)
    assert bisection.bracket(along, edges[0], 1.5).status == "not measured" and measured == 2
