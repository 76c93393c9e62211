"""Forget and retain text: from where it lies to rows of token ids.

    TextSource -> documents -> the documents of this run -> token ids, cut at max_length -> padded batches

Which documents a run uses is decided by their content alone: all documents are put in the order of their SHA-256, and
unlearning takes from the front of that order while attacks and held-out scores take from the back. So an attack's text
is disjoint from the text used to unlearn as long as there is enough of it, whatever the seeds; the seed decides only
in which order the documents come. Reading needs no torch, so that empty or broken text is refused at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import string
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import files
from lethe.config import TextSource, as_text_source
from lethe.errors import LetheError, nearest
from lethe.models import refs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LAB_TEXTS = ("forget", "retain")
_already: ContextVar[dict[str, list[Document]] | None] = ContextVar("_already", default=None)


@dataclass(frozen=True)
class Document:
    """A text and the SHA-256 that names it."""

    text: str
    id: str


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Inside, what was read of a source is kept: many recipes over the same text are checked."""
    token = _already.set({})
    try:
        yield
    finally:
        _already.reset(token)


def read(text: str | TextSource) -> list[Document]:
    """All documents of a source, without repetitions, in the order of their SHA-256.

    Raises:
        LetheError: the text is missing, unreadable (naming the line), empty, or lacks the column.
    """
    source, already = as_text_source(text), _already.get()
    if already is None:
        return _read(source)
    if repr(source) not in already:
        already[repr(source)] = _read(source)
    return already[repr(source)]


def _read(source: TextSource) -> list[Document]:
    documents: dict[str, Document] = {}
    for where, record in _records(source):
        body = _body(record, source, where)
        if body.strip():
            key = hashlib.sha256(body.encode()).hexdigest()
            documents.setdefault(key, Document(body, key))
    if not documents:
        raise LetheError(f"text '{source.source}' is empty: it holds no document with a word in it")
    return [documents[key] for key in sorted(documents)]


def take(
    documents: list[Document], count: int | None, end: Literal["front", "back"], what: str = "text", most: int = 0
) -> list[Document]:
    """`count` documents (0: all) from one end of the order; None: as many as there are, up to `most`.

    Raises:
        LetheError: there are fewer.
    """
    if count is None:
        count = min(most, len(documents))
    if count > len(documents):
        raise LetheError(f"{what} has {len(documents)} documents, {count} are asked for; ask for fewer, or 0 for all")
    if count == 0:
        return documents
    return documents[:count] if end == "front" else documents[-count:]


def select(
    text: str | TextSource | list[TextSource],
    count: int | None,
    end: Literal["front", "back"],
    what: str = "text",
    most: int = 0,
) -> list[Document]:
    """`count` documents (0: all) of a source, or of a mixture of sources in proportion to their weights.

    None takes as many as there are, up to `most`. There are as many documents in a mixture as its weights allow.

    Raises:
        LetheError: a source cannot be read or has too few documents.
    """
    if not isinstance(text, list):
        return take(read(text), count, end, what, most)
    pools: list[list[Document]] = []
    seen: set[str] = set()
    for source in text:  # a document of several sources belongs to the first
        pools.append([document for document in read(source) if document.id not in seen])
        seen |= {document.id for document in pools[-1]}
    total = sum(source.weight for source in text)
    there = int(min(len(pool) * total / source.weight for pool, source in zip(pools, text, strict=True)))
    wanted = min(most, there) if count is None else count or there
    bounds = [round(wanted * sum(s.weight for s in text[:i]) / total) for i in range(len(text) + 1)]
    chosen: dict[str, Document] = {}
    for pool, source, low, high in zip(pools, text, bounds, bounds[1:], strict=False):
        part = take(pool, high - low, end, f"{what} '{source.source}'") if high > low else []
        chosen |= {document.id: document for document in part}
    return list(chosen.values())


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents' own, in order: equal for equal documents and only for those."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode())
    return digest.hexdigest()


def record(text: str | TextSource | list[TextSource], documents: list[Document]) -> dict[str, Any]:
    """The text of a run, for run.json; a mixture is named `weight·source + …`."""
    if isinstance(text, list):
        name = " + ".join(f"{source.weight:g}·{source.source}" for source in text)
    else:
        name = as_text_source(text).source
    return {"ref": name, "documents": len(documents), "sha256": fingerprint(documents)}


def tokenise(documents: list[Document], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """One row of token ids a document, cut at `max_length` tokens, with the tokenizer's own special tokens.

    Raises:
        LetheError: a document has no token.
    """
    rows = tokenizer([d.text for d in documents], truncation=True, max_length=max_length)["input_ids"]
    for document, row in zip(documents, rows, strict=True):
        if not row:
            raise LetheError(f"a document has no token: {document.text[:60]!r}; remove it")
    return rows


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Documents one after the other, each closed by the end-of-text token, cut into blocks of `length` tokens.

    The last block is shorter when the tokens do not come out even: none is lost.

    Raises:
        LetheError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise LetheError("packing: packed needs a tokenizer with an end-of-text token; use packing none")
    stream: list[int] = []
    for row in tokenizer([d.text for d in documents])["input_ids"]:
        stream += [*row, tokenizer.eos_token_id]
    return [stream[i : i + length] for i in range(0, len(stream), length)]


def rows_of(documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int, packing: str) -> list[list[int]]:
    """Token rows as `packing` says: `none` is one row a document, `packed` packs them."""
    return pack(documents, tokenizer, length) if packing == "packed" else tokenise(documents, tokenizer, length)


def pad(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as `input_ids` and `mask` (1 for a token, 0 for padding), both [rows, longest], padded on the right.

    A causal model's activations on the tokens do not depend on padding that follows them, so no attention mask is
    needed; the mask says which positions count.
    """
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def _records(source: TextSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a source, with where it stands there: `line 3` of a file, `row 3` of a table."""
    name = source.source
    if name.startswith("lab:"):
        what = name.removeprefix("lab:")
        if what not in LAB_TEXTS:
            raise LetheError(f"text '{name}': the lab has no such text{nearest(what, LAB_TEXTS)}")
        return _jsonl(refs.lab_folder() / "text" / f"{what}.jsonl", name)
    path = Path(name)
    if path.suffix in {".jsonl", ".parquet", ".txt"}:
        if not path.is_file():
            raise LetheError(f"text '{name}': there is no such file")
        if path.suffix == ".parquet":
            return _parquet(path, source)
        return _jsonl(path, name) if path.suffix == ".jsonl" else _txt(path, name)
    if path.exists():
        raise LetheError(f"text '{name}': give a .jsonl, .parquet or .txt file, lab:forget, lab:retain or a hub data set")
    return _hub(source)


def _txt(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path, name):
        yield where, {"text": line}


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path, name):
        try:
            record = files.json_of(line)
        except files.UnreadableError as error:
            raise LetheError(f"text '{name}', {where}: {error}; mend or remove the line") from error
        if not isinstance(record, dict):
            raise LetheError(f"text '{name}', {where}: expected an object with columns, got {type(record).__name__}")
        yield where, record


def _lines(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        content = files.text_of(path)
    except files.UnreadableError as error:
        raise LetheError(f"text '{name}' cannot be read ({error})") from error
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _parquet(path: Path, source: TextSource) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names, wanted = file.schema_arrow.names, _columns(source)
        twice = next((column for column in wanted if names.count(column) > 1), None)
        rows = [] if twice else file.read(wanted if set(wanted) <= set(names) else None).to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # a string that is no UTF-8, a far date
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise LetheError(f"text '{source.source}' cannot be read as parquet ({why}); write the file again") from error
    if twice:
        raise LetheError(f"text '{source.source}': there are several columns '{twice}'; rename all but one")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _hub(source: TextSource) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, configuration = source.source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=source.split)
    except Exception as error:  # load_dataset raises errors of a dozen libraries; each means the same here
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"text '{source.source}' is no file here and cannot be loaded as a hub data set ({why})") from error
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _body(record: dict[str, Any], source: TextSource, where: str) -> str:
    columns = _columns(source)
    for column in columns:
        if column in record and record[column] is None:
            raise LetheError(f"text '{source.source}', {where}: column '{column}' is null; give it a text, or remove it")
        if not isinstance(record.get(column), str):
            have = ", ".join(k for k, v in record.items() if isinstance(v, str)) or "none"
            raise LetheError(
                f"text '{source.source}', {where}: no text column '{column}' (text columns: {have}); "
                "name it with column or template"
            )
    return source.template.format(**record) if source.template else record[source.column]


def _columns(source: TextSource) -> list[str]:
    """The columns that a document is made of."""
    if source.template is None:
        return [source.column]
    try:
        parts = [
            (name, form, change) for _, name, form, change in string.Formatter().parse(source.template) if name is not None
        ]
    except ValueError as error:
        raise LetheError(f"template: {source.template!r} cannot be filled ({error}); write columns as {{name}}") from error
    if not parts or any(form or change or not name for name, form, change in parts):
        raise LetheError(f"template: {source.template!r} must name columns, each as {{name}} alone")
    return [name for name, _, _ in parts]
