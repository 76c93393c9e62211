"""The hub: files of its repositories, fetched into its cache, and what keeps it from answering as a refusal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lethe.errors import LetheError


@contextlib.contextmanager
def hub(problem: str) -> Iterator[None]:
    """Inside, what keeps the hub from answering is a refusal: the problem, and why.

    Raises:
        LetheError: there is no connection or it breaks, the hub does not have it, or does not let it be read.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # of a connection that breaks, no OSError
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

    with hub(f"model reference '{repository}@{revision}': no such folder here, and the hub's cannot be read"):
        return Path(hf_hub_download(repository, name, revision=revision))


def fetch_optional(repository: str, revision: str, name: str) -> Path | None:
    """A file that a repository may have; None if it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return fetch(repository, revision, name)
    except LetheError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise
