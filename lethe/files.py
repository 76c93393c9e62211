"""Reading what somebody else wrote: text, JSON and YAML, each refused in one line that a caller can name its file in.

    text_of(path) -> str        json_of(text) -> Any        yaml_of(text, loader) -> Any

All raise `UnreadableError`, whose message says what is wrong and not where: the caller knows what the file is to the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import yaml

from lethe.errors import LetheError, printable

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


def write_atomically(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Replace `path`, whole or not at all; without `sync`, which may take long, a crash of the machine may leave it empty."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # never through a link
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(*paths: Path) -> str:
    """SHA-256 over the names and contents of files, in order of name."""
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
    """Refuse an output folder that is itself a run (its content would be mixed up), or that cannot be written.

    Raises:
        LetheError: says which.
    """
    if not str(out).strip():
        raise LetheError("out: names no folder; give one, or . for this one")
    try:
        if (Path(out) / RUN).exists():
            raise LetheError(f"out: '{out}' already holds a run; give the folder that runs are to be put in")
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
        raise LetheError(f"name: '{name}' is no name; give the run one with letters")
    if printable(name) != name:
        raise LetheError(f"name: '{printable(name, 80)}' has control characters; leave them out")
    if len(slug(name).encode()) > longest:
        raise LetheError(f"name: '{printable(name, 80)}' is longer than a folder's name may be; {longest} bytes at most")


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def is_folder_name(value: Any) -> bool:
    """Whether a text is the name of a folder beside others: no path, no control characters."""
    return isinstance(value, str) and value not in {"", ".", ".."} and "/" not in value and printable(value) == value


def refuse_links(folder: Path) -> None:
    """Refuse to work in a run's folder that has links out of it (what is written there would be written elsewhere) or pipes.

    Raises:
        LetheError: there is one.
    """
    inside = folder.resolve()
    for where, folders, files in os.walk(folder):
        for path in (Path(where) / name for name in (*folders, *files)):
            if path.is_symlink():
                optunas = path.name == f"{JOURNAL}.lock"  # a link to the journal, by the name that it had where it was made
                if not optunas and not path.resolve().is_relative_to(inside):
                    raise LetheError(
                        f"run: '{path}' is a link to '{path.readlink()}', out of the run's folder; put the file there"
                    )
            elif not path.is_file() and not path.is_dir():
                raise LetheError(f"run: '{path}' is no file that a run has written; remove it")
