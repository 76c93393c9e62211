"""From a recipe and a command line to a config object.

    words -> one `--name=value` a setting, recipes as their text -> jsonargparse (types, YAML) -> `build` -> the dataclass

Around jsonargparse, lists are written as plain words (`--layers 0 2`), the first word may be a positional setting
(`lethe tamper run:ID`), and each error is one line that names the setting, with the nearest right name for an unknown one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from lethe import files
from lethe.config import options, recipes, renamed, spoken
from lethe.config.checks import DEEPEST, refuse_text, refuse_unusable
from lethe.errors import LetheError, nearest, printable

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PASSED_ON = {"help", "print_config"}
"""Options that jsonargparse answers itself."""


def parse(command: str, config: type, words: list[str], example: str, positional: str | None = None) -> Any:
    """The config object that `words` describe.

    Raises:
        LetheError: a setting is unknown or has the wrong type, or a recipe cannot be read.
        SystemExit: `words` ask for help or for the configuration, which is printed.
    """
    settings = _settings(_named(words, config, positional))
    given = {name: values[0] for name, values in settings if len(values) == 1}
    found = [_Recipe.read(_one_recipe(values)) for name, values in settings if name == "config"]
    config = _variant(config, *(recipe.content for recipe in found), given)
    arguments = _arguments(settings, iter(found), fields_of(config))
    parser = _parser(command, config, example)
    return _made(config, lambda: parser.parse_args(arguments))


def from_recipe(config: type, recipe: str | Path | None, **overrides: Any) -> Any:
    """The config object of a recipe (a file, or the name of a recipe that comes with Lethe; None: all defaults).

    `overrides` are settings that replace those of the recipe, as they would on the command line.

    Raises:
        LetheError: as `parse`.
    """
    plain = {name: _plain(value) for name, value in overrides.items()}
    found = [] if recipe is None else [_Recipe.read(recipe)]
    config = _variant(config, *(each.content for each in found), plain)
    known = fields_of(config)
    for name in _dotted(plain, known):
        if name not in known:
            raise LetheError(f"there is no setting '{name}'{_advice(name, known)}")
    for name, value in plain.items():
        refuse_unusable(name, value)
    arguments = [f"--config={each.checked(known)}" for each in found]
    parser = _parser("recipe", config, "")
    return _made(config, lambda: parser.parse_args([*arguments, f"--config={json.dumps(plain)}"]))


def from_settings(config: type, given: Mapping[str, Any]) -> Any:
    """The config object of a section of a recipe: settings, with `recipe` as the recipe to start from.

    Raises:
        LetheError: as `parse`.
    """
    overrides = {name: numbers(value) for name, value in given.items() if name != "recipe"}
    return from_recipe(config, given.get("recipe"), **overrides)


@dataclasses.dataclass
class _Recipe:
    """A recipe that is read once: the name or file given, its text, and what the text says."""

    given: str
    text: str
    content: dict[Any, Any]

    @classmethod
    def read(cls, given: str | Path) -> _Recipe:
        text = recipes.text_of(given)
        try:
            content = files.yaml_of(text)
        except files.UnreadableError as error:
            raise LetheError(f"config: '{given}' cannot be read ({error})") from error
        if not isinstance(content, dict):
            raise LetheError(f"config: '{given}' holds no settings; a recipe is a list of name: value lines")
        return cls(str(given), text, content)

    def checked(self, known: dict[str, Any]) -> str:
        """The text, whose settings are all known and usable."""
        for name in _dotted(self.content, known):
            if name not in known:
                raise LetheError(f"config: '{self.given}' has an unknown field '{name}'{_advice(name, known)}")
        try:
            refuse_unusable("", self.content)
        except LetheError as error:
            raise LetheError(f"config: '{self.given}': {error}") from error
        return self.text


def _one_recipe(values: list[str]) -> str:
    if len(values) != 1:
        raise LetheError(f"config: expected one recipe, got {' '.join(values) or 'none'}")
    return values[0]


def _variant(config: type, *given: Mapping[Any, Any]) -> type:
    """The class that has the settings: `config` itself, or the one that it chooses by what is given (later settings count)."""
    choose = getattr(config, "variant", None)
    return choose(dict(itertools.chain.from_iterable(each.items() for each in given))) if choose else config


@functools.cache
def _parser(command: str, config: type, example: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"lethe {command}",
        description=(config.__doc__ or "").strip(),
        epilog=f"--json prints the answer as JSON alone.    example: {example}",
        exit_on_error=False,
        default_env=False,
    )
    help_text = "A recipe: a YAML file, or a name that `lethe recipes` lists. Later settings override it."
    parser.add_argument("--config", action=ActionConfigFile, help=help_text)
    parser.add_class_arguments(config, as_group=False, fail_untyped=True)
    return parser


def _made(config: type, values: Callable[[], Any]) -> Any:
    """The config object from parsed values. Built here, so that jsonargparse does not wrap the object's own errors."""
    try:
        found = values().as_dict()
    except (ArgumentError, TypeError) as error:
        raise LetheError(_one_line(str(error), config)) from error
    return build(config, found)


def build(kind: Any, value: Any) -> Any:
    """Plain data, such as a run's `config`, as the dataclasses that `kind` declares.

    Raises:
        LetheError: a required setting is missing, or a value is not allowed.
    """
    for option in options(kind):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            hints = typing.get_type_hints(option)
            for f in dataclasses.fields(option):
                if f.default is f.default_factory is dataclasses.MISSING and f.name not in value:
                    raise LetheError(f"{f.name}: this setting is required")
            return option(**{name: build(hints[name], item) for name, item in value.items() if name in hints})  # type: ignore[operator]
        if typing.get_origin(option) is list and isinstance(value, list):
            return [build(typing.get_args(option)[0], item) for item in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _named(words: list[str], config: type, positional: str | None) -> list[str]:
    """The words with the name of the positional setting before those that precede the first option."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if count == 0:
        return words
    if positional is None:
        raise LetheError(f"'{words[0]}' is not a setting; settings are written --name value")
    if count > 1 and typing.get_origin(fields_of(config)[positional]) is not list:
        raise LetheError(f"one {positional} is expected, got {count}: {' '.join(words[:count])}")
    return [f"--{positional}", *words]


def _arguments(settings: list[tuple[str, list[str]]], found: Iterator[_Recipe], known: dict[str, Any]) -> list[str]:
    """The settings as jsonargparse reads them: one `--name=value` for each, and each recipe as its text."""
    arguments = []
    for name, values in settings:
        if name == "config":
            arguments.append(f"--config={next(found).checked(known)}")
        elif name in known:
            arguments.append(f"--{name}={_value(name, known[name], values)}")
        elif name in PASSED_ON or name.endswith(".help"):
            arguments.append("=".join([f"--{name}", *values]))
        else:
            raise LetheError(f"there is no setting '--{name}'{_advice(name, known)}")
    return arguments


def _settings(words: list[str]) -> list[tuple[str, list[str]]]:
    """Each `--name` with the words that follow it."""
    named: list[tuple[str, list[str]]] = []
    for word in words:
        refuse_text(named[-1][0] if named else "", word, free=True)
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            named.append((name, [value] if equals else []))
        elif word == "-h":
            named.append(("help", []))
        elif not named or (word.startswith("-") and not re.fullmatch(r"-\d.*", word)):
            raise LetheError(f"there is no setting '{word}'; settings are written --name value")
        else:
            named[-1][1].append(word)
    return named


def _value(name: str, kind: Any, words: list[str]) -> str:
    """The words of a setting as one value: `0 2` is `[0, 2]` for a list, `a=FILE` is `{"a": "FILE"}` for name: value pairs."""
    for word in words:
        _refuse_unreadable(name, kind, word)
    if kind in {dict[str, str], dict[str, Any]}:
        return _pairs(name, words, kind == dict[str, Any])
    items = [typing.get_args(option)[0] for option in options(kind) if typing.get_origin(option) is list]
    always = len(options(kind)) == len(items) == 1
    if always and len(words) == 1 and words[0].startswith("["):
        return words[0]
    if always or (len(words) != 1 and items and items[0] in {str, int, float}):
        return f"[{', '.join(map(json.dumps if items[0] is str else str, words))}]"
    if kind is bool and not words:
        return "true"
    if len(words) != 1:
        raise LetheError(f"{name}: expected {spoken(kind)}, got {printable(' '.join(words), 80) or 'nothing'}")
    return words[0]


def _pairs(name: str, words: list[str], typed: bool) -> str:
    """`a=FILE b=FILE` as JSON; typed: the values are YAML, such as `lr=[1e-3, 1e-2]`."""
    if len(words) == 1 and words[0].startswith("{"):
        return words[0]
    parts = [word.partition("=") for word in words]
    wrong = [word for word, (key, _, value) in zip(words, parts, strict=True) if not key or not value]
    if wrong or not words:
        raise LetheError(f"{name}: expected name=value, got {repr(wrong[0]) if wrong else 'nothing'}")
    found = {key: _yaml(name, value) if typed else value for key, _, value in parts}
    if len(found) < len(parts):
        raise LetheError(f"{name}: a name is written twice in {' '.join(words)}; write each once")
    return json.dumps(found)


def _yaml(name: str, text: str) -> Any:
    """A value on the command line, read as in a recipe. Numbers such as 1e-3 are numbers."""
    try:
        return numbers(files.yaml_of(text))
    except files.UnreadableError as error:
        raise LetheError(f"{name}: '{printable(text, 80)}' cannot be read ({error})") from error


def numbers(value: Any) -> Any:
    """`value` with text such as "1e-3", which YAML 1.1 does not read as a number, as numbers."""
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def fields_of(config: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields, with their types."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config).items():
        found[prefix + name] = kind
        for option in filter(dataclasses.is_dataclass, options(kind)):
            found |= fields_of(option, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def _refuse_unreadable(name: str, kind: Any, word: str) -> None:
    """Refuse a word that jsonargparse, which reads it as YAML, would fail on, and one in which a key is written twice."""
    depths = itertools.accumulate((char in "[{") - (char in "]}") for char in word)
    if max(depths, default=0) > DEEPEST:
        raise LetheError(f"{name}: nested too deeply; a setting has {DEEPEST} levels at most")
    holds_keys = any(dataclasses.is_dataclass(one) or typing.get_origin(one) in {dict, list} for one in options(kind))
    if word.startswith(("{", "[{")) and holds_keys:
        _yaml(name, word)


def _dotted(content: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict) and any(map(dataclasses.is_dataclass, options(known.get(f"{prefix}{key}")))):
            names += _dotted(value, known, f"{prefix}{key}.")
    return names


def _advice(name: str, known: dict[str, Any]) -> str:
    """What to write instead of an unknown setting: its new name, the field of which it is the last part, or the nearest one."""
    if new := renamed.advice(name):
        return f"; {new}"
    for full in known:
        if full.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]:
            return f"; did you mean '{full}'?"
    return nearest(name, known)


def _one_line(message: str, config: type) -> str:
    """jsonargparse's message, which lists every alternative of a type over many lines, as one line."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    known = fields_of(config)
    name = next((name for name in (".".join(keys), *keys) if name in known), "")
    missing = re.search(r'(?<![\w.])([\w.]+)"? is required', message)
    if missing or not name:
        return f"{missing[1]}: this setting is required" if missing else " ".join(message.split())
    got = re.findall(r"(?:Got|Given) value: (.+)", message)
    given = got[0].strip() if got else "something else"
    if given.startswith("Namespace"):
        required = re.findall(r"arguments are required: (.+)", message)
        return f"{name}: {required[0].strip()} is required" if required else f"{name}: expected {spoken(known[name])}"
    new = renamed.advice(name, given)
    return f"{name}: expected {spoken(known[name])}, got {printable(given, 80)}" + (f"; {new}" if new else "")
