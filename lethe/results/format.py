"""How numbers, settings and texts of unknown origin are written in tables and messages.

Accuracies are in per cent, probabilities and losses have four decimals, and `-` stands for what is not there.
"""

from __future__ import annotations

import math
from typing import Any

from lethe.errors import printable

MISSING = "-"
DEGENERATE = "†"
DEGENERATE_NOTE = (
    f"{DEGENERATE} degenerate: the model chose the same answer position nearly always, so the number says nothing."
)
LONGEST = 2000
"""Characters of a text of unknown origin that are shown."""


def shown(text: str, most: int | None = LONGEST) -> str:
    """Text of unknown origin on one line, without control characters or lone surrogates, of `most` characters."""
    return printable(" ".join(text.split()), most)


def percent(share: float | None, decimals: int = 2) -> str:
    """A share as a percentage: `41.25 %`."""
    if share is None:
        return MISSING
    return f"{100 * share:.{decimals}f} %" if math.isfinite(share) else "nan"


def decimal(value: float | None) -> str:
    """A loss or a probability with four decimals."""
    if value is None or abs(value) >= 1e12:
        return compact(value)
    return f"{round(value, 4) + 0.0:.4f}"  # + 0.0 turns −0 into 0


def compact(value: float | None) -> str:
    """A number of any size in four significant digits."""
    return MISSING if value is None else f"{value:.4g}"


def result(evaluated: dict[str, Any] | None) -> str:
    """A task's result: accuracy in per cent, mean probability with four decimals; degenerate ones marked."""
    if evaluated is None:
        return MISSING
    text = "~" if evaluated.get("approximate") else ""
    text += percent(evaluated["acc"]) if "acc" in evaluated else decimal(evaluated["correct_prob"])
    return text + (DEGENERATE if evaluated.get("degenerate") else "")


def interval(evaluated: dict[str, Any]) -> str:
    """A task's 95 % interval, in the unit of its result."""
    if "acc" in evaluated:
        return f"{100 * evaluated['low']:.2f} to {percent(evaluated['high'])}"
    return f"{evaluated['low']:.4f} to {evaluated['high']:.4f}"


def setting(value: Any) -> str:
    """A setting's value as it would be written in a recipe, on one line."""
    if isinstance(value, list):
        return ", ".join(setting(item) for item in value) or "[]"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short(digest: str | None) -> str:
    """The beginning of a hash, with what kind of hash it is."""
    if not digest:
        return MISSING
    *kind, hexadecimal = digest.split(":")
    return ":".join([*kind, hexadecimal[:12]])


def seconds(duration: float) -> str:
    """A duration in two units at most: `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if not math.isfinite(duration):
        return MISSING
    whole = round(duration)
    for size, unit, rest_size, rest_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // rest_size} {rest_unit}"
    return f"{duration:.1f} s" if duration < 10 else f"{whole} s"
