"""What a setting may be: types, ranges, and Slurm's time formats. Each error is one line that names the setting."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

from lethe.errors import UNSEEN, LetheError, printable
from lethe.files import refuse_name

Rule = Callable[[str, Any], None]
"""Refuses a value of the setting of that name. A field's type carries it: `r: Annotated[int, at_least(1)]`."""
Dtype = Literal["float32", "bfloat16", "float64"]
"""Types of weights."""
LARGEST, LARGEST_WHOLE = 3.4e38, 10**15
"""The largest number that float32 holds, and a whole number beyond any count."""
LONGEST = 10_000
LONGEST_PART = 255
DEEPEST = 20
MOST = 100_000
FREE = {"goal", "title", "template", "setup", "extra", "storage", "where"}
"""Settings that may have long text, or several lines. None of them names a file, a model or a task."""
RENAMED = {
    "kept_threshold": "it is called retained_threshold now",
    "prune": "it is called stop_early now",
    "forget_loss": "write method: transfer or method: distill now; for both: method: transfer with forget_kl_coef: 1",
    "find: keeps": "write find: retained now",
    "packing: blocks": "write packing: packed now",
}
"""What to write instead of settings and values of version 0.1.0."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class Settings:
    """Settings. The types of fields and their rules are checked when the object is made, in Python as in a recipe."""

    def __post_init__(self) -> None:
        own: Any = type(self)
        rules = _rules_of(own)
        for name, kind in types_of(own).items():
            value = getattr(self, name)
            refuse_unusable(name, value)
            if not fits(value, kind):
                given = printable(value if isinstance(value, str) and value else repr(value), 80)
                new = RENAMED.get(f"{name}: {value}")
                raise LetheError(f"{name}: expected {spoken(kind)}, got {given}" + (f"; {new}" if new else ""))
            for rule in () if value is None else rules[name]:
                rule(name, value)

    def changed(self) -> list[str]:
        """The names of the settings that do not have their default value."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return [field.name for field in fields if getattr(self, field.name) != default_of(field)]

    def refuse_idle(self, *names: str, when: bool, why: str) -> None:
        """Refuse these settings `when` nothing would read them, if they do not have their default value.

        Raises:
            LetheError: names the setting and the reason.
        """
        for name in names:
            if when and name in self.changed():
                value = getattr(self, name)
                given = "" if dataclasses.is_dataclass(value) else f"{value} "
                raise LetheError(f"{name}: {given}has no effect {why}; leave it out")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a field; `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of each setting of a dataclass, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _rules_of(kind: type) -> dict[str, set[Rule]]:
    """The rules that each setting's type is annotated with. A class that declares a setting again inherits its rules."""
    found: dict[str, set[Rule]] = {}
    for each in kind.__mro__:
        for name, hint in typing.get_type_hints(each, include_extras=True).items():
            rules = (rule for option in options(hint) for rule in getattr(option, "__metadata__", ()))
            found.setdefault(name, set()).update(rules)
    return found


def refuse_unusable(name: str, value: Any) -> None:
    """Refuse values that no setting can have, at any depth: control characters, names too long for a file, huge numbers.

    This check comes first, because a library that meets such a value ends in an error of its own, or hangs.
    """
    left, seen = [(name, value, 0)], 0
    while left:
        name, value, depth = left.pop()
        seen += 1
        if depth > DEEPEST:
            raise LetheError(f"{name}: nested too deeply; a setting has {DEEPEST} levels at most")
        if seen > MOST:
            raise LetheError(f"{name}: more than {MOST} values; a setting has fewer")
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise LetheError(f"{name}: {printable(repr(odd[0]), 80)} is not a name; write it in quotes")
            for key in value:
                refuse_text(f"{name}: the name '{key}'", key, free=False)
            left += [(f"{name}.{key}" if name else key, inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            for text in value.split(",") if name.endswith("tasks") else [value]:  # tasks may be named in one text
                refuse_text(name, text, free=bool(FREE & set(name.split("."))))
        elif isinstance(value, int | float):
            most = LARGEST_WHOLE if isinstance(value, int) else LARGEST
            if not abs(value) <= most:
                given = printable(value, 40) if isinstance(value, float) or value.bit_length() < 1000 else "one of many digits"
                raise LetheError(f"{name}: expected a number between {-most:g} and {most:g}, got {given}")


def refuse_text(name: str, text: str, free: bool) -> None:
    """Refuse text that no setting can have. `free`: the text may have several lines, and is not a name."""
    unseen = UNSEEN.search(text.translate({9: None, 10: None, 13: None}) if free else text)
    if unseen:
        raise LetheError(f"{name}: holds the control character {unseen[0]!a}; leave it out")
    if len(text) > LONGEST:
        raise LetheError(f"{name}: has {len(text)} characters; a setting has {LONGEST} at most")
    longest = max((len(part.encode()) for part in text.split("/")), default=0)
    if longest > LONGEST_PART and not free:
        raise LetheError(f"{name}: a part of it has {longest} bytes; a file system allows {LONGEST_PART} for one name")


def must_be(what: str, fits: Callable[[Any], bool]) -> Rule:
    """The rule that a value fits; `what` says in words what it must be."""

    def refuse(name: str, value: Any) -> None:
        if not fits(value):
            raise LetheError(f"{name}: must be {what}, got {value}")

    return refuse


def at_least(least: float) -> Rule:
    return must_be(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Rule:
    return must_be(f"above {bound}", lambda value: value > bound)


def _refuse_layers(name: str, layers: list[int]) -> None:
    if not layers:
        raise LetheError(f"{name}: name at least one layer, such as [0, 1, 2]")
    if min(layers) < 0:
        raise LetheError(f"{name}: {min(layers)} is negative; layer L is the residual stream after block L, from 0")
    if len(set(layers)) < len(layers):
        raise LetheError(f"{name}: {layers} names a layer twice; name each once")


Count = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
Length = Annotated[int, at_least(2)]
Amount = Annotated[float, at_least(0)]
Fraction = Annotated[float, must_be("at least 0 and below 1", lambda value: 0 <= value < 1)]
Seed = Annotated[int, at_least(0), must_be("below 2**32, the limit of NumPy's seeds", lambda seed: seed < 2**32)]
Layers = Annotated[list[int], _refuse_layers]
RunName = Annotated[str, lambda _, name: refuse_name(name)]
NameTemplate = Annotated[str, lambda _, name: name and refuse_name(name)]
Memory = Annotated[str, lambda _, text: memory_bytes(text)]
Duration = Annotated[str | int, lambda _, time: minutes(time)]
"""Types of settings with their rules, named after what the setting is."""


def minutes(time: str | int) -> int:
    """A Slurm time in whole minutes, rounded up: 90, "90", "90:00", "1:30:00", "1-12", "1-12:00", "1-12:00:00".

    Raises:
        LetheError: it has none of these forms, or is 0.
    """
    if isinstance(time, int) and time > 1440:  # YAML reads 12:00:00 without quotes as the number 43200
        raise LetheError(f'time: {time} minutes are more than a day; write it in quotes, such as "12:00:00" or "2-00:00:00"')
    parts = _TIME.fullmatch(str(time).strip())
    if parts:
        days, first, second, third = (int(part) if part else 0 for part in parts.groups())
        with_hours = parts[1] or parts[4]
        seconds = 86400 * days + 3600 * first + 60 * second + third if with_hours else 60 * first + second
        if seconds:
            return -(-seconds // 60)
    raise LetheError(f'time: expected minutes, or a time such as "12:00:00" or "2-00:00:00", got {time!r}')


def memory_bytes(text: str) -> int:
    """A size in bytes: 80GiB and 80G (1024³ bytes each), 80GB (1000³ bytes); also with M and T.

    Raises:
        LetheError: it has none of these forms, or is 0.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?B)?", text.strip(), re.IGNORECASE)
    if not parts or not float(parts[1]):
        raise LetheError(f"memory: expected a size such as 80GiB, got '{printable(text, 40)}'")
    base = 1000 if (parts[3] or "").lower() == "b" else 1024
    return round(float(parts[1]) * base ** {"m": 2, "g": 3, "t": 4}[parts[2].lower()])


def options(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)


def fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if len(options(kind)) > 1:
        return any(fits(value, option) for option in options(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        return isinstance(value, dict) and all(isinstance(key, str) and fits(item, inner) for key, item in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if kind is None else kind)


def spoken(kind: Any) -> str:
    """A type in words, for messages and help."""
    if len(options(kind)) > 1:
        return " or ".join(spoken(option) for option in options(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list ({spoken(typing.get_args(kind)[0])} each)"
    if typing.get_origin(kind) is dict:
        return f"name: value pairs ({spoken(typing.get_args(kind)[1])} each)"
    if dataclasses.is_dataclass(kind):
        return "settings " + ", ".join(f.name for f in dataclasses.fields(kind))
    names = {Any: "any value", int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
