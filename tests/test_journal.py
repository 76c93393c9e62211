"""A sweep's journal is repaired before it is written: what a crash cut short is removed, any other damage is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from lethe.errors import LetheError
from lethe.sweeps.journal import JOURNAL, studies

NAME = "grid 1a2b"


@pytest.fixture
def journal(tmp_path) -> Path:
    """Of a sweep with two trials."""
    study, _ = studies(None, tmp_path, NAME, directions=["minimize", "maximize"])
    for number in range(2):
        study.add_trial(
            create_trial(state=TrialState.RUNNING, user_attrs={"name": f"t{number}", "runs": [f"unlearn-t{number}"]})
        )
    return tmp_path / JOURNAL


def names(journal: Path) -> list[str]:
    study, _ = studies(None, journal.parent, NAME, directions=["minimize", "maximize"])
    return [trial.user_attrs["name"] for trial in study.get_trials()]


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_last_line_that_was_cut_short_is_removed_and_logged(journal, cut, caplog):
    before = journal.read_bytes()
    assert names(journal) == ["t0", "t1"] and journal.read_bytes() == before  # looking at it writes nothing
    journal.write_bytes(before[:-cut])
    expected = ["t0", "t1"] if cut == 1 else ["t0"]  # without its end alone, the record is whole
    for _ in range(3):
        assert names(journal) == expected
    assert [r.levelno for r in caplog.records] == [logging.ERROR] and "was cut short by a crash" in caplog.text
    study, _ = studies(None, journal.parent, NAME, directions=["minimize", "maximize"])
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"name": "later"}))
    assert names(journal) == [*expected, "later"]


@pytest.mark.parametrize(
    "line", ["garbage", "[1]", '{"op_code": 4}', "[" * 5000, "\ufffd", '{"op_code":4,"worker_id":"w","study_']
)
def test_any_other_damage_is_refused_with_its_line(journal, line):
    lines = journal.read_text().splitlines()
    damaged = "\n".join([lines[0], line, *lines[1:]]) + "\n"
    journal.write_text(damaged)
    with pytest.raises(LetheError, match="is damaged in line 2; restore it from a backup, or start a new sweep"):
        names(journal)
    assert journal.read_text() == damaged


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"op_code": 99}, "do not fit together"),
        ({"op_code": 4}, "do not fit together"),
        ({"op_code": 8, "trial_id": 0, "user_attr": {"runs": ["../../home"]}}, "trial 0.runs.0: expected a name without '/'"),
        ({"op_code": 8, "trial_id": 0, "user_attr": {"runs": "all"}}, "trial 0.runs: expected a list"),
        (
            {"op_code": 8, "trial_id": 0, "user_attr": {"stages": [["../x", {"name": "n"}]]}},
            "trial 0.stages.0: expected a kind",
        ),
    ],
)
def test_records_that_are_not_of_a_sweep_are_refused(journal, record, said):
    with journal.open("a") as file:
        file.write(json.dumps({"worker_id": "w"} | record) + "\n")
    with pytest.raises(LetheError, match=said):
        names(journal)
