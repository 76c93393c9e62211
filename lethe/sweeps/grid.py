"""Sweeps of kind `grid`: every combination of the listed values."""

from __future__ import annotations

import math
from functools import cached_property

from lethe.errors import LetheError
from lethe.sweeps import axes
from lethe.sweeps.axes import Point
from lethe.sweeps.planner import MOST_RUNS, Planner
from lethe.sweeps.trials import Plan


class Grid(Planner):
    """Every combination."""

    def samples(self) -> list[Point]:
        """The combinations.

        Raises:
            LetheError: there are too many.
        """
        count = len(self.config.seed_list) * math.prod(len(axis.values) or axis.steps or 1 for axis in self.axes)
        if count > MOST_RUNS:
            raise LetheError(f"vary: {count} runs, at most {MOST_RUNS} are allowed; give fewer values or steps, or kind pareto")
        return axes.points(self.axes, self.recipe)

    @cached_property
    def plans(self) -> list[Plan]:
        return [self.plan(point, [seed]) for point in self.samples() for seed in self.config.seed_list]
