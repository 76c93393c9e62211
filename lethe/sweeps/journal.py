"""Where a sweep's Optuna study is stored: a journal file in the sweep's folder, or a database.

A process that is killed while it writes may leave half of a record at the end of the journal, and the next record would join it
in one line. So this half is removed before the journal is used. Nothing is lost by that, since a trial's results are read from
its runs. Any other damage is refused.
"""

from __future__ import annotations

import logging
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
    """Complete or remove the last line of a journal if a crash cut it short, and log it.

    Raises:
        LetheError: another line is damaged, or the journal cannot be written.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    try:
        if not _checked(file)[1]:
            return
        lock = JournalFileSymlinkLock(str(file))  # Optuna's own: another controller may be writing that line now
        lock.acquire()
        try:
            lines, last = _checked(file)
            if last:
                whole = _is_record(last)
                write_atomically(file, "".join(f"{line}\n" for line in [*lines, *[last] * whole]))
                done = "completed" if whole else "removed"
                logger.error("'%s': line %d was cut short by a crash; %s", file, len(lines) + 1, done)
        finally:
            lock.release()
    except OSError as error:
        raise LetheError(f"sweep: '{file}' cannot be repaired ({error.strerror}); make it readable and writable") from error


def _checked(file: Path) -> tuple[list[str], str]:
    """The lines of a journal, and what stands after the last line break."""
    *lines, last = file.read_bytes().decode(errors="replace").split("\n")
    damaged = [str(number) for number, line in enumerate(lines, 1) if not _is_record(line)]
    if damaged:
        raise LetheError(f"sweep: '{file}' is damaged in line {', '.join(damaged[:5])}; {ADVICE}")
    return lines, last


def _is_record(line: str) -> bool:
    try:
        record = json_of(line)
    except UnreadableError:
        return False
    return isinstance(record, dict) and type(record.get("op_code")) is int and isinstance(record.get("worker_id"), str)
