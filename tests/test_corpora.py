"""Text: every kind of file becomes documents in an order that their content alone decides; broken text is refused in words."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from lethe.config import TextSource
from lethe.errors import LetheError
from lethe.text import corpora

DOCUMENTS = ["one document", "another one\nwith two lines", "übergröße – 文", 'a fourth, "quoted"']


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, columns: dict[str, list]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def texts(source: str | TextSource) -> list[str]:
    return [document.text for document in corpora.read(source)]


def test_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    by_line = texts(jsonl(tmp_path / "a.jsonl", [{"text": t, "n": i} for i, t in enumerate(DOCUMENTS)]))
    by_column = texts(parquet(tmp_path / "a.parquet", {"text": DOCUMENTS, "n": [1, 2, 3, 4]}))
    assert sorted(by_line) == sorted(DOCUMENTS)
    assert by_line == by_column


def test_txt_is_one_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first line\r\nsecond line\n\n  \nthird\n")
    assert sorted(texts(str(tmp_path / "a.txt"))) == ["first line", "second line", "third"]


def test_separators_inside_a_document_do_not_end_it(tmp_path):
    """U+2028 and form feed end lines for str.splitlines, not for JSON."""
    text = "before\u2028after\x0cend\x85"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(str(tmp_path / "a.jsonl")) == [text]


def test_column_and_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "T", "abstract": "A {x}", "body": "B"}])
    assert texts(TextSource(path, column="body")) == ["B"]
    assert texts(TextSource(path, template="{title}\n\n{abstract}")) == ["T\n\nA {x}"]


def test_documents_are_named_by_their_hash_and_come_in_its_order(tmp_path):
    found = corpora.read(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS]))
    assert [d.id for d in found] == sorted(hashlib.sha256(t.encode()).hexdigest() for t in DOCUMENTS)
    assert all(hashlib.sha256(d.text.encode()).hexdigest() == d.id for d in found)


def test_order_and_fingerprint_do_not_depend_on_the_file(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(50)]
    first = corpora.read(jsonl(tmp_path / "a.jsonl", rows))
    random.Random(0).shuffle(rows)
    second = corpora.read(jsonl(tmp_path / "b.jsonl", rows))
    assert first == second
    assert [d.text for d in first] != [f"document {i}" for i in range(50)]
    assert corpora.fingerprint(first) == corpora.fingerprint(second)
    assert corpora.fingerprint(first) != corpora.fingerprint(first[:-1])
    assert corpora.fingerprint(first) != corpora.fingerprint(first[::-1])


def test_repetitions_and_blank_documents_are_dropped(tmp_path):
    rows = [{"text": t} for t in ("same", "same", "other", "", "  \n")]
    assert sorted(texts(jsonl(tmp_path / "a.jsonl", rows))) == ["other", "same"]


def test_front_and_back_are_disjoint(tmp_path):
    documents = corpora.read(jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(10)]))
    front, back = corpora.take(documents, 6, "front"), corpora.take(documents, 4, "back")
    assert front + back == documents
    assert not {d.id for d in front} & {d.id for d in back}
    assert corpora.take(documents, 0, "front") == corpora.take(documents, 0, "back") == documents
    with pytest.raises(LetheError, match="forget text has 10 documents, 11 are asked for"):
        corpora.take(documents, 11, "back", "forget text")
    assert corpora.take(documents, None, "back", most=4) == back
    assert corpora.take(documents, None, "front", most=11) == documents


def refusal(source: str | TextSource) -> str:
    with pytest.raises(LetheError) as caught:
        corpora.read(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut off\n{"text": "fine too"}\n')
    assert "line 3: not JSON" in refusal(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": null}', "line 2: column 'text' is null; give it a text, or remove it"),
        ('{"text": "a", "text": "b"}', "line 2: 'text' is written twice"),
        ('{"text": "half \\ud83d"}', "line 2: half of a character"),
        ('{"text": "a", "b": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: nested too deeply"),
        ('{"title": "a"}', "line 2: no text column 'text' (text columns: title)"),
    ],
    ids=["null", "twice", "half", "deep", "lacking"],
)
def test_one_bad_line_among_good_ones_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "fine too"}}\n')
    assert words in refusal(str(tmp_path / "a.jsonl"))


def test_only_the_columns_of_the_text_are_read_from_parquet(tmp_path):
    """A column that Python cannot hold, such as a far date, does no harm beside the text; a null is named by its row."""
    import pyarrow

    far = pyarrow.array([2**62, 2**62], pyarrow.timestamp("us"))
    assert texts(parquet(tmp_path / "a.parquet", {"text": ["one", "two"], "when": far})) == sorted(
        ["one", "two"], key=lambda text: hashlib.sha256(text.encode()).hexdigest()
    )
    assert "row 2: column 'text' is null" in refusal(parquet(tmp_path / "b.parquet", {"text": ["one", None]}))


def test_a_line_that_is_no_object_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n["text"]\n')
    assert "line 2: expected an object with columns, got list" in refusal(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_bytes_that_are_not_utf8_are_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "UTF-8" in refusal(str(tmp_path / f"a{suffix}"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\nsecond\n")
    assert sorted(texts(str(tmp_path / "a.txt"))) == ["first", "second"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n')
    assert texts(str(tmp_path / "a.jsonl")) == ["first"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n", "   \n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "is empty" in refusal(str(tmp_path / name))


def test_only_blank_documents_are_empty(tmp_path):
    assert "is empty" in refusal(jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": ""}]))


def test_a_missing_column_is_refused_naming_those_there(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "T", "body": "B", "year": 1999}])
    assert "no text column 'text' (text columns: title, body)" in refusal(path)
    assert "no text column 'abstract'" in refusal(TextSource(path, template="{title} {abstract}"))
    assert "no text column 'year'" in refusal(TextSource(path, column="year"))
    assert "no text column 'text'" in refusal(parquet(tmp_path / "a.parquet", {"title": ["T"]}))


@pytest.mark.parametrize(
    "template", ["{title", "title}", "{}", "{0}", "{title!z}", "{title:>x}", "{title.upper}", "{title[0]}"]
)
def test_a_template_that_cannot_be_filled_is_refused(tmp_path, template):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "T"}])
    assert "column" in (message := refusal(TextSource(path, template=template))) or "template" in message


def test_a_template_without_a_column_is_refused(tmp_path):
    """It would make all documents the same one."""
    assert "template" in refusal(TextSource(jsonl(tmp_path / "a.jsonl", [{"title": "T"}]), template="title"))


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_refused(tmp_path):
    assert "no such file" in refusal(str(tmp_path / "nowhere.jsonl"))
    assert "give a .jsonl, .parquet or .txt file" in refusal(str(tmp_path))
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert "give a .jsonl, .parquet or .txt file" in refusal(str(tmp_path / "a.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "no such file" in refusal(str(tmp_path / "folder.jsonl"))


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    assert "cannot be read as parquet" in refusal(str(tmp_path / "a.parquet"))


def test_an_unknown_lab_text_is_refused():
    assert "did you mean 'forget'" in refusal("lab:froget")


def test_record_names_source_number_and_fingerprint(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS])
    documents = corpora.read(path)
    record = corpora.record(TextSource(path), documents)
    assert (record["ref"], record["documents"], record["sha256"]) == (path, 4, corpora.fingerprint(documents))


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_the_tokenizers_own_cut_at_max_length(make_tokenizer, texts, bos):
    tokenizer = make_tokenizer(bos)
    documents = [corpora.Document(t, str(i)) for i, t in enumerate(texts)]
    rows = corpora.tokenise(documents, tokenizer, 12)
    assert rows == [tokenizer.encode(t)[:12] for t in texts]
    assert max(map(len, rows)) == 12 > min(map(len, rows))
    assert all((row[0] == tokenizer.bos_token_id) == bos for row in rows)


def test_a_document_without_a_token_is_refused(make_tokenizer):
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


def test_a_mixture_takes_from_each_source_by_its_weight(tmp_path):
    sources = []
    for name, count, weight in (("a", 40, 3.0), ("b", 40, 1.0)):
        path = jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
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


def test_a_mixture_holds_as_many_documents_as_asked_for(tmp_path):
    """Also when the sources share documents."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(40)])
    more = jsonl(tmp_path / "b.jsonl", [{"text": f"document {i}"} for i in range(30, 70)])
    assert len(corpora.select([TextSource(path), TextSource(more)], 20, "front")) == 20
    assert len(corpora.select([TextSource(path), TextSource(more)], 60, "front")) == 60


@pytest.mark.parametrize("bos", [False, True])
def test_packing_loses_no_token_and_closes_every_document(make_tokenizer, texts, bos):
    tokenizer = make_tokenizer(bos)
    documents = [corpora.Document(t, str(i)) for i, t in enumerate(texts)]
    blocks = corpora.rows_of(documents, tokenizer, 10, "packed")
    assert {len(b) for b in blocks[:-1]} == {10}
    assert 0 < len(blocks[-1]) <= 10
    stream = [token for block in blocks for token in block]
    assert stream == [token for t in texts for token in (*tokenizer.encode(t), tokenizer.eos_token_id)]
    assert corpora.rows_of(documents, tokenizer, 10, "none") == [tokenizer.encode(t)[:10] for t in texts]
