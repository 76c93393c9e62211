"""Writes the pages of docs/reference/ that list settings: one page for each command, from the config dataclasses.

    python scripts/reference.py

`lethe.cli.COMMANDS` names the commands and their dataclasses. Each field becomes a row of a table: name, type, default and help
text. A field that is itself a dataclass, such as `lora`, gets a table of its own below. tests/test_docs.py compares the files
with what this program would write, so that a page cannot become outdated.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

import docstring_parser

from lethe.cli import COMMANDS, Command
from lethe.config.checks import default_of, options, spoken
from lethe.methods import method

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
HEADER = "<!-- Written by scripts/reference.py; change the config dataclass instead. -->\n"
MORE = {"check": "unlearn"}
"""Commands that take the settings of another one beside their own."""
TABLE = "| setting | type | default | what it does |\n| --- | --- | --- | --- |\n"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    found = {f"{_slug(name)}.md": _command_page(name, command) for name, command in COMMANDS.items()}
    found |= {f"unlearn-{name}.md": _method_page(name, kind) for name, kind in methods().items()}
    return found | {"index.md": _index()}


def methods() -> dict[str, type]:
    """Name -> dataclass of every method of unlearning."""
    return {name: method.named(name) for name in method.names()}


def _index() -> str:
    lines = [f"| [`lethe {name}`]({_slug(name)}.md) | {_summary(_about(command))} |" for name, command in COMMANDS.items()]
    text = f"{HEADER}\n# Commands\n\nEvery setting of every command, with its type, default and help text.\n\n"
    text += "| command | what it does |\n| --- | --- |\n" + "\n".join(lines) + "\n"
    rows = [f"| [`{name}`](unlearn-{name}.md) | {_summary(kind.__doc__)} |" for name, kind in methods().items()]
    text += "\n## Methods of unlearning\n\n| method | what it is |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    return text + "\nSee also: [what a run writes](run-folder.md), [what the numbers mean](measures.md).\n"


def _command_page(name: str, command: Command) -> str:
    text = f"{HEADER}\n# lethe {name}\n\n{_prose(_about(command))}\n\n```text\n{command.example}\n```\n\n"
    if command.positional:
        text += f"`{command.positional}` may stand without its name, as the first word after the command.\n\n"
    text += "Every command also takes `--config` (a recipe), `--print_config`, `--json` and `--help`."
    if command.runs_tasks:
        text += " This one takes [`--trust_task_code`](../guides/evaluation.md#a-task-folder-is-code) as well."
    if name in MORE:
        text += f"\n\nThe other settings are those of [lethe {MORE[name]}]({_slug(MORE[name])}.md)."
    return f"{text}\n\n## Settings\n\n{_tables(command.config, set())}"


def _method_page(name: str, kind: type) -> str:
    """The settings that a method adds to those of `lethe unlearn`, or declares anew."""
    shared = COMMANDS["unlearn"].config
    own = {name for base in kind.__mro__ if base not in shared.__mro__ for name in vars(base).get("__annotations__", {})}
    common = {field.name for field in dataclasses.fields(shared)} - own
    text = f"{HEADER}\n# lethe unlearn --method {name}\n\n{_prose(kind.__doc__)}\n\n"
    text += "The other settings are those of [lethe unlearn](unlearn.md)."
    return f"{text}\n\n## Settings\n\n{_tables(kind, common)}"


def _tables(config: type, left_out: set[str], prefix: str = "") -> str:
    """The table of a dataclass's fields, followed by the tables of its nested dataclasses."""
    hints, help_of = typing.get_type_hints(config), _help(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in left_out]
    if not fields:
        return "There are no settings.\n"
    rows, below = [], ""
    for field in fields:
        name = prefix + field.name
        cells = [_cell(_type(hints[field.name])), _default(field), _cell(help_of.get(field.name, ""))]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
        for nested in filter(dataclasses.is_dataclass, options(hints[field.name])):
            below += f"\n## {name}\n\n{_prose(nested.__doc__)}\n\n{_tables(typing.cast(type, nested), set(), f'{name}.')}"
    return TABLE + "\n".join(rows) + "\n" + below


def _type(kind: Any) -> str:
    parts = ["settings (below)" if dataclasses.is_dataclass(part) else spoken(part) for part in options(kind)]
    return re.sub(r"settings source, [\w, ]+", "settings", " or ".join(parts))


def _default(field: dataclasses.Field[Any]) -> str:
    if (value := default_of(field)) is dataclasses.MISSING:
        return "required"
    return "as below" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"


def _help(config: type) -> dict[str, str]:
    """Field -> the string below it, of the class and of those that it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if dataclasses.is_dataclass(kind):
            found |= {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(kind).params}
    return found


def _about(command: Command) -> str | None:
    """What a command does for its user."""
    return getattr(command, "about", None) or command.config.__doc__


def _prose(docstring: str | None) -> str:
    """A docstring; its indented lines, which are formulas, stand in a code fence."""
    lines = inspect.cleandoc(docstring or "")
    return re.sub(r"(?m)(^ {4}.+\n?)+", lambda block: f"```text\n{textwrap.dedent(block[0]).rstrip()}\n```\n", lines)


def _summary(docstring: str | None) -> str:
    return _cell((docstring or "").strip().partition("\n\n")[0])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _slug(name: str) -> str:
    return name.replace(" --", "-").replace(" ", "-")


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
