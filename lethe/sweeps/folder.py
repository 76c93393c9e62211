"""A sweep: its folder, its trials in an Optuna study, and how trials are added and ended.

The Optuna study is a journal file in the sweep's folder, or a database. optuna-dashboard opens it, and several controllers on
several machines can share it. It holds the trials. The results of a trial are read from the folders of its runs, which lie
beside the sweep's folder.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import TrialState, create_trial

from lethe import config as c
from lethe.errors import LetheError
from lethe.files import refuse_links
from lethe.launching import launchers
from lethe.launching.slurm import log_file
from lethe.launching.worker import settings_of
from lethe.methods.user_file import keep, refuse_changed
from lethe.runs import slurm_jobs
from lethe.runs.finding import find_run
from lethe.runs.run import Run
from lethe.sweeps import journal
from lethe.sweeps.boundary import Boundary
from lethe.sweeps.grid import Grid
from lethe.sweeps.pareto import Pareto
from lethe.sweeps.planner import Planner
from lethe.sweeps.reuse import complete_runs, inputs, key_of, made_from_the_same
from lethe.sweeps.suite import Suite
from lethe.sweeps.trials import STOPPED_EARLY, Plan, Trial
from lethe.sweeps.trust import consent, consent_to_methods

logger = logging.getLogger(__name__)
Settings = c.SweepConfig | c.SuiteConfig
CANCELLED = "cancelled by lethe sweep cancel"
OF_ONE_ATTEMPT = {"status", "reason", "log", "owner", "lost"}
"""Attributes of a trial that do not pass on to the trial that retries it."""


def planner_of(config: Settings) -> Planner:
    """The planner of a sweep's kind, or of a suite of attacks."""
    if isinstance(config, c.SuiteConfig):
        return Suite(config)
    kinds: dict[str, type[Planner]] = {"grid": Grid, "boundary": Boundary, "pareto": Pareto}
    return kinds[config.kind](config)


def config_of(run: Run, trusts: bool) -> Settings:
    """The configuration in a sweep's record. `trusts`: the user agrees to what it runs or opens.

    Raises:
        LetheError: it cannot be used, or runs or opens what the user has not agreed to.
    """
    config = settings_of(run, c.SuiteConfig if "suite" in run.record["config"] else c.SweepConfig)
    consent(config, given=trusts)
    refuse_changed(run.record.get("method_files") or {})
    consent_to_methods(config, given=trusts)
    return config


class Sweep:
    """A sweep's folder. `run` is its record; the trials' runs lie beside it, in `out`."""

    def __init__(self, run: Run, config: Settings):
        self.run, self.out = run, run.path.parent
        sections = {name: value for name in ("unlearn", "tamper") if (value := getattr(config, name, None))}
        for name, section in sections.items():  # the folder may have been moved, and what the sweep sets itself is set anew
            sections[name] = {key: value for key, value in section.items() if key not in {"out", "name"}}
        self.config = dataclasses.replace(config, out=str(self.out), **sections)
        self.lock = FileLock(run.path / "sweep.lock")
        self.ended_runs: dict[tuple[str, int], list[Run]] = {}
        self.recorded = -math.inf
        self.planner = planner_of(self.config)
        name = f"{run.record['name']} {run.id}"
        self.study, self.references = journal.studies(
            config.storage, run.path, name, list(self.planner.directions), self.planner.sampler()
        )

    @classmethod
    def open(cls, name: str, out: str, trusts: bool = False) -> Sweep:
        """The sweep of that id, or folder. `trusts`: the user agrees to what its record runs or opens.

        Raises:
            LetheError: there is none, or its record runs or opens what the user has not agreed to.
        """
        run = find_run(name.removeprefix("run:"), out)
        if run.record["kind"] != "sweep":
            raise LetheError(f"sweep: '{name}' is a run of kind {run.record['kind']}; `lethe runs` lists the sweeps")
        refuse_links(run.path)
        return cls(run, config_of(run, trusts))

    def trials(self, references_only: bool = False) -> list[Trial]:
        """All trials in order of proposal, those that measure references first."""
        found = []
        for study in (self.references,) if references_only else (self.references, self.study):
            every = study.get_trials(deepcopy=False)
            retried = {trial.user_attrs.get("retry_of") for trial in every}
            found += [Trial(study, trial, self.ended_runs, trial.number in retried) for trial in every]
        return found

    def queued(self) -> list[Trial]:
        return [trial for trial in self.trials() if trial.status == "queued" and trial.get("stages")]

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials() if not trial.is_done]

    def claim_waiting(self) -> None:
        """Trials that an earlier version of Lethe left WAITING become RUNNING: Optuna takes results of such trials only."""
        for study in (self.references, self.study):
            while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.ask()

    # -- adding trials

    def add(self, plans: Iterable[Plan], study: optuna.Study) -> None:
        """Add plans to the Optuna study, each once. Those whose runs exist already are complete at once."""
        known = {trial.get("key") for trial in self.trials()}
        for plan in plans:
            if plan.key in known:
                continue
            known.add(plan.key)
            proposed = "number" in plan.facts
            if not proposed:
                study.add_trial(plan.frozen())
            trial = Trial(study, study.get_trials(deepcopy=False)[plan.facts.get("number", -1)], self.ended_runs)
            if proposed:  # Optuna's own trial, which has nothing but its point yet
                trial.set(**plan.attributes())
            found = self.measured(plan)
            if len(found) == len(plan.stages):
                trial.set(runs=[run.path.name for run in found], reused=True)
                self.complete(trial, found)

    @cached_property
    def _complete(self) -> dict[str, list[Run]]:
        return complete_runs(self.out)

    def measured(self, plan: Plan) -> list[Run]:
        """Complete runs of the plan's first stages, as many as there are."""
        found: list[Run] = []
        for kind, settings in plan.stages:
            same = self._complete.get(key_of(kind, _with_results(settings, found)), [])
            run = next((run for run in reversed(same) if made_from_the_same(run, self.config.processes)), None)
            if run is None:
                break
            found.append(run)
        return found

    def make_runs(self, trial: Trial) -> list[Run]:
        """The runs of a trial, `queued`. The model of a later one may be the result of an earlier one."""
        runs: list[Run] = []
        for kind, settings in trial.get("stages"):
            run = Run.create(kind, settings["name"], _with_results(settings, runs), self.out)
            keep(run, (self.run.record.get("method_files") or {}).get(settings.get("method")))
            run.update(
                launcher=self.config.launcher,
                sweep={"id": self.run.id, "trial": trial.get("name")},
                inputs=inputs(run.record["config"], self.out),
                **self.planner.facts_of(trial, settings),
            )
            runs.append(run)
        return runs

    # -- ending trials

    def has_ended(self, trial: Trial, runs: list[Run]) -> bool:
        """End a trial whose runs have ended, and return whether they have."""
        for run in runs:
            status, reason = run.record["status"], run.record.get("reason") or ""
            if status in {"failed", "diverged"}:
                self.fail(trial, status, f"{run.record['kind']} {run.id}: {reason}", runs)
                return True
            if status == "cancelled" and (request := run.asked_to_stop()):
                if request.startswith(STOPPED_EARLY):
                    trial.end(TrialState.PRUNED, reason=request)
                else:
                    self.fail(trial, "cancelled", request, runs)
                return True
        if runs and len(runs) == len(trial.get("stages")) and all(run.record["status"] == "complete" for run in runs):
            self.complete(trial, runs)
            return True
        return False

    def complete(self, trial: Trial, runs: list[Run]) -> None:
        """Report a trial's objectives to Optuna. Without one of them the trial has failed."""
        try:
            values = [0.0] if trial.is_reference else self.planner.values(runs)
        except LetheError as missing:
            self.fail(trial, "failed", str(missing), runs)
        else:
            trial.end(TrialState.COMPLETE, values)

    def fail(self, trial: Trial, status: str, reason: str, runs: list[Run] | None = None) -> None:
        """End a trial without objectives, with its status, the reason and the last lines of its log."""
        files = [run.path / "log.txt" for run in runs or []]
        log = [line for file in files for line in launchers.last_lines(file)][-5:]
        if not log and (job := (trial.get("owner") or {}).get("job_id")):  # the job ended before its runs began
            log = launchers.last_lines(log_file(self.run.path / launchers.JOBS, job))
        for run in runs or []:
            if run.record["status"] in {"queued", "running"}:
                run.update(status="cancelled" if status == "cancelled" else "failed", reason=reason)
        trial.end(TrialState.FAIL, status=status, reason=" ".join(reason.split()), log=log)

    def requeue(self, trial: Trial, reason: str, counts: bool = True) -> None:
        """Queue a lost trial again. It has failed if it was lost more often than `retries`."""
        lost = trial.get("lost", 0) + counts
        if lost > self.config.retries:
            self.fail(trial, "failed", f"lost {lost} times; the last time: {reason}", trial.runs(self.out))
            return
        logger.warning("%s: %s; restarting it from its last save", trial.get("name"), reason)
        trial.set(lost=lost, owner=None)

    def retry(self) -> int:
        """Queue failed and cancelled trials again, with the runs that they have. Returns how many."""
        with self.lock:
            failed = [t for t in self.trials() if t.is_shown and t.frozen.state == TrialState.FAIL and t.status != "diverged"]
            for trial in failed:
                attributes = {k: v for k, v in trial.frozen.user_attrs.items() if k not in OF_ONE_ATTEMPT}
                if len(trial.runs(self.out)) < len(trial.get("runs", [])):  # a folder is missing: all are made again
                    del attributes["runs"]
                trial.study.add_trial(
                    create_trial(
                        state=TrialState.RUNNING,
                        params=trial.frozen.params,
                        distributions=trial.frozen.distributions,
                        user_attrs=attributes | {"retry_of": trial.frozen.number},
                    )
                )
        return len(failed)

    def cancel(self) -> list[Trial]:
        """Ask the controller and the runs of every unfinished trial to stop. Returns these trials."""
        with self.lock:
            self.claim_waiting()
            if self.run.status == "running":
                self.run.ask_to_stop(CANCELLED)
            left = self.unfinished()
            for trial in left:
                for run in trial.runs(self.out):
                    run.ask_to_stop(CANCELLED)
            slurm_jobs.cancel(trial.get("owner")["job_id"] for trial in left if "job_id" in (trial.get("owner") or {}))
        return left

    def record(self, trials: list[Trial]) -> None:
        """Write the results so far, and the conclusions from them, into the sweep's record."""
        self.recorded = time.monotonic()
        rows, conclusions = [self.row(trial) for trial in trials if trial.is_shown], self.planner.conclusions(self)
        if (rows, conclusions) != (self.run.record.get("trials"), self.run.record.get("conclusions")):
            self.run.record["trials"], self.run.record["conclusions"] = rows, conclusions
            self.run.update(runs=[name for trial in trials for name in trial.get("runs", [])])

    def row(self, trial: Trial) -> dict[str, Any]:
        """A trial as plain data, for the record and for tables."""
        runs = trial.runs(self.out)
        jobs = [job for run in runs if (job := run.record.get("job_id"))]
        return {
            "name": trial.get("name"),
            "reference": trial.is_reference,
            "point": trial.get("point", {}),
            "seed": trial.get("seed"),
            "status": trial.status,
            "reason": trial.get("reason") if trial.is_done else None,
            "log": trial.get("log", []) if trial.frozen.state == TrialState.FAIL else [],
            "runs": [run.id for run in runs],
            "job_id": jobs[-1] if jobs else None,
            "reused": bool(trial.get("reused")),
            "lost": trial.get("lost", 0),
        } | self.planner.results(self, trial, runs)


def _with_results(settings: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """A stage's settings with the result of an earlier stage as its model, where it names one (`@0`)."""
    model = str(settings.get("model"))
    return {**settings, "model": f"run:{runs[int(model[1:])].id}"} if model.startswith("@") else settings
