"""The user's consent to what a sweep's record would make this machine run or open.

`slurm.setup` holds shell lines, `slurm.extra` options of sbatch, `storage` the URL of a database. A record with them may come
from anybody. So Lethe resumes a sweep only with those that the user has started a sweep with, or agrees to by
`--trust_record true`. Their hash is stored in $LETHE_HOME/trusted.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lethe.config import LaunchSettings
from lethe.errors import LetheError, printable
from lethe.home import lethe_home, store, stored


def trust(config: LaunchSettings) -> None:
    """Store that the user agrees to what these settings run or open."""
    if named := _named(config):
        store(_file(named), json.dumps(named))


def consented(config: LaunchSettings, trusts: bool) -> None:
    """Refuse a record whose settings run or open what the user has not agreed to. `trusts`: the user agrees now.

    Raises:
        LetheError: names those settings.
    """
    if trusts:
        trust(config)
    named = _named(config)
    if named and stored(_file(named)) is None:
        shown = printable(json.dumps(named, ensure_ascii=False), 600)
        raise LetheError(
            f"sweep: its record has {shown}, which Lethe would run or open as you; if you trust it, add --trust_record true"
        )


def _named(config: LaunchSettings) -> dict[str, Any]:
    named = {"slurm.setup": config.slurm.setup, "slurm.extra": config.slurm.extra, "storage": config.storage}
    return {name: value for name, value in named.items() if value}


def _file(named: dict[str, Any]) -> Path:
    return lethe_home() / "trusted" / f"{hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()}.json"
