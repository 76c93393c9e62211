"""Files of the Hugging Face hub, downloaded into its cache. Failures of the hub are refusals with a reason."""

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


def fetch(repository: str, revision: str, name: str) -> Path:
    """A file of a repository.

    Raises:
        LetheError: it cannot be read.
    """
    from huggingface_hub import hf_hub_download

    with hub(f"model reference '{repository}@{revision}': there is no such folder, and the repository cannot be read"):
        return Path(hf_hub_download(repository, name, revision=revision))


def fetch_optional(repository: str, revision: str, name: str) -> Path | None:
    """As `fetch`; None if the repository has no such file."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return fetch(repository, revision, name)
    except LetheError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise
