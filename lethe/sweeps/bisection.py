"""Bisection along an axis: where to measure next, and between which values the boundary lies.

A boundary lies where the verdict on a run changes along one axis, for instance from "neither fell" to "one fell". There is one
verdict per seed and value. `next_values` says what to measure next, `bracket` between which values the boundary lies. Where
the seeds of a value disagree, the boundary is known no better than to the nearest values on which they agree.

Pure functions over numbers. Nothing here imports torch or Optuna.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lethe.sweeps.axes import Axis

Verdicts = Mapping[float, Sequence[bool] | None]
"""By value on the axis: one verdict per seed; None where the value could not be measured."""


@dataclass(frozen=True)
class Bracket:
    """The boundary lies between `below` and `above`, neighbouring measured values.

    `status`: `found` (within the width, or as well as the seeds allow), `open` (still wider), `not bracketed` (both ends of the
    axis have the same verdict), `not measured` (an end has no verdict) or `undecided` (seeds disagree at an end). `before` is
    the verdict below the boundary.
    """

    status: Literal["found", "open", "not bracketed", "not measured", "undecided"]
    below: float | None = None
    above: float | None = None
    before: bool | None = None
    monotone: bool = True
    disagreeing: tuple[float, ...] = ()


def bracket(axis: Axis, verdicts: Verdicts, width: float) -> Bracket:
    """Where the verdict changes, as far as the measurements tell. `width`: the factor that is close enough."""
    ends = axis.at(0), axis.at(1)
    if any(verdicts.get(end) is None for end in ends):
        return Bracket("not measured")
    if undecided := tuple(end for end in ends if _agreed(verdicts[end]) is None):
        return Bracket("undecided", disagreeing=undecided)
    before, after = (_agreed(verdicts[end]) for end in ends)
    if before == after:
        return Bracket("not bracketed", before=before)
    agreed = [(value, _agreed(seen)) for value, seen in sorted(verdicts.items()) if seen]
    first = next(i for i, (_, verdict) in enumerate(agreed) if verdict == after)
    last = max(i for i, (_, verdict) in enumerate(agreed[:first]) if verdict == before)
    below, above = agreed[last][0], agreed[first][0]
    monotone = all(verdict != before for _, verdict in agreed[first:])
    disagreeing = tuple(value for value, _ in agreed[last + 1 : first])
    sharp = all(_excess(axis, a, b, width) <= 1 for a, b in itertools.pairwise([below, *disagreeing, above]))
    return Bracket("found" if sharp else "open", below, above, before, monotone, disagreeing)


def next_values(axis: Axis, edges: Iterable[Verdicts], width: float) -> list[float]:
    """The values to measure next: both ends first, then the middle of every bracket that is too wide.

    Empty when more measurements would not make any bracket narrower.
    """
    edges = list(edges)
    ends = [end for end in (axis.at(0), axis.at(1)) if any(end not in verdicts for verdicts in edges)]
    if ends:
        return ends
    wanted = []
    for verdicts in edges:
        found = bracket(axis, verdicts, width)
        if found.status == "open" and found.below is not None and found.above is not None:
            wanted.append(_between(axis, [found.below, *found.disagreeing, found.above], verdicts, width))
    return list(dict.fromkeys(value for value in wanted if value is not None))


def _between(axis: Axis, measured: list[float], verdicts: Verdicts, width: float) -> float | None:
    """The middle of the widest gap, or a quarter of it where the middle could not be measured; None if no value is left."""
    gaps = [(_excess(axis, below, above, width), below, above) for below, above in itertools.pairwise(measured)]
    for _, below, above in sorted((gap for gap in gaps if gap[0] > 1), key=lambda gap: -gap[0]):
        for share in (0.5, 0.25, 0.75):
            value = below ** (1 - share) * above**share if axis.log else (1 - share) * below + share * above
            value = round(value) if axis.whole else float(f"{value:.4g}")
            if value not in verdicts and below < value < above:
                return value
    return None


def _excess(axis: Axis, below: float, above: float, width: float) -> float:
    """How far apart two values are, where up to 1 is close enough. From 0, which has no factor, a hundredth of the axis is."""
    if axis.whole and above - below <= 1:
        return 0.0
    return math.log(above / below) / math.log(width) if below > 0 else 100 * (above - below) / (axis.high - axis.low)


def _agreed(verdicts: Sequence[bool] | None) -> bool | None:
    return verdicts[0] if verdicts and len(set(verdicts)) == 1 else None
