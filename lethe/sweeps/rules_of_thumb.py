"""Rules of thumb for sweeps: where a plateau begins, the next axis to try, when to stop a run early, advice.

Pure functions over numbers. Nothing here imports torch or Optuna.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lethe.results import regimes

NEXT_AXES = ("max_steps", "lr", "retain_coef", "remove_coef", "lora.r")
BETTER_RUNS = 2
"""How many finished runs must be clearly better before a run is stopped early."""


def plateau(
    forget: Mapping[float, regimes.Estimate], retain: Mapping[float, regimes.Estimate], towards_high: bool
) -> float | None:
    """The value from which on, towards the stronger end, retained shares stay within their intervals; None if they do not."""
    values = sorted(set(forget) & set(retain), reverse=towards_high)
    level: float | None = None
    for value in values[1:]:
        pairs = [(shares[value], shares[values[0]]) for shares in (forget, retain)]
        if not all(one.low <= end.high and end.low <= one.high for one, end in pairs):
            break
        level = value
    return level


def next_axis(varied: str) -> str:
    """The axis to try when `varied` did not bracket the boundary: steps matter most, then the learning rate."""
    used = {part.strip() for part in varied.split("/")} | ({"max_steps"} if varied == "epochs" else set())
    return next(axis for axis in NEXT_AXES if axis not in used)


def is_clearly_worse(run: tuple[dict, dict], others: Iterable[tuple[dict, dict]]) -> bool:
    """Whether `BETTER_RUNS` others have lower forget and higher retain accuracy, each by more than the intervals.

    Each item is (forget result, retain result), at the same step of the same number of steps.
    """
    forget, retain = run
    better = [f for f, r in others if f["high"] < forget["low"] and r["low"] > retain["high"]]
    return len(better) >= BETTER_RUNS


def advice(found: Sequence[regimes.Regime]) -> str:
    """The next step that rules of thumb suggest, from the regimes of a sweep's runs."""
    if not found:
        return "no run was measured: see the reasons of the failed runs"
    kinds = set(found)
    if "selective" in kinds:
        return "attack the selective runs, to see whether the topic is gone or only hidden (lethe tamper)"
    if kinds == {"neither"}:
        return "neither fell: raise lr or remove_coef, lower retain_coef, or train for more steps (steps matter most)"
    if kinds == {"both"}:
        return "both fell to chance: lower lr, raise retain_coef, or lower remove_coef"
    if "inverted" in kinds and "partial" not in kinds:
        return "retain lost more than forget: raise retain_coef, or look at what the retain text covers"
    if kinds <= {"neither", "both"}:
        return "no run lies between neither and both: lower lr a little and raise remove_coef, or raise retain_coef"
    return "both fell partly: lower lr a little and raise remove_coef, or raise retain_coef"
