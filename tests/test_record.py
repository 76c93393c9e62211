"""Records that somebody else wrote, edited or cut short: refused in one line or read, and never in the way of other runs."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lethe.cli import main
from lethe.errors import LetheError, PlainFormatter
from lethe.report.runs_list import as_data
from lethe.report.tables import all_tables, runs_table
from lethe.results.listing import entries, ordered, select
from lethe.results.study import Study
from lethe.runs.finding import find_runs
from lethe.runs.run import Run

DATA = Path(__file__).parent / "data" / "records"
KINDS = sorted(file.stem for file in DATA.glob("*.json"))
ABSENT = object()
DEEP: list = []
for _ in range(100):
    DEEP = [DEEP]
HOSTILE = "a\x1b[31m\x00\n\u202e[red]\ud800"
WRONG = [ABSENT, None, 7, -1.5, "text", HOSTILE, [], [{}], {}, {"a": 1}, 10**400, float("nan"), True, DEEP]


def stored(folder: Path, kind: str, record: Any = None) -> Path:
    """A folder with the record of a run of that kind, as it is or as it is given."""
    path = folder / f"{kind}-{kind}-{len(list(folder.glob('*')))}"
    path.mkdir(parents=True)
    text = (DATA / f"{kind}.json").read_text() if record is None else json.dumps(record)
    (path / "run.json").write_text(text)
    return path


def places(value: Any, depth: int = 3) -> Iterator[tuple]:
    """Where a record can be edited: every field, of maps and lists the first item."""
    if depth and value and isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else [0]
        plain = isinstance(value, dict) and len({type(item) for item in value.values()}) > 1
        for key in keys if plain else keys[:1]:
            yield (key,)
            yield from ((key, *rest) for rest in places(value[key], depth - 1))


def edited(record: dict, place: tuple, wrong: Any) -> dict:
    changed = copy.deepcopy(record)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    if wrong is ABSENT:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_record_is_refused_in_one_line_or_can_be_listed(kind, tmp_path):
    good = json.loads((DATA / f"{kind}.json").read_text())
    path = stored(tmp_path, kind)
    refused = accepted = 0
    for place in places(good):
        for wrong in WRONG:
            (path / "run.json").write_text(json.dumps(edited(good, place, wrong)))
            try:
                run = Run.open(path)
            except LetheError as error:
                refused += 1
                assert "run.json" in str(error) and "\n" not in str(error)
                continue
            accepted += 1
            listed = entries([run])
            select(listed, ["lr<1", "name=x*", "status!=complete", "age>1", "time>1", "config=3"])
            for field in ("name", "created", "progress", "results", "config"):
                ordered(listed, field)
            json.dumps(as_data(listed[0], [])).encode()
            shown = [runs_table(listed, []), runs_table(listed, ["lr", "config", "evals", "plan.steps", "parents", "results"])]
            with contextlib.suppress(LetheError):
                shown += all_tables(Study([run]))
            for table in shown:
                assert not {"\x1b", "\x00", "\u202e", "\ud800"} & set(table.text())
    assert refused > 100 and accepted > 100


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"id": ABSENT}, "id is missing"),
        ({"kind": "../.."}, "kind: expected a name without '/'"),
        ({"status": "done"}, "status: expected one of queued, running"),
        ({"created": "yesterday"}, "created: expected a time such as"),
        ({"config": None}, "config: expected name: value pairs, got null"),
        ({"runs": ["../elsewhere"]}, "runs.0: expected a name without '/'"),
        ({"artifacts": {"adapter": {"path": "/etc"}}}, "artifacts.adapter.path: expected a path within the run's folder"),
        ({"artifacts": {"adapter": {"path": "../other/adapter"}}}, "artifacts.adapter.path: expected a path within"),
        ({"parents": {"model": {"ref": "lab:final"}}}, "parents.model.sha256 is missing"),
        ({"plan": {"steps": 10**30}}, "plan.steps: expected a number"),
        ({"config": {"lr": 10**400}}, "config.lr: expected a number below"),
        ({"config": {"deep": DEEP}}, "nested too deeply"),
    ],
)
def test_the_refusal_names_file_field_and_what_to_do(field, said, tmp_path):
    good = json.loads((DATA / "unlearn.json").read_text())
    ((name, value),) = field.items()
    path = stored(tmp_path, "unlearn", edited(good, (name,), value))
    with pytest.raises(LetheError) as caught:
        Run.open(path)
    assert all(part in str(caught.value) for part in ("run.json", said, "restore it from a backup"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Good runs of every kind, and as many damaged ones."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs"
    for kind in KINDS:
        stored(out, kind)
        good = json.loads((DATA / f"{kind}.json").read_text())
        for change in ({"id": ABSENT}, {"config": 3}, {"evals": {"t": {"acc": "high"}}}, {"heartbeat": "never"}):
            ((name, value),) = change.items()
            stored(out, kind, edited(good, (name,), value) if name in good else good | change)
    for content in (b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"id": 1', b"null"):
        (path := out / f"unlearn-bytes-{len(content)}").mkdir()
        (path / "run.json").write_bytes(content)
    return out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--json"],
        ["--where", "status=complete", "lr<1"],
        ["--sort", "name", "--reverse"],
        ["--columns", "id", "config.eval"],
    ],
    ids=lambda words: " ".join(words) or "plain",
)
def test_runs_lists_the_others_and_names_the_damaged_ones(folder, words, capsys, caplog):
    assert main(["runs", str(folder), *words]) == 0
    shown = capsys.readouterr().out
    assert all(json.loads((DATA / f"{kind}.json").read_text())["id"] in shown for kind in KINDS if "--where" not in words)
    main(["runs", str(folder), "--json"])
    assert len(json.loads(capsys.readouterr().out)) == len(KINDS)


def test_every_command_that_takes_a_damaged_run_refuses_it_in_one_line(folder, capsys):
    bad = [path.parent for path in folder.glob("*/run.json") if path.parent not in {run.path for run in find_runs(folder)}]
    assert len(bad) == 4 * len(KINDS) + 5
    for path in bad:
        for words in (["resume", str(path)], ["evaluate", str(path)], ["report", str(path)], ["sweep", "status", str(path)]):
            assert main(words) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("lethe: ") and "run.json" in line


@pytest.mark.parametrize("file", ["metrics.jsonl", "curve.jsonl", "batches.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", [b"[1, 2]", b"3", b"\xff\xfe\x00\x01", b'{"half', b"{}", b'{"step": "x"}', b"[" * 5000])
def test_a_line_that_is_no_row_is_left_out_and_named(file, line, tmp_path, caplog):
    run = Run.open(stored(tmp_path, "tamper"))
    row = {"step": 1, "evals": {}, "task": "t"}
    (run.path / file).write_bytes(
        json.dumps(row).encode() + b"\n" + line + b"\n" + json.dumps(row | {"step": 2}).encode() + b"\n"
    )
    assert [row["step"] for row in run.rows(file)] == [1, 2]
    assert run.last_row(file)["step"] == 2
    assert "line 2 cannot be read; left out" in caplog.text
    run.keep_until(1)
    assert [row["step"] for row in run.rows(file)] == ([1, 2] if file == "samples.jsonl" else [1])


def test_an_artifact_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    run = Run.open(stored(tmp_path / "runs", "unlearn"))
    (tmp_path / "elsewhere").mkdir()
    (run.path / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LetheError, match="adapter is a link to"):
        run.artifact("adapter")
    with pytest.raises(LetheError, match=r"links to .*, outside the run's folder"):
        run.hold()
    (run.path / "adapter").unlink()
    shutil.copytree(tmp_path / "elsewhere", run.path / "adapter")
    assert run.artifact("adapter") == run.path / "adapter"


@pytest.mark.parametrize("name", ["work.lock", "sweep.lock", "metrics.jsonl", "study.journal"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_a_link_or_to_a_pipe(name, kind, tmp_path):
    path = stored(tmp_path / "runs", "sweep")
    (tmp_path / "mine").write_text("mine")
    if kind == "link":
        (path / name).symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(path / name)
    for words in (["resume"], ["sweep", "status"], ["sweep", "retry"], ["sweep", "cancel"]):
        assert main([*words, str(path)]) == 2
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_pipe_in_the_place_of_a_record_is_left_out(tmp_path, capsys):
    stored(tmp_path, "unlearn")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "run.json")
    assert [run.record["kind"] for run in find_runs(tmp_path)] == ["unlearn"]
    assert main(["resume", str(tmp_path / "pipe")]) == 2 and "(not a file)" in capsys.readouterr().err


def test_the_link_that_optuna_locks_with_is_no_link_out_of_the_folder(tmp_path):
    run = Run.open(stored(tmp_path, "unlearn"))
    (run.path / "study.journal.lock").symlink_to("/elsewhere/study.journal")
    run.hold()


def test_a_run_of_a_sweep_that_is_gone_does_not_hide_the_others(tmp_path, caplog):
    sweep = Run.open(stored(tmp_path, "sweep"))
    sweep.update(runs=["unlearn-gone", stored(tmp_path, "unlearn").name])
    assert [run.record["kind"] for run in find_runs(sweep.path)] == ["sweep", "unlearn"]
    assert "unlearn-gone" in caplog.text


def test_a_log_line_is_one_line_without_control_characters():
    record = logging.LogRecord("lethe", logging.ERROR, "", 0, "%s", ("a\x1b[31m\nERROR fake",), None)
    try:
        raise ValueError("b\x1b[31m\nc")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = PlainFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first == "ERROR a\\x1b[31m\\nERROR fake"
    assert rest[0].startswith("Traceback") and rest[-2:] == ["ValueError: b\\x1b[31m", "c"]
