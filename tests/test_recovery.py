"""Measures of recovery, against closed forms."""

from __future__ import annotations

import math

import pytest

from lethe.recovery import Point, excess, measure


def curve(values, steps=None, tokens_a_step=10, half=0.05) -> list[Point]:
    steps = steps or range(0, 10 * len(values), 10)
    return [
        Point(step, tokens_a_step * step, v, v - half, v + half, half / 1.96) for step, v in zip(steps, values, strict=True)
    ]


def test_a_straight_climb_has_the_measures_of_its_line():
    found = measure(curve([0.25 + 0.05 * i for i in range(11)]), baseline=0.75)
    assert (found.start, found.final, found.highest) == pytest.approx((0.25, 0.75, 0.75))
    assert found.recovered == pytest.approx(1)
    assert found.area == pytest.approx(0.5)
    assert (found.half.step, found.nine_tenths.step) == (50, 90)
    assert found.half.tokens == 500
    assert found.full.step == 90  # the interval reaches 0.05 up


def test_what_is_never_reached_says_within_how_many_steps():
    found = measure(curve([0.25, 0.3, 0.35]), baseline=0.9)
    assert str(found.half) == "not within 20" and found.half.step is None and found.full.tokens is None
    assert found.recovered == pytest.approx(0.1 / 0.65)


def test_a_start_that_is_not_below_the_baseline_has_no_gap():
    found = measure(curve([0.9, 0.5]), baseline=0.9)
    assert found.recovered is found.half is found.area is None
    assert found.full.step == 0


def test_a_fall_is_negative_and_an_overshoot_above_one():
    assert measure(curve([0.5, 0.4]), baseline=0.9).recovered == pytest.approx(-0.25)
    assert measure(curve([0.5, 0.98]), baseline=0.9).recovered == pytest.approx(1.2)


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
    error = math.hypot(0.05 / 1.96, 0.05 / 1.96)
    assert (found.low, found.high) == pytest.approx((0.1 - 1.959964 * error, 0.1 + 1.959964 * error))


def test_excess_between_evaluations_is_linear_and_needs_tokens():
    found = excess(curve([0.2, 0.6], steps=[0, 100]), curve([0.2, 0.3], steps=[0, 50]))
    assert found.tokens == 500 and found.final == pytest.approx(0.4 - 0.3)
    assert excess(curve([0.2]), curve([0.2, 0.3])) is None
