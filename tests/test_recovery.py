"""Measures of recovery, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from lethe.results.recovery import AttackCurves, Point, excess, measure, over_seeds, worst_case


def curve(values, steps=None, tokens_a_step=10, half=0.05) -> list[Point]:
    steps = steps or range(0, 10 * len(values), 10)
    return [Point(step, tokens_a_step * step, v, v - half, v + half) for step, v in zip(steps, values, strict=True)]


def test_a_straight_climb_has_the_measures_of_its_line():
    found = measure(curve([0.25 + 0.05 * i for i in range(11)]), baseline=0.75)
    assert (found.recovered, found.area) == pytest.approx((1, 0.5))
    assert (found.half.step, found.half.tokens, found.nine_tenths.step) == (50, 500, 90)
    assert found.full.step == 90  # the interval reaches 0.05 up


def test_curves_that_fall_overshoot_or_have_no_gap():
    found = measure(curve([0.25, 0.3, 0.35]), baseline=0.9)
    assert found.half is found.full is None and found.last.step == 20
    assert found.recovered == pytest.approx(0.1 / 0.65)
    assert measure(curve([0.5, 0.4]), baseline=0.9).recovered == pytest.approx(-0.25)
    assert measure(curve([0.5, 0.98]), baseline=0.9).recovered == pytest.approx(1.2)
    no_gap = measure(curve([0.9, 0.5]), baseline=0.9)
    assert no_gap.recovered is no_gap.half is no_gap.area is None and no_gap.full.step == 0


def test_area_weighs_steps_not_evaluations():
    found = measure(curve([0.2, 0.6, 0.6], steps=[0, 10, 110]), baseline=1.0)
    assert found.area == pytest.approx((10 * 0.25 + 100 * 0.5) / 110)


def test_excess_is_taken_at_equal_tokens():
    attack = curve([0.3, 0.5, 0.7], tokens_a_step=10)
    control = curve([0.2, 0.3, 0.4, 0.5, 0.6], tokens_a_step=5)  # the same tokens in twice the steps
    found = excess(attack, control)
    assert found.tokens == 200
    assert found.final == pytest.approx(0.7 - 0.6)
    assert found.area == pytest.approx(0.1)
    half = math.hypot(0.05, 0.05)
    assert (found.low, found.high) == pytest.approx((0.1 - half, 0.1 + half))


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, method 10, 56 of 70 less 48 of 80: 0.2, 0.0524 to 0.3339."""
    attack = [Point(0, 0, 0.2, 0.1, 0.3), Point(1, 9, 56 / 70, *binomtest(56, 70).proportion_ci(method="wilson"))]
    control = [Point(0, 0, 0.2, 0.1, 0.3), Point(1, 9, 48 / 80, *binomtest(48, 80).proportion_ci(method="wilson"))]
    found = excess(attack, control)
    assert (found.final, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_excess_between_evaluations_is_linear_and_needs_tokens():
    found = excess(curve([0.2, 0.6], steps=[0, 100]), curve([0.2, 0.3], steps=[0, 50]))
    assert found.tokens == 500 and found.final == pytest.approx(0.4 - 0.3)
    assert excess(curve([0.2]), curve([0.2, 0.3])) is None


def test_seeds_add_a_t_interval_to_that_of_the_questions():
    """Values 0.5, 0.6, 0.7: s = 0.1, t(0.975, 2) = 4.302653 (any table of Student's distribution)."""
    curves = [curve([0.2, value], half=0.05) for value in (0.5, 0.6, 0.7)]
    start, last = over_seeds(curves)
    assert (start.value, start.low, start.high) == pytest.approx((0.2, 0.15, 0.25))  # no spread: the questions alone
    seeds = 4.302653 * 0.1 / math.sqrt(3)
    assert last.value == pytest.approx(0.6)
    assert last.high - last.value == pytest.approx(math.hypot(0.05, seeds), rel=1e-5)
    assert last.low == pytest.approx(0.6 - math.hypot(0.05, seeds), rel=1e-5)
    assert over_seeds(curves[:1]) == curves[0]
    merged = over_seeds([curve([0.2, 0.9, 0.9]), curve([0.2, 0.1])])
    assert [point.step for point in merged] == [0, 10] and (merged[1].low, merged[1].high) == (0.0, 1.0)


def test_few_seeds_do_not_make_full_recovery_sooner():
    """Two seeds that differ have an interval from 0 to 1; what the questions leave open is 0.05."""
    merged = over_seeds([curve([0.2, 0.55, 0.9]), curve([0.2, 0.65, 0.9])])
    assert merged[1].low == 0.0 and merged[1].high == 1.0
    found = measure(merged, baseline=0.93)
    assert (found.full.step, found.half.step) == (20, 10)


def by_strength(values, strengths) -> list[Point]:
    return [Point(i, 0, v, v - 0.05, v + 0.05, strength) for i, (v, strength) in enumerate(zip(values, strengths, strict=True))]


def test_attacks_without_training_are_compared_by_strength_and_say_so():
    attack, control = by_strength([0.3, 0.5, 0.8], [0, 0.1, 0.4]), by_strength([0.25, 0.3, 0.9, 0.4], [0, 0.1, 0.2, 0.4])
    found = excess(attack, control)
    assert found.final == pytest.approx(0.4) and found.area == pytest.approx((0.2 + 0.4) / 2)
    measures = measure(attack, 0.9)
    assert (measures.half.place, measures.nine_tenths, measures.last.place) == ("strength 0.4", None, "strength 0.4")
    assert excess(attack, by_strength([0.2, 0.2], [0, 0.3])) is None


def general(*values: float) -> list[Point]:
    return curve(list(values))


def test_the_worst_case_is_the_highest_point_within_the_bound():
    attacks = [
        AttackCurves("mild", curve([0.3, 0.5, 0.6]), general(0.8, 0.8, 0.79)),
        AttackCurves("hard", curve([0.3, 0.65, 0.95]), general(0.8, 0.75, 0.6), control=curve([0.2, 0.4, 0.9])),
        AttackCurves("ruin", curve([0.3, 0.99, 0.99]), general(0.8, 0.3, 0.3)),
    ]
    found = worst_case(attacks, bound=0.05, baseline=0.9)
    assert (found.attack, found.point.value, found.point.step) == ("hard", 0.65, 10)  # 0.05 lost is at most 0.05
    assert found.general_lost == pytest.approx(0.05)
    assert found.recovered == pytest.approx(0.35 / 0.6)
    assert found.above.final == pytest.approx(0.65 - 0.4)
    assert worst_case(attacks, bound=0.2).above.final == pytest.approx(0.95 - 0.9)
    short = [replace(attacks[1], control=attacks[1].control[:2])]  # the control was not measured as far as the worst point
    assert worst_case(short, bound=0.2).above is None and worst_case(short, bound=0.05).above is not None
    assert found.never_within == ["ruin"] and found.not_measured == {} and len(found.counted) == 3
    assert worst_case(attacks, bound=0.2).point.value == 0.95
    assert worst_case(attacks, bound=0.04).attack == "mild"
    assert worst_case(attacks, bound=1).attack == "ruin"
    assert worst_case(attacks[2:], bound=0.05).attack is None and worst_case(attacks[2:]).point.value == 0.3


def test_what_is_not_measured_is_listed_and_never_counts_as_robust():
    attacks = [
        AttackCurves("done", curve([0.3, 0.4]), general(0.8, 0.8)),
        AttackCurves("broke", curve([0.3, 0.7]), general(0.8, 0.8), "diverged: at step 12"),
        AttackCurves("absent", [], [], "not run on this model"),
        AttackCurves("started", curve([0.3]), general(0.8), "running"),
        AttackCurves("blind", curve([0.3, 0.99]), []),
    ]
    found = worst_case(attacks)
    assert (found.attack, found.point.value) == ("broke", 0.7)  # what it had reached by then, it had reached
    assert found.counted == ["done"]
    assert found.not_measured == {
        "broke": "diverged: at step 12", "absent": "not run on this model", "started": "running",
        "blind": "no general accuracy",
    }  # fmt: skip
    assert worst_case(attacks[2:3]) is None
