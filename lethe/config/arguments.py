"""Arguments of a command line that are not settings: the command, consent to task code, and where attacks are launched."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from lethe import config as c
from lethe.config.parse import fields_of
from lethe.errors import LetheError, nearest

TRUST = "--trust_task_code"
SUITE_WORDS = {"--suite", "--seeds", "--launcher", "--jobs"}


def command_of(words: list[str], known: Collection[str]) -> tuple[str | None, list[str]]:
    """The command's name and the arguments after it; None and the commands to list where the user requests help on several.

    Raises:
        LetheError: there is no such command.
    """
    if not words or words[0] in {"-h", "--help", "help"}:
        return None, list(known)
    two = " ".join(words[:2])
    if two in known and "-" not in two:
        return two, words[2:]
    if words[0] in known:
        return words[0], words[1:]
    group = [name for name in known if name.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in {"-h", "--help"}):
        return None, group
    given = two if group else words[0]
    raise LetheError(f"there is no command '{given}'{nearest(given, group or known)}")


def consent(words: list[str]) -> tuple[list[str], bool]:
    """The words without --trust_task_code, and its value. It is no setting, so that no recipe or record can give it."""
    rest, given = list(words), False
    while TRUST in (names := [word.split("=")[0] for word in rest]):
        at = names.index(TRUST)
        _, equals, value = rest.pop(at).partition("=")
        if not equals:
            value = rest.pop(at) if at < len(rest) and not rest[at].startswith("-") else "true"
        if value not in {"true", "false"}:
            raise LetheError(f"trust_task_code: expected true or false, got '{value}'")
        given = value == "true"
    return rest, given


def is_suite(words: list[str]) -> bool:
    """Whether the arguments of `lethe tamper` request several attacks, or one attack that is launched several times."""
    return any(word.split("=")[0] in SUITE_WORDS for word in words)


def as_suite(words: list[str], attack_of: Callable[[list[str]], Any]) -> list[str]:
    """The arguments of an attack with --seeds, --jobs or --launcher, as those of a suite that has this one attack.

    `attack_of` makes the attack's config object from words.
    """
    if any(word.split("=")[0] == "--suite" for word in words):
        return ["--help"] if {"-h", "--help"} & set(words) else words
    only_launched = fields_of(c.LaunchSettings).keys() - fields_of(c.TamperConfig).keys()
    launch: list[str] = []
    attack: list[str] = []
    into = attack
    for word in words:
        if word.startswith("--"):
            into = launch if word.removeprefix("--").split("=")[0] in only_launched else attack
        into.append(word)
    settings = attack_of(attack)
    if settings.seed:
        raise LetheError(f"seed: {settings.seed} has no effect beside seeds; name the seeds: --seeds {settings.seed} …")
    own = {name: value for name, value in c.to_dict(settings).items() if name not in {"model", "out", "name", "seed"}}
    return [settings.model, *launch, "--attacks", json.dumps({settings.name: own}), "--out", settings.out]
