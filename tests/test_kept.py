"""What is kept between processes does not grow without end, and lm-eval is one that numbers were compared with."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lethe.errors import LetheError
from lethe.evaluation import lm_eval_api, tasks
from lethe.home import store, stored


def test_the_oldest_files_go_when_there_are_too_many(tmp_path):
    folder = tmp_path / "kept"
    for age, name in enumerate("abcd"):
        store(folder / f"{name}.json", 1000 * name)
        os.utime(folder / f"{name}.json", (1000 + age, 1000 + age))
    (folder / "other.txt").write_text("x" * 1000)
    store(folder / "e.json", 1000 * "e", most=3200)
    assert sorted(file.name for file in folder.iterdir()) == ["c.json", "d.json", "e.json", "other.txt"]
    store(folder / "f.json", 10000 * "f", most=3200)  # what is needed now stays, however large
    assert [file.name for file in folder.glob("*.json")] == ["f.json"]


@pytest.mark.parametrize("damage", ["", "[]", "null", "{}", "\0", "\ud800", "[" * 100_000, '{"mmlu": 5}', '["mmlu"]'])
def test_where_tasks_are_is_found_again_when_the_file_is_damaged(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("LETHE_HOME", str(tmp_path))
    monkeypatch.setattr(tasks, "_scan", lambda root: {"mmlu": "mmlu/default"})
    for content in (None, damage):
        tasks._lm_eval_tasks.cache_clear()
        if content is not None:
            (file,) = (tmp_path / "tasks").iterdir()
            file.write_text(content, errors="surrogatepass")
        assert [folder.name for folder in tasks._lm_eval_tasks().values()] == ["default"]
    tasks._lm_eval_tasks.cache_clear()


def test_what_was_kept_is_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    assert stored(file) is None and stored(tmp_path) is None
    store(file, '{"é": 1}\n')
    assert stored(file) == '{"é": 1}\n'
    for text in (file.read_text()[:-2], file.read_text() + " ", file.read_text().replace("1", "2"), ""):
        file.write_text(text)
        assert stored(file) is None


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "home").write_text("a file")
    store(tmp_path / "home" / "requests" / "a.json", "x")


@pytest.mark.parametrize("version", ["0.4.9.2", "0.4.12", "0.4.14", "0.5.0", "1.0"])
def test_another_version_of_lm_eval_is_one_clear_line(version):
    with pytest.raises(LetheError, match=rf"lm_eval {version} is installed, lm_eval>=0.4.13,<0.4.14 is supported") as refusal:
        lm_eval_api.require_supported(version)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["0.4.13", "0.4.13.1", "0.4.13.dev0"])
def test_supported_versions_are_those_that_are_installed_with_lethe(version):
    lm_eval_api.require_supported(version)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"lm_eval>={lm_eval_api.FIRST},<{lm_eval_api.BEYOND}" in project["dependencies"]


def test_the_command_line_refuses_another_lm_eval_before_it_writes_anything(lab, tmp_path):
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.4.20' if name == 'lm_eval' else real(name)\n"
        "from lethe.cli import main\n"
        f"raise SystemExit(main(['evaluate', 'random:lab:final', '--tasks', 'lab_forget', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("lethe: evaluate: lm_eval 0.4.20 is installed")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["wmdp_bio", "mmlu", "mmlu_stem", "mmlu_anatomy", "hellaswag", "winogrande", "boolq", "arc_easy"]
)
def test_a_task_whose_file_or_folder_has_its_name_is_found_without_reading_the_others(monkeypatch, tmp_path, name):
    monkeypatch.setenv("LETHE_HOME", str(tmp_path))
    tasks._lm_eval_tasks.cache_clear()
    everywhere = tasks._lm_eval_tasks()[name]
    monkeypatch.setattr(tasks, "_lm_eval_tasks", lambda: pytest.fail("all files were read"))
    assert tasks.locate([name]) == {name: everywhere}


def test_a_task_in_a_file_of_another_name_is_found_too():
    assert tasks._named_like("mmlu_abstract_algebra_generative") is None
    assert tasks.locate(["mmlu_abstract_algebra_generative"])
