"""A run's directory: whole at every moment, honest about how it ended, readable after a crash."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lethe.errors import LetheError
from lethe.files import refuse_run_folder, sha256, write_atomically
from lethe.runs import run as run_module
from lethe.runs import supervise
from lethe.runs.finding import find_run, find_runs
from lethe.runs.run import Run, Terminated

KEYS = {"id", "kind", "name", "status", "reason", "job_id", "launcher", "created", "started", "finished", "heartbeat", "config"}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create("unlearn", "trial", {"lr": 0.1}, tmp_path / "runs")


def on_disk(run: Run) -> dict:
    return json.loads((run.path / "run.json").read_text())


def test_a_new_run_is_queued_in_a_folder_of_kind_name_and_id(run, tmp_path):
    assert run.path == tmp_path / "runs" / f"unlearn-trial-{run.id}"
    assert on_disk(run).keys() >= KEYS
    assert (on_disk(run)["status"], on_disk(run)["config"]) == ("queued", {"lr": 0.1})


def test_a_name_cannot_leave_the_folder(tmp_path):
    run = Run.create("unlearn", "../../a b/c", {}, tmp_path / "runs")
    assert run.path.parent == tmp_path / "runs"
    assert on_disk(run)["name"] == "../../a b/c"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_reader_never_sees_half_a_record(run):
    """Two threads write records of very different sizes while a third reads."""
    stop, problems, reads = threading.Event(), [], 0

    def write(size: int) -> None:
        while not stop.is_set():
            run.update(payload="x" * size)

    writers = [threading.Thread(target=write, args=(size,)) for size in (10, 400_000)]
    for writer in writers:
        writer.start()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        try:
            assert len(on_disk(run).get("payload", "x" * 10)) in {10, 400_000}
        except (ValueError, OSError, AssertionError) as error:
            problems.append(repr(error)[:80])
        reads += 1
    stop.set()
    for writer in writers:
        writer.join()
    assert reads > 20
    assert not problems
    assert sorted(p.name for p in run.path.iterdir()) == ["run.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    write_atomically(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_update_merges_dicts_one_level_and_replaces_the_rest(run):
    run.update(plan={"steps": 3, "epochs": 1}, losses=[1])
    run.update(plan={"tokens": 9, "epochs": 2}, losses=[2])
    assert on_disk(run)["plan"] == {"steps": 3, "epochs": 2, "tokens": 9}
    assert on_disk(run)["losses"] == [2]


def test_what_cannot_be_recorded_is_a_warning_with_its_reason_until_it_can(run, caplog):
    def broken():
        raise KeyError("experts.base_layer")

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    run.try_to_record(losses=lambda: {"cb_loss": 1.0}, update_by_layer=broken, agreement=lambda: 0.5)
    assert on_disk(run)["missing"] == {"update_by_layer": "KeyError: 'experts.base_layer'"}
    assert (on_disk(run)["losses"], on_disk(run)["agreement"]) == ({"cb_loss": 1.0}, 0.5)
    assert "update_by_layer could not be recorded" in caplog.text
    run.try_to_record(update_by_layer=lambda: {"0": {}})
    assert on_disk(run)["missing"] == {} and on_disk(run)["update_by_layer"] == {"0": {}}
    with pytest.raises(OSError, match="No space"):
        run.try_to_record(agreement=full)


def test_not_a_number_stays_not_a_number(run):
    run.append("metrics.jsonl", {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": None})
    row = run.rows("metrics.jsonl")[0]
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf
    assert row["lr"] is None
    run.update(losses={"cb_loss": math.nan})
    assert math.isnan(Run.open(run.path).record["losses"]["cb_loss"])


def test_a_line_that_a_crash_cut_short_is_left_out_and_the_next_one_does_not_join_it(run):
    assert run.rows("metrics.jsonl") == []
    run.append("metrics.jsonl", {"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1]
    run.append("metrics.jsonl", {"step": 2})
    run.append("metrics.jsonl", {"step": 3})
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1, 2, 3]


# --- how a run ends --------------------------------------------------------------------------------------------------


def test_complete(run):
    with run.running():
        assert on_disk(run)["status"] == "running"
        assert on_disk(run)["started"]
        logging.getLogger("lethe.test").warning("something to know")
    record = on_disk(run)
    assert (record["status"], record["reason"]) == ("complete", None)
    assert record["finished"] >= record["started"] >= record["created"]
    assert record["environment"]["seconds"] >= 0
    assert record["environment"]["peak_memory"] > 1e6
    assert record["environment"]["versions"]["torch"]
    assert "something to know" in (run.path / "log.txt").read_text()


def test_failed_with_its_reason_and_the_traceback_in_the_log_or_cancelled(run):
    with pytest.raises(ZeroDivisionError), run.running():
        1 / 0  # noqa: B018
    assert (on_disk(run)["status"], on_disk(run)["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert on_disk(run)["finished"]
    assert "Traceback" in (run.path / "log.txt").read_text()
    with pytest.raises(KeyboardInterrupt), run.running():
        raise KeyboardInterrupt
    assert on_disk(run)["status"] == "cancelled"


def test_a_divergence_is_the_status_of_a_run_that_ends_and_part_of_the_reason_of_one_that_fails(run):
    with run.running():
        run.update(divergence={"step": 3, "reason": "the loss was nan at step 3"})
        assert on_disk(run)["status"] == "running"
    assert (on_disk(run)["status"], on_disk(run)["reason"]) == ("diverged", "the loss was nan at step 3")
    with pytest.raises(ValueError, match="later"), run.running():
        run.update(divergence={"step": 3, "reason": "the loss was nan at step 3"})
        raise ValueError("later")
    assert on_disk(run)["status"] == "failed"
    assert on_disk(run)["reason"] == "the loss was nan at step 3; then ValueError: later"


def test_neither_log_file_nor_thread_outlives_the_run(run):
    handlers, threads = list(logging.getLogger().handlers), threading.active_count()
    with run.running():
        assert len(logging.getLogger().handlers) == len(handlers) + 1 and threading.active_count() == threads + 1
    assert logging.getLogger().handlers == handlers and threading.active_count() == threads
    logging.getLogger("lethe.test").error("afterwards")
    assert "afterwards" not in (run.path / "log.txt").read_text()


def test_heartbeat_is_renewed_while_running(run, monkeypatch):
    monkeypatch.setattr(supervise, "HEARTBEAT_SECONDS", 0.05)
    with run.running():
        run.update(heartbeat="2001-01-01T00:00:00+00:00")
        deadline = time.monotonic() + 5
        while on_disk(run)["heartbeat"].startswith("2001") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert run_module.seconds_since(on_disk(run)["heartbeat"]) < 5


# --- finding runs ----------------------------------------------------------------------------------------------------


def test_find_runs_lists_oldest_first_in_a_folder_its_runs_or_a_run(tmp_path):
    made = [Run.create("unlearn", f"n{i}", {}, tmp_path / "demo" / "runs") for i in range(3)]
    for run, created in zip(made, ("2024-03-01", "2024-01-01", "2024-02-01"), strict=True):
        run.update(created=created)
    expected = [made[1].id, made[2].id, made[0].id]
    assert [r.id for r in find_runs(tmp_path / "demo" / "runs")] == expected
    assert [r.id for r in find_runs(tmp_path / "demo")] == expected
    assert [r.id for r in find_runs(made[0].path)] == [made[0].id]
    assert find_runs(tmp_path / "nowhere") == []


def test_find_run_by_id_by_part_and_by_folder(tmp_path, monkeypatch):
    one = Run.create("unlearn", "first", {}, tmp_path / "demo" / "runs")
    two = Run.create("tamper", "second", {}, tmp_path / "runs")
    for name in (one.id, "unlearn-first", one.path.name, str(one.path)):
        assert find_run(name, tmp_path / "demo" / "runs").id == one.id
    monkeypatch.chdir(tmp_path)
    assert find_run(one.id).path.resolve() == one.path.resolve()  # in */runs/
    assert find_run(two.id).path.resolve() == two.path.resolve()  # in runs/
    Run.create("tamper", f"of-{one.id}-again", {}, one.path.parent)
    assert find_run(one.id, one.path.parent).id == one.id  # a whole id before a part of a name


def test_find_run_refuses_what_fits_several_or_none(tmp_path):
    runs = [Run.create("unlearn", "same", {}, tmp_path) for _ in range(2)]
    with pytest.raises(LetheError, match=r"matches 2 runs.*give the whole id") as caught:
        find_run("same", tmp_path)
    assert all(run.path.name in str(caught.value) for run in runs)
    for name, said in (("ffff", "run:ffff is not in"), ("", "names no run")):
        with pytest.raises(LetheError, match=said):
            find_run(name, tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(LetheError, match=r"cannot be read .there is no such file."):
        Run.open(tmp_path)


def full(where: str) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", where)


def test_a_run_whose_record_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def write(path: Path, text: str) -> None:
        raise full(str(path))

    monkeypatch.setattr(run_module, "write_atomically", write)
    with pytest.raises(LetheError, match=r"out: cannot write to '.*runs' .No space left"):
        Run.create("unlearn", "trial", {}, tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [full("curve.jsonl"), SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
    ids=["of the system", "of safetensors"],
)
def test_a_disk_that_is_full_is_one_line_that_says_how_to_go_on(run, error):
    with pytest.raises(LetheError, match=f"a disk is full.*make room and resume: lethe resume {run.path}"), run.running():
        raise error
    assert on_disk(run)["status"] == "failed" and "a disk is full" in on_disk(run)["reason"]
    assert "Traceback" not in (run.path / "log.txt").read_text()


@pytest.mark.parametrize("kind", ["complete", "stopped", "refused", "full"])
def test_a_full_disk_does_not_hide_how_the_work_ended(small, capfd, kind):
    """Not even where there is no room for what is logged."""
    run = Run.create("unlearn", "trial", {}, small(64) / "runs")
    raised = {
        "complete": (LetheError, "a disk is full.*make room and resume: lethe resume"),
        "stopped": (Terminated, "SIGTERM; resume with: lethe resume"),
        "refused": (LetheError, r"^the map is too wide .os error 28.$"),
        "full": (LetheError, "a disk is full.*ballast.*make room and resume: lethe resume"),
    }[kind]
    with pytest.raises(raised[0], match=raised[1]), run.running():
        try:
            (run.path.parent / "ballast").write_bytes(bytes(10**6))
        except OSError as error:
            logging.getLogger("lethe.test").warning("a line " * 10000)
            if kind == "full":
                raise OSError(error.errno, error.strerror, "ballast") from None
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        if kind == "refused":
            raise LetheError("the map is too wide (os error 28)")
    assert capfd.readouterr().err == ""
    assert run.record["status"] == {"complete": "complete", "stopped": "cancelled"}.get(kind, "failed")


def test_an_output_folder_that_is_a_run_or_a_file_is_refused(run, tmp_path):
    before = sorted(p.name for p in run.path.rglob("*"))
    for function in (refuse_run_folder, lambda out: Run.create("unlearn", "inside", {}, out)):
        with pytest.raises(LetheError, match="already holds a run"):
            function(run.path)
    assert sorted(p.name for p in run.path.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LetheError, match="is a file"):
        refuse_run_folder(tmp_path / "file")
    with pytest.raises(LetheError, match="cannot write"):
        Run.create("unlearn", "below", {}, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    refuse_run_folder(tmp_path / "runs")
    refuse_run_folder(tmp_path / "new")


@pytest.mark.parametrize("kind", ["sweep", "lab"])
def test_several_processes_at_a_sweep_or_a_lab_are_refused_and_leave_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LetheError, match=rf"^{kind}: runs in one process, and 2 were started; start it without torchrun"):
        Run.create(kind, "another", {}, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_sha256_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert sha256(a, b) == sha256(b, a)
    first = sha256(a, b)
    a.write_text("2")
    b.write_text("1")
    assert sha256(a, b) != first
