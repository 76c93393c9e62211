"""The docs: every command shown in a bash block is run on the nano lab, in the order in which it stands; the others are valid.

Reference pages are those that the settings give. The site builds without a broken link, and loads nothing from elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lethe import cli
from lethe.config import EvaluateConfig, SweepConfig
from lethe.config.parse import from_recipe
from lethe.lab.presets import PRESETS
from lethe.methods import user_file
from lethe.sweeps.grid import Grid

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "lethe" / "recipes"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STANDARD, NANO = (f"global_step{PRESETS[name].onset}" for name in ("standard", "nano"))
HANDWRITTEN = {"run-folder.md", "measures.md"}
"""Pages of docs/reference that are not generated."""
RUN_HERE = ["docs/choosing", "docs/guides/evaluation", "docs/guides/unlearning", "docs/guides/attacks"]
RUN_HERE += ["docs/methods/undo", "docs/results/lab", "docs/results/rewinding", "docs/results/attacks"]
RUN_ELSEWHERE = ["README", "docs/quickstart", "docs/guides/sweeps", "docs/guides/runs-and-reports"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str, language: str = "bash") -> list[str]:
    lines = [line for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in lines if line.strip() and (language == "bash" or line.startswith("lethe "))]


def shortened(command: str) -> str:
    """As it stands, but for its length: three updates show what three hundred would."""
    short = {"unlearn": " --epochs 1 --max_steps 3 --warmup_steps 0", "tamper": " --max_steps 3"}
    return command + ("" if "--attack" in command or "--suite" in command else short.get(command.split()[1], ""))


@pytest.fixture
def here(lab, tmp_path) -> Path:
    """A folder with a copy of the package; recipes name the nano lab's onset."""
    shutil.copytree(ROOT / "lethe", tmp_path / "lethe")
    for recipe in tmp_path.glob("**/recipes/**/*.yaml"):
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


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readmes_two_commands_are_targets_and_its_others_run(here):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("README.md"):
        if command.startswith("make "):
            assert re.search(rf"^{command.removeprefix('make ')}: install$", makefile, re.MULTILINE), command
        else:
            run(command, here)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_of_the_page_run(here, lab, page):
    for command in commands(f"{page}.md"):
        run(shortened(command.replace("FOLDER", str(lab / "filtered"))), here)
    if page == "docs/guides/evaluation":
        assert (next((here / "runs").glob("checkpoints-*")) / "checkpoints.svg").exists()


def test_every_page_with_commands_is_run():
    with_commands = {str(page.relative_to(ROOT).with_suffix("")) for page in PAGES if blocks(str(page), "bash")}
    assert with_commands == {*RUN_HERE, *RUN_ELSEWHERE}


def test_commands_that_are_only_shown_are_valid(here, monkeypatch):
    (here / "mine.yaml").write_text(blocks("docs/guides/model-and-data.md", "yaml")[0])
    (here / "mine.py").write_text(blocks("docs/extending.md", "python")[0])
    monkeypatch.chdir(here)
    shown = [command for page in PAGES if page.parent.name != "reference" for command in commands(str(page), "text")]
    assert len(shown) > 8
    for command in shown:
        with contextlib.suppress(SystemExit):
            assert cli.main([*shlex.split(command)[1:], "--print_config"]) == 0, command


def test_import_of_a_log(tmp_path):
    (log,) = blocks("docs/guides/runs-and-reports.md", "markdown")
    (tmp_path / "log.md").write_text(log)
    imported, listed, _ = [run(command, tmp_path) for command in commands("docs/guides/runs-and-reports.md")]
    assert "45.2 % is in no cell of 'Retain sweep'" in imported
    assert [line.split()[0] for line in listed.splitlines()[2:4]] == ["2042651", "2042650"]
    assert (tmp_path / "study-report" / "index.html").exists()
    (code,) = blocks("docs/guides/runs-and-reports.md", "python")
    (tmp_path / "example.py").write_text(code)
    assert "0.4312" in run("python example.py", tmp_path)


def test_recipes_in_the_guides_are_valid(here, monkeypatch):
    monkeypatch.chdir(here)

    def recipe(page: str) -> Path:
        file = here / "page.yaml"
        file.write_text(blocks(f"docs/guides/{page}.md", "yaml")[0])
        return file

    assert from_recipe(cli.COMMANDS["unlearn"].config, recipe("model-and-data")).layers == [5, 10, 15, 20, 25, 30]
    assert len(Grid(from_recipe(SweepConfig, recipe("sweeps"))).samples()) == 27
    (here / "mine.py").write_text(blocks("docs/extending.md", "python")[0])
    user_file.trust("mine.py")
    over_methods = SweepConfig(**yaml.safe_load(blocks("docs/guides/sweeps.md", "yaml")[1]))
    assert [plan.point["method"] for plan in Grid(over_methods).plans] == ["transfer", "npo", "npo", "./mine.py"]
    assert from_recipe(SweepConfig, recipe("several-machines"), vary={"lr": [1e-3]}).slurm.time == "12:00:00"
    tasks = from_recipe(EvaluateConfig, recipe("evaluation"), model="lab:final", tasks=["biothreat", "general"]).tasks
    assert tasks == ["wmdp_bio_robust", "wmdp_bio_cloze", "mmlu"]


def test_pages_name_files_and_recipes_that_are_there():
    for page in PAGES:
        text = page.read_text()
        files = re.findall(r"(?<![\w/])(?:lethe|tests|benchmarks|scripts)/[a-z_/-]+\.(?:py|yaml|sh)\b", text)
        recipes = re.findall(r"`((?:lab|tamper|sweeps|deep-ignorance-7b)/[\w-]+)`", text)
        missing = [file for file in files if not (ROOT / file).exists()]
        missing += [name for name in recipes if not (RECIPES / f"{name}.yaml").exists()]
        assert not missing, page.name


def test_reference_pages_are_those_of_the_settings():
    folder, pages = ROOT / "docs" / "reference", reference().pages()
    assert {page.name for page in folder.glob("*.md")} == {*pages, *HANDWRITTEN}
    outdated = [name for name, text in pages.items() if (folder / name).read_text() != text]
    assert not outdated, "run scripts/reference.py"


def test_every_setting_has_a_help_text():
    made = reference()
    for name, command in cli.COMMANDS.items():
        empty = re.findall(r"^\| `([\w.]+)` \|.*\|  \|$", made._tables(command.config, set()), re.MULTILINE)
        assert not empty, f"{name}: {empty}"


def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text()
        outside = re.findall(r"<(?:script|link|img|source|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*", html)
        assert not [tag for tag in outside if 'rel="canonical"' not in tag], page.name
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", html), page.name
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name
    assert (tmp_path / "site" / "search" / "search_index.json").exists()


def test_the_method_that_the_guide_shows_is_the_one_in_the_package():
    source = (ROOT / "lethe" / "methods" / "npo.py").read_text()
    assert all(line in source for line in blocks("docs/extending.md", "python")[1].splitlines())
