"""A wheel, installed where there is no repository, does the whole job."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from lethe.lab.presets import active_preset

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("lethe", "pyproject.toml", "README.md", "LICENSE")


def run(words: list[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an environment that has Lethe from its wheel, and this environment's other packages."""
    source = tmp_path / "source"
    source.mkdir()
    for name in BUILT_FROM:
        made = source / name
        shutil.copytree(ROOT / name, made) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, made)
    pip = [sys.executable, "-m", "pip"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], tmp_path)
    shutil.rmtree(source)
    venv.create(tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.mark.slow
def test_a_wheel_does_the_whole_job(lab, python, tmp_path):
    (here := tmp_path / "empty").mkdir()
    package = Path(run([python, "-c", "import lethe; print(lethe.__file__)"], here).strip()).parent
    assert package.is_relative_to(tmp_path / "environment") and (package / "py.typed").exists()
    lethe = python.parent / "lethe"
    assert run([lethe, "--version"], here) == run([python, "-m", "lethe", "--version"], here)
    onset = f"lab:global_step{active_preset().onset}"
    words = [lethe, "unlearn", "--config", "lab", "--source", onset, "--epochs", "1", "--max_steps", "3", "--json"]
    model = f"run:{json.loads(run(words, here))['id']}"
    suite = run([lethe, "tamper", model, "--suite", "standard", "--only", "noise", "--json"], here)
    assert json.loads(suite)["status"] == "complete"
    run([lethe, "demo"], here)
    assert "lab_forget_robust" in (here / "demo" / "report" / "index.html").read_text()
