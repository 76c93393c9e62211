"""One process at a time works on a run, whoever started it. Whether it is alive is determined without comparing clocks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lethe.cli import main
from lethe.config import DemoConfig, EvaluateConfig, ResumeConfig, to_dict
from lethe.demo import demo
from lethe.errors import LetheError
from lethe.launching.worker import work
from lethe.runs.locks import FolderLock, HeldError, identity, lives, seconds_since_written
from lethe.runs.run import Run, now
from lethe.sweeps.resuming import resume

TWO_DAYS = 2 * 86400


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create("evaluate", "trial", to_dict(EvaluateConfig("nowhere", ["lab_retain"])), tmp_path / "runs")


@contextlib.contextmanager
def working(path: Path) -> Iterator[subprocess.Popen]:
    """Another process that works on the run in `path` until it is killed."""
    program = f"""
import time
from lethe.runs.run import Run
with Run.open({str(path)!r}).running():
    print("at work", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def clock_set(path: Path, by: float) -> None:
    """The record of a run as if its machine's clock had been off: what it says, and when it was written."""
    file = path / "run.json"
    os.utime(file, (time.time() + by,) * 2)


@pytest.mark.parametrize("by", [0, -TWO_DAYS, TWO_DAYS], ids=["right", "back", "ahead"])
def test_a_run_at_work_is_refused_by_every_entry_and_killed_is_let_go(run, by, capsys):
    with working(run.path) as process:
        clock_set(run.path, by)
        assert Run.open(run.path).status == "running"
        before = (run.path / "run.json").read_bytes()
        assert main(["resume", str(run.path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is in use by process {process.pid} on {socket.gethostname()};" in line and "stop it first" in line
        with pytest.raises(HeldError), Run.open(run.path).running():
            pass
        work([run.path])
        assert (run.path / "run.json").read_bytes() == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Run.open(run.path).status == "lost"
    with pytest.raises(LetheError, match="nowhere"):  # it gets as far as the model
        resume(ResumeConfig(str(run.path)))


def test_one_object_of_a_process_works_on_a_run_at_a_time(run):
    with pytest.raises(ZeroDivisionError), run.running():
        with pytest.raises(HeldError):
            Run.open(run.path).hold()
        raise ZeroDivisionError
    Run.open(run.path).hold()


def test_what_was_done_since_the_record_was_read_is_seen(run):
    earlier = Run.open(run.path)
    with run.running():
        run.update(evals={})
    with pytest.raises(LetheError, match="is complete, there is nothing to resume"):
        resume(ResumeConfig(str(run.path)))
    earlier.hold()
    assert earlier.status == "complete"


@pytest.mark.parametrize(
    ("by", "refused"), [(0, True), (-TWO_DAYS, False), (TWO_DAYS, False)], ids=["fresh", "silent", "copied"]
)
def test_another_machine_that_writes_to_the_run_keeps_it_whatever_its_clock_says(run, by, refused):
    """Its lock is not seen here: the file system has none for both."""
    for heartbeat in ("2001-01-01T00:00:00+00:00", "2101-01-01T00:00:00+00:00", now()):
        run.update(status="running", heartbeat=heartbeat, environment={"host": "node7", "pid": 123})
        clock_set(run.path, by)
        found = Run.open(run.path)
        assert found.status == ("running" if refused else "lost")
        if refused:
            with pytest.raises(HeldError, match=r"process 123 on node7, which wrote to it . s ago; stop it there, or try"):
                found.hold()
        else:
            found.hold()
            found.lock.release()


def test_a_slurm_job_that_is_requeued_does_not_wait_for_its_own_earlier_process(run):
    run.update(status="running", heartbeat=now(), job_id="7", environment={"host": "node7", "pid": 123})
    with pytest.raises(HeldError):
        Run.open(run.path).hold("8")
    Run.open(run.path).hold("7")


def test_a_living_process_keeps_a_run_that_it_has_no_lock_on(run):
    """As one of an earlier version, or on a file system without locks, has none."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run.update(status="running", heartbeat="2001-01-01T00:00:00+00:00", environment=identity(process.pid))
    clock_set(run.path, -TWO_DAYS)
    assert Run.open(run.path).status == "running"
    with pytest.raises(HeldError, match=f"process {process.pid}"):
        Run.open(run.path).hold()
    process.communicate(b"\n")
    assert Run.open(run.path).status == "lost"
    Run.open(run.path).hold()


def test_the_controllers_of_a_sweep_share_it(tmp_path):
    sweep = Run.create("sweep", "grid", {}, tmp_path)
    with working(sweep.path):
        Run.open(sweep.path).hold()


@pytest.mark.parametrize("age", [0, 100, TWO_DAYS])
def test_the_age_of_a_file_is_measured_by_its_file_systems_clock(tmp_path, monkeypatch, age):
    """That of this machine may be anywhere."""
    file = tmp_path / "f"
    file.touch()
    os.utime(file, (time.time() - age,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert seconds_since_written(file) == pytest.approx(age, abs=2)
    assert seconds_since_written(tmp_path / "none") == float("inf")


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone(monkeypatch):
    mine = identity()
    assert lives(mine) is True
    assert lives(mine | {"born": "another"}) is False
    assert lives({k: v for k, v in mine.items() if k != "born"}) is True  # as records of earlier versions have it
    assert lives(mine | {"host": "node7"}) is None and lives({}) is None
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)  # the machine's clock was set
    assert identity() == mine


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    who = identity(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert lives(who) is False
    process.wait()


def test_a_second_demo_in_a_folder_is_refused(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    first = FolderLock(out)
    first.acquire()
    with pytest.raises(HeldError, match=f"'{out}' is in use by process {os.getpid()} on "):
        demo(DemoConfig(str(out)))
    assert [path.name for path in out.iterdir()] == ["work.lock"]


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "work.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(LetheError, match="cannot write in"):
        demo(DemoConfig(str(tmp_path / "demo")))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_process_that_is_stopped_for_long_is_not_lost(run):
    with working(run.path) as process:
        process.send_signal(signal.SIGSTOP)
        clock_set(run.path, -TWO_DAYS)
        assert Run.open(run.path).status == "running"
        with pytest.raises(HeldError):
            Run.open(run.path).hold()


@pytest.mark.slow
def test_of_two_that_resume_a_run_at_once_one_does_and_one_is_refused(lab, tmp_path):
    run = Run.create("evaluate", "trial", to_dict(EvaluateConfig("lab:final", ["lab_retain"], limit=8)), tmp_path / "runs")
    both = [
        subprocess.Popen([sys.executable, "-m", "lethe.cli", "resume", str(run.path)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (refused,) = [text for text, process in zip(said, both, strict=True) if process.returncode]
    assert len(refused.splitlines()) == 1
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "complete"
