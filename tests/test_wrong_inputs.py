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
            if (turn + place) % 7 and "LETHE_ALL_WRONG_INPUTS" not in os.environ:
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
            known_by = [last] if must else [*name.split("."), *echoes(value), "run:"]
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


@pytest.mark.slow
@pytest.mark.parametrize(("command", "setting"), [("unlearn", "forget"), ("unlearn", "retain"), ("tamper", "forget")])
def test_wrong_texts(tried, tmp_path, command, setting):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(right(command)))
    report(failures(tried, wrong_texts(tmp_path, [command, "--config", str(tmp_path / "recipe.yaml")], setting)))


# --- sweeps and suites -----------------------------------------------------------------------------------------------


def lines_of(name: str) -> list[str]:
    """What is wrong of a kind, one input a line: YAML of a setting (vary, sweep, suite), or words (unlearn, runs)."""
    return (Path(__file__).parent / "data" / "wrong" / f"{name}.txt").read_text().splitlines()


def wrong_sweeps(file: Path) -> Iterator[Case]:
    base = right("sweep")
    words = ["sweep", "--config", str(file)]
    for line in lines_of("vary"):
        file.write_text(
            yaml.safe_dump(base | {"vary": {}}).replace("vary: {}", f"vary: {line if line[0] == '{' else f'{{{line}}}'}")
        )
        yield Case(f"vary: {line}", words, ["vary", "at ", "recipe.yaml"])
    for line in lines_of("sweep"):
        given = yaml.safe_load(line)
        changed = {key: base["unlearn"] | value if key == "unlearn" else value for key, value in given.items()}
        file.write_text(yaml.safe_dump(base | changed))
        yield Case(f"sweep: {line}", words, [*given, *yaml.safe_load(line).get("tamper", {}), "source", "max_runs", "vary"])


@pytest.mark.slow
def test_wrong_sweeps(tried, tmp_path):
    (file := tmp_path / "recipe.yaml").touch()
    report(failures(tried, wrong_sweeps(file)))


def wrong_suites(file: Path) -> Iterator[Case]:
    words = ["tamper", "lab:filtered", "--suite", str(file)]
    for line in lines_of("suite"):
        file.write_text(yaml.safe_dump({"attacks": {"a": {"attack": "noise"}}} | yaml.safe_load(line)))
        yield Case(f"suite: {line}", words, ["suite.yaml", "attacks", "a: ", "a on ", "c: "])
    file.write_text("attacks: {a: {attack: noise}}\n")
    for more in ("--only b", "--seeds 0", "--seeds 1000000000", '--attacks {"a":{}}', "--jobs 0", "--controls 5 5"):
        yield Case(f"suite: {more}", [*words, *more.split()], [more.split()[0].removeprefix("--"), "'5'"])


@pytest.mark.slow
def test_wrong_suites(tried, tmp_path):
    (file := tmp_path / "suite.yaml").touch()
    report(failures(tried, wrong_suites(file)))


# --- command lines ---------------------------------------------------------------------------------------------------

WORDS = [
    "",
    " ",
    "-",
    "--",
    "--=",
    "--=1",
    "--nothing",
    "nothing",
    "-x",
    "a\0b",
    "a\nb",
    "half \udcff",
    "--\udcff",
    LONG,
    f"--{LONG}",
]
VALUES_OF_WORDS = ["a\0b", "\x1b[31m", LONG, "9" * 5000, "[" * DEEP, "[" * 40 + "]" * 40, "half \udcff", "n" * 300 + "."]
VARIED = [
    '{"lr": [1], "lr": [2]}',
    "",
    "{",
    "lr",
    "lr=",
    "=1",
    "lr=[",
    "lr=*a",
    "lr=!!python/none",
    f"lr={'[' * DEEP}",
    f"lr={'[' * 30}1{']' * 30}",
    "[1]",
]
NAMES = ["", " ", ".", "/", "run:", "run:x", "*", "[", "a\0b", "a\nb", "\udcff", LONG, "n" * 300, "../" * 50, "gone"]
"""Names of runs that are none."""


def wrong_lines() -> Iterator[Case]:
    for word in WORDS:
        yield Case(f"lethe {shown(word)}", [word], ["lethe"])
        yield Case(f"lethe unlearn {shown(word)}", ["unlearn", word], ["lethe"])
    source = ["unlearn", "--source", onset()]
    for line in lines_of("unlearn"):
        option, *values = line.split(" ")
        name = option.removeprefix("--").removesuffix("=")
        yield Case(f"unlearn {line}", [*source, option, *values], [name, name.split(".")[-1], *echoes(values[-1:])])
    for name in ("lr", "layers", "name", "model", "lora", "eval.tasks", "config", "report_to", "forget", "retain"):
        for value in VALUES_OF_WORDS:
            yield Case(f"unlearn --{name} {shown(value)}", [*source, f"--{name}", value], [name])
    for text in VARIED:
        yield Case(f"sweep --vary {shown(text)}", ["sweep", "--vary", text], ["vary"])
    for line in lines_of("runs"):
        yield Case(f"runs {line}", ["runs", ".", *line.split()], [line.split()[0].removeprefix("--")])
    for seed in ("-2", "4294967296", "1.5", "x", "1e308", "9" * 400):
        yield Case(f"demo --seed {seed}", ["demo", "--seed", seed], ["seed"])
    for command in ("resume", "sweep status", "sweep retry", "sweep cancel", "runs", "report"):
        for name in NAMES:
            lists = command == "runs" and name in {"", ".", "/", "../" * 50}  # a folder without runs is an answer
            yield Case(f"{command} {shown(name)}", [*command.split(), name], ["lethe"], not lists)


@pytest.mark.slow
def test_wrong_command_lines(tried):
    report(failures(tried, wrong_lines()))
