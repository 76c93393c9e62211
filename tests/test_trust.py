"""A sweep's record runs shell lines and opens a database only if the user has started a sweep with them, or agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from lethe.cli import main
from lethe.config import SweepConfig, to_dict
from lethe.launching import slurm
from lethe.launching.worker import work
from lethe.runs.run import Run
from lethe.sweeps.trust import consent

SLURM = {"launcher": "slurm", "slurm": {"setup": ["touch ran"], "extra": {"qos": "long"}}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def config(**settings) -> SweepConfig:
    own = {"slurm": slurm.SlurmSettings(**settings.pop("slurm", {}))}
    return SweepConfig(unlearn={"source": "lab:final"}, vary={"lr": [1, 2]}, **own, **settings)


def stored(**settings) -> Path:
    return Run.create("sweep", "grid", to_dict(config(**settings)), "runs").path


@pytest.mark.parametrize(
    ("settings", "said"),
    [(SLURM, '{"slurm.setup": ["touch ran"], "slurm.extra": {"qos": "long"}}'), ({"storage": "sqlite:///made.db"}, "made.db")],
    ids=["slurm", "storage"],
)
def test_what_a_record_runs_or_opens_is_shown_and_refused_without_consent(settings, said, capsys):
    path = stored(**settings)
    for words in ("resume", "sweep status", "sweep retry", "sweep cancel"):
        assert main([*words.split(), str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "--trust_record true" in line
    work([path])  # as a trial of another sweep, in a worker
    assert "of kind sweep" in Run.open(path).record["reason"]
    assert not Path("made.db").exists()


def test_consent_is_needed_once_for_the_same_values_and_not_for_those_of_ones_own_sweeps():
    path = stored(storage="sqlite:///made.db")
    assert main(["sweep", "status", str(path), "--trust_record", "true"]) == 0 and Path("made.db").exists()
    assert main(["sweep", "status", str(path)]) == 0
    consent(config(**SLURM), given=True)
    for settings, code in ((SLURM, 0), ({}, 0), ({"storage": "sqlite:///other.db"}, 2)):
        assert main(["sweep", "status", str(stored(**settings))]) == code


def test_consent_that_nothing_reads_is_refused(capsys):
    run = Run.create("evaluate", "eval", {"model": "lab:final"}, "runs")
    assert main(["resume", str(run.path), "--trust_record", "true"]) == 2
    assert "trust_record: has no effect on a run of kind evaluate" in capsys.readouterr().err


def test_a_trials_name_adds_no_line_to_a_jobs_script(monkeypatch):
    """It may come from somebody else's study."""
    import submitit

    given = {}
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(submitit.SlurmExecutor, "__init__", lambda self, *args, **more: None)
    monkeypatch.setattr(submitit.SlurmExecutor, "update_parameters", lambda self, **more: given.update(more))
    monkeypatch.setattr(submitit.SlurmExecutor, "submit", lambda self, work: type("Job", (), {"job_id": "7"}))
    slurm.submit(print, "jobs", slurm.SlurmSettings(), "lethe-1-a\ntouch ran #")  # type: ignore[arg-type]
    assert given["job_name"] == "lethe-1-a-touch-ran--"
