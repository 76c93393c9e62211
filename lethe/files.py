"""Files: reading text, JSON and YAML that others wrote, writing atomically, and what a run's folder and name may be.

    text_of(path) -> str        json_of(text) -> Any        yaml_of(text, loader) -> Any

These raise `UnreadableError`, whose message says what is wrong. The caller adds which file it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import yaml

from lethe.errors import LetheError, printable

LFS = "version https://git-lfs.github.com/spec/"
"""The first characters of a Git LFS pointer."""
LFS_POINTER = "a Git LFS pointer, not the file itself; fetch it: git lfs pull"


class UnreadableError(LetheError):
    """A text cannot be read; the message says why in a few words."""


def text_of(path: str | Path) -> str:
    """The text of a UTF-8 file, with a byte-order mark or without.

    Raises:
        UnreadableError: the file does not exist, cannot be opened, is not UTF-8, or is a Git LFS pointer.
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
    """Whether a file is the pointer that Git LFS leaves in place of a large file that was not fetched."""
    with Path(path).open("rb") as file:
        return file.read(len(LFS)) == LFS.encode()


def json_of(text: str, twice: bool = False) -> Any:
    """A JSON value. `twice`: a key may be written twice, and the last one counts. This is faster, as nothing is checked.

    Raises:
        UnreadableError: the text is not JSON, is nested too deeply, or has a key twice or a lone surrogate.
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
    """A YAML value; `loader` is a subclass of `Loader`, by default `SettingsLoader`.

    Raises:
        UnreadableError: the text is not YAML, is nested too deeply, or has a key twice.
    """
    try:
        return yaml.load(text, loader or SettingsLoader)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45 in a task
        raise UnreadableError(f"not YAML: {' '.join(str(error).split())}") from error


class Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key that is written twice, because the first one would have no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' is written twice")
        return super().construct_mapping(node, deep)


class SettingsLoader(Loader):
    """Settings: `1e-3` is a number, as in YAML 1.2, and a date is text. What stands in quotes is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
        for first, rules in Loader.yaml_implicit_resolvers.items()
    }


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class SettingsDumper(yaml.SafeDumper):
    """Writes settings so that `SettingsLoader` reads the same: a text such as 1e-3 in quotes."""

    yaml_implicit_resolvers = SettingsLoader.yaml_implicit_resolvers


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UnreadableError(f"'{next(name for name in names if names.count(name) > 1)}' is written twice")
    return found


def write_atomically(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Replace `path` as a whole or not at all. Without `sync`, which is slow, a crash may leave it empty."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # "x": never through a link
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(*paths: Path) -> str:
    """SHA-256 over the names and contents of files, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


RUN = "run.json"
JOURNAL = "study.journal"
LONGEST_NAME = 255


def refuse_run_folder(out: str | Path) -> None:
    """Refuse an output folder that is itself a run, because two runs would be mixed up, or that cannot be written.

    Raises:
        LetheError: the folder is a run, or cannot be written.
    """
    if not str(out).strip():
        raise LetheError("out: names no folder; give one, or . for the current one")
    try:
        if (Path(out) / RUN).exists():
            raise LetheError(f"out: '{out}' already holds a run; give a folder to write runs to")
        if Path(out).exists() and not Path(out).is_dir():
            raise LetheError(f"out: '{out}' is a file; give a folder")
        above = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        why = getattr(error, "strerror", None) or error
        raise LetheError(f"out: '{printable(out, 80)}' cannot be a folder ({why}); choose another") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "no permission, or read-only" if above.is_dir() else f"'{above}' is a file"
        raise LetheError(f"out: cannot write to '{out}' ({why}); choose another folder")


def refuse_name(name: str) -> None:
    """Refuse a name that no folder can have, or with control characters.

    Raises:
        LetheError: it is empty, too long, or has control characters.
    """
    longest = LONGEST_NAME - len("checkpoints--01234567")
    if name.strip() in {"", ".", ".."}:
        raise LetheError(f"name: '{name}' is not a name; use letters or digits")
    if printable(name) != name:
        raise LetheError(f"name: '{printable(name, 80)}' has control characters; leave them out")
    if len(slug(name).encode()) > longest:
        raise LetheError(f"name: '{printable(name, 80)}' is longer than a folder's name may be; {longest} bytes at most")


def slug(name: str) -> str:
    """A name as a part of a folder's name: other characters than letters, digits and ._- become -."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def is_folder_name(value: Any) -> bool:
    """Whether a text can be the name of a folder: no path, no control characters."""
    return isinstance(value, str) and value not in {"", ".", ".."} and "/" not in value and printable(value) == value


def refuse_links(folder: Path) -> None:
    """Refuse a run's folder that has links out of it, through which Lethe would write elsewhere, or that has pipes.

    Raises:
        LetheError: there is such a link or pipe.
    """
    inside = folder.resolve()
    for where, folders, files in os.walk(folder):
        for path in (Path(where) / name for name in (*folders, *files)):
            if path.is_symlink():
                optunas = path.name == f"{JOURNAL}.lock"  # Optuna's lock is a link
                if not optunas and not path.resolve().is_relative_to(inside):
                    raise LetheError(
                        f"run: '{path}' links to '{path.readlink()}', outside the run's folder; copy the file there"
                    )
            elif not path.is_file() and not path.is_dir():
                raise LetheError(f"run: '{path}' is not a regular file; remove it")
