"""The list of runs: conditions, order, columns, time left, and the state of Slurm jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lethe.cli import main
from lethe.results import listing
from lethe.results.listing import Entry, entries, ordered, select
from lethe.runs.finding import find_runs
from lethe.runs.run import Run, now


def make(folder: Path, name: str, retain: float = 5.0, acc: float | None = None, **fields: Any) -> Run:
    config = {"retain_coef": retain, "remove_coef": 5.0, "lr": 1e-3, "lora": {"r": 16}, "merge": False, "name": name}
    run = Run.create(fields.pop("kind", "unlearn"), name, config | fields.pop("config", {}), folder)
    results = {} if acc is None else {"mmlu": {"acc": acc, "fingerprint": fields.pop("fingerprint", "f")}}
    run.update(**({"status": "complete", "evals": results, "losses": {"cb_loss": retain / 10}} | fields))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three complete runs, one failed, one queued; the oldest first."""
    made = [
        make(tmp_path, "ret5", 5, 0.40),
        make(tmp_path, "ret20", 20, 0.44, config={"lora": None}),
        make(tmp_path, "ret10", 10, 0.42, plan={"steps": 8}),
        make(tmp_path, "bad", 1, status="failed", reason="the disk is full"),
        make(tmp_path, "attack", status="queued", kind="tamper", config={"model": "run:x"}),
    ]
    for i, run in enumerate(made):
        run.update(created=f"2026-01-01T00:00:0{i}+00:00")
    return tmp_path


def names(listed: list[Entry]) -> list[str]:
    return [entry.run.record["name"] for entry in listed]


def listed(folder: Path) -> list[Entry]:
    return entries(find_runs(folder))


# --- conditions, order, columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["status=complete"], ["ret5", "ret20", "ret10"]),
        (["status!=complete"], ["bad", "attack"]),
        (["kind=tamper"], ["attack"]),
        (["retain_coef=5", "kind=unlearn"], ["ret5"]),
        (["config.retain_coef=5.0", "kind=unlearn"], ["ret5"]),
        (["lr=1e-3", "retain_coef>=10"], ["ret20", "ret10"]),
        (["lr=0.001", "retain_coef<5"], ["bad"]),
        (["name=ret*"], ["ret5", "ret20", "ret10"]),
        (["mmlu>0.4"], ["ret20", "ret10"]),
        (["evals.mmlu.acc<=0.4"], ["ret5"]),
        (["cb_loss=0.5", "kind=unlearn"], ["ret5"]),
        (["lora_r=full"], ["ret20"]),
        (["config.lora.r=16", "retain_coef=10"], ["ret10"]),
        (["merge=false", "lora=null"], ["ret20"]),
        (["plan.steps=8"], ["ret10"]),
        (["steps=8"], ["ret10"]),
        (["mmlu!=0.4", "status=complete"], ["ret20", "ret10"]),
        (["reason=*disk*"], ["bad"]),
        (["optimizer=muon"], []),
    ],
)
def test_conditions(folder, conditions, expected):
    assert names(select(listed(folder), conditions)) == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("retian_coef=5", "no run has a field 'retian_coef'; did you mean 'retain_coef'"),
        ("config.lro=5", "did you mean 'config.lr'"),
        ("mmul>0.3", "did you mean 'mmlu'"),
        ("evals.mmul.acc>0.3", "did you mean 'evals.mmlu.acc'"),
        ("status", "expected a condition"),
        ("lr>fast", "compares numbers, got 'fast' for lr"),
    ],
)
def test_conditions_that_cannot_be_are_refused_in_one_line(folder, condition, message, capsys):
    assert main(["runs", str(folder), "--where", condition]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_field_is_known_even_where_an_earlier_condition_left_no_run(folder):
    assert main(["runs", str(folder), "--where", "status=lost", "cb_loss=1"]) == 0
    assert select(listed(folder), ["status=lost", "optimizer=muon"]) == []
    assert main(["runs", str(folder), "--where", "status=lost", "cb_lost=1"]) == 2


def test_order_puts_runs_without_the_field_last_either_way(folder):
    assert names(ordered(listed(folder), "mmlu"))[:3] == ["ret5", "ret10", "ret20"]
    assert names(ordered(listed(folder), "mmlu", descending=True)) == ["ret20", "ret10", "ret5", "bad", "attack"]
    assert names(ordered(listed(folder), "lora_r"))[-1] == "ret20"  # numbers before words
    assert names(ordered(listed(folder), "name")) == sorted(names(listed(folder)))


def test_the_command_sorts_and_shows_what_was_asked_for(folder, capsys):
    words = ["--where", "kind=unlearn", "status=complete", "--sort", "retain_coef", "--reverse"]
    assert main(["runs", str(folder), *words, "--columns", "name", "lora_r", "mmlu", "losses.cb_loss", "plan.steps"]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert (title, header.split()) == ("Runs", ["Name", "lora_r", "mmlu", "losses.cb_loss", "plan.steps"])
    assert [row.split() for row in rows] == [
        ["ret20", "full", "44.00", "%", "2", "-"],
        ["ret10", "16", "42.00", "%", "1", "8"],
        ["ret5", "16", "40.00", "%", "0.5", "-"],
    ]


def test_json_holds_records_or_the_columns(folder, capsys):
    assert main(["runs", str(folder), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in records] == ["ret5", "ret20", "ret10", "bad", "attack"]
    assert {"status", "path", "config", "evals", "eta", "progress"} <= set(records[0])
    assert main(["runs", str(folder), "--json", "--columns", "name", "mmlu", "--where", "retain_coef=20"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "ret20", "mmlu": 0.44}]
    assert main(["runs", str(folder), "--json", "--where", "status=lost"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_usual_list_has_reasons_and_an_empty_one_says_so(folder, tmp_path, capsys):
    assert main(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "failed: the disk is full." in out and "mmlu 44.00 %" in out
    assert out.splitlines()[1].split() == ["ID", "Kind", "Name", "Status", "Age", "Time", "Progress", "Results"]
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty"), "--columns", "whatever"]) == 0
    assert main(["runs", str(folder), "--where", "status=lost"]) == 0
    assert [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()] == ["no runs", "no such runs"]


def test_listing_imports_no_torch(folder):
    words = ["runs", str(folder), "--where", "mmlu>0.1", "--sort", "lr"]
    code = f"import sys; from lethe.cli import main; main({words!r}); sys.exit(bool({{'torch', 'scipy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


# --- progress and time left -------------------------------------------------------------------------------------------


def running(folder: Path, steps: int, planned: int = 100, seconds: float = 50.0) -> Run:
    run = make(folder, "at-work", status="running", heartbeat=now(), plan={"steps": planned})
    run.update(environment={"seconds": seconds}, started=now())
    for step in range(1, steps + 1):
        run.append("metrics.jsonl", {"step": step, "loss": 1.0})
    return run


def test_time_left_is_the_mean_speed_times_what_is_left(tmp_path, monkeypatch):
    assert Entry(running(tmp_path, steps=0)).eta is None
    done = running(tmp_path, steps=9)
    done.update(status="complete")
    assert (Entry(done).eta, Entry(done).done) == (None, (9, 100))
    monkeypatch.setattr(Run, "seconds_since_heartbeat", 10.0)
    monkeypatch.setattr(listing, "seconds_since", lambda timestamp: 10.0)
    entry = Entry(running(tmp_path, steps=20))
    assert (entry.value("progress"), entry.time) == (0.2, 60.0)
    assert entry.eta == pytest.approx(60 * 80 / 20)


def test_the_last_line_is_read_from_the_files_end(tmp_path, monkeypatch):
    run = running(tmp_path, steps=3000)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read whole"))
    assert run.last_row("metrics.jsonl") == {"step": 3000, "loss": 1.0}
    run.append("metrics.jsonl", {"step": 3001, "text": "x" * 100_000})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3002, "lo')
    assert (run.last_row("metrics.jsonl") or {})["step"] == 3001
    assert run.last_row("curve.jsonl") is None


# --- watching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeping is over at once; the third time the user presses Ctrl-C."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    return slept


def test_watching_without_a_terminal_prints_once_a_refresh(folder, interrupted, capsys):
    assert main(["runs", str(folder), "--watch", "--every", "2", "--columns", "name"]) == 130
    assert capsys.readouterr().out.count("Name\n") == 3
    assert interrupted == [2.0, 2.0, 2.0]


def test_watching_on_a_terminal_shows_what_fits(folder, interrupted, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("LINES", "9")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["runs", str(folder), "--watch", "--columns", "name"]) == 130
    out = capsys.readouterr().out
    assert "… and 2" in out
    assert "attack" not in out
    assert "ret5" in out


def test_settings_of_watching_that_have_no_effect_are_refused(folder, capsys):
    assert main(["runs", str(folder), "--every", "2"]) == 2
    assert main(["runs", str(folder), "--watch", "--json"]) == 2
    assert capsys.readouterr().err.count("no effect") == 2


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """slurm(squeue=text): programs on PATH, which print the text, or fail for None. sacct fails."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(**answers: str | None) -> Path:
        for name, text in {"sacct": None, **answers}.items():
            (folder / f"{name}.out").write_text(text or "")
            script = f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\ncat {folder}/{name}.out\nexit {int(text is None)}\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        return folder

    return install


def submitted(folder: Path, job: str, status: str = "running", age: str | None = None) -> Entry:
    run = make(folder, f"job-{job}", status=status, launcher="slurm", job_id=job, heartbeat=age or now())
    if age == OLD:
        os.utime(run.path / "run.json", (978307200,) * 2)
    return next(entry for entry in listed(folder) if entry.run.record["job_id"] == job)


OLD = "2001-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("recorded", "heartbeat", "state", "expected"),
    [
        ("queued", None, "PENDING", "queued"),
        ("queued", None, "RUNNING", "queued"),
        ("queued", None, "FAILED", "failed"),
        ("queued", None, None, "lost"),
        ("running", None, "RUNNING", "running"),
        ("running", OLD, "RUNNING", "lost"),
        ("running", OLD, "PENDING", "queued"),
        ("running", OLD, "CANCELLED", "cancelled"),
        ("running", OLD, "CANCELLED by 0", "cancelled"),
        ("running", OLD, "TIMEOUT", "failed"),
        ("running", OLD, "OUT_OF_MEMORY", "failed"),
        ("running", OLD, "COMPLETED", "lost"),
        ("running", OLD, None, "lost"),
        ("complete", None, "FAILED", "complete"),
    ],
)
def test_heartbeat_and_slurm_both_have_a_say(tmp_path, slurm, recorded, heartbeat, state, expected):
    slurm(squeue=f"7|{state}|Priority\n" if state else "8|RUNNING|None\n")
    entry = submitted(tmp_path / "runs", "7", recorded, heartbeat)
    assert entry.status == expected
    if expected in {"failed", "cancelled"}:
        assert state.split()[0] in (entry.reason or "")


def test_squeue_is_asked_once_and_only_if_a_run_is_slurms(tmp_path, slurm):
    programs = slurm(squeue="7|RUNNING|None\n9_2|PENDING|Resources\n")
    make(tmp_path / "runs", "here", status="queued", job_id="7")
    assert listed(tmp_path / "runs")[0].status == "queued"
    assert not (programs / "squeue.calls").exists()
    submitted(tmp_path / "runs", "7")
    (programs / "squeue.calls").unlink()
    assert submitted(tmp_path / "runs", "9_2", "queued").reason == "Slurm: PENDING, Resources"
    assert (programs / "squeue.calls").read_text().count("\n") == 1


def test_without_an_answer_from_slurm_the_heartbeat_decides(tmp_path, slurm):
    slurm(squeue=None)
    assert submitted(tmp_path / "runs", "7", "queued").status == "queued"
    assert submitted(tmp_path / "runs", "8", "running", OLD).status == "lost"
