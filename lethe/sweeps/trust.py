"""The user's consent to what a sweep's record would make this machine run or open.

`slurm.setup` holds shell lines, `slurm.extra` options of sbatch, `storage` the URL of a database, and a method may be a file of
Python code. A record with them may come from anybody. So Lethe resumes a sweep only with those that the user has started a
sweep with, or agrees to by `--trust_record true`. Their hash is stored in $LETHE_HOME/trusted. `user_file.py` stores that of
each method's file.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lethe.config import LaunchSettings, SweepConfig
from lethe.config.parse import section_of
from lethe.errors import LetheError, printable
from lethe.home import lethe_home, store, stored
from lethe.methods.user_file import hashes, trust


def consent(config: LaunchSettings, given: bool) -> None:
    """Store the user's consent to what these settings run or open, if it is `given` now. Refuse them if it never was.

    Raises:
        LetheError: names those settings.
    """
    named = {"slurm.setup": config.slurm.setup, "slurm.extra": config.slurm.extra, "storage": config.storage}
    named = {name: value for name, value in named.items() if value}
    file = lethe_home() / "trusted" / f"{hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()}.json"
    if named and given:
        store(file, json.dumps(named))
    elif named and stored(file) is None:
        shown = printable(json.dumps(named, ensure_ascii=False), 600)
        raise LetheError(
            f"sweep: its record has {shown}, which Lethe would run or open as you; if you trust it, add --trust_record true"
        )


def methods_of(config: LaunchSettings) -> list[Any]:
    """The methods that a sweep uses: that of its recipe, and those that it varies."""
    if not isinstance(config, SweepConfig):
        return []
    varied = config.vary.get("method", [])
    values = varied.get("values", []) if isinstance(varied, dict) else varied
    try:
        method = section_of(config.unlearn).get("method")
    except LetheError as error:
        raise LetheError(f"unlearn: {error}") from error
    return [method, *(values if isinstance(values, list) else [])]


def consent_to_methods(config: LaunchSettings, given: bool) -> dict[str, str]:
    """Let the files of a sweep's methods run if consent is `given` now. Returns their SHA-256, by path.

    Raises:
        LetheError: a file cannot be read.
    """
    found = hashes(methods_of(config))
    for path in found if given else ():
        trust(path)
    return found
