"""Folders of runs: which names they may have, where they may be made, and that nothing is written outside of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lethe.errors import LetheError, printable

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
