"""Names and folders that cannot be a run's are refused before anything is made, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lethe import Transfer
from lethe import config as c
from lethe.cli import main
from lethe.errors import LetheError
from lethe.files import refuse_run_folder
from lethe.report.rendering import Table
from lethe.runs.run import Run

CONFIGS = [
    lambda **given: Transfer(source="lab:final", **given),
    lambda **given: c.TamperConfig(model="lab:final", **given),
    lambda **given: c.EvaluateConfig(model="lab:final", **given),
    lambda **given: c.CheckpointsConfig(model="lab:final", **given),
    lambda **given: c.AffineConfig(model="lab:final", source="lab:final", **given),
    lambda **given: Run.create("checkpoints", given["name"], {}, "runs"),
]


@pytest.mark.parametrize("make", CONFIGS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is not a name"),
        ("  ", "is not a name"),
        ("..", "is not a name"),
        ("a\x1b[31mb", "control character"),
        ("a\nb", "control character"),
        ("a\u202eb", "control character"),
        ("x" * 235, "234 bytes at most"),
        ("知" * 100, "at most|allows 255 for one name"),
        ("x" * 100_000, "at most|allows 255 for one name"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused(make, name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LetheError, match=f"^name: .*({said})") as caught:
        make(name=name)
    assert len(str(caught.value)) < 300 and list(tmp_path.iterdir()) == []


def test_the_longest_name_makes_a_run(tmp_path):
    assert Run.create("checkpoints", "x" * 234, {}, tmp_path).path.is_dir()


def unusable(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").write_text("mine")
    return {
        "a file": str(tmp_path / "file"),
        "below a file": str(tmp_path / "file" / "below"),
        "too long": str(tmp_path / ("x" * 300)),
        "a path too long": str(tmp_path / "/".join(["x" * 200] * 30)),
    }


@pytest.mark.parametrize("which", ["a file", "below a file", "too long", "a path too long"])
@pytest.mark.parametrize(
    "words", [["evaluate", "lab:final"], ["unlearn", "--source", "lab:final"], ["demo"], ["checkpoints", "lab:final"]]
)
def test_an_output_folder_that_cannot_be_one_is_refused_first(which, words, tmp_path, capsys):
    out = unusable(tmp_path)[which]
    assert main([*words, "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lethe: out: ") and len(line) < 5000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, whom nothing is refused
    with pytest.raises(LetheError, match=r"out: cannot write to .*no permission, or read-only"):
        refuse_run_folder(tmp_path / "runs")


@pytest.mark.parametrize("setting", ["out", "model"])
def test_a_nul_is_refused(setting):
    with pytest.raises(LetheError, match=f"{setting}: holds the control character"):
        c.EvaluateConfig(**{"model": "lab:final", setting: "a\0b"})
    with pytest.raises(LetheError, match="tasks: holds the control character"):
        c.EvaluateConfig("lab:final", tasks=["a\0b"])


@pytest.mark.parametrize("home", ["file", "file/below", "x" * 300])
@pytest.mark.parametrize("words", [["lab", "build"], ["evaluate", "lab:final"], ["demo", "--out", "demo"]])
def test_a_home_that_is_a_file_is_refused(home, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / home))
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("lethe: LETHE_HOME: ")


def test_no_text_of_a_table_reaches_a_terminal_raw():
    hostile = "[red]a\x1b]0;title\x07\u202e\nb"
    table = Table(hostile, [hostile], [[hostile]], [hostile], hostile)
    assert not {"\x1b", "\x07", "\u202e"} & set(table.text() + table.markdown())
    assert "[red]a" in table.text()


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    """As the adapter of somebody else's run; tests may run as root, to whom nothing is denied."""

    def denied(*_: object) -> list[Run]:
        raise PermissionError(13, "Permission denied", "adapter\n.safetensors")

    monkeypatch.setattr("lethe.report.runs_list.find_runs", denied)
    assert main(["runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "lethe: 'adapter\\n.safetensors': no permission; ask its owner\n"
