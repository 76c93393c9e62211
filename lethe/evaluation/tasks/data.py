"""Local files in place of a task's data set: `task_data` maps a task or group to a .jsonl file.

Each line is an object with the fields of the data set: a row. In a group, a row belongs to the task whose configuration
(`dataset_name`) is in the row's field `subject` or `configuration`. If all tasks of a group have the same prompt, rows may lack
such a field, and the group is evaluated as one task. Rows whose field `split` names another split than the test split are
few-shot examples. All broken rows are refused at once, by line. Nothing here imports torch.
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
    """Rows of a local file for one task. `like`: the task with the definition, which for a whole group is one of its tasks."""

    task: str
    like: str
    file: str
    rows: tuple[Row, ...]
    test_split: str
    """The split with the questions."""

    @property
    def splits(self) -> dict[str, list[Row]]:
        """Rows by split. Rows without a split are questions."""
        found: dict[str, list[Row]] = {self.test_split: []}
        for row in self.rows:
            found.setdefault(row.get("split") or self.test_split, []).append(row)
        return found


def read(task_data: dict[str, str], folders: dict[str, Path]) -> dict[str, LocalData]:
    """Read and check the local data of tasks, by name.

    Args:
        task_data: file by name of a task or group.
        folders: the tasks of the evaluation and the folders that define them, as `tasks.locate` returns.

    Raises:
        LetheError: a name is not among the tasks, or a file cannot be read or has broken rows.
    """
    found: dict[str, LocalData] = {}
    known_in = {folder: definitions(folder) for folder in set(folders.values())} if task_data else {}
    for name, file in task_data.items():
        known = next((known for known in known_in.values() if leaves(name, known)), {})
        evaluated = {leaf for task, folder in folders.items() for leaf in leaves(task, known_in[folder])}
        wanted = [leaf for leaf in leaves(name, known) if leaf in evaluated]
        if not wanted:
            raise LetheError(f"task_data: '{name}' is not among the tasks{nearest(name, folders)}")
        found |= _assigned(name, file, wanted, known, name in folders)
    return found


def _assigned(name: str, file: str, tasks: list[str], known: dict[str, Row], whole: bool) -> dict[str, LocalData]:
    """A file's rows by the task that they belong to. `whole`: the group itself is evaluated, not only some of its tasks."""
    lines = list(_lines(file))
    rows = [row for _, row in lines if isinstance(row, dict)]
    every = {str(definition.get("dataset_name")) for definition in known.values()}
    key = next((key for key in CONFIGURATION if any(_named(row, key) in every for row in rows)), None)
    names = {str(known[task].get("dataset_name")): task for task in tasks}
    grouped = len(tasks) > 1 or known.get(name, {}).get("group") == name
    if key is None and grouped:
        if not (whole and _same_prompt([known[task] for task in tasks])):
            raise LetheError(
                f"task_data: the tasks of '{name}' have different prompts, so each row of '{file}' has to name its task: "
                f"a field subject with one of {', '.join(sorted(names)[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
            )
        checked = _checked(file, lines, known[tasks[0]], None, "", every)
        return {name: LocalData(name, tasks[0], file, checked, _test_split(known[tasks[0]]))}
    found = {}
    for configuration, task in names.items():
        checked = _checked(file, lines, known[task], key, configuration, every)
        if checked:
            found[task] = LocalData(task, task, file, checked, _test_split(known[task]))
    if not found:
        raise LetheError(
            f"task_data: '{file}' has no row of '{name}'"
            + (f": no {key} is one of {', '.join(sorted(names)[:SHOWN])}" if key else "")
        )
    return found


def _named(row: Row, key: str) -> str | None:
    """The configuration in a row's field `key`; None if that is not a text."""
    return row[key] if isinstance(row.get(key), str) else None


def _test_split(definition: Row) -> str:
    return definition.get("test_split") or definition.get("validation_split") or definition.get("training_split") or "test"


def _same_prompt(some: list[Row]) -> bool:
    """Whether tasks differ only in their names and data."""
    names = {"task", "task_alias", "dataset_name", "tag", "test_split", "fewshot_split"}
    return len({json.dumps({k: v for k, v in one.items() if k not in names}, sort_keys=True) for one in some}) == 1


def _lines(file: str) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1, with the parsed line, or the error of a line that cannot be read."""
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
    """The rows of the configuration `only`, by their field `key` (None: all rows). `every`: all known configurations."""
    import pyarrow

    shape = _Shape.of(definition)
    broken: dict[int, str] = {}
    rows: list[Row] = []
    first: dict[str, int] = {}
    schema = pyarrow.schema([])
    for number, row in lines:
        if not isinstance(row, dict):
            broken[number] = _unreadable(row) if isinstance(row, UnreadableError) else "is not an object with fields"
        elif key is not None and _named(row, key) not in every:
            broken[number] = f"{key} {printable(repr(row[key]), 60)} is no configuration" if row.get(key) else f"has no {key}"
        elif key is None or row[key] == only:
            same = first.setdefault(shape.question(row), number)
            wrong = shape.wrong_with(row) or (None if same == number else f"has the question of line {same}")
            try:
                if not wrong:
                    one = pyarrow.RecordBatch.from_pylist([row]).schema
                    schema = pyarrow.unify_schemas([schema, one], promote_options="permissive")
                    rows.append(row)
            except OverflowError:
                wrong = "has a number beyond 64 bits; write it as text"
            except pyarrow.ArrowException as error:  # a data set needs the same types in all rows
                wrong = printable(str(error).splitlines()[0].removeprefix("Unable to merge: "), 120)
            if wrong:
                broken[number] = wrong
    if broken:
        said = [f"line {number} ({wrong})" for number, wrong in list(broken.items())[:SHOWN]]
        rest = [f"and {len(broken) - SHOWN} more"] if len(broken) > SHOWN else []
        raise LetheError(f"task_data: '{file}' has broken rows: {', '.join(said + rest)}")
    if not rows and key is None:
        raise LetheError(f"task_data: '{file}' has no rows")
    test = _test_split(definition)
    if rows and not any(row.get("split") in {None, "", test} for row in rows):
        splits = printable(", ".join(sorted({row["split"] for row in rows})), 80)
        whose = f" of {only}" if definition.get("dataset_name") else ""
        wrong = f"has no row{whose} in the split {test}, only in {splits}"
        raise LetheError(f"task_data: '{file}' {wrong}; leave out the field split")
    return tuple(rows)


def _unreadable(error: UnreadableError) -> str:
    """The fault of a line, without the parser's position, which counts each line as its line 1."""
    return "is not JSON" if str(error).startswith("not JSON") else str(error)


@dataclass(frozen=True)
class _Shape:
    """Which fields a task reads, as far as its YAML shows. What its functions read is unknown."""

    fields: frozenset[str]
    choices: str | None
    """The field with the list of choices."""
    answer: str | None
    """The field with the right choice and nothing else."""
    letters: tuple[str, ...]
    prompt: bool
    """Whether the fields include everything in a question."""

    @classmethod
    def of(cls, definition: Row) -> _Shape:
        if definition.get("process_docs"):  # the function replaces the rows of the file
            return cls(frozenset(), None, None, (), False)
        text, target, choice = (definition.get(f"doc_to_{part}") for part in ("text", "target", "choice"))
        fields = _fields(text) | _fields(target) | _fields(choice)
        letters = tuple(choice) if isinstance(choice, list) else ()
        nested = re.search(r"\bchoices\s*(\.|\[\s*['\"])", f"{text} {target} {choice}")
        named = choice if isinstance(choice, str) and choice in fields else "choices" if "choices" in fields else None
        answer = re.fullmatch(r"(?:{{\s*)?(\w+)(?:\s*}})?", target) if isinstance(target, str) else None
        return cls(frozenset(fields), None if nested else named, answer and answer[1], letters, bool(_fields(text)))

    def wrong_with(self, row: Row) -> str | None:
        """The fault of a row in a few words; None if it has none."""
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
        """A hash of a row's question: all its fields except the answer, choices in any order."""
        fields = {name: row.get(name) for name in (self.fields if self.prompt else row) if name != self.answer}
        if self.choices and isinstance(fields.get(self.choices), list):
            fields[self.choices] = sorted(map(str, row[self.choices]))
        fields = {name: " ".join(value.split()) if isinstance(value, str) else value for name, value in fields.items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _fields(template: Any) -> set[str]:
    """The fields in a doc_to_… setting: its name, or the variables of its template."""
    if not isinstance(template, str) or template.startswith("!function"):
        return set()
    if re.fullmatch(r"\w+", template):
        return {template}
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import SandboxedEnvironment

    try:
        return meta.find_undeclared_variables(SandboxedEnvironment().parse(template))
    except (TemplateError, RecursionError):  # lm-eval fails on it too, and that refusal names the template
        return set()
