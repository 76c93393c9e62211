"""From a recipe and a command line to a config object.

jsonargparse does the typing, the YAML and `--print_config`. Around it: lists are written as plain words
(`--layers 0 2`), the first word may be a positional setting (`lethe tamper run:ID`), and whatever is wrong is said in
one line, with the nearest right name for an unknown field, wherever it is nested.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from lethe import files
from lethe.config import options, spoken
from lethe.config.checks import DEEPEST, refuse_text, refuse_unusable, types_of
from lethe.errors import LetheError, nearest, printable

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(command: str, config: type, words: list[str], example: str, positional: str | None = None) -> Any | None:
    """The config object that `words` describe; None when they only asked to print something.

    Raises:
        LetheError: a field is unknown or ill-typed, or a recipe cannot be read.
    """
    words = _named(words, config, positional)
    config = _variant(config, words, {})
    _refuse_unusable(words, config)
    _refuse_unknown(words, config)
    parser = _parser(command, config, example)
    return _made(config, lambda: parser.parse_args(_joined(words, config)))


def from_recipe(config: type, recipe: str | Path | None, **overrides: Any) -> Any:
    """The config object of a recipe file (None: of the defaults), with fields overridden, as the command line would make it.

    Raises:
        LetheError: as `parse`.
    """
    plain = {name: _plain(value) for name, value in overrides.items()}
    config = _variant(config, [] if recipe is None else ["--config", str(recipe)], plain)
    known = fields_of(config)
    for name in _dotted(plain, known):
        if name not in known:
            raise LetheError(f"there is no setting '{name}'{_nearest_field(name, known)}")
    for name, value in plain.items():
        refuse_unusable(name, value)
    words = [] if recipe is None else ["--config", str(recipe)]
    _refuse_unknown(words, config)
    parser = _parser("recipe", config, "")
    return _made(config, lambda: parser.parse_args([*words, "--config", json.dumps(plain)]))


def _variant(config: type, words: list[str], given: Mapping[str, Any]) -> type:
    """The class that has the settings of a recipe: that of its method, for unlearning; for all else `config` itself."""
    choose = getattr(config, "variant", None)
    if choose is None:
        return config
    named: dict[str, Any] = {}
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        value = value or (words[i + 1] if i + 1 < len(words) else "")
        if name == "--config":
            try:
                content = files.yaml_of(files.text_of(value))
            except files.UnreadableError:  # refused below, where its name can be given
                content = None
            named |= {"method": content["method"]} if isinstance(content, dict) and "method" in content else {}
        elif name == "--method":
            named["method"] = value
    return choose({**named, **given})


def from_settings(config: type, given: Mapping[str, Any]) -> Any:
    """The config object of settings as a recipe's section holds them: a `recipe` to start from, if named, and overrides.

    Raises:
        LetheError: as `parse`.
    """
    overrides = {name: numbers(value) for name, value in given.items() if name != "recipe"}
    return from_recipe(config, given.get("recipe"), **overrides)


@functools.cache
def _parser(command: str, config: type, example: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"lethe {command}",
        description=(config.__doc__ or "").strip(),
        epilog=f"--json prints the answer as JSON alone.    example: {example}",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A recipe (YAML); later settings override it.")
    parser.add_class_arguments(config, as_group=False, fail_untyped=True)
    return parser


def _made(config: type, values: Callable[[], Any]) -> Any:
    """The config object from parsed values. Built here, so that its own refusals are not wrapped in the parser's."""
    try:
        found = values().as_dict()
    except (ArgumentError, TypeError) as error:
        raise LetheError(_one_line(str(error), config)) from error
    return build(config, found)


def build(kind: Any, value: Any) -> Any:
    """Plain data, such as a run's `config`, as the dataclasses that `kind` declares.

    Raises:
        LetheError: a setting that has no default is missing, or one cannot be what it is.
    """
    for option in options(kind):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            made: Any = option
            if hasattr(option, "of_record"):  # a method: its class, and the names that its settings have today
                value = made.of_record(value)
                made = made.variant(value)
            hints = types_of(made)
            for f in dataclasses.fields(made):
                if f.default is f.default_factory is dataclasses.MISSING and f.name not in value:
                    raise LetheError(f"{f.name}: this setting is required")
            return made(**{name: build(hints[name], item) for name, item in value.items() if name in hints})
        if typing.get_origin(option) is list and isinstance(value, list):
            return [build(typing.get_args(option)[0], item) for item in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _named(words: list[str], config: type, positional: str | None) -> list[str]:
    """Words before the first option belong to the positional setting."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if count == 0:
        return words
    if positional is None:
        raise LetheError(f"'{words[0]}' is not a setting; settings are written --name value")
    if count > 1 and positional not in _lists(config):
        raise LetheError(f"one {positional} is expected, got {count}: {' '.join(words[:count])}")
    return [f"--{positional}", *words]


def _joined(words: list[str], config: type) -> list[str]:
    """Words as jsonargparse reads them.

    `--layers 0 2` becomes `--layers [0, 2]`; `--task_data a=FILE`: `--task_data {"a": "FILE"}`; `--merge`: `--merge true`.
    """
    lists, mixed = _lists(config), _mixed(config)
    pairs = {name: kind for name, kind in fields_of(config).items() if kind in {dict[str, str], dict[str, Any]}}
    switches = {f"--{name}" for name, kind in fields_of(config).items() if kind is bool}
    several = lists.keys() | pairs.keys()
    words = [part for word in words for part in (word.split("=", 1) if _head(word) in several and "=" in word else [word])]
    out: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        name = word.removeprefix("--") if word.startswith("--") else ""
        count = sum(1 for _ in itertools.takewhile(lambda w: not w.startswith("--"), words[i:]))
        if name not in several and (name not in mixed or count == 1):
            bare = word in switches and (i == len(words) or words[i].startswith("--"))
            out += [word, "true"] if bare else [word]
            continue
        values = []
        while i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
        if name in pairs:
            out += [word, _pairs(name, values, pairs[name] == dict[str, Any])]
            continue
        quote = json.dumps if (lists | mixed)[name] is str else str
        single = len(values) == 1 and values[0].startswith(("[", "null"))
        out += [word, values[0] if single else f"[{', '.join(map(quote, values))}]"]
    return out


def _head(word: str) -> str:
    return word.removeprefix("--").split("=", 1)[0] if word.startswith("--") else ""


def _pairs(name: str, words: list[str], typed: bool) -> str:
    """`a=FILE b=FILE` as JSON; typed: the values are YAML, such as `lr=[1e-3, 1e-2]`."""
    if len(words) == 1 and words[0].startswith("{"):
        return words[0]
    parts = [word.partition("=") for word in words]
    wrong = next((word for word, (key, _, value) in zip(words, parts, strict=True) if not key or not value), None)
    if wrong is not None or not words:
        raise LetheError(f"{name}: expected name=value, got {wrong!r}" if wrong is not None else f"{name}: expected name=value")
    found = {key: _yaml(name, value) if typed else value for key, _, value in parts}
    if len(found) < len(parts):
        raise LetheError(f"{name}: a name is written twice in {' '.join(words)}; write each once")
    return json.dumps(found)


def _yaml(name: str, text: str) -> Any:
    """A value on the command line as it would be in a recipe; numbers such as 1e-3 are numbers there, too."""
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


def _lists(config: type) -> dict[str, Any]:
    """Dotted names of the fields that are lists, or null, and nothing else, with the type of their items."""
    found = {name: [one for one in options(kind) if one is not type(None)] for name, kind in fields_of(config).items()}
    lists = {name: kinds[0] for name, kinds in found.items() if len(kinds) == 1 and typing.get_origin(kinds[0]) is list}
    return {name: typing.get_args(kind)[0] for name, kind in lists.items()}


def _mixed(config: type) -> dict[str, Any]:
    """Dotted names of the fields that may be a list of plain values or something else, with the type of the list's items."""
    found = {
        name: [option for option in options(kind) if typing.get_origin(option) is list]
        for name, kind in fields_of(config).items()
    }
    items = {name: typing.get_args(lists[0])[0] for name, lists in found.items() if lists and name not in _lists(config)}
    return {name: item for name, item in items.items() if item in {str, int, float}}


def fields_of(config: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields, with their types."""
    found: dict[str, Any] = {}
    for name, kind in types_of(config).items():
        found[prefix + name] = kind
        for option in filter(dataclasses.is_dataclass, options(kind)):
            found |= fields_of(option, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def _refuse_unusable(words: list[str], config: type) -> None:
    """Refuse words that jsonargparse, which reads them as YAML, would fail on, or where it would drop a key written twice."""
    kinds, name = fields_of(config), ""
    for word in words:
        name = word.partition("=")[0] if word.startswith("--") else name
        setting = name.removeprefix("--")
        refuse_text(setting, word, free=True)
        depths = itertools.accumulate((char in "[{") - (char in "]}") for char in word)
        if max(depths, default=0) > DEEPEST:
            raise LetheError(f"{setting}: nested too deeply; a setting has {DEEPEST} levels at most")
        value = word.partition("=")[2] if word.startswith("--") else word
        kind = kinds.get(setting, str)
        holds_keys = any(dataclasses.is_dataclass(one) or typing.get_origin(one) in {dict, list} for one in options(kind))
        if value.startswith(("{", "[{")) and holds_keys:
            _yaml(setting, value)


def _refuse_unknown(words: list[str], config: type) -> None:
    known = fields_of(config)
    own = {"config", "help", "json", "print_config"}
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            if name == "config":
                _refuse_unknown_in_recipe(value or (words[i + 1] if i + 1 < len(words) else ""), known)
            elif name not in known and name not in own and not name.endswith(".help"):
                raise LetheError(f"there is no setting '--{name}'{_nearest_field(name, known)}")
        elif word.startswith("-") and word != "-h" and not re.fullmatch(r"-\d.*", word):
            raise LetheError(f"there is no setting '{word}'; settings are written --name value")


def _refuse_unknown_in_recipe(file: str, known: dict[str, Any]) -> None:
    try:
        content = files.yaml_of(files.text_of(file))
    except files.UnreadableError as error:
        raise LetheError(f"config: '{file}' cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise LetheError(f"config: '{file}' holds no settings; a recipe is a list of name: value lines")
    for name in _dotted(content, known):
        if name not in known:
            raise LetheError(f"config: '{file}' has an unknown field '{name}'{_nearest_field(name, known)}")
    try:
        refuse_unusable("", content)
    except LetheError as error:
        raise LetheError(f"config: '{file}': {error}") from error


def _dotted(content: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict) and any(map(dataclasses.is_dataclass, options(known.get(f"{prefix}{key}")))):
            names += _dotted(value, known, f"{prefix}{key}.")
    return names


def _nearest_field(name: str, known: dict[str, Any]) -> str:
    """The field of which this is the last part, or the nearest one."""
    for full in known:
        if full.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]:
            return f"; did you mean '{full}'?"
    return nearest(name, known)


def _one_line(message: str, config: type) -> str:
    """jsonargparse's message, which lists every alternative of a type over many lines, as one line."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    known = fields_of(config)
    name = ".".join(keys)
    name = name if name in known else keys[0] if keys else ""
    missing = re.search(r'(?<![\w.])([\w.]+)"? is required', message)
    if missing or not name:
        field = missing.group(1) if missing else ""
        stray = message.partition("unrecognized arguments: ")[2]
        if stray:
            return f"'{stray}' belongs to no setting; one that is no list takes one value, as --name value"
        return f"{field}: this setting is required" if field else " ".join(message.split())
    got = re.findall(r"Got value: (.+)", message) or re.findall(r"Given value: (.+)", message)
    given = printable(got[0].strip(), 80) if got else "something else"
    if given.startswith("Namespace"):
        required = re.findall(r"arguments are required: (.+)", message)
        return f"{name}: {required[0].strip()} is required" if required else f"{name}: expected {spoken(known[name])}"
    return f"{name}: expected {spoken(known[name])}, got {given}"
