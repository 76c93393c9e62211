"""Forget and retain text: from its source to sequences of token ids.

    TextSource -> read -> documents -> select -> documents of this run -> sequences_of -> token ids -> pad -> batches

The content of documents alone determines which of them a run uses. All documents are in the order of their SHA-256. Unlearning
uses the front of that order, attacks and held-out scores use the back. So the text of an attack is disjoint from the text of
unlearning as long as there is enough text, whatever the seed. The seed determines the order of documents in training. Reading
needs no torch, so empty or broken text is refused at once.
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
from lethe.config.training import part_of
from lethe.errors import LetheError, full_disk, nearest
from lethe.models import refs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LAB_TEXTS = ("forget", "retain")
_cached: ContextVar[dict[str, list[Document]] | None] = ContextVar("_cached", default=None)


@dataclass(frozen=True)
class Document:
    """A text, and its SHA-256 as its name."""

    text: str
    id: str


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Inside, `read` caches the documents of each source, for the check of many recipes with the same text."""
    token = _cached.set({})
    try:
        yield
    finally:
        _cached.reset(token)


def read(text: str | TextSource) -> list[Document]:
    """All documents of a source, without repetitions, in the order of their SHA-256.

    Raises:
        LetheError: the text is missing, empty, or a line is unreadable or lacks the column.
    """
    source, cached = as_text_source(text), _cached.get()
    if cached is None:
        return _read(source)
    if repr(source) not in cached:
        cached[repr(source)] = _read(source)
    return cached[repr(source)]


def _read(source: TextSource) -> list[Document]:
    documents: dict[str, Document] = {}
    for where, record in _records(source):
        body = _body(record, source, where)
        if body.strip():
            key = hashlib.sha256(body.encode()).hexdigest()
            documents.setdefault(key, Document(body, key))
    if not documents:
        raise LetheError(f"text '{source.source}' has no document with text in it; give another text")
    return _chosen(source, [documents[key] for key in sorted(documents)])


def _chosen(source: TextSource, documents: list[Document]) -> list[Document]:
    """The documents that `first` and `part` leave.

    Raises:
        LetheError: there are fewer.
    """
    if source.first and source.first > len(documents):
        raise LetheError(
            f"first: text '{source.source}' has {len(documents)} documents, {source.first} are requested; lower it"
        )
    documents = documents[: source.first]
    if source.part is None:
        return documents
    number, parts = part_of(source.part)
    if parts > len(documents):
        raise LetheError(f"part: text '{source.source}' has {len(documents)} documents, too few for {parts} parts; use fewer")
    bounds = part_bounds(len(documents), parts)
    return documents[bounds[number - 1] : bounds[number]]


def part_bounds(count: int, parts: int) -> list[int]:
    """Where parts of `count` documents begin and end, as equal as possible: part i is from bound i - 1 to bound i."""
    return [i * count // parts for i in range(parts + 1)]


def take(
    documents: list[Document], count: int | None, end: Literal["front", "back"], what: str = "text", most: int = 0
) -> list[Document]:
    """`count` documents (0: all) from one end of the order; None: all documents, up to `most`.

    Raises:
        LetheError: there are fewer.
    """
    if count is None:
        count = min(most, len(documents))
    if count > len(documents):
        raise LetheError(f"{what} has {len(documents)} documents, {count} are requested; give a smaller number, or 0 for all")
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
    """`count` documents of a source, or of a mixture of sources in proportion to their weights.

    0 means all documents, None all documents up to `most`. The weights limit how many documents a mixture has.

    Raises:
        LetheError: a source cannot be read or has too few documents.
    """
    if not isinstance(text, list):
        return take(read(text), count, end, what, most)
    pools: list[list[Document]] = []
    seen: set[str] = set()
    for source in text:  # a document in several sources belongs to the first
        pools.append([document for document in read(source) if document.id not in seen])
        seen |= {document.id for document in pools[-1]}
    total = sum(source.weight for source in text)
    available = int(min(len(pool) * total / source.weight for pool, source in zip(pools, text, strict=True)))
    wanted = min(most, available) if count is None else count or available
    bounds = [round(wanted * sum(s.weight for s in text[:i]) / total) for i in range(len(text) + 1)]
    chosen: list[Document] = []
    for pool, source, low, high in zip(pools, text, bounds, bounds[1:], strict=False):
        chosen += take(pool, high - low, end, f"{what} '{source.source}'") if high > low else []
    return chosen


def beside(text: str | TextSource | list[TextSource], used: set[str], count: int) -> list[Document]:
    """The first `count` documents that are not `used`, or fewer. Those of a mixture are in proportion to the weights."""
    sources = text if isinstance(text, list) else [as_text_source(text)]
    total, chosen, seen = sum(source.weight for source in sources), list[Document](), set(used)
    bounds = [round(count * sum(s.weight for s in sources[:i]) / total) for i in range(len(sources) + 1)]
    for source, low, high in zip(sources, bounds, bounds[1:], strict=False):
        chosen += [document for document in read(source) if document.id not in seen][: high - low]
        seen |= {document.id for document in chosen}
    return chosen


def split(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """The documents to fit on, and the last ones, a share of `held_out`, to score on."""
    count = max(1, round(held_out * len(documents)))
    if count >= len(documents):
        raise LetheError(f"affine: {len(documents)} documents are too few to hold {held_out:.0%} out; give more text")
    return documents[:-count], documents[-count:]


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the SHA-256 of the documents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode())
    return digest.hexdigest()


def record(text: str | TextSource | list[TextSource], documents: list[Document]) -> dict[str, Any]:
    """The text of a run, for run.json. The name of a mixture is `weight·source + …`."""
    if isinstance(text, list):
        name = " + ".join(f"{source.weight:g}·{source.source}" for source in text)
    else:
        source = as_text_source(text)
        name = source.source + (f" (first {source.first})" if source.first else "")
        name += f" (part {source.part})" if source.part else ""
    return {"ref": name, "documents": len(documents), "sha256": fingerprint(documents)}


def tokenise(documents: list[Document], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """One sequence of token ids for each document, cut at `max_length` tokens, with the tokenizer's own special tokens.

    Raises:
        LetheError: a document has no token.
    """
    sequences = tokenizer([d.text for d in documents], truncation=True, max_length=max_length)["input_ids"]
    for document, sequence in zip(documents, sequences, strict=True):
        if not sequence:
            raise LetheError(f"text: a document has no token: {document.text[:60]!r}; remove it")
    return sequences


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Documents one after the other, each followed by the end-of-text token, cut into sequences of `length` tokens.

    No token is lost: the last sequence may be shorter.

    Raises:
        LetheError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise LetheError("packing: packed needs a tokenizer with an end-of-text token; use packing none")
    stream: list[int] = []
    for ids in tokenizer([d.text for d in documents])["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + length] for i in range(0, len(stream), length)]


def sequences_of(documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int, packing: str) -> list[list[int]]:
    """Sequences of token ids. `packing`: `none` for one sequence per document, `packed` for documents joined."""
    return pack(documents, tokenizer, length) if packing == "packed" else tokenise(documents, tokenizer, length)


def pad(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `mask` (1 for a token, 0 for padding), both [batch, longest], padded on the right.

    Activations of a causal model do not depend on what follows, so no attention mask is needed. The mask tells tokens from
    padding in losses.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones(len(sequence), dtype=torch.long) for sequence in sequences], batch_first=True)
    return ids, mask


def _records(source: TextSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a source with its place: `line 3` of a file, `row 3` of a table."""
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
        if path.suffix == ".txt":
            return ((where, {"text": line}) for where, line in _lines(path, name))
        return _jsonl(path, name)
    if path.exists():
        raise LetheError(f"text '{name}': give a .jsonl, .parquet or .txt file, lab:forget, lab:retain or a hub data set")
    return _hub(source)


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path, name):
        try:
            record = files.json_of(line)
        except files.UnreadableError as error:
            raise LetheError(f"text '{name}', {where}: {error}; correct or remove the line") from error
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
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # text that is not UTF-8, a date out of range
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
    except Exception as error:  # load_dataset raises errors of many libraries
        if full_disk(error):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"text '{source.source}' is neither a file nor a hub data set ({why}); give one of them") from error
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
    """The columns in a document."""
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
