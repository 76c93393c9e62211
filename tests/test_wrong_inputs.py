"""Hundreds of wrong inputs, made from the settings themselves: each is refused in one line that names it, with nothing written.

Every field of every command meets `NEVER` and `VALUES`; files of all kinds meet `NO_TEXT` and the lines of `data/wrong/`. A new
setting is covered by being a field, a new kind of wrong value by a line in one of these. Each input goes through the program's
own `main`; what is not refused stops where a run's folder would be made. LETHE_ALL_WRONG_INPUTS=1 tries every value on every
field instead of a part of them, in minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from wrong_inputs import (
    DEEP,
    DEEP_LISTS,
    LONG,
    NEVER,
    NO_TEXT,
    VALUES,
    Case,
    check,
    echoes,
    file_of,
    lines_of,
    odd_places,
    shown,
    tables,
)

from lethe.cli import COMMANDS, main
from lethe.config.parse import fields_of
from lethe.lab.presets import active_preset
from lethe.runs.run import Run

pytestmark = pytest.mark.slow
TEXTS = ("forget", "retain", "text")


class Began(BaseException):
    """A command has passed all its gates: it would make a run's folder now."""


@pytest.fixture
def tried(lab, tmp_path, monkeypatch, capsys) -> Callable[[list[str]], str | None]:
    """tried(WORDS): the one line in which a command line is refused, None where it is not; what is wrong with it otherwise."""
    monkeypatch.chdir(tmp_path)
    for library in (huggingface_hub.constants, datasets.config):  # else the client tries for half a minute each time
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)

    def begin(*_: Any) -> Run:
        raise Began

    monkeypatch.setattr(Run, "create", begin)
    monkeypatch.setattr(Run, "running", begin)  # of a run that is resumed

    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if path.name != "work.lock")

    def run(words: list[str]) -> str | None:
        before = files()
        capsys.readouterr()
        try:
            code = main(words)
        except (Began, SystemExit):
            return None
        said = capsys.readouterr()
        if code == 0:
            return None
        assert files() == before, "something was written"
        assert code == 2, f"exit code {code}"
        line = said.err.removesuffix("\n")
        assert said.out == "" and line.startswith("lethe: "), f"printed {said.out[:100]!r}, {said.err[:300]!r}"
        assert line.isprintable(), f"not one printable line: {line[:300]!r}"
        assert len(line) <= 1300, f"{len(line)} characters"
        return line

    return run


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


def wrong_settings(folder: Path, command: str) -> Iterator[Case]:
    """Every field of a command with wrong values, in a recipe."""
    file = folder / "recipe.yaml"
    words = ["tamper", "--suite", "standard"] if command == "tamper --suite" else command.split()
    for place, name in enumerate(fields_of(COMMANDS[command].config)):
        for turn, value in enumerate([*NEVER, *VALUES]):
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
            known_by = [*name.split("."), *echoes(value), "run:"]
            yield Case(f"{command}: {name}: {shown(value)}", [*words, "--config", str(file)], known_by, turn < len(NEVER))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""Nine values a level, by alias: 9**12 of them."""
NOT_SETTINGS: dict[str, str | bytes | None] = NO_TEXT | {
    "deep": f"layers: {'[' * DEEP}{']' * DEEP}",
    "deep mappings": f"eval: {'{a: ' * DEEP}1{'}' * DEEP}",
    "less deep": f"suites: {{a: {'[' * 100}{']' * 100}}}",
    "a bomb": BOMB,
    "a bomb as a value": BOMB + "vary: *a11\nunlearn: *a11\ntasks: *a11\nattacks: *a11\n",
    "long key": f"{LONG}: 1\n",
    "long word": LONG,
    "huge number": f"seed: {'9' * 5000}\n",
}


def wrong_recipes(folder: Path) -> Iterator[Case]:
    contents = NOT_SETTINGS | {line: line.encode().decode("unicode_escape") for line in lines_of("recipes")}
    commands = {"unlearn": "unlearn --config", "sweep": "sweep --config", "suite": "tamper lab:filtered --suite"}
    for command, words in commands.items():
        for title, content in contents.items():
            path = file_of(folder / "recipe.yaml", content)
            yield Case(f"{command}: {title}", [*words.split(), str(path)], ["recipe.yaml"])
    for path in odd_places(folder, ".yaml"):
        yield Case(path.name, ["unlearn", "--config", str(path)], [path.name])


GOOD = "".join(json.dumps({"text": f"Document {i} about nothing."}) + "\n" for i in range(20))
TEXTS_OF_LINES: dict[str, str | bytes | None] = NO_TEXT | {
    "blank": "\n \n",
    "only empty documents": '{"text": ""}\n',
    "cut": GOOD[:-9],
    "one array": "[" + ", ".join(GOOD.splitlines()) + "]",
    "deep": GOOD + f'{{"text": {DEEP_LISTS}}}\n',
    "deep elsewhere": GOOD + f'{{"text": "a", "b": {DEEP_LISTS}}}\n',
    "huge number": GOOD + f'{{"text": "a", "n": {"9" * 5000}}}\n',
    "parquet by name alone": b"PAR1\0\0\0\0PAR1",
}


def wrong_texts(folder: Path) -> Iterator[Case]:
    command = ["unlearn", "--config", str(file_of(folder / "recipe.yaml", yaml.safe_dump(right("unlearn"))))]
    contents = TEXTS_OF_LINES | {line: f"{GOOD}{line}\n" for line in lines_of("texts")}
    places = [(f"jsonl: {title}", "text.jsonl", content) for title, content in contents.items()]
    places += [(f"txt: {title}", "text.txt", content) for title, content in NO_TEXT.items() if title != "gzip"]
    for title, name, content in places:
        path = file_of(folder / name, content)
        yield Case(title, [*command, "--forget", str(path)], [name])
    for title, path in [*tables(folder), *((path.stem, path) for path in odd_places(folder, ".jsonl"))]:
        yield Case(f"{path.suffix}: {title}", [*command, "--forget", str(path)], [path.name])
    good = str(file_of(folder / "good.jsonl", GOOD))
    for template in [*lines_of("templates"), "{text\n}"]:
        words = ["--forget.source", good, "--forget.template", template]
        yield Case(f"template {template!r}", [*command, *words], ["template", "good.jsonl"])


QUESTION = {"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 1, "meta": {"a": 1}}
ROWS = "".join(json.dumps(QUESTION | {"question": f"What is {i}?"}) + "\n" for i in range(4))
TASK = {"task": "mine", "dataset_path": "json", "dataset_kwargs": "{data_files: {test: rows.jsonl}}", "test_split": "test"}
TASK |= {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
TASK |= {"metric_list": "[{metric: acc}]"}


def task_file(line: str) -> str:
    """A right task file with the settings of a line in place of its own."""
    given = line.encode().decode("unicode_escape")
    names = {part.partition(":")[0] for part in given.split("\n")}
    return "".join(f"{name}: {value}\n" for name, value in TASK.items() if name not in names) + given + "\n"


def wrong_tasks(folder: Path) -> Iterator[Case]:
    file_of(folder / "rows.jsonl", ROWS)
    (where := folder / "tasks").mkdir()
    file_of(where / "code.py", "open('ran', 'w')\n")
    contents: dict[str, str | bytes | None] = NO_TEXT | {line: task_file(line) for line in lines_of("tasks")}
    contents |= {"deep": task_file(f"metadata: {DEEP_LISTS}"), "twice": task_file("metadata: 1\nmetadata: 2")}
    contents |= {"a bomb": task_file("metadata: *a11").replace("metadata", BOMB + "metadata")}
    for title, content in contents.items():
        file_of(where / "mine.yaml", content)
        yield Case(f"task: {title}", ["evaluate", "lab:final", "--tasks", str(where)], ["tasks: ", "num_fewshot: "])
    assert not (folder / "ran").exists()


def wrong_sweeps(folder: Path) -> Iterator[Case]:
    base, file = right("sweep"), folder / "recipe.yaml"
    words = ["sweep", "--config", str(file)]
    for line in lines_of("vary"):
        varied = line if line[0] == "{" else f"{{{line}}}"
        file.write_text(yaml.safe_dump(base | {"vary": {}}).replace("vary: {}", f"vary: {varied}"))
        yield Case(f"vary: {line}", words, ["vary", "at ", "recipe.yaml"])
    for line in lines_of("sweep"):
        given = yaml.safe_load(line)
        changed = {key: base["unlearn"] | value if key == "unlearn" else value for key, value in given.items()}
        file.write_text(yaml.safe_dump(base | changed))
        yield Case(f"sweep: {line}", words, [*given, *yaml.safe_load(line).get("tamper", {}), "source", "max_runs", "vary"])


def wrong_suites(folder: Path) -> Iterator[Case]:
    file = folder / "suite.yaml"
    words = ["tamper", "lab:filtered", "--suite", str(file)]
    for line in lines_of("suite"):
        file.write_text(yaml.safe_dump({"attacks": {"a": {"attack": "noise"}}} | yaml.safe_load(line)))
        yield Case(f"suite: {line}", words, ["suite.yaml", "attacks", "a: ", "a on ", "c: "])
    file.write_text("attacks: {a: {attack: noise}}\n")
    for more in ("--only b", "--seeds 0", "--seeds 1000000000", '--attacks {"a":{}}', "--jobs 0", "--controls 5 5"):
        yield Case(f"suite: {more}", [*words, *more.split()], [more.split()[0].removeprefix("--"), "'5'"])


WORDS = ["", " ", "-", "--", "--=", "--=1", "--nothing", "nothing", "-x", "a\0b", "a\nb", "half \udcff", "--\udcff"]
WORDS += [LONG, f"--{LONG}"]
VALUES_OF_WORDS = ["a\0b", "\x1b[31m", LONG, "9" * 5000, "[" * DEEP, "half \udcff", "n" * 300 + "."]
VARIED = ['{"lr": [1], "lr": [2]}', "", "{", "lr", "lr=", "=1", "lr=[", "lr=*a", "lr=!!python/none", f"lr={'[' * DEEP}", "[1]"]
VARIED += [f"lr={'[' * 30}1{']' * 30}"]
NAMES = ["", " ", ".", "/", "run:", "run:x", "*", "[", "a\0b", "a\nb", "\udcff", LONG, "n" * 300, "../" * 50, "gone"]
"""Names of runs that are none."""


def wrong_lines(_: Path) -> Iterator[Case]:
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


SAME = {"lab build", "lab show", "check", "sweep retry", "sweep cancel"}
"""Commands that have no settings, or those of another one."""
KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    **{f"settings of {name}": partial(wrong_settings, command=name) for name in COMMANDS if name not in SAME},
    "recipes and suites": wrong_recipes,
    "text": wrong_texts,
    "tasks": wrong_tasks,
    "sweeps": wrong_sweeps,
    "suites": wrong_suites,
    "command lines": wrong_lines,
}


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_are_refused_in_one_line(tried, tmp_path, kind):
    check(tried, KINDS[kind](tmp_path))
