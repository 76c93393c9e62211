"""What a sweep varies: axes over the fields of a recipe, their values, and the settings that a point on them stands for.

    vary:
      retain_coef: [1, 5, 20]                                   # a list
      remove_coef: {low: 1, high: 100, log: true, steps: 5}     # a range; `steps` values for a grid
      lora.r: {values: [4, 16], when: {optimizer: adamw}}       # only where another axis, or the recipe, has that value
      remove_coef / retain_coef: {low: 0.1, high: 10, log: true}    # a ratio; the field below keeps the recipe's value
      tamper.lr: [1e-4, 1e-3]                                   # a field of the attack that follows

A point is a dict from axis to value. Nothing here imports torch or Optuna.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lethe.config import MAPPED, LoraSettings, TamperConfig
from lethe.config.checks import options
from lethe.config.parse import fields_of, numbers
from lethe.errors import LetheError, nearest, printable
from lethe.methods.method import Method, all_fields

Point = dict[str, Any]
KEYS = {"values", "low", "high", "log", "steps", "when"}
ATTACK = "tamper."
MOST_STEPS = 1000
RATIO = " / "
NOT_SETTINGS = {"name", "out", "report_to", "time_limit", "save_every", "teacher_cache"}
"""Fields of a recipe that do not change what is measured."""
AS_BEFORE = [("cb_scale", "raw"), ("affine_examples", MAPPED), ("method", "transfer"), ("forget_kl_coef", 0.0)]
"""Fields at the values that earlier versions had, whose records lack them: a sweep of theirs is resumed, not done again."""


@dataclass(frozen=True)
class Axis:
    """One axis: either `values`, or a range from `low` to `high`."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    steps: int = 0
    whole: bool = False
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @classmethod
    def parse(cls, name: str, given: Any, attacked: bool) -> Axis:
        """The axis that a recipe describes.

        Raises:
            LetheError: the field is unknown, or its values make no axis.
        """
        name = RATIO.join(part.strip() for part in name.split("/"))
        if name.count(RATIO) > 1:
            raise LetheError(f"vary: {name} divides twice; a ratio is one field by another")
        for field in name.split(RATIO):
            _refuse_unknown(field, attacked)
        given = numbers(given)
        if isinstance(given, list):
            given = {"values": given}
        if not isinstance(given, dict) or set(given) - KEYS:
            wrong = nearest(next(iter(set(given) - KEYS)), KEYS) if isinstance(given, dict) else ""
            raise LetheError(
                f"vary: {name} must be a list, or low and high (with log, steps, when), got {printable(repr(given), 80)}{wrong}"
            )
        when = given.get("when", {})
        if not isinstance(when, dict):
            raise LetheError(
                f"vary: {name}: when must name fields and values, such as {{optimizer: adamw}}, got {printable(repr(when), 80)}"
            )
        for field in when:
            _refuse_unknown(field, attacked)
        conditions = tuple((field, tuple(v) if isinstance(v, list) else (v,)) for field, v in when.items())
        if "values" in given:
            values = given["values"]
            if set(given) & {"low", "high", "log", "steps"} or not isinstance(values, list) or not values:
                raise LetheError(
                    f"vary: {name} takes either a list of values, or low and high, got {printable(repr(given), 80)}"
                )
            if len({json.dumps(_alike(v), sort_keys=True) for v in values}) < len(values):
                raise LetheError(f"vary: {name} has a value twice in {printable(values, 80)}; name each once")
            return cls(name, tuple(values), when=conditions)
        return cls._range(name, given, conditions)

    @classmethod
    def _range(cls, name: str, given: dict[str, Any], when: tuple[tuple[str, tuple[Any, ...]], ...]) -> Axis:
        low: Any = given.get("low")
        high: Any = given.get("high")
        fits = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (low, high))
        log, steps = given.get("log", False), given.get("steps", 0)
        if not fits or not isinstance(log, bool) or not isinstance(steps, int):
            raise LetheError(f"vary: {name} takes low and high as numbers, log as true or false, steps as a whole number")
        if steps > MOST_STEPS:
            raise LetheError(f"vary: {name} has {steps} steps, {MOST_STEPS} at most are taken; lower steps")
        if not low < high or (log and low <= 0):
            raise LetheError(f"vary: {name} must rise from low to high{' and start above 0' * log}, got {low} to {high}")
        if steps and steps < 2:
            raise LetheError(f"vary: {name}: steps are the values from low to high, at least 2, got {steps}")
        kind = (fields_of(TamperConfig) if name.startswith(ATTACK) else all_fields()).get(name.removeprefix(ATTACK))
        return cls(name, (), float(low), float(high), log, steps, int in options(kind), when)

    def grid(self) -> list[Any]:
        """The values of a grid.

        Raises:
            LetheError: a range without `steps`.
        """
        if self.values:
            return list(self.values)
        if not self.steps:
            raise LetheError(f"vary: {self.name} is a range; say how many values a grid takes from it: steps")
        shares = [i / (self.steps - 1) for i in range(self.steps)]
        return list(dict.fromkeys(self.at(share) for share in shares))

    def at(self, share: float) -> float:
        """The value at a share of the way from low (0) to high (1), on the axis's own scale."""
        if self.log:
            value = math.exp((1 - share) * math.log(self.low) + share * math.log(self.high))
        else:
            value = (1 - share) * self.low + share * self.high
        if share in {0, 1}:  # the ends themselves, not their rounding
            value = self.high if share else self.low
        return round(value) if self.whole else float(f"{value:.6g}")

    def choice(self, share: float) -> Any:
        """The value at a share of the way (0 to below 1) through the values that there are to choose from."""
        values = self.values or (self.grid() if self.steps else ())
        return values[int(share * len(values))] if values else self.at(share)

    def applies(self, point: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
        """Whether the conditions hold at a point."""
        return all((point[f] if f in point else value_at(recipe, f)) in wanted for f, wanted in self.when)


def parse(vary: Mapping[str, Any], attacked: bool = False) -> list[Axis]:
    """The axes of a sweep, those without conditions first.

    Raises:
        LetheError: an axis is unknown or makes no sense.
    """
    axes = [Axis.parse(name, given, attacked) for name, given in vary.items()]
    fields = [field for axis in axes for field in axis.name.split(RATIO)[:1]]
    if len(set(fields)) < len(fields):
        raise LetheError(f"vary: {', '.join(fields)} sets a field twice; vary each once")
    return sorted(axes, key=lambda axis: bool(axis.when))


def points(axes: list[Axis], recipe: Mapping[str, Any]) -> Iterator[Point]:
    """Every combination of a grid; an axis whose conditions do not hold is left out of a point, which then comes once."""
    seen = set()
    for values in itertools.product(*(axis.grid() for axis in axes)):
        point: Point = {}
        for axis, value in zip(axes, values, strict=True):
            if axis.applies(point, recipe):
                point[axis.name] = value
        key = json.dumps(point, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield point


def settings_at(recipe: Mapping[str, Any], point: Point, attack: bool = False) -> dict[str, Any]:
    """The settings of the unlearning run at a point (or of the attack): the recipe's with the point's values in them."""
    made = copy.deepcopy(dict(recipe))
    for name, value in point.items():
        if name.startswith(ATTACK) == attack:
            field, _, below = name.removeprefix(ATTACK).partition(RATIO)
            ratio_to = value_at(point, below) if below in point else value_at(made, below) if below else 1
            _put(made, field, _times(name, value, ratio_to) if below else copy.deepcopy(value))
    return made


def _times(name: str, value: Any, unit: Any) -> float:
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in (value, unit)):
        raise LetheError(f"vary: {name} is a ratio, which only numbers have; got {value} of {unit}")
    return value * unit


def value_at(settings: Mapping[str, Any], name: str) -> Any:
    """A field's value by its dotted name; None where a part of the way is null or absent."""
    found: Any = settings
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _put(settings: dict[str, Any], name: str, value: Any) -> None:
    *way, last = name.split(".")
    for part in way:
        if isinstance(settings.get(part), str | list):  # a text by its name alone, or a mixture
            raise LetheError(f"vary: {name} has no place, since {part} is {settings[part]}; vary {part} itself")
        if settings.get(part) is None:  # lora.r on a recipe that is full-rank: adapters with their defaults
            settings[part] = vars(LoraSettings()).copy() if part == "lora" else {}
        settings = settings[part]
    settings[last] = value


def name_at(template: str, settings: Mapping[str, Any], point: Point, seed: int | None) -> str:
    """A run's name: `ret{retain_coef}_rm{remove_coef}` with the run's own values; without a template, its place on the axes.

    Raises:
        LetheError: the template names an unknown field.
    """
    seeded = seed is None or "{seed}" in template
    if not template:
        parts = [f"{re.split('[./ ]', name)[-1] if RATIO not in name else 'ratio'}{_spoken(v)}" for name, v in point.items()]
        template = "_".join(parts) or "run"
    else:
        fields = all_fields()
        try:
            fields_in = list(string.Formatter().parse(template))
        except ValueError as error:
            raise LetheError(f"name: a brace in '{template}' is not closed, or not opened ({error})") from error
        if any(spec or conversion or name == "" for _, name, spec, conversion in fields_in):
            raise LetheError(
                f"name: '{template}' formats a field, or names none; write the field alone, such as {{retain_coef}}"
            )
        asked = [name for _, name, _, _ in fields_in if name]
        for name in asked:
            if name not in point and name.removeprefix(ATTACK) not in fields:
                raise LetheError(f"name: there is no field '{name}' for the template '{template}'{nearest(name, fields)}")
        for name in asked:
            value = point[name] if name in point else value_at(settings, name)
            template = template.replace(f"{{{name}}}", _spoken(value))
    return template if seeded else f"{template}_seed{seed}"


def _spoken(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}{_spoken(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_spoken, value))
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def key_of(kind: str, settings: Mapping[str, Any]) -> str:
    """What tells two runs of the same kind apart, in a few characters: their settings, less those that change no number."""
    return hashlib.sha256(json.dumps([kind, that_matter(kind, settings)], sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def that_matter(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as they stand in its record."""
    settings = Method.of_record(settings) if kind == "unlearn" else settings
    kept = {name: value for name, value in settings.items() if name not in NOT_SETTINGS and (name, value) not in AS_BEFORE}
    if kind == "unlearn":  # how often it is evaluated on the way changes nothing in how it ends
        kept["eval"] = {name: value for name, value in kept["eval"].items() if name != "every"}
    return _alike(json.loads(json.dumps(kept, default=str)))


def _alike(value: Any) -> Any:
    """Whole numbers as any others: 5 and 5.0 are one setting."""
    if isinstance(value, dict):
        return {name: _alike(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_alike(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _refuse_unknown(field: str, attacked: bool) -> None:
    if field.startswith(ATTACK) and not attacked:
        raise LetheError(f"vary: {field} is a setting of an attack, and this sweep has none; give tamper a recipe")
    known = fields_of(TamperConfig) if field.startswith(ATTACK) else all_fields()
    bare = field.removeprefix(ATTACK)
    if bare in {"seed", "out", "name"}:
        raise LetheError(f"vary: {bare} is not varied; {'seeds repeats every setting' if bare == 'seed' else 'leave it out'}")
    if bare == "eval" or bare.startswith("eval."):
        raise LetheError(f"vary: {field} changes how runs are measured, so that they could not be compared; leave it out")
    if bare not in known:
        raise LetheError(f"vary: there is no setting '{field}'{nearest(bare, known)}")
