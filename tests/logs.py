"""Logs written by hand, for tests of importing them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lethe.config import ImportConfig
from lethe.runs.importing import Imported, import_log
from lethe.runs.run import Run

HEAD = "| Job ID | retain_coef | cb_loss | MMLU |\n|---|---|---|---|\n"
TABLE = HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n"


def imported_text(folder: Path, text: str, **settings: Any) -> Imported:
    """What importing a text does."""
    (folder / "notes.md").write_text(text)
    return import_log(ImportConfig(str(folder / "notes.md"), out=str(folder / "runs"), **settings))


def jobs(runs: Iterable[Run]) -> list[str]:
    """The runs' job ids."""
    return [run.record["job_id"] for run in runs]
