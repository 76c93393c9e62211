"""Retained share, selectivity and regimes, against their formulas."""

from __future__ import annotations

import pytest
from studies import FORGET, RETAIN, accuracy

from lethe.results import regimes
from lethe.results.regimes import Estimate

BEFORE = {"forget": accuracy(FORGET, 0.85), "retain": accuracy(RETAIN, 0.75)}


@pytest.mark.parametrize(
    ("forget", "retain", "half", "expected"),
    [
        (0.84, 0.74, 0.02, "neither"),  # retained shares 0.98 and 0.98
        (0.26, 0.25, 0.02, "both"),  # 0.02 and 0
        (0.26, 0.74, 0.02, "selective"),  # 0.02 and 0.98
        (0.84, 0.30, 0.02, "inverted"),  # 0.98 and 0.1
        (0.70, 0.40, 0.02, "inverted"),  # 0.75 and 0.3
        (0.55, 0.70, 0.02, "partial"),  # 0.5 and 0.9
        (0.26, 0.65, 0.02, "partial"),  # retain 0.8, its interval ends at 0.84
        (0.26, 0.65, 0.06, "selective"),  # retain 0.8, its interval ends at 0.92
        (0.20, 0.74, 0.02, "selective"),  # below chance is ignorant too
        (0.55, 0.65, 0.36, "partial"),  # intervals hold both thresholds: undecided
        (0.55, 0.49, 0.02, "partial"),  # 0.5 and 0.48: the difference is within the noise
    ],
)
def test_regimes(forget: float, retain: float, half: float, expected: str) -> None:
    share_forget = regimes.retained_share(accuracy(FORGET, forget, half), BEFORE["forget"])
    share_retain = regimes.retained_share(accuracy(RETAIN, retain, half), BEFORE["retain"])
    assert share_forget is not None and share_retain is not None
    assert share_forget.value == pytest.approx((forget - 0.25) / 0.6)
    assert regimes.regime(share_forget, share_retain) == expected
    assert regimes.is_decided(share_forget) == (half != 0.36)


def test_selectivity_and_its_interval() -> None:
    found = regimes.selectivity(Estimate(0.1, 0.06, 0.13), Estimate(0.9, 0.86, 0.93))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8 - 0.05, 0.8 + 0.05))


def test_thresholds_are_settings_and_a_baseline_at_chance_has_no_retained_share() -> None:
    forget, retain = Estimate(0.3, 0.28, 0.32), Estimate(0.7, 0.68, 0.72)
    assert regimes.regime(forget, retain) == "partial"
    assert regimes.regime(forget, retain, retained_threshold=0.7, chance_threshold=0.3) == "selective"
    assert regimes.retained_share(accuracy(FORGET, 0.5), accuracy(FORGET, 0.26)) is None


def test_the_forget_and_the_retain_task_are_found_by_name() -> None:
    assert regimes.forget_task(["lab_forget", "lab_forget_robust", "wmdp_bio"]) == "lab_forget_robust"
    assert regimes.forget_task(["wmdp_bio", "wmdp_bio_robust"]) == "wmdp_bio_robust"
    assert (regimes.retain_task(["lab_retain", "mmlu"]), regimes.retain_task(["mmlu_stem"])) == ("mmlu", None)
