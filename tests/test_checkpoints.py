"""The checkpoint sweep: which checkpoint is the latest still ignorant one."""

from __future__ import annotations

import pytest

from lethe import CheckpointsConfig, checkpoints
from lethe.checkpoints import annotate, at_chance
from lethe.errors import LetheError
from lethe.lab import active_preset
from lethe.refs import checkpoint_folders, resolve


def rows(*accuracies: float, n: int = 400) -> list[dict]:
    return [{"evals": {"t": {"acc": a, "low": a - 0.04, "high": a + 0.04, "chance": 0.25, "n": n}}} for a in accuracies]


def test_at_chance_asks_only_for_the_lower_end():
    assert at_chance({"low": 0.2, "high": 0.3, "chance": 0.25})
    assert at_chance({"low": 0.05, "high": 0.12, "chance": 0.25})
    assert not at_chance({"low": 0.26, "high": 0.35, "chance": 0.25})


def test_notes_are_those_of_the_log():
    table = rows(0.24, 0.25, 0.27, 0.40, 0.9)
    assert annotate(table, "t") is table[2]
    assert [row["note"] for row in table] == ["~Random", "~Random", "~Random (latest viable)", "Learning starts", ""]


def test_no_ignorant_checkpoint_is_none():
    table = rows(0.5, 0.9)
    assert annotate(table, "t") is None and [row["note"] for row in table] == ["", ""]


def test_sweep_of_the_lab_ends_at_the_onset(lab, tmp_path):
    run = checkpoints(CheckpointsConfig("lab:final", out=str(tmp_path)))
    names = list(checkpoint_folders(lab / "checkpoints"))
    assert [row["name"] for row in run.record["checkpoints"]] == names
    latest = resolve(run.record["latest_ignorant"])
    step = next(row["step"] for row in run.record["checkpoints"] if row["ref"] == run.record["latest_ignorant"])
    assert step >= active_preset().onset and latest.path.endswith(f"global_step{step}")
    assert run.record["checkpoints"][-1]["evals"]["lab_forget_robust"]["low"] > 0.5


def test_a_folder_of_checkpoints_gives_the_same_numbers(lab, tmp_path):
    by_name = checkpoints(CheckpointsConfig("lab:final", tasks=["lab_forget_robust"], limit=20, out=str(tmp_path)))
    by_folder = checkpoints(
        CheckpointsConfig(
            "lab:final", checkpoints=str(lab / "checkpoints"), tasks=["lab_forget_robust"], limit=20, out=str(tmp_path)
        )
    )
    for a, b in zip(by_name.record["checkpoints"], by_folder.record["checkpoints"], strict=True):
        assert a["evals"] == b["evals"] and a["sha256"] == b["sha256"]


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(LetheError, match="global_step"):
        checkpoints(CheckpointsConfig(str(tmp_path), out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
