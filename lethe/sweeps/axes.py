"""The axes of a sweep: which settings it varies, through which values, and the settings at a point.

    vary:
      retain_coef: [1, 5, 20]                                   # a list
      remove_coef: {low: 1, high: 100, log: true, steps: 5}     # a range; a grid takes `steps` values from it
      lora.r: {values: [4, 16], when: {optimizer: adamw}}       # only where another axis, or the recipe, has that value
      remove_coef / retain_coef: {low: 0.1, high: 10, log: true}    # a ratio; retain_coef keeps the recipe's value
      tamper.lr: [1e-4, 1e-3]                                   # a setting of the attack on every result

`parse` reads `vary` into axes. A planner chooses points (dicts from axis to value). `settings_at` puts a point into the recipe,
`name_at` names the run. Nothing here imports torch or Optuna.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lethe.config import LoraSettings, TamperConfig
from lethe.config.checks import RENAMED, Settings, options
from lethe.config.parse import build, fields_of
from lethe.errors import LetheError, nearest, printable
from lethe.methods.method import all_fields

Point = dict[str, Any]
RANGE = {"low", "high", "log", "steps"}
KEYS = RANGE | {"values", "when"}
ATTACK = "tamper."
MOST_STEPS = 1000
RATIO = " / "
BRACES = re.compile(r"\{(.*?)\}")


@dataclass
class Axis(Settings):
    """One axis: listed `values`, or a range from `low` to `high`. `when` limits it to points where settings have those values.

    Raises:
        LetheError: the values make no axis.
    """

    name: str
    values: list[Any] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    steps: int = 0
    when: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole = int in options(_known(self.name).get(self.name.removeprefix(ATTACK)))
        different = {json.dumps(value, sort_keys=True) for value in json.loads(json.dumps(self.values), parse_int=float)}
        if len(different) < len(self.values):
            raise LetheError(f"has a value twice in {printable(self.values, 80)}; name each once")
        if not self.values and (not self.low < self.high or (self.log and self.low <= 0)):
            above = " and start above 0" * self.log
            raise LetheError(f"must rise from low to high{above}, got {self.low:g} to {self.high:g}")
        if self.steps and not 2 <= self.steps <= MOST_STEPS:
            raise LetheError(f"steps counts the values from low to high, at least 2 and at most {MOST_STEPS}, got {self.steps}")

    def choices(self) -> list[Any]:
        """The values of a list, or of a range with `steps`; empty for a range without."""
        if self.values or not self.steps:
            return self.values
        return list(dict.fromkeys(self.at(i / (self.steps - 1)) for i in range(self.steps)))

    def grid(self) -> list[Any]:
        """The values of a grid.

        Raises:
            LetheError: a range without `steps`.
        """
        if not (found := self.choices()):
            raise LetheError(f"vary: {self.name} is a range; set steps, the number of values that a grid takes from it")
        return found

    def at(self, share: float) -> float:
        """The value at a share of the way from low (0) to high (1), on the axis's own scale."""
        if share in {0, 1}:  # exactly the ends
            value = self.high if share else self.low
        elif self.log:
            value = math.exp((1 - share) * math.log(self.low) + share * math.log(self.high))
        else:
            value = (1 - share) * self.low + share * self.high
        return round(value) if self.whole else float(f"{value:.6g}")

    def choice(self, share: float) -> Any:
        """The value at a share (from 0 to below 1) of the choices or of the range."""
        choices = self.choices()
        return choices[int(share * len(choices))] if choices else self.at(share)

    def applies(self, point: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
        """Whether its conditions hold at a point."""
        for name, wanted in self.when.items():
            value = point[name] if name in point else value_at(recipe, name)
            if value not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True


def parse(vary: Mapping[str, Any], attacked: bool = False) -> list[Axis]:
    """The axes of a sweep, those without conditions first. `attacked`: settings of an attack may be varied too.

    Raises:
        LetheError: an axis is unknown or makes no sense.
    """
    axes = [_parse(name, given, attacked) for name, given in vary.items()]
    fields = [axis.name.split(RATIO)[0] for axis in axes]
    if len(set(fields)) < len(fields):
        raise LetheError(f"vary: {', '.join(fields)} sets a setting twice; vary each once")
    return sorted(axes, key=lambda axis: bool(axis.when))


def _parse(name: str, given: Any, attacked: bool) -> Axis:
    """One entry of `vary`."""
    name = RATIO.join(part.strip() for part in name.split("/"))
    given = {"values": given} if isinstance(given, list) else given
    try:
        if name.count(RATIO) > 1:
            raise LetheError("divides twice; a ratio divides one setting by another")
        for each in name.split(RATIO):
            _refuse_unknown(each, attacked)
        if not isinstance(given, dict) or (unknown := set(map(str, given)) - KEYS):
            wrong = nearest(min(unknown), KEYS) if isinstance(given, dict) else ""
            raise LetheError(
                f"must be a list, or low and high (with log, steps, when), got {printable(repr(given), 80)}{wrong}"
            )
        listed = bool(given.get("values"))
        if listed == ({"low", "high"} <= set(given)) or (listed and set(given) & RANGE):
            raise LetheError(f"takes either a list of values, or low and high, got {printable(repr(given), 80)}")
        axis: Axis = build(Axis, given | {"name": name})
        for each in axis.when:
            _refuse_unknown(each, attacked)
    except LetheError as error:
        raise LetheError(f"vary: {name}: {error}") from error
    return axis


def point_of(axes: list[Axis], values: Iterable[Any], recipe: Mapping[str, Any]) -> Point:
    """The point with these values, one per axis, without the axes whose conditions do not hold there."""
    point: Point = {}
    for axis, value in zip(axes, values, strict=True):
        if axis.applies(point, recipe):
            point[axis.name] = value
    return point


def points(axes: list[Axis], recipe: Mapping[str, Any]) -> list[Point]:
    """Every combination of a grid, each once."""
    found = [point_of(axes, values, recipe) for values in itertools.product(*(axis.grid() for axis in axes))]
    return list({json.dumps(point, sort_keys=True): point for point in found}.values())


def settings_at(recipe: Mapping[str, Any], point: Point, attack: bool = False) -> dict[str, Any]:
    """The recipe of the unlearning run (or of the attack) with the point's values in it."""
    made = copy.deepcopy(dict(recipe))
    for name, value in point.items():
        if name.startswith(ATTACK) == attack:
            varied, _, below = name.removeprefix(ATTACK).partition(RATIO)
            unit = value_at(point, below) if below in point else value_at(made, below)
            if below and not (_is_number(value) and _is_number(unit)):
                raise LetheError(f"vary: {name} is a ratio, which only numbers have; got {value} of {unit}")
            _put(made, varied, value * unit if below else copy.deepcopy(value))
    return made


def value_at(settings: Mapping[str, Any], name: str) -> Any:
    """A setting's value by its dotted name; None where a part of the way is null or absent."""
    found: Any = settings
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _put(settings: dict[str, Any], name: str, value: Any) -> None:
    *way, last = name.split(".")
    for part in way:
        if isinstance(settings.get(part), str | list):  # a text by its name alone, or a mixture
            raise LetheError(f"vary: {name} cannot be set, since {part} is {settings[part]}; vary {part} itself")
        if settings.get(part) is None:  # lora.r on a full-rank recipe: adapters with their defaults
            settings[part] = vars(LoraSettings()).copy() if part == "lora" else {}
        settings = settings[part]
    settings[last] = value


def name_at(template: str, settings: Mapping[str, Any], point: Point, seed: int | None) -> str:
    """A run's name: the template with the run's values, such as `ret{retain_coef}`; without a template, its point.

    Raises:
        LetheError: the template names an unknown setting.
    """
    if not template:
        parts = [f"{'ratio' if RATIO in name else name.rsplit('.', 1)[-1]}{_in_name(v)}" for name, v in point.items()]
        made = "_".join(parts) or "run"
        return made if seed is None else f"{made}_seed{seed}"
    if re.search("[{}]", BRACES.sub("", template)):
        raise LetheError(f"name: '{template}' has a brace without its partner; close it")
    fields = _known("")

    def shown(brace: re.Match[str]) -> str:
        name = brace[1]
        if name not in point and name.removeprefix(ATTACK) not in fields:
            raise LetheError(f"name: there is no setting '{name}' for the template '{template}'{nearest(name, fields)}")
        return _in_name(point[name] if name in point else value_at(settings, name))

    made = BRACES.sub(shown, template)
    return made if seed is None or "{seed}" in template else f"{made}_seed{seed}"


def _in_name(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}{_in_name(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_in_name, value))
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(name: str) -> dict[str, Any]:
    """The types of all settings of an attack, if `name` is one's, else of unlearning."""
    return fields_of(TamperConfig) if name.startswith(ATTACK) else all_fields()


def _refuse_unknown(name: str, attacked: bool) -> None:
    if name.startswith(ATTACK) and not attacked:
        raise LetheError(f"{name} is a setting of an attack, and this sweep has no attack; add a section tamper")
    known, bare = _known(name), name.removeprefix(ATTACK)
    if bare in {"seed", "out", "name"}:
        raise LetheError(f"{bare} is not varied; {'give seeds instead' if bare == 'seed' else 'leave it out'}")
    if bare == "eval" or bare.startswith("eval."):
        raise LetheError(f"{name} changes how runs are measured, so that they could not be compared; leave it out")
    if bare not in known:
        now = RENAMED.get(bare)
        raise LetheError(f"there is no setting '{name}'{f'; {now}' if now else nearest(bare, known)}")
