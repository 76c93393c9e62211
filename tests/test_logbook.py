"""What is a table, a setting or a number in a log, and that reading takes time in proportion to the text."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
from logs import HEAD, TABLE, imported_text, jobs

from lethe.runs.logbook import read

OTHER = HEAD + "| 21 | 5 | 0.5 | 40% |\n"


@pytest.fixture
def take(tmp_path: Path):
    """take(text): what importing this text does."""
    return partial(imported_text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TABLE,
        "\ufeff## A\n\n" + TABLE,
        "words\n" + TABLE,  # a table may end a paragraph
        "```lethe unlearn```\n\n" + TABLE,
        "~~~\n" + OTHER + "~~~\n" + TABLE,
        "````md\n```\n" + OTHER + "```\n````\n\n" + TABLE,
        "```\n" + OTHER + "~~~\n```\n" + TABLE,
        "<!-- old\n\n" + OTHER + "-->\n\n" + TABLE,
        "<div>\n" + OTHER + "</div>\n\n" + TABLE,
        "".join(f"    {line}\n" for line in OTHER.splitlines()) + "\n" + TABLE,  # indented code
        "".join(f"> {line}\n" for line in TABLE.splitlines()),
        "- a list\n\n" + "".join(f"  {line}\n" for line in TABLE.splitlines()),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        "".join(line.strip("|") + "\n" for line in TABLE.splitlines()),
    ],
)
def test_what_is_a_table_is_what_markdown_says(take, text: str) -> None:
    made = take(text)
    assert jobs(made.new) == ["11", "12"] and made.unreadable == []
    assert [run.record["evals"]["mmlu"]["acc"] for run in made.new] == [0.4, 0.41]


def test_settings_end_with_the_section_of_an_underlined_heading_or_of_a_quotation(take) -> None:
    text = f"Log\n===\n\nFirst\n-----\n\n- lr: 1e-3\n\n{TABLE}\nSecond\n---\n\n{OTHER}\n> ## Quoted\n> lr: 1e-4\n\n"
    made = take(text + OTHER.replace("21", "31"))
    found = [(run.record["imported"]["group"], run.record["config"].get("lr")) for run in made.new]
    assert found == [("First", 1e-3), ("First", 1e-3), ("Second", None), ("Second", None)]


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_break_that_is_none_in_markdown_cuts_no_row(take, mark: str) -> None:
    made = take(f"| Job ID | Notes | MMLU |\n|---|---|---|\n| 1 | a{mark}b | 40% |\n| 2{mark} | c | 41% |\n\nMMLU was 77.7%\n")
    assert jobs(made.new) == ["1", "2"]
    assert made.new[0].record["imported"]["notes"] == "a b"
    assert [p["line"] for p in made.prose] == [6]


def test_names_of_imported_runs_are_one_printable_line(take) -> None:
    dirty = "a\x1b[31m\x00\u202eb" + "c" * 1000
    made = take(f"# {dirty}\n\n| Run | Model | MMLU |\n|---|---|---|\n| {dirty} | 名{'名' * 300} | 40% |\n")
    record, path = made.new[0].record, made.new[0].path
    assert record["name"].isprintable() and len(record["name"]) <= 210 and len(path.name.encode()) < 200
    assert json.dumps(record, ensure_ascii=False).isprintable()


def test_pipes_in_cells_and_rows_of_another_width(take) -> None:
    rows = ["| 1 | 5 | `a\\|b` \\| c | 40% |", "| 2 | 6 |", "| 3 | 7 | d | 41% | more |", "4 | 8 | e | 42%"]
    made = take("| Job ID | retain_coef | Notes | MMLU |\n|---|---|---|---|\n" + "\n".join(rows))
    assert jobs(made.new) == ["1", "2", "3", "4"]
    assert made.new[0].record["imported"]["notes"] == "a|b | c"
    assert [(u["line"], u["why"]) for u in made.unreadable] == [(4, "2 cells under 4 headers"), (5, "5 cells under 4 headers")]


def test_what_looks_like_a_table_and_is_none_is_named(take) -> None:
    made = take(TABLE + "\n| 13 | 7 | 0.7 | 42% |\n\n| Job ID | MMLU |\n|---|\n| 14 | 43% |\n")
    assert jobs(made.new) == ["11", "12"]
    assert [(s["line"], s["columns"][0]) for s in made.skipped] == [(6, "13"), (8, "Job ID")]
    assert "markdown reads no table" in made.text()


def test_a_number_is_not_read_from_the_middle_of_another(take) -> None:
    made = take("## 1,024 examples, 1.5 epochs, lr=1e-3\n\n" + TABLE)
    assert set(made.new[0].record["imported"]["inherited"]) == {"lr"}


LONG = 50_000


@pytest.mark.parametrize(
    "part", ["a", "1", "_a", "a ", "1 ", "start ", "(a", "[^a", "**a ", "![", "`a ", "<a ", "a=", "setting ", "\u0661"]
)
def test_long_lines_take_no_longer_than_they_are_long(take, part: str) -> None:
    """Headings, prose, cells, headers and settings: patterns that look back took more than 40 s for one such line."""
    text = part * (LONG // len(part))
    start = time.process_time()
    settings = f"**Settings:**\n- lr: {text}\n- {text}: 5\n- layers: [{text}]"
    take(f"# {text}x\n\n{text}\n\n{settings}\n\n{TABLE}|{4 * f' {text} |'}\n")
    take(f"| Job ID | {text} | MMLU |\n|---|---|---|\n| 1 | 5 | 40% |\n").text()
    assert time.process_time() - start < 5


def test_prose_of_many_numbers_is_looked_up_in_many_cells_at_once(take) -> None:
    rows = "".join(f"| {i} | 5 | 0.5 | 0.{i + 1000} |\n" for i in range(500))
    prose = "".join(f"MMLU went from 0.{i + 1000} to 0.{i + 2000}1 in run {i}.\n\n" for i in range(5000))
    start = time.process_time()
    made = take(HEAD + rows + "\n" + prose)
    assert time.process_time() - start < 20
    assert len(made.prose) == 4499 + 5000  # one is the cells' cb_loss
    assert made.prose[0]["hint"] == "" and made.prose[0]["number"] == "0.20001"


def test_short_rows_without_end_are_all_read() -> None:
    """The parser's own rule ends a table after 65,536 cells that are not there."""
    made = read("| Job ID | " + "MMLU | " * 99 + "\n|" + "---|" * 100 + "\n" + "| 1 |\n" * 1000)
    assert [len(table.rows) for table in made[0]] == [1000]
