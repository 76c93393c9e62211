"""What is kept for later runs is bounded: what was not used for longest goes, what a process uses or builds stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lethe import home
from lethe.runs.locks import building

DISK = 10_000


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """Three folders of 100 bytes on a disk where 300 are allowed; `a` was used before `b`, `b` before `c`."""
    monkeypatch.setattr(home, "SHARE", 300 / DISK)
    monkeypatch.setattr(home.shutil, "disk_usage", lambda path: SimpleNamespace(total=DISK))
    for age, name in enumerate("cba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.bin").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    return tmp_path


def left(shelf: Path) -> list[str]:
    return sorted(path.name for path in shelf.iterdir() if path.is_dir())


@pytest.mark.parametrize(("room", "stay"), [(0, "abc"), (1, "bc"), (100, "bc"), (101, "c"), (1000, "")])
def test_those_not_used_for_longest_make_room(shelf, room, stay):
    home.evict(shelf, room)
    assert left(shelf) == list(stay)


def test_what_is_used_stays_for_as_long_as_its_user_lives_and_counts_as_used_last(shelf):
    class User:
        pass

    user = User()
    home.use(shelf / "a", user)
    assert home.evict(shelf, 1000) == [shelf / "b", shelf / "c"]
    assert (shelf / "a").stat().st_mtime > 1e9
    del user
    assert home.evict(shelf, 1000) == [shelf / "a"]


def test_what_another_process_uses_stays(shelf):
    script = "import sys, pathlib, lethe.home as k; k.use(pathlib.Path(sys.argv[1]), k); print(1, flush=True); input()"
    command = [sys.executable, "-c", script, str(shelf / "b")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        home.evict(shelf, 1000)
        assert left(shelf) == ["b"]
        process.kill()
    home.evict(shelf, 1000)
    assert left(shelf) == []


def test_what_a_killed_builder_left_goes_and_what_is_being_built_stays(shelf):
    for name in (".x.partial", ".y.partial"):
        (shelf / name).mkdir()
    with building(shelf / "y"), building(shelf / "a"):
        home.evict(shelf)
        assert left(shelf) == [".y.partial", "a", "b", "c"]
        home.evict(shelf, 1000)
        assert left(shelf) == [".y.partial", "a"]
