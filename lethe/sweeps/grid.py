"""Sweeps of kind `grid`: every combination of the listed values."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

from lethe.errors import LetheError
from lethe.sweeps import axes
from lethe.sweeps.axes import Point
from lethe.sweeps.planner import MOST_RUNS, Planner

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep


class Grid(Planner):
    """Every combination."""

    @cached_property
    def points(self) -> list[Point]:
        """The combinations.

        Raises:
            LetheError: there are too many.
        """
        count = len(self.config.seed_list) * math.prod(len(axis.values) or axis.steps or 1 for axis in self.axes)
        if count > MOST_RUNS:
            raise LetheError(f"vary: {count} runs, at most {MOST_RUNS} are allowed; give fewer values or steps, or kind pareto")
        return axes.points(self.axes, self.recipe)

    @property
    def expected(self) -> int:
        return len(self.points) * len(self.config.seed_list)

    def samples(self) -> list[Point]:
        return self.points

    def begin(self, sweep: Sweep) -> None:
        sweep.add((self.plan(point, [seed]) for point in self.points for seed in self.config.seed_list), sweep.study)
