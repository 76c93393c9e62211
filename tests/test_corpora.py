"""Text: every kind of file becomes documents in an order that only their content determines. Broken text is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lethe.config import TextSource
from lethe.errors import LetheError
from lethe.text import corpora

DOCUMENTS = ["one document", "another one\nwith two lines", "übergröße – 文", 'a fourth, "quoted"']


def jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return str(path)


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def texts(source: str | TextSource) -> list[str]:
    return [document.text for document in corpora.read(source)]


# --- reading -------------------------------------------------------------------------------------------------------------


def test_jsonl_and_parquet_hold_the_same_documents_in_the_order_of_their_hashes(tmp_path):
    found = corpora.read(jsonl(tmp_path / "a.jsonl", [{"text": t, "n": i} for i, t in enumerate(DOCUMENTS)]))
    assert found == corpora.read(parquet(tmp_path / "a.parquet", {"text": DOCUMENTS, "n": [1, 2, 3, 4]}))
    assert [d.id for d in found] == sorted(hashlib.sha256(t.encode()).hexdigest() for t in DOCUMENTS)
    assert all(hashlib.sha256(d.text.encode()).hexdigest() == d.id for d in found)


@pytest.mark.parametrize(
    ("file", "content", "documents"),
    [
        ("a.txt", b"first line\r\nsecond line\n\n  \nthird\n", ["first line", "second line", "third"]),
        ("a.txt", b"\xef\xbb\xbffirst\nsecond\n", ["first", "second"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "first"}\n', ["first"]),
        ("a.jsonl", '{"text": "before\u2028after\x85"}\n'.encode(), ["before\u2028after\x85"]),
        ("a.jsonl", b'{"text": "same"}\n{"text": "same"}\n{"text": "other"}\n{"text": ""}\n{"text": " "}\n', ["other", "same"]),
    ],
    ids=["lines", "byte-order mark", "byte-order mark of JSON", "separators of str.splitlines", "repeated and blank"],
)
def test_documents_of_a_file(tmp_path, file, content, documents):
    (tmp_path / file).write_bytes(content)
    assert sorted(texts(str(tmp_path / file))) == documents


def test_column_and_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "T", "abstract": "A {x}", "body": "B"}])
    assert texts(TextSource(path, column="body")) == ["B"]
    assert texts(TextSource(path, template="{title}\n\n{abstract}")) == ["T\n\nA {x}"]


def test_only_the_columns_of_the_text_are_read_from_parquet(tmp_path):
    """Python cannot hold the date in the other column."""
    far = pyarrow.array([2**62, 2**62], pyarrow.timestamp("us"))
    assert set(texts(parquet(tmp_path / "a.parquet", {"text": ["one", "two"], "when": far}))) == {"one", "two"}


def test_order_and_fingerprint_do_not_depend_on_the_file(tmp_path):
    records = [{"text": f"document {i}"} for i in range(50)]
    first = corpora.read(jsonl(tmp_path / "a.jsonl", records))
    random.Random(0).shuffle(records)
    assert first == corpora.read(jsonl(tmp_path / "b.jsonl", records))
    fingerprints = {corpora.fingerprint(some) for some in (first, list(first), first[:-1], first[::-1])}
    assert len(fingerprints) == 3
    record = corpora.record(TextSource(str(tmp_path / "a.jsonl")), first)
    assert record == {"ref": str(tmp_path / "a.jsonl"), "documents": 50, "sha256": corpora.fingerprint(first)}


# --- refusals ------------------------------------------------------------------------------------------------------------


def refusal(source: str | TextSource) -> str:
    with pytest.raises(LetheError) as caught:
        corpora.read(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut off', "line 3: not JSON"),
        ('{"text": null}', "line 3: column 'text' is null; give it a text, or remove it"),
        ('{"title": "a"}', "line 3: no text column 'text' (text columns: title)"),
    ],
    ids=["cut", "null", "lacking"],
)
def test_a_bad_line_among_good_ones_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine too"}}\n')
    assert words in refusal(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "UTF-8"),
        ("a.jsonl", b'{"text": " "}\n{"text": ""}\n', "no document with text"),
        ("a.parquet", b"PAR1 this is not parquet PAR1", "cannot be read as parquet"),
    ],
)
def test_a_file_without_usable_text_is_refused(tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    assert words in refusal(str(tmp_path / file))


def test_a_missing_file_a_folder_and_an_unknown_lab_text_are_refused(tmp_path):
    assert "no such file" in refusal(str(tmp_path / "nowhere.jsonl"))
    assert "give a .jsonl, .parquet or .txt file" in refusal(str(tmp_path))
    (tmp_path / "folder.jsonl").mkdir()
    assert "no such file" in refusal(str(tmp_path / "folder.jsonl"))
    assert "did you mean 'forget'" in refusal("lab:froget")


def test_a_missing_column_is_refused_naming_those_there(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "T", "body": "B", "year": 1999}])
    assert "no text column 'text' (text columns: title, body)" in refusal(path)
    assert "no text column 'abstract'" in refusal(TextSource(path, template="{title} {abstract}"))
    assert "no text column 'year'" in refusal(TextSource(path, column="year"))
    assert "no text column 'text'" in refusal(parquet(tmp_path / "a.parquet", {"title": ["T"]}))
    assert "row 2: column 'text' is null" in refusal(parquet(tmp_path / "b.parquet", {"text": ["one", None]}))


@pytest.mark.parametrize("template", ["{title", "{}", "{title!r}", "{title.upper}", "title"])
def test_a_template_that_cannot_be_filled_is_refused(tmp_path, template):
    message = refusal(TextSource(jsonl(tmp_path / "a.jsonl", [{"title": "T"}]), template=template))
    assert "column" in message or "template" in message


# --- choosing ------------------------------------------------------------------------------------------------------------


def test_front_and_back_are_disjoint(tmp_path):
    documents = corpora.read(jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(10)]))
    front, back = corpora.take(documents, 6, "front"), corpora.take(documents, 4, "back")
    assert front + back == documents
    assert corpora.take(documents, 0, "front") == corpora.take(documents, 0, "back") == documents
    with pytest.raises(LetheError, match="forget text has 10 documents, 11 are requested"):
        corpora.take(documents, 11, "back", "forget text")
    assert corpora.take(documents, None, "back", most=4) == back
    assert corpora.take(documents, None, "front", most=11) == documents


def test_a_mixture_takes_from_each_source_by_its_weight(tmp_path):
    sources = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        path = jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(40)])
        sources.append(TextSource(path, weight=weight))
    chosen = corpora.select(sources, 20, "front")
    assert sorted(d.text[0] for d in chosen) == ["a"] * 15 + ["b"] * 5
    assert {d.id for d in chosen if d.text[0] == "a"} == {d.id for d in corpora.read(sources[0])[:15]}
    assert len(corpora.select(sources, 0, "front")) == 53  # all 40 of a, a third as many of b
    assert not {d.id for d in chosen} & {d.id for d in corpora.select(sources, 20, "back")}
    with pytest.raises(LetheError, match=r"a\.jsonl' has 40 documents, 60"):
        corpora.select(sources, 80, "front")
    assert len(corpora.select(sources, None, "front", most=100)) == 53
    assert corpora.select(sources, None, "front", most=20) == chosen


def test_a_mixture_of_sources_that_share_documents_has_the_full_number(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(40)])
    more = jsonl(tmp_path / "b.jsonl", [{"text": f"document {i}"} for i in range(30, 70)])
    assert [len(corpora.select([TextSource(path), TextSource(more)], n, "front")) for n in (20, 60)] == [20, 60]


# --- tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_sequences_are_the_tokenizers_own_cut_or_packed(make_tokenizer, texts, bos):
    tokenizer = make_tokenizer(bos)
    documents = [corpora.Document(t, str(i)) for i, t in enumerate(texts)]
    cut = corpora.sequences_of(documents, tokenizer, 12, "none")
    assert cut == [tokenizer.encode(t)[:12] for t in texts]
    assert max(map(len, cut)) == 12 > min(map(len, cut))
    assert all((sequence[0] == tokenizer.bos_token_id) == bos for sequence in cut)
    packed = corpora.sequences_of(documents, tokenizer, 10, "packed")
    assert {len(sequence) for sequence in packed[:-1]} == {10} and 0 < len(packed[-1]) <= 10
    stream = [token for t in texts for token in (*tokenizer.encode(t), tokenizer.eos_token_id)]
    assert [token for sequence in packed for token in sequence] == stream


def test_a_document_without_a_token_is_refused():
    class Deaf:
        def __call__(self, texts, **_):
            return {"input_ids": [[1] if "word" in text else [] for text in texts]}

    documents = [corpora.Document("a word", "1"), corpora.Document("\u200b", "2")]
    with pytest.raises(LetheError, match="no token"):
        corpora.tokenise(documents, Deaf(), 8)  # type: ignore[arg-type]


def test_padding_is_on_the_right_and_the_mask_counts_tokens():
    ids, mask = corpora.pad([[5, 6, 7], [8], [9, 0]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]  # a token that happens to be the padding token still counts


def test_a_disk_that_is_full_while_a_data_set_is_downloaded_is_not_blamed_on_its_name(monkeypatch):
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        corpora.read("some/text")
