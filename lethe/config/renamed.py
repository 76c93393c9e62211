"""Settings and values that had another name before, so that a recipe with the old one is refused with the new one."""

from __future__ import annotations

RENAMED: dict[str, str] = {"kept_threshold": "retained_threshold", "forget_loss": "method"}
"""Old name of a setting -> its new name."""

RENAMED_VALUES: dict[tuple[str, str], str] = {("find", "keeps"): "find: retained", ("packing", "blocks"): "packing: packed"}
"""(Setting, old value) -> what to write now."""


def advice(name: str, value: object = None) -> str | None:
    """What to write in place of an old setting or value, as part of a message; None for one that is not old."""
    last = name.rsplit(".", 1)[-1]
    if last in RENAMED:
        return f"it is called {RENAMED[last]} now"
    if isinstance(value, str) and (last, value) in RENAMED_VALUES:
        return f"write {RENAMED_VALUES[last, value]} now"
    return None
