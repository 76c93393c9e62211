"""Hundreds of wrong inputs, made from the settings themselves: each is refused in one line that names it, with nothing written.

Every field of every command's settings meets `VALUES`; recipes, suites, texts, sweeps and command lines meet what stands in
their own lists. A new setting is covered by being a field, a new kind of wrong value by a line in `VALUES`. Each input goes
through the program's own `main`; what is not refused stops where a run's folder would be made. LETHE_ALL_WRONG_INPUTS=1 tries
every value on every field instead of a part of them, in minutes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from lethe import config as c
from lethe.cli import COMMANDS, main
from lethe.config import options
from lethe.lab import active_preset
from lethe.ledger import Run

LONG = "x" * 100_000
HUGE = 10**400
DEEP = 5_000
VALUES: list[Any] = [
    *(-1, 0, 1.5, 2**64, HUGE, -HUGE, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(None, True, [], [None], [[]], [1, "a"], [0, 0], [-1], [math.nan], [""], {}, {"a": 1}, {"a": None}, {1: "b"}, {"": ""}),
    *("", " ", "nonsense", "a\0b", "a\nb", "a\x1b[31mb", "half \ud800", LONG, "/".join(["y" * 300] * 3), "../..", "-", "{"),
    *(["a\0b"], [LONG], {"a": "b\0"}, {"a\0": "b"}, ["x"] * 2),
]
PROSE = ("goal", "title", "template", "setup")
"""Settings that are free text: of several lines, and as long as one likes."""


class Began(BaseException):
    """A command has passed all its gates: it would make a run's folder now."""


@pytest.fixture
def tried(lab, tmp_path, monkeypatch, capsys) -> Callable[[list[str]], str | None]:
    """tried(WORDS): the one line in which a command line is refused, None where it is not; what is wrong with it otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def begin(*_: Any) -> Run:
        raise Began

    monkeypatch.setattr(Run, "create", begin)

    def run(words: list[str]) -> str | None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            code = main(words)
        except (Began, SystemExit):
            code = 0
        said = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        if code == 0:
            return None
        assert code == 2, f"exit code {code}"
        line = said.err.removesuffix("\n")
        assert said.out == "" and line.startswith("lethe: ")
        assert line.isprintable(), f"not one printable line: {line[:300]!r}"
        assert len(line) <= 1300, f"{len(line)} characters"
        return line

    return run


@dataclasses.dataclass
class Case:
    """A wrong input: its words, and what a refusal may name it by. `must`: whether it cannot be right."""

    title: str
    words: list[str]
    names: list[str]
    must: bool = True


def failures(tried: Callable[[list[str]], str | None], cases: Iterable[Case]) -> list[str]:
    """What is wrong with how inputs are answered."""
    wrong = []
    for case in cases:
        try:
            line = tried(case.words)
        except (Exception, AssertionError) as error:
            wrong.append(f"{case.title}: {type(error).__name__}: {str(error)[:300]}")
            continue
        passed = line is None or "nowhere" in line
        if passed and case.must:
            wrong.append(f"{case.title}: not refused")
        elif line is not None and not passed and not any(name in line for name in case.names):
            wrong.append(f"{case.title}: named by none of {case.names}: {line[:300]}")
    return wrong


def report(wrong: list[str]) -> None:
    assert not wrong, f"{len(wrong)} inputs\n" + "\n".join(wrong)


# --- settings --------------------------------------------------------------------------------------------------------


def onset() -> str:
    return f"lab:global_step{active_preset().onset}"


def right(command: str) -> dict[str, Any]:
    """Settings that are right, and small."""
    evaluated = {"tasks": ["lab_forget_robust"], "limit": 2}
    recipe = {"source": onset(), "affine": "none", "num_train_examples": 8, "max_steps": 1, "layers": [0], "eval": evaluated}
    both = recipe | {"eval": {"tasks": ["lab_forget_robust", "lab_retain"], "limit": 2}}
    pair = {"model": "lab:final", "source": onset(), "num_examples": 20}
    kinds: dict[str, dict[str, Any]] = {
        "check": recipe,
        "unlearn": recipe,
        "tamper": {"model": "lab:filtered", "num_train_examples": 8, "max_steps": 1, "eval": evaluated},
        "tamper --suite": {"models": ["lab:filtered"], "suite": "standard", "only": ["noise"], "controls": []},
        "sweep": {"unlearn": both, "vary": {"retain_coef": [1, 2]}},
        "checkpoints": {"model": "lab:final"} | evaluated,
        "evaluate": {"model": "lab:final"} | evaluated,
        "compare": {"models": ["lab:final", "nowhere"]} | evaluated,
        "affine fit": pair | {"layers": [0]},
        "affine score": pair | {"affine": "nowhere"},
        "resume": {"run": "nowhere"},
        "sweep status": {"sweep": "nowhere"},
        "runs import": {"file": "nowhere.md"},
        "report": {"runs": ["nowhere"]},
        "runs": {"folder": "nowhere"},
    }
    return kinds.get(command.replace("retry", "status").replace("cancel", "status"), {})


def fits(value: Any, kind: Any, prose: bool = False) -> bool:
    """Whether a value is of a type, and such that any setting of that type may hold it."""
    if len(options(kind)) > 1:
        return any(fits(value, option, prose) for option in options(kind))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return not isinstance(value, str) or fits(value, str, True)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0], prose) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else []
        return isinstance(value, dict) and all(fits(key, str) and fits(item, inner[1], prose) for key, item in pairs)
    if dataclasses.is_dataclass(kind):
        return value == {}
    if kind in {int, float}:
        number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        return number and abs(value) < (2**53 if kind is int else 1e100)
    if kind is str:
        whole = isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
        if prose:
            return whole and not set(value) & {"\0", "\x1b"}
        return whole and value.isprintable() and all(len(part.encode()) < 256 for part in value.split("/"))
    return type(value) is (type(None) if kind is None else kind)


def wrong_settings(command: str, file: Path) -> Iterator[Case]:
    """Every field of a command with wrong values, in a recipe."""
    from lethe.settings import fields_of

    words = ["tamper", "--suite", "standard"] if command == "tamper --suite" else command.split()
    for place, (name, kind) in enumerate(fields_of(COMMANDS[command].config).items()):
        for turn, value in enumerate(VALUES):
            if (turn + place) % 5 and "LETHE_ALL_WRONG_INPUTS" not in os.environ:
                continue
            *way, last = name.split(".")
            settings = json.loads(json.dumps(right(command)))
            inner = settings
            for part in way:
                below = inner.get(part)
                inner[part] = below if isinstance(below, dict) else {"source": below or "lab:retain"} if part in TEXTS else {}
                inner = inner[part]
            inner[last] = value
            file.write_text(yaml.safe_dump(settings))
            must = not fits(value, kind, last in PROSE)
            known_by = [last] if must else [*name.split("."), *echoes(value)]
            yield Case(f"{command}: {name}: {shown(value)}", [*words, "--config", str(file)], known_by, must)


TEXTS = ("forget", "retain", "text")


def echoes(value: Any) -> list[str]:
    """How a refusal may show a value."""
    parts = value if isinstance(value, list | dict) else [value]
    return [f"'{part}'" for part in parts]


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}… ({len(text)})"


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in {"lab build", "lab show", "check", "sweep retry", "sweep cancel"}])
def test_wrong_settings(tried, tmp_path, command):
    (file := tmp_path / "recipe.yaml").touch()
    report(failures(tried, wrong_settings(command, file)))
