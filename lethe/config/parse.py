"""From a recipe and a command line to a config object.

    words -> (name, words) of each setting -> plain data: recipes and settings in their order -> `build` -> the dataclass

A value on the command line means what it would mean in a recipe, except that text is taken as it is written and that lists are
plain words (`--layers 0 2`). The first word may be a positional setting (`lethe tamper run:ID`). Each error is one line that
names the setting, with the nearest right name for an unknown one. The help is made from the text below each field.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import yaml

from lethe import files
from lethe.config import options, recipes, spoken, to_dict
from lethe.config.checks import RENAMED, default_of, refuse_text, refuse_unusable, types_of
from lethe.errors import LetheError, nearest, printable

ANSWERED = {"config", "help", "print_config"}
"""Options of every command that are no settings."""
Part = tuple[str | None, Mapping[Any, Any]]
"""Settings as plain data, and the recipe that they come from."""


def parse(command: str, config: type, words: list[str], example: str, positional: str | None = None, about: str = "") -> Any:
    """The config object that `words` describe. `example` and `about` are for the help.

    Raises:
        LetheError: a setting is unknown or has the wrong type, or a recipe cannot be read.
        SystemExit: `words` ask for the help or for the configuration, which is printed.
    """
    settings = _settings(_named(words, config, positional))
    given = {name: values[0] for name, values in settings if len(values) == 1}
    parts = [_read(values) for name, values in settings if name == "config"]
    config = _variant(config, *(content for _, content in parts), given, trusts=True)
    if "help" in dict(settings):
        sys.stdout.write(_help(command, config, example, about))
        raise SystemExit(0)
    known = fields_of(config)
    if unknown := [name for name, _ in settings if name not in {*known, *ANSWERED}]:
        raise LetheError(f"there is no setting '--{unknown[0]}'{_advice(unknown[0], known, config)}")
    parts += [(None, _nested(name, _value(name, known[name], values))) for name, values in settings if name in known]
    made = _combined(config, parts)
    if "print_config" in dict(settings):
        sys.stdout.write(yaml.dump(to_dict(made), Dumper=files.SettingsDumper, sort_keys=False, allow_unicode=True))
        raise SystemExit(0)
    return made


def from_recipe(config: type, recipe: str | Path | None, /, **overrides: Any) -> Any:
    """The config object of a recipe (a file, or the name of a recipe that comes with Lethe; None: all defaults).

    `overrides` are settings that replace those of the recipe, as they would on the command line.
    """
    return _from_recipe(config, recipe, overrides, trusts=True)


def _from_recipe(config: type, recipe: str | Path | None, overrides: Mapping[str, Any], trusts: bool) -> Any:
    parts = [*([] if recipe is None else [_read([str(recipe)])]), (None, overrides)]
    return _combined(_variant(config, *(content for _, content in parts), trusts=trusts), parts)


def from_settings(config: type, given: Mapping[str, Any]) -> Any:
    """The config object of a section of a recipe or of a record: settings, with `recipe` as the recipe to start from."""
    overrides = {name: value for name, value in given.items() if name != "recipe"}
    return _from_recipe(config, given.get("recipe"), overrides, trusts=False)


def section_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a section of a recipe and its `recipe` give, without defaults. Settings inside others are merged."""
    made = dict(_read([given["recipe"]])[1]) if given.get("recipe") else {}
    for name, value in given.items():
        both = isinstance(value, Mapping) and isinstance(made.get(name), Mapping)
        made[name] = made[name] | value if both else value
    return {name: value for name, value in made.items() if name != "recipe"}


def build(kind: Any, value: Any) -> Any:
    """The `config` of a run's record, as the dataclasses that `kind` declares. Unknown names are left out.

    Raises:
        LetheError: a required setting is missing, or a value is not allowed.
    """
    if hasattr(kind, "of_record"):  # a method: its class, and the names that its settings have today
        value = kind.of_record(value)
        kind = kind.variant(value)
    return _object(kind, value)


def _object(kind: Any, value: Any) -> Any:
    for option in options(kind):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            hints, made = types_of(option), {}  # type: ignore[arg-type]
            for f in dataclasses.fields(option):
                if f.name in value:
                    try:
                        made[f.name] = _object(hints[f.name], value[f.name])
                    except LetheError as error:  # it names a setting of this one
                        raise LetheError(f"{f.name}.{error}") from error
                elif f.default is f.default_factory is dataclasses.MISSING:
                    raise LetheError(f"{f.name}: this setting is required")
            return option(**made)  # type: ignore[operator]
        if typing.get_origin(option) is list and isinstance(value, list):
            return [_object(typing.get_args(option)[0], item) for item in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if kind is float and whole and abs(value) < 2**53 else value


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


def _nested(name: str, value: Any) -> dict[str, Any]:
    """`lora.r` and 8 as `{"lora": {"r": 8}}`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _value(name: str, kind: Any, words: list[str]) -> Any:
    """The arguments of a setting as a recipe's value: `0 2` is a list, and `a=FILE` is a name: value pair."""
    choices = options(kind)
    starts = words[0][:1] if len(words) == 1 else ""
    if {dict[str, str], dict[str, Any]} & set(choices) and starts != "{" and words != ["null"]:
        return _pairs(name, words, typed=dict[str, Any] in choices)
    (item,) = [typing.get_args(option)[0] for option in choices if typing.get_origin(option) is list] or [None]
    always_list = len({*choices} - {type(None)}) == 1 and starts != "[" and words != ["null"]
    if item in {str, int, float} and (always_list or len(words) != 1):
        return [_word(name, item, word) for word in words]
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise LetheError(f"{name}: expected {spoken(kind)}, got {printable(' '.join(words), 80) or 'nothing'}")
    return _word(name, kind, words[0])


def _word(name: str, kind: Any, word: str) -> Any:
    """One word: text as it is written where the setting may be text, and YAML elsewhere."""
    choices = options(kind)
    if word == "null" and type(None) in choices:
        return None
    holds_settings = any(dataclasses.is_dataclass(option) for option in choices) and word.startswith(("{", "[{"))
    if (str in choices and not holds_settings) or any(typing.get_origin(option) is Literal for option in choices):
        return word
    try:
        value = files.yaml_of(word)
    except files.UnreadableError as error:
        raise LetheError(f"{name}: '{printable(word, 80)}' cannot be read ({error})") from error
    if isinstance(value, dict | list):
        refuse_unusable(name, value)
    return value


def _pairs(name: str, words: list[str], typed: bool) -> dict[str, Any]:
    """`a=FILE b=FILE` as a mapping; typed: the values are YAML, such as `lr=[1e-3, 1e-2]`."""
    parts = [word.partition("=") for word in words]
    wrong = [word for word, (key, _, value) in zip(words, parts, strict=True) if not key or not value]
    if wrong or not words:
        raise LetheError(f"{name}: expected name=value, got {repr(wrong[0]) if wrong else 'nothing'}")
    found = {key: _word(name, Any if typed else str, value) for key, _, value in parts}
    if len(found) < len(parts):
        raise LetheError(f"{name}: a name is written twice in {' '.join(words)}; write each once")
    return found


def _read(recipe: list[str]) -> Part:
    """The name and the content of the recipe that `--config` names."""
    if len(recipe) != 1:
        raise LetheError(f"config: expected one recipe, got {' '.join(recipe) or 'nothing'}")
    text = recipes.text_of(recipe[0])
    try:
        content = files.yaml_of(text)
        refuse_unusable("", content)
    except files.UnreadableError as error:
        raise LetheError(f"config: '{recipe[0]}' cannot be read ({error})") from error
    except LetheError as error:
        raise LetheError(f"config: '{recipe[0]}': {str(error).removeprefix(': ')}") from error
    if not isinstance(content, dict):
        raise LetheError(f"config: '{recipe[0]}' holds no settings; a recipe is a list of name: value lines")
    return recipe[0], content


def _combined(config: type, parts: Iterable[Part]) -> Any:
    """The config object of settings in their order: later ones replace earlier ones, and the defaults.

    Raises:
        LetheError: a setting does not exist, or its value is not allowed.
    """
    return _object(config, _together(config, _defaults(config), parts))


def filled(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a variant of `config`, those that are given and the defaults of the others. Values are not checked.

    Raises:
        LetheError: a setting does not exist.
    """
    config = _variant(config, given, trusts=False)
    defaults = {f.name: default_of(f) for f in dataclasses.fields(config)}
    return _together(config, defaults | _defaults(config), [(None, given)])


def _together(config: type, made: dict[str, Any], parts: Iterable[Part]) -> Any:
    """Plain data with the settings of all parts, in their order.

    Raises:
        LetheError: a setting does not exist.
    """
    known = fields_of(config)
    for recipe, content in parts:
        try:
            made = _merged(made, content, known)
        except KeyError as error:
            what = f"config: '{recipe}' has an unknown field" if recipe else "there is no setting"
            raise LetheError(f"{what} '{error.args[0]}'{_advice(error.args[0], known, config)}") from None
    return made


def _merged(old: Any, new: Any, known: dict[str, Any], prefix: str = "") -> Any:
    """Plain data with new values over old ones; of nested settings, those that are not named stay.

    Raises:
        KeyError: the dotted name of a setting that is not known.
    """
    if isinstance(new, list):
        return [_merged(None, each, known, prefix) for each in new]
    if not isinstance(new, Mapping):
        return new
    made = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        nested = any(map(dataclasses.is_dataclass, options(known[f"{prefix}{key}"])))
        made[key] = _merged(made.get(key), value, known, f"{prefix}{key}.") if nested else value
    return made


def _variant(config: Any, *given: Mapping[Any, Any], trusts: bool) -> type:
    """The class that has the settings: `config`, or the one that it chooses by what is given (a later setting counts).

    `trusts`: the user gives these settings, so that a file which they name as the method may run.
    """
    if not hasattr(config, "variant"):
        return config
    together = dict(itertools.chain.from_iterable(each.items() for each in given))
    if trusts:
        config.trust(together)
    return config.variant(together)


def _defaults(config: type) -> dict[str, Any]:
    """Default values of nested settings as plain data, so that a recipe may change one setting of them."""
    made = {f.name: default_of(f) for f in dataclasses.fields(config)}
    return {name: to_dict(value) for name, value in made.items() if dataclasses.is_dataclass(value)}


def fields_of(config: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields, with their types."""
    found: dict[str, Any] = {}
    for name, kind in types_of(config).items():
        found[prefix + name] = kind
        for option in filter(dataclasses.is_dataclass, options(kind)):
            found |= fields_of(option, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def _advice(name: str, known: dict[str, Any], config: Any) -> str:
    """What to write instead of an unknown setting: its new name, the method that has it, or the nearest setting."""
    if new := RENAMED.get(name.rsplit(".", 1)[-1]):
        return f"; {new}"
    if hasattr(config, "elsewhere") and (owner := config.elsewhere(name)):
        return f"; it is a setting of method {owner}"
    for full in known:
        if full.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]:
            return f"; did you mean '{full}'?"
    return nearest(name, known)


def _help(command: str, config: Any, example: str, about: str) -> str:
    if hasattr(config, "variant"):  # a method has formulas to show
        about = f"{about}\n\nmethod {config.title()}: {inspect.cleandoc(config.__doc__ or '')}"
    parser = argparse.ArgumentParser(
        usage=f"lethe {command} [--config RECIPE] [--name value ...]",
        description=about,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = "A recipe: a YAML file, or a name that `lethe recipes` lists. Other options override it."
    parser.add_argument("--config", metavar="RECIPE", help=recipe)
    parser.add_argument("--print_config", action="store_true", help="Print the settings as a recipe, and do nothing else.")
    parser.add_argument("--json", action="store_true", help="Print the answer as JSON alone.")
    for name, text in _described(config):
        parser.add_argument(f"--{name}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser.format_help()


def _described(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting with the text below its field, its type and its default."""
    texts: dict[str, str] = {}
    for each in filter(dataclasses.is_dataclass, reversed(config.__mro__)):
        texts |= {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(each).params}
    for f in dataclasses.fields(config):
        kind = types_of(config)[f.name]
        default = default_of(f)
        fallback = "required" if default is dataclasses.MISSING else f"default: {json.dumps(default, default=to_dict)}"
        yield f"{prefix}{f.name}", f"{texts.get(f.name, '')} ({spoken(kind)}; {fallback})"
        for option in filter(dataclasses.is_dataclass, options(kind)):
            yield from _described(option, f"{prefix}{f.name}.")
