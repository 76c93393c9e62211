"""Settings and values that had another name before, so that a recipe with the old one is refused with the new one."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {"kept_threshold": "retained_threshold", "prune": "stop_early"}
"""Old name of a setting -> its new name."""

RENAMED_VALUES: dict[tuple[str, str], str] = {("find", "keeps"): "find: retained", ("packing", "blocks"): "packing: packed"}
"""(Setting, old value) -> what to write now."""


def advice(name: str, value: object = None) -> str | None:
    """What to write in place of an old setting or value, as part of a message; None for one that is not old."""
    last = name.rsplit(".", 1)[-1]
    if last == "forget_loss":
        return "write method: transfer or method: distill now; in place of both: method: transfer with forget_kl_coef: 1"
    if last in RENAMED:
        return f"it is called {RENAMED[last]} now"
    if isinstance(value, str) and (last, value) in RENAMED_VALUES:
        return f"write {RENAMED_VALUES[last, value]} now"
    return None


def current(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an old record under today's names and values. `known`: the types of today's settings by name."""
    made = {}
    for old, value in settings.items():
        name = RENAMED[old] if old not in known and RENAMED.get(old) in known else old
        is_old = isinstance(value, str) and (name, value) in RENAMED_VALUES and value not in typing.get_args(known.get(name))
        made[name] = RENAMED_VALUES[name, value].partition(": ")[2] if is_old else value
    return made
