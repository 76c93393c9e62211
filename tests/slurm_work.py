"""What the tests of Slurm submit: a job unpickles these by name, so they live in a module of their own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lethe.launching import slurm
from lethe.runs import slurm_jobs
from lethe.runs.finding import find_runs
from lethe.runs.run import Run


class Steps:
    """A run of `steps` tenths of a second, a line of metrics each. It saves every 50 and when it must stop."""

    def __init__(self, folder: Path, steps: int):
        self.folder = folder
        self.steps = steps

    def run(self) -> Run:
        found = find_runs(self.folder)
        return found[0] if found else Run.create("lab", "steps", {}, self.folder)

    def __call__(self) -> None:
        run = self.run()
        run.update(job_id=slurm_jobs.current_job_id(), launcher="slurm")
        sys.stderr.write("at work\n")
        with run.running(), run.deferring():
            for step in range(run.record.get("saved", 0) + 1, self.steps + 1):
                time.sleep(0.1)
                run.append("metrics.jsonl", {"step": step, "restart": slurm.restarts()})
                if run.stopping or step % 50 == 0:
                    run.update(saved=step)
                if run.stopping:
                    return

    def before_requeue(self, reason: str) -> None:
        self.run().update(status="queued", reason=reason, requeue=reason)


class Submits:
    """A job that submits another, with fewer cores than it has."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> str:
        settings = slurm.SlurmSettings(time=5, cpus=1)
        inner = slurm.submit(Steps(self.folder / "runs", 1), self.folder / "jobs", settings, "inner")
        (self.folder / "inner").write_text(inner)
        return inner
