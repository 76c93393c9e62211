"""What sweeps request for runs of several devices: from Slurm, and of this machine."""

from __future__ import annotations

import subprocess

import pytest
from sweeping import TASKS, config, recipe, trials

from lethe.config import SlurmSettings, SuiteConfig
from lethe.errors import LetheError
from lethe.launching import launchers, slurm
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.controller import sweep
from lethe.sweeps.reuse import made_from_the_same

SLURM = {"launcher": "slurm"}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(gres, settings): what sbatch gets, on a cluster whose partition has these generic resources."""

    def submit(gres: str, **settings) -> list[str]:
        programs = {"sinfo": f"echo '{gres}'", "srun": "true", "sbatch": f"cp $1 {tmp_path}/script; echo job 7"}
        for name, does in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        slurm._has_gpus.cache_clear()
        slurm.submit(print, tmp_path / "jobs", SlurmSettings(**settings), "a job")  # type: ignore[arg-type]
        return (tmp_path / "script").read_text().splitlines()

    return submit


@pytest.mark.parametrize(
    ("gres", "settings", "gpus"),
    [
        ("gpu:a100:8(S:0-1)", {"devices": 4}, ["#SBATCH --gpus-per-node=4"]),
        ("gpu:8", {"devices": 1}, ["#SBATCH --gpus-per-node=1"]),
        ("gpu:8", {}, []),
        ("(null)", {"devices": 4}, []),
        ("gpu:8", {"devices": 4, "extra": {"gres": "gpu:a100:4"}}, ["#SBATCH --gres=gpu:a100:4"]),
        ("gpu:8", {"devices": 4, "extra": {"gpus-per-node": "a100:4"}}, ["#SBATCH --gpus-per-node=a100:4"]),
        ("gpu:8", {"devices": 4, "extra": {"gres": "nvme:1"}}, ["#SBATCH --gpus-per-node=4", "#SBATCH --gres=nvme:1"]),
    ],
)
def test_gpus_are_requested_where_there_are_some(script, gres, settings, gpus):
    assert [line for line in script(gres, **settings) if line.startswith("#SBATCH --g")] == gpus


def test_a_job_has_a_task_for_each_device_of_each_node(script):
    lines = script("(null)", devices=4, nodes=2, cpus=3, setup=["module load cuda"])
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=3"} <= set(lines)
    assert lines.index("module load cuda") + 1 == lines.index(slurm.THREADS)
    threads = ["bash", "-c", f"unset OMP_NUM_THREADS; SLURM_CPUS_PER_TASK=3; {slurm.THREADS}; echo $OMP_NUM_THREADS"]
    assert subprocess.run(threads, capture_output=True, text=True, check=True).stdout == "3\n"
    (command,) = (line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=0 --wait=120" in command


def test_a_recipes_devices_must_be_those_of_the_job(lab, tmp_path):
    for devices, given in ((4, {"devices": 2}), (2, {})):
        settings = SLURM | {"slurm": SlurmSettings(**given)}
        with pytest.raises(LetheError, match=f"devices: {devices}, but slurm.devices is {given.get('devices', 0)}"):
            sweep(config(tmp_path / "runs", unlearn=recipe(devices=devices), **settings))
        attacks = {"a": {"devices": devices, "max_steps": 2, "eval": {"tasks": TASKS}}}
        with pytest.raises(LetheError, match=f"devices: {devices}, but slurm.devices"):
            sweep(SuiteConfig(models=["lab:final"], attacks=attacks, out=str(tmp_path / "runs"), **settings))  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def test_each_local_job_has_gpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-5,3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    of_two = launchers.LocalLauncher(tmp_path, 2, 2)
    assert [of_two._environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1", "GPU-5,3"]
    shared = launchers.LocalLauncher(tmp_path, 6, 1)
    assert [shared._environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(6)] == ["0", "1", "GPU-5", "3", "0", "1"]


def test_more_local_jobs_than_gpus_are_refused(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(LetheError, match="2 jobs of 2 devices need 4 GPUs, and this machine has 3"):
        sweep(config(tmp_path / "runs", unlearn=recipe(devices=2), jobs=2))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_local_worker_starts_the_devices_of_a_run(lab, tmp_path):
    """A run of one process is not reused for it, since its updates have half as many documents."""
    out = tmp_path / "runs"
    sweep(config(out, vary={"retain_coef": [1]}))
    two = config(out, unlearn=recipe(devices=2), vary={"retain_coef": [1]})
    made = sweep(two)
    assert {trial["status"] for trial in trials(made).values()} == {"complete"}
    one, both = (run for run in find_runs(out) if run.record["kind"] == "unlearn")
    assert [run.record["plan"]["effective_batch"] for run in (one, both)] == [4, 8]
    assert both.record["environment"]["world_size"] == 2
    assert trials(sweep(two))["retain_coef1"]["runs"] == [both.id]


@pytest.mark.slow
def test_a_failed_run_of_several_devices_keeps_its_record(lab, tmp_path):
    broken = recipe(devices=2, lr=1e30, divergence_factor=1.001, on_divergence="stop")
    with pytest.raises(LetheError):
        sweep(config(tmp_path / "runs", unlearn=broken, vary={"retain_coef": [1]}))
    (run,) = (run for run in find_runs(tmp_path / "runs") if run.record["kind"] == "unlearn")
    assert run.status in {"failed", "diverged"} and run.record["plan"]["steps"] == 6


def test_runs_with_other_updates_are_not_reused(tmp_path):
    made = Run.create("tamper", "a", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, tmp_path)
    made.update(plan={"effective_batch": 16})
    assert [made_from_the_same(made, processes) for processes in (None, 1, 2, 4)] == [False, False, True, False]
