"""Axes of sweeps: they are read as written, wrong ones are refused in one line, points become settings."""

from __future__ import annotations

import itertools
import math

import pytest

from lethe import Transfer
from lethe.config import to_dict
from lethe.errors import LetheError
from lethe.sweeps import axes
from lethe.sweeps.reuse import key_of

RECIPE = to_dict(Transfer(source="lab:global_step600"))


def test_a_grid_is_every_combination():
    found = list(axes.points(axes.parse({"retain_coef": [1, 5], "remove_coef": [2, 3, 4], "lora.r": [4, 8]}), RECIPE))
    expected = [{"retain_coef": a, "remove_coef": b, "lora.r": c} for a, b, c in itertools.product([1, 5], [2, 3, 4], [4, 8])]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lr", {"low": 1e-4, "high": 1e-1, "log": True, "steps": 4}, [1e-4, 1e-3, 1e-2, 1e-1]),
        ("max_steps", {"low": 10, "high": 1000, "log": True, "steps": 5}, [10, 32, 100, 316, 1000]),  # whole numbers
    ],
)
def test_a_log_range_has_equal_ratios_and_its_own_ends(name, given, expected):
    (axis,) = axes.parse({name: given})
    assert axis.grid() == pytest.approx(expected) and (axis.grid()[0], axis.grid()[-1]) == (expected[0], expected[-1])
    assert {type(value) for value in axis.grid()} == {type(expected[0])}


def test_a_condition_leaves_an_axis_out_and_the_point_comes_once():
    vary = {"optimizer": ["adamw", "muon"], "lora.r": {"values": [4, 16], "when": {"optimizer": "adamw"}}}
    assert list(axes.points(axes.parse(vary), RECIPE)) == [
        {"optimizer": "adamw", "lora.r": 4},
        {"optimizer": "adamw", "lora.r": 16},
        {"optimizer": "muon"},
    ]
    of_the_recipe = axes.parse({"lr": [1e-3, 1e-2], "lora.r": {"values": [4, 16], "when": {"schedule": ["constant"]}}})
    assert list(axes.points(of_the_recipe, RECIPE)) == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert len(list(axes.points(of_the_recipe, RECIPE | {"schedule": "constant"}))) == 4


def test_settings_of_a_point_change_nothing_else():
    point = {"lora.r": 4, "retain_coef": 7, "tamper.lr": 1e-4}
    made = axes.settings_at(RECIPE, point)
    assert made["lora"] == {**RECIPE["lora"], "r": 4} and made["retain_coef"] == 7
    same = {name: value for name, value in made.items() if name not in {"lora", "retain_coef"}}
    assert same == {name: value for name, value in RECIPE.items() if name not in {"lora", "retain_coef"}}
    assert axes.settings_at({"lr": 1.0, "seed": 0}, point, attack=True) == {"lr": 1e-4, "seed": 0}
    assert RECIPE["lora"]["r"] == 16
    made = axes.settings_at(RECIPE | {"lora": None}, {"lora.r": 4})  # a rank on a full-rank recipe makes adapters
    assert made["lora"]["r"] == 4 and made["lora"]["alpha"] == 16


def test_a_ratio_holds_the_field_below_it():
    made = axes.settings_at(RECIPE, {"remove_coef / retain_coef": 3.0})
    assert (made["remove_coef"], made["retain_coef"]) == (15.0, 5.0)
    (axis,) = axes.parse({"remove_coef/retain_coef": {"low": 0.1, "high": 10, "log": True}})
    assert axis.name == "remove_coef / retain_coef"
    assert math.isclose(axis.at(0.5), 1.0)


def test_names_are_templates_over_the_runs_own_fields():
    made = axes.settings_at(RECIPE, {"retain_coef": 10})
    assert axes.name_at("ret{retain_coef}_rm{remove_coef}_r{lora.r}", made, {"retain_coef": 10}, None) == "ret10_rm5_r16"
    assert axes.name_at("ret{retain_coef}", made, {"retain_coef": 10}, 2) == "ret10_seed2"
    assert axes.name_at("s{seed}", made | {"seed": 2}, {}, 2) == "s2"
    assert axes.name_at("", made, {"retain_coef": 10, "lora.r": 4}, None) == "retain_coef10_r4"


def test_runs_have_equal_keys_if_their_numbers_must_be_equal():
    other = RECIPE | {"name": "b", "out": "elsewhere", "save_every": 3, "eval": {**RECIPE["eval"], "every": 7}}
    assert key_of("unlearn", other) == key_of("unlearn", RECIPE)
    assert key_of("unlearn", RECIPE | {"retain_coef": 5}) == key_of("unlearn", RECIPE | {"retain_coef": 5.0})
    before = {name: value for name, value in RECIPE.items() if name not in {"cb_scale", "affine_examples"}}
    assert key_of("unlearn", before) == key_of("unlearn", RECIPE)  # as records of earlier versions have it
    changes = ({"lr": 1.5e-3}, {"seed": 1}, {"cb_scale": "relative"}, {"eval": {**RECIPE["eval"], "limit": 5}})
    for change in changes:
        assert key_of("unlearn", RECIPE | change) != key_of("unlearn", RECIPE)


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"retian_coef": [1]}, "retain_coef"),
        ({"seed": [0, 1]}, "give seeds instead"),
        ({"retain_coef": []}, "retain_coef"),
        ({"retain_coef": [1, 1.0, 1]}, "twice"),
        ({"retain_coef": 5}, "must be a list"),
        ({"retain_coef": {"low": 5, "high": 1}}, "must rise"),
        ({"retain_coef": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"retain_coef": {"low": 1, "high": 2, "steps": 1}}, "at least 2"),
        ({"retain_coef": {"lo": 1, "high": 2}}, "did you mean 'low'"),
        ({"retain_coef": {"values": [1], "low": 1}}, "either a list of values, or low and high"),
        ({"retain_coef": {"values": [1], "when": {"optimiser": "adamw"}}}, "optimizer"),
        ({"tamper.lr": [1e-3]}, "this sweep has no attack"),
        ({"lr": {"low": 1, "high": 2, "steps": 100_000_000}}, "at most 1000, got 100000000"),
        ({"lr / retain_coef / remove_coef": [1]}, "divides twice"),
        ({"retain_coef": [1], "retain_coef / remove_coef": [2]}, "twice"),
        ({"kept_threshold": [0.8]}, "no setting 'kept_threshold'; it is called retained_threshold now"),
    ],
)
def test_what_makes_no_axis_is_refused(vary, words):
    with pytest.raises(LetheError, match=words) as refused:
        axes.parse(vary)
    assert "\n" not in str(refused.value)


def test_a_point_that_makes_no_settings_is_refused():
    for point, words in (
        ({"lr / optimizer": 2}, "a ratio, which only numbers have"),
        ({"forget.column": "a"}, "vary forget itself"),
    ):
        with pytest.raises(LetheError, match=words):
            axes.settings_at(RECIPE, point)
    with pytest.raises(LetheError, match="steps"):
        axes.points(axes.parse({"lr": {"low": 1e-4, "high": 1e-2}}), RECIPE)
