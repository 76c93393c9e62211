"""Caches in $LETHE_HOME are bounded: the least recently used go, what a process uses stays, damaged files count as absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lethe import home
from lethe.home import store, stored
from lethe.runs.locks import building

DISK = 10_000


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Three folders of 100 bytes on a disk where 300 are allowed; `a` was used before `b`, `b` before `c`."""
    monkeypatch.setattr(home, "SHARE", 300 / DISK)
    monkeypatch.setattr(home.shutil, "disk_usage", lambda path: SimpleNamespace(total=DISK))
    for age, name in enumerate("cba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.bin").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    return tmp_path


def left(cache: Path) -> str:
    return "".join(sorted(path.name for path in cache.iterdir() if path.is_dir()))


@pytest.mark.parametrize(("room", "stay"), [(0, "abc"), (1, "bc"), (100, "bc"), (101, "c"), (1000, "")])
def test_the_least_recently_used_folders_make_room(cache, room, stay):
    home.evict(cache, room)
    assert left(cache) == stay


def test_a_used_folder_stays_as_long_as_its_user_lives(cache):
    class User:
        pass

    user = User()
    home.use(cache / "a", user)
    assert home.evict(cache, 1000) == [cache / "b", cache / "c"]
    assert (cache / "a").stat().st_mtime > 1e9
    del user
    assert home.evict(cache, 1000) == [cache / "a"]


def test_a_folder_that_another_process_uses_stays(cache):
    script = "import sys, pathlib, lethe.home as k; k.use(pathlib.Path(sys.argv[1]), k); print(1, flush=True); input()"
    command = [sys.executable, "-c", script, str(cache / "b")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        home.evict(cache, 1000)
        assert left(cache) == "b"
        process.kill()
    home.evict(cache, 1000)
    assert left(cache) == ""


def test_leftovers_of_a_killed_builder_go_and_what_is_being_built_stays(cache):
    for name in (".x.partial", ".y.partial"):
        (cache / name).mkdir()
    with building(cache / "y"), building(cache / "a"):
        home.evict(cache)
        assert left(cache) == ".y.partialabc"
        home.evict(cache, 1000)
        assert left(cache) == ".y.partiala"


def test_the_oldest_texts_make_room_and_the_newest_stays_however_large(tmp_path):
    for age, name in enumerate("abcd"):
        store(tmp_path / f"{name}.json", 1000 * name)
        os.utime(tmp_path / f"{name}.json", (1000 + age, 1000 + age))
    (tmp_path / "other.txt").write_text("x" * 1000)
    store(tmp_path / "e.json", 1000 * "e", most=3200)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.json", "d.json", "e.json", "other.txt"]
    store(tmp_path / "f.json", 10000 * "f", most=3200)
    assert [file.name for file in tmp_path.glob("*.json")] == ["f.json"]


def test_a_text_is_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    assert stored(file) is None and stored(tmp_path) is None
    store(file, '{"é": 1}\n')
    assert stored(file) == '{"é": 1}\n'
    for text in (file.read_text()[:-2], file.read_text() + " ", file.read_text().replace("1", "2"), ""):
        file.write_text(text)
        assert stored(file) is None
    store(file / "below" / "b.json", "x")  # a home that cannot be written is no error
