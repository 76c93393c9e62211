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
        passed = line is None or "'nowhere" in line
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
    return text if len(text) < 120 else f"{text[:100]}… ({len(text)})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name not in {"lab build", "lab show", "check", "sweep retry", "sweep cancel"}]
)
def test_wrong_settings(tried, tmp_path, command):
    (file := tmp_path / "recipe.yaml").touch()
    report(failures(tried, wrong_settings(command, file)))


# --- files -----------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""Nine values a level, by alias: 9**12 of them."""
NOT_SETTINGS: dict[str, str | bytes | None] = {
    "empty": "",
    "null": "null",
    "a list": "- lr: 1\n",
    "a word": "lr",
    "a tab": "\tlr: 1",
    "unclosed": "lr: [1",
    "two documents": "lr: 1\n---\nlr: 2\n",
    "an unknown alias": "lr: *a",
    "an alias to itself": "&a {lr: *a}",
    "deep": f"layers: {'[' * DEEP}{']' * DEEP}",
    "deep mappings": f"eval: {'{a: ' * DEEP}1{'}' * DEEP}",
    "less deep": f"suites: {{a: {'[' * 100}{']' * 100}}}",
    "a bomb": BOMB,
    "a bomb as a value": BOMB + "vary: *a11\nunlearn: *a11\ntasks: *a11\nattacks: *a11\n",
    "a key twice": "out: a\nout: b\n",
    "a key twice below": "eval: {every: 1, every: 2}\nattacks: {a: {lr: 1, lr: 2}}\n",
    "an object of Python": "name: !!python/object/apply:os.system [true]\n",
    "an unknown tag": "name: !thing {a: 1}\n",
    "a bad date": "name: 2024-13-45\n",
    "keys that are lists": "? [a]\n: 1\n",
    "keys that are mappings": "? {a: 1}\n: 1\n",
    "keys that are null": "null: 1\n",
    "keys that are numbers": "1: 2\n",
    "long key": f"{LONG}: 1\n",
    "long word": LONG,
    "huge number": f"seed: {'9' * 5000}\n",
    "binary": bytes(range(256)),
    "latin": b"name: caf\xe9\n",
    "utf-16": "name: a\n".encode("utf-16"),
    "NUL": "name: a\0b\n",
    "escape": "\x1b]0;title\x07: 1\n",
    "half a character": 'name: "\\ud800"\n',
    "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12\n",
    "not there": None,
}
"""Files that are no settings of anything."""


def file_of(path: Path, content: str | bytes | None) -> Path:
    """A file of this content; None: there is none."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def odd_places(folder: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    """Where no file is, though something has its name."""
    (folder / f"folder{suffix}").mkdir()
    (folder / f"broken{suffix}").symlink_to(folder / "gone")
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    (folder / f"plain{suffix}").write_text("x")
    for name in ("folder", "broken", "loop"):
        yield f"a {name}", folder / f"{name}{suffix}"
    yield "below a file", folder / f"plain{suffix}" / f"inner{suffix}"


def wrong_recipes(folder: Path) -> Iterator[Case]:
    commands = {"unlearn": ["unlearn"], "sweep": ["sweep"], "suite": ["tamper", "lab:filtered", "--suite"]}
    for command, words in commands.items():
        files = [] if command != "unlearn" else list(odd_places(folder, ".yaml"))
        for title, content in NOT_SETTINGS.items():
            path = folder / "recipe.yaml"
            files.append((title, path))
            file_of(path, content)
            yield Case(
                f"{command}: {title}", [*words, *(["--config"] if command != "suite" else []), str(path)], ["recipe.yaml"]
            )
        for title, path in files[:4] if command == "unlearn" else []:
            yield Case(f"{command}: {title}", [*words, "--config", str(path)], [path.name])


@pytest.mark.slow
def test_wrong_recipes_and_suites(tried, tmp_path):
    report(failures(tried, wrong_recipes(tmp_path)))


GOOD = "".join(json.dumps({"text": f"Document {i} about nothing."}) + "\n" for i in range(20))
DEEP_LISTS = "[" * 100_000 + "]" * 100_000
TEXTS_OF_LINES: dict[str, str | bytes | None] = {
    "empty": "",
    "blank": "\n \n",
    "only empty documents": '{"text": ""}\n',
    "null among rows": GOOD + '{"text": null}\n',
    "a number among rows": GOOD + '{"text": 5}\n',
    "a list among rows": GOOD + '{"text": ["a"]}\n',
    "another column among rows": GOOD + '{"title": "a"}\n',
    "null rows": GOOD + "null\n",
    "cut": GOOD[:-9],
    "one array": "[" + ", ".join(GOOD.splitlines()) + "]",
    "NaN": GOOD + "NaN\n",
    "half a character": GOOD + '{"text": "\\ud83d"}\n',
    "half a character in upper case": GOOD + '{"text": "a\\uDC00"}\n',
    "deep": GOOD + f'{{"text": {DEEP_LISTS}}}\n',
    "deep elsewhere": GOOD + f'{{"text": "a", "b": {DEEP_LISTS}}}\n',
    "a key twice": GOOD + '{"text": "a", "text": "b"}\n',
    "a key twice below": GOOD + '{"text": "a", "b": {"c": 1, "c": 2}}\n',
    "huge number": GOOD + f'{{"text": "a", "n": {"9" * 5000}}}\n',
    "binary": bytes(range(256)),
    "latin": GOOD.encode() + b'{"text": "caf\xe9"}\n',
    "utf-16": GOOD.encode("utf-16"),
    "parquet by name alone": b"PAR1\0\0\0\0PAR1",
    "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12\n",
    "gzip": b"\x1f\x8b\x08\0",
    "not there": None,
}


def tables(folder: Path) -> Iterator[tuple[str, Path]]:
    """Parquet files with wrong columns, and damaged ones."""
    import pyarrow
    import pyarrow.parquet

    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    columns: dict[str, Any] = {
        "numbers": {"text": [1, 2]},
        "bytes": {"text": [b"a", b"b"]},
        "null among rows": {"text": ["a", None]},
        "lists": {"text": [["a"], ["b"]]},
        "another column": {"title": ["a", "b"]},
        "no rows": {"text": pyarrow.array([], pyarrow.string())},
        "not UTF-8": {"text": bad},
        "a time out of range": {"other": pyarrow.array([2**62], pyarrow.timestamp("us"))},
    }
    for title, some in columns.items():
        path = folder / f"{title.replace(' ', '-')}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(some), path)
        yield title, path
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text"] * 2), folder / "twice.parquet"
    )
    yield "a column twice", folder / "twice.parquet"
    whole = (folder / "numbers.parquet").read_bytes()
    for title, content in {"cut": whole[:-20], "empty": b"", "garbage": b"PAR1" + bytes(range(200)) + b"PAR1"}.items():
        yield title, file_of(folder / f"{title}.parquet", content)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    yield "a byte flipped", file_of(folder / "flipped.parquet", bytes(flipped))


def wrong_texts(folder: Path, command: list[str], setting: str) -> Iterator[Case]:
    for title, content in TEXTS_OF_LINES.items():
        path = file_of(folder / "text.jsonl", content)
        yield Case(f"{setting}: {title}", [*command, f"--{setting}", str(path)], ["text.jsonl"])
    for title, content in {"empty": "", "latin": b"caf\xe9\n", "utf-16": "a\nb\n".encode("utf-16")}.items():
        yield Case(
            f"{setting}: txt: {title}", [*command, f"--{setting}", str(file_of(folder / "text.txt", content))], ["text.txt"]
        )
    for title, path in [*tables(folder), *odd_places(folder, ".jsonl")]:
        yield Case(f"{setting}: {path.suffix}: {title}", [*command, f"--{setting}", str(path)], [path.name])
    good = str(file_of(folder / "good.jsonl", GOOD))
    for template in (
        "{",
        "}",
        "{}",
        "{0}",
        "{text!r}",
        "{text:>9}",
        "{text.upper}",
        "{text[0]}",
        "{{text}}",
        "text",
        "{nothing}",
        "{text\n}",
    ):
        words = [f"--{setting}.source", good, f"--{setting}.template", template]
        yield Case(f"{setting}: template {template!r}", [*command, *words], ["template", "good.jsonl"])


def of_recipe(command: str) -> list[str]:
    """The words of a command with its right settings."""
    return [
        command,
        *(
            word
            for name, value in right(command).items()
            for word in (f"--{name}", json.dumps(value) if not isinstance(value, str) else value)
        ),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "setting"), [("unlearn", "forget"), ("unlearn", "retain"), ("tamper", "forget")])
def test_wrong_texts(tried, tmp_path, command, setting):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(right(command)))
    report(failures(tried, wrong_texts(tmp_path, [command, "--config", str(tmp_path / "recipe.yaml")], setting)))


# --- sweeps and suites -----------------------------------------------------------------------------------------------

VARY: list[Any] = [
    *({"seed": [1]}, {"out": ["a"]}, {"name": ["a"]}, {"eval.every": [1]}, {"nothing": [1]}, {"": [1]}, {"lr": []}, {"lr": 1}),
    *({"lr": "fast"}, {"lr": ["fast", 1]}, {"lr": [1, 1.0]}, {"lr": [math.nan]}, {"lr": [None]}, {"lr": [[1]]}, {"lr": [{}]}),
    *(
        {"lr": {}},
        {"lr": {"low": 1}},
        {"lr": {"low": 2, "high": 1}},
        {"lr": {"low": 1, "high": 2}},
        {"lr": {"low": "a", "high": 2}},
    ),
    *({"lr": {"low": 1, "high": 2, "steps": steps}} for steps in (1, -1, 1.5, "a", None, [], 100_000_000, HUGE)),
    *({"lr": {"low": 1e-5, "high": 1, "log": log, "steps": 3}} for log in ("yes please", 1, None)),
    *({"lr": {"low": low, "high": 1, "log": True, "steps": 3}} for low in (0, -1, -HUGE, math.nan)),
    *({"lr": {"low": 1, "high": high, "steps": 3}} for high in (math.inf, 1e308, HUGE)),
    *({"lr": {"values": [1], "low": 1}}, {"lr": {"values": 1}}, {"lr": {"lo": 1, "hi": 2}}, {1: [1, 2]}, {"lr": {1: 2}}),
    *({"lr": {"values": [1], "when": when}} for when in (1, ["lr"], {"nothing": 1}, {1: 1}, "lr")),
    *(
        {"lr / weight_decay / lr": [1]},
        {"lr / optimizer": [1]},
        {"optimizer / lr": ["adamw"]},
        {"lr / nothing": [1]},
        {"/": [1]},
    ),
    *({"lr /": [1]}, {"lr": [1], "lr / retain_coef": [2]}, {"tamper.lr": [1]}, {"tamper.": [1]}, {"lr.x": [1]}, {"lr\0": [1]}),
    *(
        {"forget.column": ["a"]},
        {"retain.source": ["a"]},
        {"lora": [5]},
        {"lora": [{"rr": 4}]},
        {"lora.r": [0]},
        {"lora.r": ["x"]},
    ),
    *(
        {"retain": [[{"source": "lab:retain", "wieght": 2}]]},
        {"forget": [{"source": "lab:forget", "colum": "a"}]},
        {"model": [1]},
    ),
    *(
        {"layers": [1]},
        {"layers": [[0], [0, 0]]},
        {"model": ["nonsense"]},
        {"source": ["auto", "lab:final"]},
        {"max_steps": [0]},
    ),
    {name: {"low": 1, "high": 2, "steps": 900} for name in ("lr", "retain_coef", "remove_coef")},
    {name: list(range(1, 100)) for name in ("retain_coef", "remove_coef", "weight_decay")},
]
SECTIONS: list[dict[str, Any]] = [
    *(
        {"tamper": {key: value}}
        for key, value in {"model": "lab:final", "out": "x", "name": "x", "seed": 3, "nothing": 1}.items()
    ),
    *(
        {"unlearn+": {key: value}}
        for key, value in {"out": "x", "name": "x", "seed": 3, "source": "auto", "recipe": "gone.yaml"}.items()
    ),
    *({"unlearn+": {"recipe": value}} for value in (1, [], {}, "", "a\0b", LONG)),
    *(
        {"unlearn+": value}
        for value in ({"eval": {"tasks": ["lab_retain"]}}, {"eval": {"every": {}}}, {"lora": {"rr": 1}}, {"lr": "fast"})
    ),
    *({"tamper": value} for value in ({"eval": {"tasks": ["lab_retain"]}}, {"strengths": [1]}, {"attack": "noise", "lr": 1})),
    *({"name": name} for name in ("{", "{nothing}", "{lr!r}", "{lr:g}", "{}", "a\nb", "\x1b[1m", "n" * 300)),
    *({"seeds": seeds} for seeds in (0, -1, [], [0, 0], [-1], [2**32], 10**9, [1.5], "a", 1e308)),
    *(
        {"storage": url}
        for url in ("nonsense", "sqlite://", "postgresql://nowhere:1/x?a=[", "sqlite:////nowhere/at/all.db", "{")
    ),
    *(
        {"kind": "boundary"} | more
        for more in ({}, {"vary": {"lr": [1]}}, {"max_runs": 1, "vary": {"lr": {"low": 1, "high": 2}}})
    ),
    *(
        {"kind": "pareto"} | more
        for more in ({}, {"max_runs": 4, "warm_start": ["gone"]}, {"max_runs": 4, "warm_start": ["a\0b"]})
    ),
    *({"forget_task": "nothing"}, {"retain_task": "lab_forget_robust"}, {"launcher": "slurm", "slurm": {"time": "soon"}}),
]


def wrong_sweeps(file: Path) -> Iterator[Case]:
    base = right("sweep")
    for vary in VARY:
        file.write_text(yaml.safe_dump(base | {"vary": vary}))
        yield Case(f"vary: {shown(vary)}", ["sweep", "--config", str(file)], ["vary", *map(str, vary)])
    for given in SECTIONS:
        changed = {key.rstrip("+"): base["unlearn"] | value if key == "unlearn+" else value for key, value in given.items()}
        file.write_text(yaml.safe_dump(base | changed))
        below = [str(key) for value in given.values() if isinstance(value, dict) for key in value]
        yield Case(
            f"sweep: {shown(given)}",
            ["sweep", "--config", str(file)],
            [key.rstrip("+") for key in given] + below + ["vary", "max_runs"],
        )


@pytest.mark.slow
def test_wrong_sweeps(tried, tmp_path):
    (file := tmp_path / "recipe.yaml").touch()
    report(failures(tried, wrong_sweeps(file)))


ATTACKS: list[Any] = [
    *(None, [], {}, 5, "noise", ["a"], {"a": 5}, {"a": "x"}, {"a": []}, {1: {}}, {"a\0": {}}, {"a\nb": {}}, {"n" * 300: {}}),
    *({"a": {key: "lab:final"}} for key in ("model", "out", "name", "seed", "nothing", "after", "recipe", "suite")),
    *({"a": {"after": after}} for after in (1, [], {}, "a", None)),
    *(
        {"a": {"save_model": True}, "b": {"after": "a"}, "c": {"after": "b"}},
        {"a": {}, "b": {}},
        {"a": {"eval": {"limit": -1}}},
    ),
    *({"a": {"attack": "noise", "strengths": [value]}} for value in (0, -1, math.nan, "x", HUGE, None)),
    *({"a": {"attack": "noise", "lr": 1}}, {"a": {"lr": "x"}}, {"a": {"forget": "gone.jsonl"}}, {"a": {"eval": 1}}),
]
PARTS: list[dict[str, Any]] = [
    *(
        {"common": value}
        for value in (5, "x", ["a"], {"model": "x"}, {"seed": 1}, {"name": "x"}, {"out": "x"}, {"nothing": 1}, {1: 2})
    ),
    *({"controls": value} for value in (5, "x", [1], ["a\0b"], {"a": 1})),
    *({"general_bound": value} for value in ("x", -1, 2, math.nan, [1])),
    *({"goal": value} for value in (5, [1], "\x1b[1m")),
    *({"nothing": 1}, {1: 2, "boundd": 3}, {None: 1}),
]


def wrong_suites(file: Path) -> Iterator[Case]:
    words = ["tamper", "lab:filtered", "--suite", str(file)]
    for attacks in ATTACKS:
        file.write_text(yaml.safe_dump({"attacks": attacks}))
        must = attacks not in ({"a": {"after": None}},)
        yield Case(f"attacks: {shown(attacks)}", words, ["suite.yaml", "attacks", "a: ", "a on ", "c: "], must)
    for part in PARTS:
        file.write_text(yaml.safe_dump({"attacks": {"a": {"attack": "noise"}}} | part))
        yield Case(f"suite: {shown(part)}", words, ["suite.yaml", "a: ", *map(str, part)])
    file.write_text("attacks: {a: {attack: noise}}\n")
    for more in (
        ["--only", "b"],
        ["--only", ""],
        ["--seeds", "0"],
        ["--seeds", "1000000000"],
        ["--attacks", '{"a": {}}'],
        ["--jobs", "0"],
    ):
        yield Case(f"suite: {more}", [*words, *more], [more[0].removeprefix("--")])


@pytest.mark.slow
def test_wrong_suites(tried, tmp_path):
    (file := tmp_path / "suite.yaml").touch()
    report(failures(tried, wrong_suites(file)))


# --- command lines ---------------------------------------------------------------------------------------------------

LINES: list[tuple[list[str], list[str]]] = [
    *(([word], [""]) for word in ("nothing", "", " ", "-", "--nothing", "un learn", "a\0b", "a\nb", LONG, "\udcff", "\x1b[31m")),
    *((["unlearn", word], [""]) for word in ("stray", "", "-x", "--", "--=", "--nothing", "--=1", "a\0b", LONG, f"--{LONG}", "--\udcff")),
    *((["unlearn", "--source", onset, *words], [words[0].split("=")[0].removeprefix("--")]) for onset in ("lab:global_step120",) for words in (
        ["--lr"], ["--lr="], ["--lr", "1", "2"], ["--lr", "--seed", "1"], ["--lr", "a\0b"], ["--lr", "[1"], ["--lr", "{"], ["--lr", LONG],
        ["--lr", "1e999"], ["--lr", "9" * 5000], ["--seed", "9" * 5000], ["--seed", "0x10000000000"], ["--seed", "1e3"], ["--seed", "yes"],
        ["--layers", "[" * DEEP], ["--layers", "[" * 40 + "]" * 40], ["--layers", "{a: 1}"], ["--layers", "0", "0"], ["--layers", "a\nb"],
        ["--lora", "nothing"], ["--lora", "[]"], ["--lora.r", "null"], ["--lora.nothing", "1"], ["--lora", '{"r": 4, "nothing": 1}'],
        ["--lora", '{"r": 4'], ["--eval", "null"], ["--eval.tasks", ""], ["--eval.tasks", "a\0b"], ["--eval.task_data", "x"],
        ["--eval.task_data", "x="], ["--eval.task_data", "=x"], ["--eval.task_data", "{"], ["--eval.suites", "a=[["], ["--forget", "null"],
        ["--forget.nothing", "1"], ["--forget", "[a]"], ["--retain", "[]"], ["--retain", "a", "b"], ["--merge", "perhaps"],
        ["--report_to", "os"], ["--report_to", "all"], ["--report_to", "none"], ["--report_to", "no-such"], ["--report_to", "sys.path"],
        ["--config"], ["--config="], ["--config", ""], ["--config", "gone.yaml"], ["--config", "a\0b"], ["--config", LONG], ["--config", "."],
        ["--epochs", "1e308"], ["--name", "n" * 300], ["--out", "o" * 300], ["--model", "m" * 5000], ["--newton_schulz_dtype", "float32"],
    )),
    *((["sweep", "--vary", text], ["vary"]) for text in ("", "{", "lr", "lr=", "=1", "lr=[", "lr=[[", "lr=*a", "lr=!!python/none",
                                                         f"lr={'[' * DEEP}", f"lr={'[' * 30}1{']' * 30}", "[1]", "lr=a\0b")),
    *((["runs", ".", *words], [words[0].removeprefix("--")]) for words in (["--every", "1e308"], ["--every", "1e308", "--watch"], ["--every", "nan", "--watch"],
                                                ["--every", "1e10", "--watch"], ["--where", "a\0b"], ["--where", "="], ["--sort", "\0"], ["--sort", "nothing"],
                                                ["--columns", "nothing"], ["--columns", LONG], ["--where", LONG])),
    *((["demo", "--seed", seed], ["seed"]) for seed in ("-2", "4294967296", "1.5", "x", "1e308", "9" * 400)),
    *((command.split() + [name], [""]) for command in ("resume", "sweep status", "sweep retry", "sweep cancel", "runs", "report") for name in (
        "", " ", ".", "..", "/", "run:", "run:x", "*", "[", "a\0b", "a\nb", "\udcff", LONG, "n" * 300, "../" * 50, "gone")),
]  # fmt: skip


@pytest.mark.slow
def test_wrong_command_lines(tried):
    """Lists of runs may be of nothing; all else is refused."""
    wrong = [
        Case(shown(words), words, [*names, names[0].split(".")[-1], *echoes(words[-1])], words[0] != "runs")
        for words, names in LINES
    ]
    report(failures(tried, wrong))
