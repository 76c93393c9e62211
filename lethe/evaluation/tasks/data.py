"""Local files in place of a task's data set: `task_data` maps a task or group to a .jsonl file.

A line is an object with the fields of the data set. Rows of a group go to the task whose configuration (`dataset_name`)
their field `subject` or `configuration` names; a group whose tasks ask in the same words may also have rows without such a
field, and is then asked as one task. Rows may have a field `split`; those of other splits than the one that is asked are
examples for few-shot prompts. Whatever is broken in a file is refused at once, line by line. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe.errors import LetheError, nearest, printable
from lethe.evaluation.tasks import definitions, leaves
from lethe.files import UnreadableError, json_of, text_of

CONFIGURATION = ("configuration", "subject")
SHOWN = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """Rows of a local file for one task. `like` is the task whose definition asks them: itself, or one of the group's."""

    task: str
    like: str
    file: str
    rows: tuple[Row, ...]
    asked: str
    """The split that is asked."""

    @property
    def splits(self) -> dict[str, list[Row]]:
        """Rows by split; those that name none are asked."""
        found: dict[str, list[Row]] = {self.asked: []}
        for row in self.rows:
            found.setdefault(row.get("split") or self.asked, []).append(row)
        return found


def read(task_data: dict[str, str], folders: dict[str, Path]) -> dict[str, LocalData]:
    """The local data of tasks by name, checked.

    Args:
        task_data: file by name of a task or group.
        folders: the tasks that are going to be asked, and the folders that define them (as `tasks.locate` gives).

    Raises:
        LetheError: a name is not among the tasks, or a file cannot be read or has broken rows.
    """
    found: dict[str, LocalData] = {}
    known_in = {folder: definitions(folder) for folder in set(folders.values())} if task_data else {}
    for name, file in task_data.items():
        known = next((known for known in known_in.values() if leaves(name, known)), {})
        asked = {leaf for task, folder in folders.items() for leaf in leaves(task, known_in[folder])}
        wanted = [leaf for leaf in leaves(name, known) if leaf in asked]
        if not wanted:
            raise LetheError(f"task_data: '{name}' is none of the tasks that are asked{nearest(name, folders)}")
        found |= _assigned(name, file, wanted, known, name in folders)
    return found


def _assigned(name: str, file: str, tasks: list[str], known: dict[str, Row], whole: bool) -> dict[str, LocalData]:
    """A file's rows, given to the tasks that they belong to."""
    lines = list(_lines(file))
    rows = [row for _, row in lines if isinstance(row, dict)]
    every = {str(definition.get("dataset_name")) for definition in known.values()}
    key = next((key for key in CONFIGURATION if any(_named(row, key) in every for row in rows)), None)
    names = {str(known[task].get("dataset_name")): task for task in tasks}
    grouped = len(tasks) > 1 or known.get(name, {}).get("group") == name
    if key is None and grouped:
        if not (whole and _alike([known[task] for task in tasks])):
            raise LetheError(
                f"task_data: the tasks of '{name}' ask in different words, so each row of '{file}' has to say whose it is: "
                f"a field subject with one of {', '.join(sorted(names)[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
            )
        checked = _checked(file, lines, known[tasks[0]], None, "", every)
        return {name: LocalData(name, tasks[0], file, checked, _asked(known[tasks[0]]))}
    found = {}
    for configuration, task in names.items():
        checked = _checked(file, lines, known[task], key, configuration, every)
        if checked:
            found[task] = LocalData(task, task, file, checked, _asked(known[task]))
    if not found:
        raise LetheError(
            f"task_data: '{file}' has no row of '{name}'"
            + (f": no {key} is one of {', '.join(sorted(names)[:SHOWN])}" if key else "")
        )
    return found


def _named(row: Row, key: str) -> str | None:
    """The configuration that a row names; a field that is no text names none."""
    return row[key] if isinstance(row.get(key), str) else None


def _asked(definition: Row) -> str:
    return definition.get("test_split") or definition.get("validation_split") or definition.get("training_split") or "test"


def _alike(some: list[Row]) -> bool:
    """Whether tasks differ only in their names and data: their prompts are made in the same way."""
    names = {"task", "task_alias", "dataset_name", "tag", "test_split", "fewshot_split"}
    return len({json.dumps({k: v for k, v in one.items() if k not in names}, sort_keys=True) for one in some}) == 1


def _lines(file: str) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and parsed lines; a line that cannot be read gives the error."""
    try:
        text = text_of(file)
    except UnreadableError as error:
        raise LetheError(f"task_data: '{file}' cannot be read ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json_of(line)
            except UnreadableError as error:
                yield number, error


def _checked(
    file: str, lines: list[tuple[int, Any]], definition: Row, key: str | None, only: str, every: set[str]
) -> tuple[Row, ...]:
    """The rows of one configuration: those whose field `key` says so, or all if there is no such field.

    Raises:
        LetheError: names every line that is broken, and what is wrong with it.
    """
    shape = _Shape.of(definition)
    broken: dict[int, str] = {}
    rows: list[Row] = []
    first: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for number, row in lines:
        if not isinstance(row, dict):
            broken[number] = _unreadable(row) if isinstance(row, UnreadableError) else "is not an object with fields"
            continue
        if key is not None and _named(row, key) not in every:
            broken[number] = f"{key} {printable(repr(row[key]), 60)} is no configuration" if row.get(key) else f"has no {key}"
            continue
        if key is not None and row[key] != only:
            continue
        wrong = shape.wrong_with(row)
        same = first.setdefault(shape.question(row), number)
        if wrong or same != number:
            broken[number] = wrong or f"asks what line {same} asks"
            continue
        try:
            given = dict(_kinds("", row))
        except ValueError as error:
            broken[number] = str(error)
            continue
        other = next((name for name in given if kinds.setdefault(name, given[name]) != given[name]), None)
        if other is not None:
            broken[number] = f"{printable(other, 60)} is {given[other]}, in lines before {kinds[other]}"
        else:
            rows.append(row)
    if broken:
        said = [f"line {number} ({wrong})" for number, wrong in list(broken.items())[:SHOWN]]
        rest = [f"lines {_ranges(list(broken)[SHOWN:])}"] if len(broken) > SHOWN else []
        raise LetheError(f"task_data: '{file}' has broken rows: {', '.join(said + rest)}")
    if not rows and key is None:
        raise LetheError(f"task_data: '{file}' has no rows")
    asked = _asked(definition)
    if rows and not any(row.get("split") in {None, "", asked} for row in rows):
        splits = printable(", ".join(sorted({row["split"] for row in rows})), 80)
        whose = f" of {only}" if definition.get("dataset_name") else ""
        raise LetheError(
            f"task_data: '{file}' has no row{whose} in the split {asked}, only in {splits}; leave out the field split"
        )
    return tuple(rows)


def _unreadable(error: UnreadableError) -> str:
    """What is wrong with a line; where in it a parser stopped is left out, since it calls each line its line 1."""
    return "is not JSON" if str(error).startswith("not JSON") else str(error)


KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def _kinds(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """What each field of a row holds, in a word, inner fields too; all rows of a data set hold the same in a field.

    Raises:
        ValueError: a number is larger than a data set can hold, or a list has values of two kinds.
    """
    if value is None:
        return
    if path:
        yield path, KINDS[type(value)]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{path} is larger than 64 bits; write it as text")
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _kinds(f"{path}.{name}" if path else name, inner)
    if isinstance(value, list):
        found: dict[str, str] = {}
        for inner in value:
            for name, kind in _kinds(f"{path}[]", inner):
                if found.setdefault(name, kind) != kind:
                    raise ValueError(f"{name} is {kind} here and {found[name]} there")
        yield from found.items()


def _ranges(numbers: list[int]) -> str:
    """Rising numbers, with neighbours as one range: 3, 5-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


@dataclass(frozen=True)
class _Shape:
    """Which fields a task reads, as far as its YAML shows; what functions read is not known."""

    fields: frozenset[str]
    choices: str | None
    """The field that lists the choices as texts."""
    answer: str | None
    """The field that holds nothing but the right choice."""
    letters: tuple[str, ...]
    prompt: bool
    """Whether the fields include all that a question is made of."""

    @classmethod
    def of(cls, definition: Row) -> _Shape:
        if definition.get("process_docs"):  # its rows are others than the file's
            return cls(frozenset(), None, None, (), False)
        text, target, choice = (definition.get(f"doc_to_{part}") for part in ("text", "target", "choice"))
        fields = _fields(text) | _fields(target) | _fields(choice)
        letters = tuple(choice) if isinstance(choice, list) else ()
        nested = re.search(r"\bchoices\s*(\.|\[\s*['\"])", f"{text} {target} {choice}")
        named = choice if isinstance(choice, str) and choice in fields else "choices" if "choices" in fields else None
        answer = re.fullmatch(r"(?:{{\s*)?(\w+)(?:\s*}})?", target) if isinstance(target, str) else None
        return cls(frozenset(fields), None if nested else named, answer and answer[1], letters, bool(_fields(text)))

    def wrong_with(self, row: Row) -> str | None:
        """What is wrong with a row, in a few words; None if nothing is."""
        for name in sorted(self.fields):
            if row.get(name) is None or (isinstance(row[name], str) and not row[name].strip()):
                return f"{'has no' if row.get(name) is None else 'has an empty'} {name}"
        if not isinstance(row.get("split") or "", str):
            return f"split {printable(repr(row['split']), 60)} is not text"
        offered: Any = row[self.choices] if self.choices else self.letters or None
        if self.choices:
            if not isinstance(offered, list) or not all(isinstance(one, str) and one.strip() for one in offered):
                return f"{self.choices} is not a list of texts"
            if len(offered) < 2 or (self.letters and len(offered) != len(self.letters)):
                return f"has {len(offered)} {self.choices}, {len(self.letters) or 'at least 2'} are needed"
        return self._wrong_answer(row[self.answer], offered) if self.answer and offered else None

    def _wrong_answer(self, answer: Any, offered: Any) -> str | None:
        if isinstance(answer, list) and answer:  # several are right
            return next((wrong for one in answer if (wrong := self._wrong_answer(one, offered))), None)
        if isinstance(answer, str) and answer in (self.letters or offered):
            return None
        if isinstance(answer, bool) or not isinstance(answer, int):
            return f"{self.answer} {printable(repr(answer), 60)} is not the number of a choice, from 0"
        if not 0 <= answer < len(offered):
            given = printable(answer, 60)
            return f"{self.answer} {given} is out of range: there are {len(offered)} choices, 0 to {len(offered) - 1}"
        return None

    def question(self, row: Row) -> str:
        """What a row asks: all its fields but the answer, choices in any order."""
        asked = {name: row.get(name) for name in (self.fields if self.prompt else row) if name != self.answer}
        if self.choices and isinstance(asked.get(self.choices), list):
            asked = asked | {self.choices: sorted(map(str, row[self.choices]))}
        asked = {name: " ".join(value.split()) if isinstance(value, str) else value for name, value in asked.items()}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _fields(template: Any) -> set[str]:
    """The fields that a doc_to_… reads: the one it names, or the variables of a template."""
    if not isinstance(template, str) or template.startswith("!function"):
        return set()
    if re.fullmatch(r"\w+", template):
        return {template}
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import SandboxedEnvironment

    try:
        return meta.find_undeclared_variables(SandboxedEnvironment().parse(template))
    except (TemplateError, RecursionError):  # lm-eval refuses it too, and the refusal names the template
        return set()
