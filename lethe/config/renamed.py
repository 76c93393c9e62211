"""Settings and values that had another name in the records of earlier versions."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {"kept_threshold": "retained_threshold", "prune": "stop_early"}
"""Old name of a setting -> its new name."""
RENAMED_VALUES: dict[tuple[str, str], str] = {("find", "keeps"): "retained", ("packing", "blocks"): "packed"}
"""(Setting, old value) -> its new value."""


def current(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an old record under today's names and values. `known`: the types of today's settings by name."""
    made = {}
    for old, value in settings.items():
        name = RENAMED[old] if old not in known and RENAMED.get(old) in known else old
        is_old = isinstance(value, str) and (name, value) in RENAMED_VALUES and value not in typing.get_args(known.get(name))
        made[name] = RENAMED_VALUES[name, value] if is_old else value
    return made
