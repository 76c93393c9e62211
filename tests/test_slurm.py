"""Jobs on a real Slurm cluster: their states, and how they end when cancelled, out of time, preempted or lost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster
from slurm_work import Steps, Submits
from sweeping import at_work, recipe, start, trials, until

from lethe.config import SweepCancelConfig, SweepRetryConfig, SweepStatusConfig
from lethe.errors import LetheError
from lethe.launching import slurm
from lethe.launching.launchers import last_lines
from lethe.runs import slurm_jobs
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.controller import cancel, retry, status

LONG = 600


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path):
    """submit(steps, **settings): the job's id and its run, once the run is at work."""
    jobs = []

    def make(steps: int, **settings: Any) -> tuple[str, Run]:
        given = slurm.SlurmSettings(**{"time": 5, "cpus": 1, **settings})
        job = slurm.submit(Steps(tmp_path / "runs", steps), tmp_path / "jobs", given, "steps")
        jobs.append(job)
        run = until(lambda: find_runs(tmp_path / "runs"))[0]
        until(lambda: run.rows("metrics.jsonl"))
        return job, run

    yield make
    slurm_jobs.cancel(jobs)
    until(lambda: not any(state.alive for state in slurm_jobs.states(jobs).values()))


def ended(job: str) -> slurm_jobs.JobState:
    return until(lambda: (state := slurm_jobs.states([job])[job]).alive is False and state)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("0:30", 1),
        ("90:01", 91),
        ("1:30:00", 90),
        ("2-00", 2880),
        ("1-12:30", 2190),
        ("1-00:00:01", 1441),
    ],
)
def test_times_in_slurms_forms(time, expected):
    assert slurm.minutes(time) == expected


@pytest.mark.parametrize("time", ["", "soon", "0", 0, "1:2:3:4", "1h", -5, 43200])
def test_what_is_no_time_is_refused(time):
    with pytest.raises(LetheError, match="time: "):
        slurm.SlurmSettings(time=time)


def test_without_slurm_a_submission_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LetheError, match="there is no sbatch"):
        slurm.submit(Steps(tmp_path, 1), tmp_path, slurm.SlurmSettings(), "steps")
    states = slurm_jobs.states(["7"])
    assert (states["7"].word, states["7"].alive) == (slurm_jobs.UNKNOWN, None)


@pytest.mark.slurm
def test_sbatchs_refusal_in_its_own_words(cluster, tmp_path):
    with pytest.raises(LetheError, match="invalid partition specified: nowhere") as caught:
        slurm.submit(Steps(tmp_path, 1), tmp_path / "jobs", slurm.SlurmSettings(partition="nowhere"), "steps")
    assert "\n" not in str(caught.value)
    with pytest.raises(LetheError, match=r"unrecognized option.*partitoin"):
        slurm.submit(Steps(tmp_path, 1), tmp_path / "jobs", slurm.SlurmSettings(extra={"partitoin": "batch"}), "steps")


@pytest.mark.slurm
def test_states_with_and_without_accounting(cluster, submit, caplog):
    """Accounting and slurmctld each answer alone, too. A job that neither knows is never taken for a completed one."""
    job, run = submit(3)
    assert ended(job) == slurm_jobs.JobState("COMPLETED", "None", False)
    assert (Run.open(run.path).record["job_id"], Run.open(run.path).status) == (job, "complete")
    accounted = ["sacct", "-X", "-n", "-P", "-o", "State", "-j", job]
    until(lambda: subprocess.run(accounted, capture_output=True, text=True, check=False).stdout == "COMPLETED\n")
    assert not caplog.records

    cluster.kill("slurmdbd")
    slurm_jobs._warn_without_accounting.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            states = slurm_jobs.states([job, "999999"])
    assert states[job].word == "COMPLETED"
    assert (states["999999"].word, states["999999"].alive) == (slurm_jobs.UNKNOWN, False)
    assert [record.getMessage().count("accounting does not answer") for record in caplog.records] == [1]
    cluster.start()

    cluster.kill("slurmctld")
    states = slurm_jobs.states([job, "999999"])
    assert states[job].word == "COMPLETED"
    assert (states["999999"].word, states["999999"].alive) == (slurm_jobs.UNKNOWN, None)
    cluster.start()


@pytest.mark.slurm
def test_a_cancelled_job_saves_and_stays_cancelled(cluster, submit):
    job, run = submit(LONG)
    slurm_jobs.cancel([job])
    assert ended(job).word == "CANCELLED"
    record = Run.open(run.path).record
    assert (record["status"], "requeue" in record) == ("cancelled", False)
    assert record["saved"] == run.rows("metrics.jsonl")[-1]["step"]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    assert "Restarts=0" in shown


def runs_out_of_time(job: str) -> None:
    subprocess.run(["scancel", "--signal=USR2", job], check=True)  # as --signal has Slurm do before the time limit


def is_preempted(job: str) -> None:
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True, capture_output=True)


def is_requeued(job: str) -> None:
    subprocess.run(["scontrol", "requeue", job], check=True)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("happens", "reason"),
    [(runs_out_of_time, "out of time"), (is_preempted, "preempted"), (is_requeued, "requeued by Slurm")],
)
def test_a_job_that_must_stop_saves_and_is_resumed_under_its_id(cluster, submit, happens, reason):
    job, run = submit(40)
    happens(job)
    until(lambda: "requeue" in Run.open(run.path).record)
    assert Run.open(run.path).record["requeue"] == reason
    assert ended(job).word == "COMPLETED"
    rows = run.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {row["restart"] for row in rows} == {0, 1}
    assert (Run.open(run.path).status, Run.open(run.path).record["job_id"]) == ("complete", job)


@pytest.mark.slurm
def test_a_job_out_of_time_too_often_or_killed_has_failed_and_its_log_says_why(cluster, submit, tmp_path):
    job, run = submit(LONG, max_timeouts=0)
    runs_out_of_time(job)
    assert ended(job).word == "FAILED"
    assert "timed-out too many times" in "\n".join(last_lines(slurm.log_file(tmp_path / "jobs", job), 10))
    assert "saved" in Run.open(run.path).record

    job, run = submit(LONG)
    until(lambda: Run.open(run.path).status == "running")
    for process in cluster.processes(f"{job}.0"):
        os.kill(process, 9)
    assert ended(job).word == "FAILED"
    tail = "\n".join(last_lines(slurm.log_file(tmp_path / "jobs", job), 10))
    assert "at work" in tail and "Killed" in tail
    assert Run.open(run.path).status == "lost"


@pytest.mark.slurm
def test_a_job_whose_node_is_lost_is_resumed_under_its_id(cluster, submit):
    """slurmd, slurmstepd and all of the job are gone at once, as when a machine loses its power; the node comes back."""
    job, run = submit(140)
    until(lambda: len(run.rows("metrics.jsonl")) > 110)  # Slurm misses a job only some time after its start
    steps = subprocess.run(["pgrep", "-x", "slurmstepd"], capture_output=True, text=True, check=True).stdout.split()
    processes = cluster.processes(job)
    cluster.kill("slurmd")
    for process in [*map(int, steps), *processes]:
        os.kill(process, 9)
    cluster.start()
    assert ended(job).word == "COMPLETED"
    assert [row["step"] for row in run.rows("metrics.jsonl") if row["restart"] == 1] == list(range(101, 141))


@pytest.mark.slurm
def test_a_job_may_submit_another(cluster, tmp_path):
    outer = slurm.submit(Submits(tmp_path), tmp_path / "jobs", slurm.SlurmSettings(time=5, cpus=2), "outer")
    assert ended(outer).word == "COMPLETED"
    inner = (tmp_path / "inner").read_text()
    assert ended(inner).word == "COMPLETED"
    shown = subprocess.run(["scontrol", "show", "job", inner], capture_output=True, text=True, check=True).stdout
    assert "CPUs/Task=1" in shown


@pytest.fixture
def swept(cluster: Cluster, lab: Path, tmp_path: Path):
    """swept(steps): a controller of a sweep of four runs, two jobs at a time, and the folder of runs."""
    controllers = []

    def make(steps: int) -> tuple[subprocess.Popen, Path]:
        recipe_file, out = tmp_path / "sweep.yaml", tmp_path / "runs"
        long = recipe(max_steps=steps, num_train_examples=64, save_every=5)
        settings = {"unlearn": long, "vary": {"retain_coef": [1, 10], "remove_coef": [5, 50]}}
        recipe_file.write_text(json.dumps(settings | {"launcher": "slurm", "jobs": 2, "slurm": {"time": 10, "cpus": 1}}))
        controllers.append(start("sweep", "--config", str(recipe_file), out=out))
        until(lambda: at_work(out))
        return controllers[-1], out

    yield make
    for controller in controllers:
        controller.kill()
        controller.wait()


def unlearned(out: Path) -> list[Run]:
    return [run for run in find_runs(out) if run.record["kind"] == "unlearn"]


@pytest.mark.slow
@pytest.mark.slurm
def test_a_sweep_of_four_jobs_outlives_a_killed_one_and_a_requeued_one(cluster, swept):
    controller, out = swept(150)
    killed = at_work(out)[0]
    for process in cluster.processes(f"{killed.record['job_id']}.0"):
        os.kill(process, 9)
    requeued = until(
        lambda: [run for run in at_work(out) if run.id != killed.id and run.rows("metrics.jsonl")[-1]["step"] > 5]
    )[0]
    subprocess.run(["scontrol", "requeue", requeued.record["job_id"]], check=True)
    assert controller.wait(400) == 0
    runs = unlearned(out)
    assert len(runs) == 4 and {run.status for run in runs} == {"complete"}
    assert all([row["step"] for row in run.rows("metrics.jsonl")] == list(range(1, 151)) for run in runs)
    jobs = {run.id: run.record["job_id"] for run in runs}
    assert len(set(jobs.values())) == 4
    until(
        lambda: not any(state.alive for state in slurm_jobs.states(jobs.values()).values())
    )  # a run is complete before its job
    assert {state.word for state in slurm_jobs.states(jobs.values()).values()} == {"COMPLETED"}
    assert jobs[killed.id] != killed.record["job_id"] and jobs[requeued.id] == requeued.record["job_id"]
    (made,) = out.glob("sweep-*")
    found = trials(Run.open(made))
    assert [trial["lost"] for trial in found.values() if trial["runs"] == [killed.id]] == [1]
    assert {trial["job_id"] for name, trial in found.items() if name != "baseline"} == set(jobs.values())


@pytest.mark.slow
@pytest.mark.slurm
def test_a_cancelled_job_is_a_cancelled_run_and_a_cancelled_sweep_cancels_its_jobs(cluster, swept):
    controller, out = swept(2000)
    first = at_work(out)[0]
    (made,) = out.glob("sweep-*")
    named = SweepStatusConfig(str(made), str(out))
    slurm_jobs.cancel([first.record["job_id"]])
    shown = until(
        lambda: [t for t in status(named).record["trials"] if t["runs"] == [first.id] and t["status"] == "cancelled"]
    )[0]
    assert "CANCELLED" in shown["reason"]
    until(lambda: len(unlearned(out)) == 3)  # the sweep has started another one
    cancel(SweepCancelConfig(str(made), str(out)))
    assert controller.wait(60) == 143
    assert {trial["status"] for name, trial in trials(status(named)).items() if name != "baseline"} == {"cancelled"}
    jobs = [run.record["job_id"] for run in unlearned(out)]
    until(lambda: not any(state.alive for state in slurm_jobs.states(jobs).values()))


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_of_two_processes_is_requeued_fails_with_a_lost_process_and_is_retried(cluster, lab, tmp_path):
    recipe_file, out = tmp_path / "sweep.yaml", tmp_path / "runs"
    long = recipe(max_steps=200, num_train_examples=64, save_every=5)
    requested = {"time": 10, "cpus": 1, "devices": 2, "setup": ["export FROM_SETUP=yes"]}
    settings = {"unlearn": long, "vary": {"retain_coef": [1]}, "launcher": "slurm", "slurm": requested}
    recipe_file.write_text(json.dumps(settings))
    controller = start("sweep", "--config", str(recipe_file), out=out)
    try:
        run = until(lambda: at_work(out))[0]
        job = run.record["job_id"]
        both = [environment(pid) for pid in cluster.processes(f"{job}.0")]
        assert {(each["SLURM_PROCID"], each["FROM_SETUP"]) for each in both} == {("0", "yes"), ("1", "yes")}
        subprocess.run(["scontrol", "requeue", job], check=True)
        until(lambda: "requeued by Slurm" in str(Run.open(run.path).record["reason"]))
        until(lambda: at_work(out))
        second = json.loads((run.path / "ranks" / "1.json").read_text())["pid"]
        os.kill(second, 9)
        assert controller.wait(60) == 2
        found = Run.open(run.path)
        assert found.status == "failed" and found.record["reason"].startswith(f"rank 1 (process {second}")
        assert ended(job).word == "FAILED"
    finally:
        controller.kill()
        controller.wait()
    (made,) = out.glob("sweep-*")
    done = trials(retry(SweepRetryConfig(str(made), str(out))))["retain_coef1"]
    assert (done["status"], done["runs"]) == ("complete", [run.id])
    found = Run.open(run.path)
    assert [row["step"] for row in found.rows("metrics.jsonl")] == list(range(1, 201))
    assert found.record["environment"]["world_size"] == 2 and found.record["plan"]["effective_batch"] == 8
    assert {row["forget_documents"] for row in found.rows("metrics.jsonl")} == {8}


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    given = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in given if "=" in line)
