"""The checkpoint sweep: which checkpoint is the latest still ignorant one."""

from __future__ import annotations

import importlib
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lethe import CheckpointsConfig, checkpoints
from lethe.errors import LetheError
from lethe.evaluation.checkpoint_sweep import annotate, find_checkpoints, not_monotone, search
from lethe.lab.presets import active_preset
from lethe.models.checkpoint_folders import checkpoint_folders
from lethe.models.refs import resolve
from lethe.report.charts import draw_checkpoints
from lethe.report.tables import checkpoints_table
from lethe.runs.run import Run


def rows(*accuracies: float, n: int = 400) -> list[dict]:
    return [{"evals": {"t": {"acc": a, "low": a - 0.04, "high": a + 0.04, "chance": 0.25, "n": n}}} for a in accuracies]


@pytest.mark.parametrize(
    ("accuracies", "source", "notes"),
    [
        ((0.1, 0.25, 0.27, 0.40, 0.9), None, ["~Random", "~Random", "~Random (latest viable)", "Learning starts", ""]),
        ((0.24, None, 0.27, 0.40), 0, ["Current source; ~Random", "", "~Random (latest viable)", "Learning starts"]),
        ((0.24, None, 0.27, 0.40), 1, ["~Random", "Current source", "~Random (latest viable)", "Learning starts"]),
        ((0.5, 0.9), None, ["", ""]),
    ],
)
def test_notes_of_checkpoints(accuracies, source, notes):
    table = rows(*(accuracy or 0.0 for accuracy in accuracies))
    for i, row in enumerate(table):
        row["name"] = f"global_step{i}"
        row["evals"] = row["evals"] if accuracies[i] else {}
    latest = annotate(table, "t", None if source is None else f"global_step{source}")
    assert [row["note"] for row in table] == notes
    assert latest is next((row for row in table if "latest viable" in row["note"]), None)


# --- the search ------------------------------------------------------------------------------------------------------


def searched(history: list[bool | None]) -> dict[int, bool | None]:
    """What bisection evaluates of a planted history (True: ignorant, None: cannot be evaluated)."""
    found: dict[int, bool | None] = {}

    def ignorant(i: int) -> bool | None:
        found[i] = history[i]
        return history[i]

    search(len(history), ignorant)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 15, 119, 128])
def test_bisection_finds_every_onset_with_few_evaluations(count):
    most = {1: 1, 2: 2, 3: 3, 15: 6, 119: 9, 128: 9}[count]
    for onset in range(count + 1):
        found = searched([i < onset for i in range(count)])
        assert max((i for i, is_so in found.items() if is_so), default=-1) == onset - 1
        assert {i for i in (onset - 2, onset) if 0 <= i < count and onset} <= set(found)  # the answer's neighbours
        assert len(found) <= most


def test_checkpoints_that_cannot_be_measured_are_passed_over():
    rng = random.Random(1)
    for _ in range(300):
        onset = rng.randrange(40)
        history: list[bool | None] = [None if rng.random() < 0.3 else i < onset for i in range(40)]
        found = searched(history)
        known = [i for i, is_so in found.items() if is_so]
        assert max(known, default=None) == max((i for i, is_so in enumerate(history) if is_so), default=None)


def test_what_is_not_monotone_is_said():
    for i, row in enumerate(table := rows(0.24, 0.40, 0.26, 0.9, 0.7)):
        row["name"] = f"global_step{i}"
    assert not_monotone(table[:2], "t") == []
    assert not_monotone(table, "t") == [
        "global_step1 has 40.00 %, global_step2 26.00 % and is at chance again",
        "global_step3 has 90.00 %, global_step4 70.00 %",
    ]
    assert not_monotone(rows(0.24, 0.22, 0.25, 0.23, 0.9, 0.88), "t") == []  # noise is no fall


# --- real sweeps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluations(monkeypatch):
    """The checkpoints evaluated, in order; a number in `stop_at` interrupts the one after so many."""
    module = importlib.import_module("lethe.evaluation.accuracy")
    original, done, stop_at = module.evaluate_model, [], []

    def counting(model, *args, **settings):
        if stop_at and len(done) == stop_at[0]:
            raise KeyboardInterrupt
        done.append(model.config._name_or_path)
        return original(model, *args, **settings)

    monkeypatch.setattr(module, "evaluate_model", counting)
    return done, stop_at


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """No results of earlier sweeps."""
    module = importlib.import_module("lethe.evaluation.checkpoint_sweep")
    monkeypatch.setattr(module, "lethe_home", lambda: tmp_path / "home")


def planted(folder: Path, lab: Path, history: str) -> str:
    """A folder of checkpoints: `i` an ignorant one of the lab's, `k` its last one, `x` one without weights."""
    known = list(checkpoint_folders(lab / "checkpoints").values())
    folder.mkdir()
    for i, letter in enumerate(history):
        step = folder / f"global_step{10 * (i + 1)}"
        if letter == "x":
            shutil.copytree(known[0], step)
            (step / "model.safetensors").write_bytes(b"damaged")
        else:
            step.symlink_to(known[0] if letter == "i" else known[-1], target_is_directory=True)
    return str(folder)


def sweep(folder: str, tmp_path: Path, **more: Any) -> Run:
    return checkpoints(
        CheckpointsConfig("lab:final", checkpoints=folder, tasks=["lab_forget_robust"], out=str(tmp_path / "runs"), **more)
    )


def test_a_planted_history_is_found_and_every_checkpoint_keeps_its_row(lab, tmp_path, empty_cache):
    """The last checkpoint is damaged: it has a reason and no number, and the one before it answers for it."""
    run = sweep(planted(tmp_path / "c", lab, "i" * 13 + "k" * 6 + "x"), tmp_path)
    assert run.record["latest_ignorant"].endswith("@global_step130")
    measured = [row["step"] for row in run.record["checkpoints"] if row["evals"]]
    assert {120, 130, 140, 190} <= set(measured) and len(measured) <= 7
    damaged = run.record["checkpoints"][-1]
    assert damaged["evals"] == {} and "model.safetensors cannot be read" in damaged["reason"]
    assert damaged["note"].startswith("not measured: ")
    assert len(run.record["checkpoints"]) == 20 and run.record["not_monotone"] == []
    table = checkpoints_table(run)
    assert [line[0] for line in table.rows] == [f"global_step{10 * (i + 1)}" for i in range(20)]
    assert sum(line[1] == "-" for line in table.rows) == 20 - len(measured)
    assert any("of 20 checkpoints were measured" in note for note in table.notes)
    draw_checkpoints(run)
    assert (run.path / "checkpoints.svg").read_text().startswith("<svg")


def test_a_history_that_is_not_monotone_is_said_in_the_table(lab, tmp_path, empty_cache):
    """Halving "iikikkkk" measures the 8th, 4th, 5th … and at the end the answer's earlier neighbour, which knows the topic."""
    run = sweep(planted(tmp_path / "c", lab, "iikikkkk"), tmp_path)
    assert run.record["latest_ignorant"].endswith("@global_step40")
    (words,) = run.record["not_monotone"]
    assert words.startswith("global_step30 has") and words.endswith("and is at chance again")
    assert any(note.startswith("Not monotone: global_step30") for note in checkpoints_table(run).notes)
    everything = sweep(str(tmp_path / "c"), tmp_path, search="all")
    assert all(row["evals"] for row in everything.record["checkpoints"])
    assert everything.record["latest_ignorant"] == run.record["latest_ignorant"]


def test_a_sweep_that_can_measure_nothing_gives_up(lab, tmp_path, empty_cache):
    folder = planted(tmp_path / "c", lab, "xxxxxx")
    with pytest.raises(LetheError, match="none of the 3 tried could be evaluated"):
        sweep(folder, tmp_path)


def test_a_killed_sweep_goes_on_and_a_second_one_is_free(lab, tmp_path, evaluations, empty_cache):
    done, stop_at = evaluations
    stop_at.append(3)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(CheckpointsConfig("lab:final", search="all", limit=20, out=str(tmp_path)))
    stop_at.clear()
    names = list(checkpoint_folders(lab / "checkpoints"))
    run = checkpoints(CheckpointsConfig("lab:final", search="all", limit=20, out=str(tmp_path)))
    assert [Path(path).name for path in done] == names
    assert run.record["evaluations"] == {"done": len(names) - 3, "cached": 3}
    again = checkpoints(CheckpointsConfig("lab:final", limit=20, out=str(tmp_path)))
    assert len(done) == len(names) and again.record["evaluations"]["done"] == 0
    checkpoints(CheckpointsConfig("lab:final", limit=21, out=str(tmp_path)))  # other questions are not those
    assert len(done) > len(names)


def test_branches_of_a_repository_are_not_fetched_before_they_are_measured(monkeypatch, tmp_path):
    """Listing 119 branches downloads nothing; they come by number."""
    module = importlib.import_module("lethe.evaluation.checkpoint_sweep")
    monkeypatch.setattr(module, "_branches", lambda repository: ["global_step0", "global_step9", "global_step10"])
    found = find_checkpoints(CheckpointsConfig("org/model", out=str(tmp_path)))
    assert list(found) == ["global_step0", "global_step9", "global_step10"]
    assert (found["global_step9"].path, found["global_step9"].revision) == ("org/model", "global_step9")


def test_sweep_of_the_lab_ends_at_the_onset(lab, tmp_path):
    run = checkpoints(CheckpointsConfig("lab:final", search="all", out=str(tmp_path)))
    names = list(checkpoint_folders(lab / "checkpoints"))
    assert [row["name"] for row in run.record["checkpoints"]] == names
    latest = resolve(run.record["latest_ignorant"])
    step = next(row["step"] for row in run.record["checkpoints"] if row["ref"] == run.record["latest_ignorant"])
    assert step >= active_preset().onset and latest.path.endswith(f"global_step{step}")
    assert run.record["checkpoints"][-1]["evals"]["lab_forget_robust"]["low"] > 0.5
    halved = checkpoints(CheckpointsConfig("lab:final", out=str(tmp_path)))
    assert halved.record["latest_ignorant"] == run.record["latest_ignorant"]
    assert halved.record["evaluations"]["done"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "global_step1"}, "source: 'global_step1' is not one of the checkpoints"),
        ({"model": "."}, "global_step"),
        ({"model": "lab:finel"}, "did you mean 'final'"),
        ({"checkpoints": "nowhere"}, "checkpoints: 'nowhere' is not a folder"),
        ({"tasks": ["lab_forget_cloze"]}, "no chance level"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(lab, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LetheError, match=words):
        checkpoints(CheckpointsConfig(**({"model": "lab:final"} | settings), out="runs"))
    assert not (tmp_path / "runs").exists()
