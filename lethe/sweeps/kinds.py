"""The planner of each kind of sweep."""

from __future__ import annotations

from typing import Any

from lethe import config as c
from lethe.sweeps.boundary import Boundary
from lethe.sweeps.grid import Grid
from lethe.sweeps.pareto import Pareto
from lethe.sweeps.planner import Planner
from lethe.sweeps.suite import Suite


def planner_of(config: Any) -> Planner:
    """The planner of a sweep's kind, or of a suite."""
    kinds: dict[str, type[Planner]] = {"grid": Grid, "boundary": Boundary, "pareto": Pareto}
    return Suite(config) if isinstance(config, c.SuiteConfig) else kinds[config.kind](config)
