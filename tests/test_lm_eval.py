"""Only tested versions of lm-eval are used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lethe.errors import LetheError
from lethe.evaluation import lm_eval_api, tasks


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


@pytest.mark.parametrize("damage", ["", "[]", '{"mmlu": 5}'])
def test_a_damaged_index_of_tasks_is_made_again(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("LETHE_HOME", str(tmp_path))
    monkeypatch.setattr(tasks, "_scan", lambda root: {"mmlu": "mmlu/default"})
    for content in (None, damage):
        tasks._lm_eval_tasks.cache_clear()
        if content is not None:
            (file,) = (tmp_path / "tasks").iterdir()
            file.write_text(content, errors="surrogatepass")
        assert [folder.name for folder in tasks._lm_eval_tasks().values()] == ["default"]
    tasks._lm_eval_tasks.cache_clear()
