"""A method in a file of the user's own: what it may do, when it runs, and what a record cannot make it do."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from lab_runs import assert_same, settings, start, wait_for
from several import ended
from several import start as started
from sweeping import recipe as sweep_recipe
from sweeping import trials

from lethe import sweep, unlearn
from lethe.cli import main
from lethe.config import ResumeConfig, SweepConfig, to_dict
from lethe.config.parse import build, from_recipe
from lethe.errors import LetheError
from lethe.lab.presets import active_preset
from lethe.launching.worker import work
from lethe.methods import user_file
from lethe.methods.method import Method
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.grid import Grid
from lethe.sweeps.resuming import resume
from lethe.sweeps.reuse import complete_runs

DOCS = Path(__file__).parent.parent / "docs"
FILE = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)[0]
"""The file in the documents."""
HEAD, CLASS = FILE.replace("Losses, Need", "Losses, Method, Need").split("@dataclass")
CLASS = f"@dataclass{CLASS}"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """mine.py in the working directory. Its content is that of this test alone, so that nobody has run it before."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(f'"""Of {tmp_path}."""\n{HEAD}{CLASS}')
    return file


@pytest.fixture
def own_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))


def short(out: Path, **changes: Any) -> dict[str, Any]:
    found = settings(out, **changes)
    del found["source"]
    return found | {"method": "./mine.py"}


def made(out: Path, **changes: Any) -> Any:
    return from_recipe(Method, None, **{name: plain(value) for name, value in short(out, **changes).items()})


def plain(value: Any) -> Any:
    return to_dict(value) if hasattr(value, "__dataclass_fields__") else value


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_help_of_a_file_lists_its_settings_and_warns_once_that_it_is_code(mine, own_home, capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--method", "./mine.py", "--help"])
    shown = capsys.readouterr()
    assert "method ./mine.py: Unlearn by gradient ascent." in shown.out and "Factor of the cross-entropy." in shown.out
    assert shown.err == "lethe: method './mine.py' is Python code, and runs with your permissions\n"


def test_a_file_is_found_from_the_working_directory_whatever_names_it(mine, own_home, capsys):
    Path("below").mkdir()
    Path("below/recipe.yaml").write_text("method: ./mine.py\ngain: 2\n")
    for given in (from_recipe(Method, "below/recipe.yaml"), from_recipe(Method, None, method=str(mine), gain=2)):
        assert type(given).__name__ == "Ascent" and given.gain == 2 and Path(given.method).samefile(mine)
    assert main(["unlearn", "--config", "below/recipe.yaml", "--gain", "0"]) == 2
    assert lines(capsys)[-1] == "lethe: gain: must be above 0, got 0.0"
    assert main(["unlearn", "--config", "below/recipe.yaml", "--gian", "1"]) == 2
    assert "did you mean" in lines(capsys)[-1] or "gain" in lines(capsys)[-1:]


DEFECTS = {
    "class Ascent(": ("class Ascent(:", "line 17: SyntaxError: invalid syntax"),
    "from dataclasses import dataclass": ("from nowhere import dataclass", "ModuleNotFoundError: No module named 'nowhere'"),
    "@dataclass(kw_only=True)\n": ("", "Ascent in './mine.py' is no dataclass; write @dataclass(kw_only=True) above it"),
    "def forget_need": ("def forget_needs", "Ascent in './mine.py' does not define forget_need(); write it"),
    "def forget_loss": ("def other_loss", "Ascent in './mine.py' does not define forget_loss(); write it"),
    "def forget_loss(self, forget: View)": (
        "def forget_loss(self, forget: View, retain: View)",
        "forget_loss(self, forget, retain) of Ascent in './mine.py' must be forget_loss(self, forget)",
    ),
    "(ForgetAndRetain)": ("(Method)", "Ascent in './mine.py' does not define needs(); write it"),
    "gain: Annotated[float, above(0)]": ("gain: Nothing", "NameError: name 'Nothing' is not defined"),
    '"""Unlearn by': ('1 / 0\n    """Unlearn by', "line 18: ZeroDivisionError: division by zero"),
    "class Ascent(ForgetAndRetain)": (
        "class Ascent(dict)",
        "must define one subclass of Method or ForgetAndRetain, and defines none",
    ),
}


@pytest.mark.parametrize("before", DEFECTS, ids=str)
def test_a_file_that_is_no_method_is_refused_in_one_line(mine, own_home, capsys, before):
    after, said = DEFECTS[before]
    text = mine.read_text()
    assert before in text
    mine.write_text(text.replace(before, after, 1))
    assert main(["unlearn", "--method", "./mine.py"]) == 2
    warned, refused = lines(capsys)
    assert "is Python code" in warned and refused.startswith("lethe: method: ") and said in refused


def test_two_classes_no_file_and_a_folder_are_refused_in_one_line(mine, own_home, capsys):
    mine.write_text(mine.read_text() + CLASS.replace("Ascent", "Second"))
    for method, said in (
        ("./mine.py", "must define one subclass of Method or ForgetAndRetain, and defines Ascent, Second"),
        ("./other.py", "'./other.py' cannot be read (No such file or directory)"),
        ("home/", "'home/' cannot be read (Is a directory)"),
        ("mine", "there is no method 'mine'"),
    ):
        Path("home").mkdir(exist_ok=True)
        assert main(["check", "--method", method]) == 2
        assert said in lines(capsys)[-1]


def test_a_helper_class_whose_name_begins_with_an_underscore_is_no_second_method(mine, own_home):
    base = CLASS.replace("Ascent", "_Base").replace("gain", "base_gain")
    mine.write_text(f"{HEAD}{base}\n\n@dataclass(kw_only=True)\nclass Mine(_Base):\n    '''Unlearn.'''\n")
    assert from_recipe(Method, None, method="./mine.py").base_gain == 0.01


def test_a_procedure_may_be_a_file(mine, own_home):
    base = CLASS.replace("ForgetAndRetain", "Method").replace(
        "def forget_loss(self, forget: View)", "def gradient(self, update)"
    )
    mine.write_text(
        HEAD
        + base.replace("def forget_need(self) -> Need", "def needs(self)")
        .replace("Need(logits", "dict(forget=Need(logits")
        .replace("True)\n\n", "True))\n\n")
    )
    assert from_recipe(Method, None, method="./mine.py").is_procedure
    mine.write_text(mine.read_text().replace("def gradient(self, update)", "def gradient(self)"))
    with pytest.raises(LetheError, match=r"gradient\(self\) of Ascent in './mine.py' must be gradient\(self, update\)"):
        from_recipe(Method, None, method="./mine.py")


def test_a_record_cannot_run_a_file_that_the_user_has_not_named(mine, own_home, capsys):
    mine.write_text(f"{mine.read_text()}\nopen('ran', 'w').close()\n")
    with pytest.raises(LetheError, match="that you have not run before; read it, and if you trust it, add --trust_record true"):
        build(Method, {"method": "./mine.py"})
    assert not Path("ran").exists()
    from_recipe(Method, None, method="./mine.py")
    Path("ran").unlink()
    assert build(Method, {"method": "./mine.py"}).gain == 0.01


def stranger(mine: Path, **changes: Any) -> Run:
    """A run of somebody else: its record, and its copy of a file."""
    marked = f"{mine.read_text()}\nopen('ran', 'w').close()\n"
    run = Run.create("unlearn", "theirs", {"method": "./mine.py", "out": "runs", "name": "theirs"} | changes, "runs")
    (run.path / "method.py").write_text(marked)
    run.update(method_file={"path": "./mine.py", "sha256": user_file._sha256(marked.encode())})
    return run


def test_a_run_of_somebody_else_is_listed_and_reported_but_resumed_only_with_consent(mine, own_home, capsys):
    run = stranger(mine, model="nowhere", retain_coef=5.0)
    assert main(["runs", "runs"]) == 0 and "theirs" in capsys.readouterr().out
    assert main(["report", "runs", "--out", "report"]) == 0
    complete_runs(Path("runs"))
    assert main(["resume", str(run.path)]) == 2
    assert "--trust_record true" in lines(capsys)[-1] and not Path("ran").exists()
    work([run.path])
    assert "--trust_record true" in Run.open(run.path).record["reason"] and not Path("ran").exists()
    assert main(["resume", str(run.path), "--trust_record", "true"]) == 2
    assert "nowhere" in lines(capsys)[-1] and Path("ran").exists()


@pytest.mark.parametrize("damage", ["changed", "gone", "no hash"])
def test_a_run_whose_copy_is_not_the_file_that_it_began_with_is_not_resumed(mine, own_home, capsys, damage):
    run = stranger(mine)
    if damage == "changed":
        (run.path / "method.py").write_text(mine.read_text())
    elif damage == "gone":
        (run.path / "method.py").unlink()
    else:
        run.update(method_file=None)
    from_recipe(Method, None, method="./mine.py")
    assert main(["resume", str(run.path), "--trust_record", "true"]) == 2
    assert "is not the file that the run began with; restore it, or start a new run" in lines(capsys)[-1]
    assert not Path("ran").exists()


def test_a_file_that_changes_between_the_check_and_the_run_leaves_no_run(mine, own_home):
    config = from_recipe(Method, None, method="./mine.py")
    run = Run.create("unlearn", "mine", to_dict(config), "runs")
    mine.write_text(f"{mine.read_text()}# changed\n")
    with pytest.raises(LetheError, match="has changed since it was checked"):
        user_file.keep(run, user_file.sha256_of(type(config)))
    assert not run.path.exists()


def varied(**changes: Any) -> SweepConfig:
    return SweepConfig(**({"unlearn": {"method": "./mine.py"}, "vary": {"gain": [1, 2]}} | changes))


def test_a_sweep_of_somebody_else_runs_its_file_only_with_consent(mine, own_home, capsys):
    mine.write_text(f"{mine.read_text()}\nopen('ran', 'w').close()\n")
    for changes in ({}, {"unlearn": {}, "vary": {"method": ["npo", "./mine.py"]}}):
        run = Run.create("sweep", "theirs", to_dict(varied(**changes)), "runs")
        for words in ("resume", "sweep status", "sweep retry", "sweep cancel"):
            assert main([*words.split(), str(run.path)]) == 2
            assert "--trust_record true" in lines(capsys)[-1] and not Path("ran").exists()
    assert main(["sweep", "status", str(run.path), "--trust_record", "true"]) == 0 and Path("ran").exists()


def test_a_sweep_whose_file_has_changed_is_not_resumed(mine, own_home, capsys):
    run = Run.create("sweep", "mine", to_dict(varied()), "runs")
    run.update(method_files=user_file.hashes(["./mine.py"]))
    mine.write_text(f"{mine.read_text()}# changed\n")
    assert main(["resume", str(run.path), "--trust_record", "true"]) == 2
    assert "'./mine.py' has changed since the sweep began; undo the change" in lines(capsys)[-1]


def grid(**changes: Any) -> Grid:
    own = {"unlearn": {"eval": {"tasks": ["lab_forget_robust", "lab_retain"]}}} | changes
    return Grid(SweepConfig(**own))


def test_a_sweep_over_methods_takes_the_defaults_of_each_and_settings_of_one_only_where_it_is():
    vary = {
        "method": ["transfer", "distill", "npo"],
        "beta": {"values": [0.1, 1], "when": {"method": "npo"}},
        "source": {"values": ["lab:global_step9"], "when": {"method": ["transfer", "distill"]}},
        "retain_coef": [2],
    }
    planner = grid(vary=vary, unlearn={"lr": 1e-4, "eval": {"tasks": ["lab_forget_robust", "lab_retain"]}, "source": ""})
    stages = [plan.stages[0][1] for plan in planner.plans]
    assert [(s["method"], s.get("beta"), s["source"], s["remove_coef"], s["schedule"]) for s in stages] == [
        ("transfer", None, "lab:global_step9", 5.0, "ramp"),
        ("distill", None, "lab:global_step9", 5.0, "ramp"),
        ("npo", 0.1, "", 1.0, "constant"),
        ("npo", 1, "", 1.0, "constant"),
    ]
    assert all(s["lr"] == 1e-4 and s["retain_coef"] == 2 for s in stages)
    points = list(planner.samples())
    assert {"method": "npo", "beta": 1, "retain_coef": 2} in points


@pytest.mark.slow
def test_a_run_with_a_file_is_killed_resumed_from_its_copy_and_reported(lab, mine, tmp_path, capsys):
    way = {"max_steps": 12, "save_every": 3, "per_device_train_batch_size": 4}
    whole = unlearn(made(tmp_path / "whole", **way))
    assert whole.record["method_file"] == {"path": "./mine.py", "sha256": user_file._sha256(mine.read_bytes())}
    assert (whole.path / "method.py").read_bytes() == mine.read_bytes() and "ascent_loss" in whole.record["losses"]
    process = start("unlearn", made(tmp_path / "killed", **way), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    mine.write_text("raise SystemExit\n")
    assert_same(resume(ResumeConfig(str(run.path))), whole)
    assert main(["runs", str(tmp_path / "whole")]) == 0 and main(["report", str(tmp_path / "whole"), "--out", "report"]) == 0
    assert "ascent" in (tmp_path / "report" / "tables.md").read_text()


@pytest.mark.slow
def test_several_processes_run_the_file(lab, mine, tmp_path):
    one = unlearn(made(tmp_path / "one", per_device_train_batch_size=8))
    (tmp_path / "recipe.json").write_text(
        json.dumps({n: plain(v) for n, v in short(tmp_path / "two", per_device_train_batch_size=4).items()} | {"devices": 2})
    )
    code, errors = ended(started(sys.executable, "-m", "lethe", "unlearn", "--config", str(tmp_path / "recipe.json")))
    assert code == 0, errors
    (two,) = find_runs(tmp_path / "two")
    for name, value in one.record["losses"].items():
        assert two.record["losses"][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_a_sweep_in_workers_over_a_file_and_over_methods(lab, mine, tmp_path):
    recipe = sweep_recipe(max_steps=2)
    for name in ("affine", "source", "layers"):
        del recipe[name]
    vary = {
        "method": ["npo", "transfer", "./mine.py"],
        "gain": {"values": [0.01, 0.02], "when": {"method": "./mine.py"}},
        "source": {"values": [f"lab:global_step{active_preset().onset}"], "when": {"method": "transfer"}},
        "affine": {"values": ["none"], "when": {"method": "transfer"}},
    }
    run = sweep(SweepConfig(unlearn=recipe, vary=vary, out=str(tmp_path / "runs"), jobs=2))
    points = [trial["point"] for trial in trials(run).values() if trial["point"]]
    assert run.status == "complete" and run.record["counts"] == {"complete": 5}
    assert [point.get("gain") for point in points if point["method"] == "./mine.py"] == [0.01, 0.02]
    kept = [each for each in find_runs(tmp_path / "runs") if each.record.get("method_file")]
    assert len(kept) == 2 and all((each.path / "method.py").read_bytes() == mine.read_bytes() for each in kept)
    again = sweep(SweepConfig(unlearn=recipe, vary=vary, out=str(tmp_path / "runs"), jobs=2))
    assert all(trial["reused"] for trial in trials(again).values())
    shutil.copy(mine, tmp_path / "before.py")
    mine.write_text(mine.read_text().replace("-self.gain", "-2 * self.gain"))
    changed = sweep(SweepConfig(unlearn=recipe, vary=vary, out=str(tmp_path / "runs"), jobs=2))
    assert [t["reused"] for t in trials(changed).values() if t["point"].get("method") == "./mine.py"] == [False, False]
