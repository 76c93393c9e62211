"""Every command shown in README and docs is run, on the nano lab, in the order in which it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lethe import Transfer
from lethe.config import EvaluateConfig, SweepConfig, recipes
from lethe.config.parse import from_recipe
from lethe.lab.presets import PRESETS
from lethe.sweeps.grid import Grid

ROOT = Path(__file__).parent.parent
STANDARD, NANO = (f"global_step{PRESETS[name].onset}" for name in ("standard", "nano"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def shortened(command: str) -> str:
    """As it stands, but for its length: three updates show what three hundred would."""
    short = {"unlearn": " --epochs 1 --max_steps 3 --warmup_steps 0", "tamper": " --max_steps 3"}
    return command + ("" if "--attack" in command else short.get(command.split()[1], ""))


@pytest.fixture
def here(lab, tmp_path) -> Path:
    """A folder with a copy of the package whose recipes name the nano lab's onset."""
    shutil.copytree(ROOT / "lethe", tmp_path / "lethe")
    for recipe in (tmp_path / "lethe" / "recipes").rglob("*.yaml"):
        recipe.write_text(recipe.read_text().replace(STANDARD, NANO))
    return tmp_path


def run(command: str, folder: Path) -> str:
    scripts = str(Path(sys.executable).parent)
    paths = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    environment = os.environ | paths | {"HF_HUB_OFFLINE": "1"}
    shell = command.replace(STANDARD, NANO).replace(".venv/bin/", f"{scripts}/")
    done = subprocess.run(shell, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_readmes_two_commands_are_targets_and_its_others_run(here):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("README.md"):
        if command.startswith("make "):
            assert re.search(rf"^{command.removeprefix('make ')}: install$", makefile, re.MULTILINE), command
        else:
            run(command, here)


def test_the_sweeps_pages_recipe_is_valid(here):
    first, slurm = blocks("docs/sweeps.md", "yaml")
    (here / "sweep.yaml").write_text(first)
    config = from_recipe(SweepConfig, here / "sweep.yaml")
    assert len(Grid(config).points) == 27
    (here / "slurm.yaml").write_text(slurm)
    assert from_recipe(SweepConfig, here / "slurm.yaml", vary={"lr": [1e-3]}).slurm.time == "12:00:00"


@pytest.mark.slow
def test_evaluation_page(here):
    for command in commands("docs/evaluation.md"):
        run(command, here)
    assert (next((here / "runs").glob("checkpoints-*")) / "checkpoints.svg").exists()


def test_suites_of_the_evaluation_page_are_settings(tmp_path):
    (text,) = blocks("docs/evaluation.md", "yaml")
    (tmp_path / "suites.yaml").write_text(text)
    asked = from_recipe(EvaluateConfig, tmp_path / "suites.yaml", model="lab:final", tasks=["biothreat", "general"]).tasks
    assert asked == ["wmdp_bio_robust", "wmdp_bio_cloze", "mmlu"]


@pytest.mark.slow
def test_lab_page(here, lab):
    for command in commands("docs/lab.md"):
        run(command.replace("FOLDER", str(lab / "filtered")), here)


def test_runs_page(tmp_path):
    (log,) = blocks("docs/runs.md", "markdown")
    (tmp_path / "log.md").write_text(log)
    imported, listed, _ = [run(command, tmp_path) for command in commands("docs/runs.md")]
    assert "45.2 % is in no cell of 'Retain sweep'" in imported
    assert [line.split()[0] for line in listed.splitlines()[2:4]] == ["2042651", "2042650"]
    assert (tmp_path / "study-report" / "index.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/unlearning.md", "docs/rewinding.md", "docs/tampering.md"])
def test_pages_about_training(here, page):
    for command in commands(page):
        run(shortened(command), here)


def test_pages_name_recipes_that_are_there():
    known = {*recipes.names(), "recipe.yaml", "sweep.yaml", "suites.yaml"}
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        given = re.findall(r"(?:--config|recipe[:=]) ?([a-z][\w./-]+)", page.read_text())
        assert set(given) <= known, page.name


def test_yaml_of_the_quickstart_is_a_recipe(tmp_path):
    for i, text in enumerate(blocks("docs/quickstart.md", "yaml")):
        (tmp_path / f"{i}.yaml").write_text(text)
        assert from_recipe(Transfer, tmp_path / f"{i}.yaml").layers
