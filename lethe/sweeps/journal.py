"""A sweep's study: Optuna's journal in the sweep's folder, or a database. It is read before anything is written to it.

A process that is killed while it writes leaves a last line that is cut short, and the next record would join it. So what is
cut short is removed first, and two records in one line are separated. A record lost in this way costs nothing, since the result
of a trial is read from its runs. Any other damage is refused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import optuna

from lethe.errors import LetheError
from lethe.files import JOURNAL, UnreadableError, json_of, write_atomically
from lethe.runs.record import TRIAL

FIRST = '{"op_code":'
"""How Optuna begins every record."""
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError)
"""What Optuna raises over records that do not belong together."""
logger = logging.getLogger(__name__)


def studies(url: str | None, folder: Path, name: str, **settings: Any) -> tuple[optuna.Study, optuna.Study]:
    """The study of that name and that of its references, made if they are not there.

    Raises:
        LetheError: the database cannot be opened, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / JOURNAL
    if not url and file.exists():
        mend(file)
    try:
        storage = storage_of(url, folder)
        there = {study.study_name for study in storage.get_all_studies()}
        first, second = name, f"{name} references"
        made = [
            optuna.load_study(study_name=each, storage=storage, sampler=how.get("sampler"))
            if each in there
            else optuna.create_study(study_name=each, storage=storage, load_if_exists=True, **how)
            for each, how in ((first, settings), (second, {}))
        ]
        wrong = [
            f"trial {trial.number}{found}"
            for study in made
            for trial in study.get_trials(deepcopy=False)
            if (found := TRIAL(trial.user_attrs)) is not None
        ]
    except DAMAGED as error:
        raise LetheError(f"sweep: '{url or file}' does not hold together ({error!r}); {_ADVICE}") from error
    if wrong:
        raise LetheError(f"sweep: '{url or file}' is not of a sweep: {wrong[0]}; {_ADVICE}")
    return made[0], made[1]


def storage_of(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    """Where the study is kept.

    Raises:
        LetheError: the database cannot be opened.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if not url:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    if url in {"sqlite://", "sqlite:///:memory:"}:
        raise LetheError(f"storage: '{url}' is lost when this process ends; name a file, such as sqlite:///study.db, or null")
    try:
        return RDBStorage(url)
    except (SQLAlchemyError, StorageInternalError, ImportError, LookupError, ValueError) as error:  # the last two: a brace
        raise LetheError(
            f"storage: '{url}' cannot be opened ({str(error).splitlines()[0]}); give another URL, or null"
        ) from error


def mend(file: Path) -> None:
    """Remove from a journal what was cut short by a crash, and report it.

    Raises:
        LetheError: something else is wrong with it, or it cannot be written.
    """
    from optuna.storages.journal import JournalFileSymlinkLock
    from optuna.storages.journal._file import get_lock_file

    try:
        if not _mended(file)[1]:
            return
        with get_lock_file(JournalFileSymlinkLock(str(file))):  # another controller may be writing that last line now
            lines, said = _mended(file)
            if said:
                write_atomically(file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise LetheError(f"sweep: '{file}' cannot be read and mended ({error.strerror}); see that it can be written") from error
    for each in said:
        logger.error("'%s': %s", file, each)


def _mended(file: Path) -> tuple[list[str], list[str]]:
    """The whole records of a journal, one a line, and what was changed to get them."""
    lines = file.read_bytes().decode(errors="replace").split("\n")
    kept, said, damaged = [], [], []
    for number, line in enumerate(lines, 1):
        whole = [line] if _is_record(line) else _apart(line)
        if number == len(lines):
            if line:  # without a line break
                said.append(f"line {number} was cut short by a crash; " + ("its end is put back" if whole else "taken out"))
        elif not whole:
            damaged.append(str(number))
        elif whole != [line]:
            said.append(f"line {number} holds two records, of which a crash cut the first short; {len(whole)} kept")
        kept += whole
    if damaged:
        raise LetheError(f"sweep: '{file}' is damaged in line {', '.join(damaged[:5])}; {_ADVICE}")
    return kept, said


def _apart(line: str) -> list[str]:
    """The records in a line that one was joined to; none if there is no whole one at its end."""
    start = line.find(FIRST, 1)
    while start > 0:
        if _is_record(line[start:]):
            return [part for part in (line[:start], line[start:]) if _is_record(part)]
        start = line.find(FIRST, start + 1)
    return []


def _is_record(line: str) -> bool:
    try:
        record = json_of(line)
    except UnreadableError:
        return False
    return isinstance(record, dict) and type(record.get("op_code")) is int and isinstance(record.get("worker_id"), str)


_ADVICE = "put back a copy of it, or start a new sweep (its runs that are complete are not run again)"
