"""The settings of `lethe check`: those of a method, and those of the devices to plan for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lethe.config.unlearning import CheckSettings
from lethe.methods.method import Method


@dataclass(kw_only=True)
class Check(CheckSettings):
    """The settings of `lethe check`. Those of the method come beside them (`variant`)."""

    trust = Method.trust

    @classmethod
    def variant(cls, given: Mapping[str, Any]) -> type[Method]:
        """The class that has the settings of a method, and those of the devices to plan for."""
        return _checked(Method.variant(given))  # type: ignore[arg-type]  # mypy takes a class for one of its objects


@functools.cache
def _checked(method: type[Method]) -> type[Method]:
    own = {"__module__": method.__module__, "__doc__": method.__doc__}
    return dataclass(kw_only=True)(type(f"Check{method.__name__}", (method, CheckSettings), own))
