"""Where a sweep's Optuna study is stored: a journal file in the sweep's folder, or a database.

A process that is killed while it writes may leave half of a record at the end of the journal, and the next record would join it
in one line. So the journal is repaired before it is used: the half record is removed, joined records are separated. Nothing
is lost by that, since a trial's results are read from its runs. Any other damage is refused.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

import optuna

from lethe.errors import LetheError
from lethe.files import JOURNAL, UnreadableError, json_of, write_atomically
from lethe.runs.record import TRIAL

Direction = Literal["minimize", "maximize"]
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError)
"""What Optuna raises over records that do not fit together."""
ADVICE = "restore it from a backup, or start a new sweep (which reuses the complete runs)"
logger = logging.getLogger(__name__)


def studies(
    url: str | None, folder: Path, name: str, directions: list[Direction], sampler: optuna.samplers.BaseSampler | None = None
) -> tuple[optuna.Study, optuna.Study]:
    """The Optuna study of that name and that of its references, created if they do not exist.

    Raises:
        LetheError: the database cannot be opened, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / JOURNAL
    if not url and file.exists():
        repair(file)
    try:
        storage = storage_of(url, folder)
        existing = set(optuna.get_all_study_names(storage))
        made = []
        goals: dict[str, list[Direction]] = {name: directions, f"{name} references": ["minimize"]}
        for each, wanted in goals.items():
            if each not in existing:
                optuna.create_study(study_name=each, storage=storage, load_if_exists=True, directions=wanted)
            made.append(optuna.load_study(study_name=each, storage=storage, sampler=sampler))
        trials = [trial for study in made for trial in study.get_trials(deepcopy=False)]
        wrong = [f"trial {trial.number}{found}" for trial in trials if (found := TRIAL(trial.user_attrs)) is not None]
    except DAMAGED as error:
        raise LetheError(f"sweep: the records in '{url or file}' do not fit together ({error!r}); {ADVICE}") from error
    if wrong:
        raise LetheError(f"sweep: '{url or file}' is not of a sweep: {wrong[0]}; {ADVICE}")
    return made[0], made[1]


def storage_of(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    """The storage of the Optuna study.

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
        why = str(error).splitlines()[0]
        raise LetheError(f"storage: '{url}' cannot be opened ({why}); give another URL, or null") from error


def repair(file: Path) -> None:
    """Remove from a journal what a crash cut short, and log it.

    Raises:
        LetheError: it has other damage, or cannot be written.
    """
    from optuna.storages.journal import JournalFileSymlinkLock
    from optuna.storages.journal._file import get_lock_file  # the lock that Optuna itself writes under has no public name

    try:
        if not _repaired(file)[1]:
            return
        with get_lock_file(JournalFileSymlinkLock(str(file))):  # another controller may be writing that last line now
            records, changes = _repaired(file)
            if changes:
                write_atomically(file, "".join(f"{record}\n" for record in records))
    except OSError as error:
        raise LetheError(f"sweep: '{file}' cannot be repaired ({error.strerror}); make it readable and writable") from error
    for change in changes:
        logger.error("'%s': %s", file, change)


def _repaired(file: Path) -> tuple[list[str], list[str]]:
    """The whole records of a journal, and what was changed to get them."""
    *lines, last = file.read_bytes().decode(errors="replace").split("\n")
    records: list[str] = []
    changes: list[str] = []
    damaged: list[str] = []
    for number, line in enumerate(lines, 1):
        # Within a record's own text, quotes are escaped: this is where another one begins.
        whole = [line] if _is_record(line) else [part for part in re.split(r'(?=\{"op_code":)', line) if _is_record(part)]
        if not whole or not line.endswith(whole[-1]):
            damaged.append(str(number))
        elif whole != [line]:
            changes.append(f"line {number} holds two records, the first cut short by a crash; {len(whole)} could be read")
        records += whole
    if last:  # without a line break
        whole = [last] if _is_record(last) else []
        changes.append(f"line {len(lines) + 1} was cut short by a crash; {'completed' if whole else 'removed'}")
        records += whole
    if damaged:
        raise LetheError(f"sweep: '{file}' is damaged in line {', '.join(damaged[:5])}; {ADVICE}")
    return records, changes


def _is_record(line: str) -> bool:
    try:
        record = json_of(line)
    except UnreadableError:
        return False
    return isinstance(record, dict) and type(record.get("op_code")) is int and isinstance(record.get("worker_id"), str)
