"""Where to measure next, and what the measurements say: bisection for a boundary, Pareto fronts, rules of thumb.

A boundary lies where a verdict about a run changes along one axis: *neither* ends, *both* begins, or the retain task has lost
more than is allowed. A verdict is drawn from the intervals of the evaluations (`regimes.regime`), once a seed. Where the
seeds of one setting disagree, the boundary is no sharper than its neighbours, and is not looked for between them.

Pure functions over numbers; nothing here imports torch or Optuna.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lethe.results import regimes
from lethe.sweeps.axes import Axis

Verdicts = Mapping[float, Sequence[bool] | None]
"""By value on the axis: one verdict a seed; None where the value could not be measured."""
Status = Literal["found", "open", "not bracketed", "not measured", "undecided"]
NEXT_AXES = ("max_steps", "lr", "retain_coef", "remove_coef", "lora.r")
DOMINATORS = 2


@dataclass(frozen=True)
class Bracket:
    """Where a verdict changes: between `below` and `above`, neighbouring measured values, on the axis.

    `found`: within the width asked for, or no sharper because seeds disagree in between; `open`: wider than that; `not
    bracketed`: both ends of the axis have the same verdict; `not measured`: an end has none; `undecided`: seeds disagree at an
    end. `before` is the verdict below it.
    """

    status: Status
    below: float | None = None
    above: float | None = None
    before: bool | None = None
    monotone: bool = True
    disagreeing: tuple[float, ...] = ()

    @property
    def factor(self) -> float | None:
        """above / below."""
        return None if self.below is None or self.above is None or self.below <= 0 else self.above / self.below


def bracket(axis: Axis, verdicts: Verdicts, width: float) -> Bracket:
    """Where the verdict changes, as far as the measurements tell."""
    low, high = axis.at(0), axis.at(1)
    ends = [_agreed(verdicts.get(end)) for end in (low, high)]
    if verdicts.get(low) is None or verdicts.get(high) is None:
        return Bracket("not measured")
    if ends[0] is None or ends[1] is None:
        return Bracket("undecided", disagreeing=tuple(x for x, said in zip((low, high), ends, strict=True) if said is None))
    if ends[0] == ends[1]:
        return Bracket("not bracketed", before=ends[0])
    before = ends[0]
    agreed = [(x, _agreed(seen)) for x, seen in sorted(verdicts.items()) if seen]
    first = next(i for i, (_, said) in enumerate(agreed) if said == (not before))
    last = max(i for i, (_, said) in enumerate(agreed[:first]) if said == before)
    below, above = agreed[last][0], agreed[first][0]
    monotone = all(said != before for _, said in agreed[first:])
    disagreeing = tuple(x for x, said in agreed[last + 1 : first])
    sharp = all(_sharp(axis, a, b, width) for a, b in _gaps([below, *disagreeing, above]))
    return Bracket("found" if sharp else "open", below, above, before, monotone, disagreeing)


def next_values(axis: Axis, edges: Iterable[Verdicts], width: float) -> list[float]:
    """The values to measure next: the ends first, then the middle of every bracket that is too wide.

    Empty when there is nothing left to learn, at this width, from this axis.
    """
    edges = list(edges)
    low, high = axis.at(0), axis.at(1)
    ends = [end for end in (low, high) if any(end not in verdicts for verdicts in edges)]
    if ends:
        return ends
    wanted: list[float] = []
    for verdicts in edges:
        found = bracket(axis, verdicts, width)
        if found.status == "open" and found.below is not None and found.above is not None:
            value = _between(axis, [found.below, *found.disagreeing, found.above], verdicts, width)
            wanted += [value] * (value is not None)  # type: ignore[list-item]
    return list(dict.fromkeys(wanted))


def _between(axis: Axis, known: list[float], verdicts: Verdicts, width: float) -> float | None:
    """The middle of the widest gap; off the middle where that could not be measured; None when no value is left."""
    for below, above in sorted(_gaps(known), key=lambda gap: -_ratio(axis, *gap)):
        if _sharp(axis, below, above, width):
            continue
        for share in (0.5, 0.25, 0.75):
            value = _along(axis, below, above, share)
            if value not in verdicts and below < value < above:
                return value
    return None


def _along(axis: Axis, below: float, above: float, share: float) -> float:
    value = below ** (1 - share) * above**share if axis.log else (1 - share) * below + share * above
    return round(value) if axis.whole else float(f"{value:.4g}")


def _gaps(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(values))


def _sharp(axis: Axis, below: float, above: float, width: float) -> bool:
    """Whether no value between the two need be measured; from 0, of which nothing is a multiple, a hundredth of the axis is."""
    if axis.whole and above - below <= 1:
        return True
    return _ratio(axis, below, above) <= width if below > 0 else above - below <= (axis.high - axis.low) / 100


def _ratio(axis: Axis, below: float, above: float) -> float:
    """How far apart two values are, as a factor; without a log scale, where 0 may be among them, by their place on the axis."""
    if below > 0:
        return above / below
    return 1 + 2 * (above - below) / (axis.high - axis.low)


def _agreed(verdicts: Sequence[bool] | None) -> bool | None:
    return verdicts[0] if verdicts and len(set(verdicts)) == 1 else None


def plateau(
    forget: Mapping[float, regimes.Estimate], retain: Mapping[float, regimes.Estimate], towards_high: bool
) -> float | None:
    """The value from which on, towards the stronger end, neither share kept changes beyond its interval; None if they do."""
    values = sorted(set(forget) & set(retain), reverse=towards_high)
    level: float | None = None
    for value in values[1:]:
        same = all(
            kept[value].low <= kept[values[0]].high and kept[values[0]].low <= kept[value].high for kept in (forget, retain)
        )
        if not same:
            break
        level = value
    return level


def next_axis(varied: str) -> str:
    """The axis to try when `varied` did not bracket the boundary: steps matter most, then the learning rate."""
    used = {part.strip() for part in varied.split("/")} | ({"max_steps"} if varied == "epochs" else set())
    return next(axis for axis in NEXT_AXES if axis not in used)


def front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """The points that none other is better than in every number (all to be small), by their place; of equal ones the first."""
    kept = []
    for i, p in enumerate(points):
        better = (q for j, q in enumerate(points) if j != i and all(a <= b for a, b in zip(q, p, strict=True)))
        if not any(q != p or points.index(q) < i for q in better):
            kept.append(i)
    return kept


def hypervolume(points: Iterable[tuple[float, float]], worst: tuple[float, float] = (1.0, 1.0)) -> float:
    """The area between a front of pairs (both to be small) and the worst point."""
    area, height = 0.0, worst[1]
    for x, y in sorted(p for p in points if p[0] < worst[0] and p[1] < worst[1]):
        if y < height:
            area += (worst[0] - x) * (height - y)
            height = y
    return area


def clearly_worse(at_step: tuple[dict, dict], others: Iterable[tuple[dict, dict]]) -> bool:
    """Whether at least two others were better in forget and in retain accuracy by more than the intervals.

    Each item is (forget result, retain result), at the same step of the same number of steps.
    """
    forget, retain = at_step
    better = [f for f, r in others if f["high"] < forget["low"] and r["low"] > retain["high"]]
    return len(better) >= DOMINATORS


def advice(found: Sequence[regimes.Regime]) -> str:
    """The next step that the field's rules of thumb suggest, from the regimes of a sweep's runs."""
    if not found:
        return "nothing was measured: see the runs' reasons"
    if "selective" in found:
        return "attack the selective runs: what an attacker gets back tells whether the topic is gone or hidden (lethe tamper)"
    kinds = set(found)
    if kinds == {"neither"}:
        return "neither fell: raise lr or remove_coef, lower retain_coef, or train for more steps (steps matter most)"
    if kinds == {"both"}:
        return "both fell to chance: lower lr, raise retain_coef, or lower remove_coef"
    if "inverted" in kinds and not kinds & {"partial"}:
        return "retain lost more than forget: raise retain_coef, or look at what the retain text covers"
    if kinds <= {"neither", "both"}:
        return (
            "it goes from neither to both at once: take a little less lr with more remove_coef, or more retain_coef, in between"
        )
    return "both are part-way: take a little less lr with more remove_coef, or more retain_coef"


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
