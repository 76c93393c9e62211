"""Snapshots of repositories of the Hugging Face hub, in its cache. Failures of the hub are refusals with a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lethe.errors import LetheError


@contextlib.contextmanager
def hub(problem: str) -> Iterator[None]:
    """Inside, a failure of the hub becomes a LetheError: the problem, and the hub's reason.

    Raises:
        LetheError: there is no connection, it breaks, or the hub does not have the file or denies access.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # a broken connection is not an OSError
    )

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"{problem} ({why})") from error


def snapshot(repository: str, revision: str, patterns: list[str], what: str = "model reference") -> Path:
    """The folder of a repository at one commit, with the files that these patterns match. Its name is the commit.

    `what`: what the repository was named as, for the error.
    """
    from huggingface_hub import snapshot_download

    with hub(f"{what} '{repository}@{revision}': there is no such folder, and the repository cannot be read"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
