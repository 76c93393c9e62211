"""Reading what somebody else wrote: text, JSON and YAML, each refused in one line that a caller can name its file in.

    text_of(path) -> str        json_of(text) -> Any        yaml_of(text, loader) -> Any

All raise `UnreadableError`, whose message says what is wrong and not where: the caller knows what the file is to the user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lethe.errors import LetheError

LFS = "version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins."""
LFS_POINTER = "a Git LFS pointer, not the file itself; fetch it: git lfs pull"


class UnreadableError(LetheError):
    """What is wrong with a text that was to be read, in a few words."""


def text_of(path: str | Path) -> str:
    """The text of a UTF-8 file, with a byte-order mark or without.

    Raises:
        UnreadableError: there is no such file, it cannot be opened, it is not UTF-8, or a pointer of Git LFS in its place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        target = Path(path)
        broken = target.is_symlink()
        raise UnreadableError(f"a broken link to '{target.readlink()}'" if broken else "there is no such file") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if text.startswith(LFS):
        raise UnreadableError(LFS_POINTER)
    return text


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of a large one that was not fetched."""
    with Path(path).open("rb") as file:
        return file.read(len(LFS)) == LFS.encode()


def json_of(text: str, twice: bool = False) -> Any:
    """A JSON value. `twice`: a key may be written twice, the last one counts; that is not looked for, which is faster.

    Raises:
        UnreadableError: not JSON, too deep, a key written twice, or text that is half of a character (a lone surrogate).
    """
    try:
        value = json.loads(text, object_pairs_hook=None if twice else _object)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise UnreadableError("half of a character (a lone surrogate); write the character itself") from error
    except UnreadableError:
        raise
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from error
    return value


def yaml_of(text: str, loader: type | None = None) -> Any:
    """A YAML value; `loader` is a subclass of `Loader`.

    Raises:
        UnreadableError: not YAML, too deep, or a key written twice.
    """
    try:
        return yaml.load(text, loader or Loader)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise UnreadableError(f"not YAML: {' '.join(str(error).split())}") from error


class Loader(yaml.SafeLoader):
    """Refuses a key that is written twice: the first would have no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' is written twice")
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UnreadableError(f"'{next(name for name in names if names.count(name) > 1)}' is written twice")
    return found
