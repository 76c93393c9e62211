"""Recipes that come with Lethe: YAML files below `lethe/recipes/`, each named by its path there without `.yaml`.

    lethe unlearn --config lab                          lethe sweep --config sweeps/lab-boundary

A recipe begins with two comments: what it is, and the command that runs it. `lethe recipes` lists both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lethe import files
from lethe.errors import LetheError, nearest

FOLDER = Path(__file__).parent.parent / "recipes"


@dataclass
class Recipe:
    """A recipe that comes with Lethe."""

    name: str
    about: str
    command: str
    text: str


def names() -> list[str]:
    """The names of all recipes that come with Lethe."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        LetheError: no recipe has this name.
    """
    if name not in names():
        raise LetheError(f"recipe: there is no recipe '{name}'{nearest(name, names())}; `lethe recipes` lists the recipes")
    text = files.text_of(FOLDER / f"{name}.yaml")
    about, command = (line.removeprefix("# ") for line in text.splitlines()[:2])
    return Recipe(name, about, command.partition(": ")[2], text)


def text_of(recipe: str | Path) -> str:
    """The text of a recipe: of a file, or else of the recipe that comes with Lethe under this name.

    Raises:
        LetheError: there is neither, or the file cannot be read.
    """
    given = str(recipe)
    if given in names() and not os.path.isfile(given):
        return named(given).text
    try:
        return files.text_of(given)
    except files.UnreadableError as error:
        if os.path.lexists(given) or given.endswith((".yaml", ".yml")):
            raise LetheError(f"config: '{given}' cannot be read ({error})") from error
        advice = f"{nearest(given, names())}; `lethe recipes` lists the recipes"
        raise LetheError(f"config: there is no file and no recipe '{given}'{advice}") from error
