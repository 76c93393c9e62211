"""Sweeps: `Sweep` keeps the trials, a planner says which to run, a launcher runs them, and this file holds them together.

The trials are those of an Optuna study (a journal file in the sweep's folder, or a database), so that optuna-dashboard opens
them and several controllers on several machines may share them. What came of a trial is read from its runs' own folders: the
study says what there is to do, the ledger what was done. A controller goes round and round, each time under the sweep's lock:

    settle    every running trial: complete, failed, cancelled, or lost and to be taken up again
    propose   what to run next
    start     as many waiting trials as there is room for

so it may be killed at any moment, started again, or run twice, and no trial is lost or done twice.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from lethe import config as c
from lethe.errors import LetheError
from lethe.files import refuse_links, refuse_run_folder
from lethe.launching import launchers
from lethe.launching.launchers import Launcher
from lethe.launching.work import settings_of
from lethe.progress import bar
from lethe.runs.run import STOP, Run, find_run, find_runs
from lethe.sweeps import journal
from lethe.sweeps.kinds import planner_of
from lethe.sweeps.planner import Plan, Planner, inputs
from lethe.sweeps.trust import consented, trust

logger = logging.getLogger(__name__)
Settings = c.SweepConfig | c.SuiteConfig
PRUNED = "pruned"
CANCELLED = "cancelled by lethe sweep cancel"
SECONDS_BETWEEN_ROUNDS = 0.5
SECONDS_BETWEEN_SLURM_ROUNDS = 2.0
SECONDS_BETWEEN_RECORDS = 1.0
TO_DO = (TrialState.WAITING, TrialState.RUNNING)


@dataclass
class Task:
    """One trial: its place in the study, and what the study knows of it. `ended` keeps the runs of trials at their end.

    `trial` is the study's own object, which is not to be changed.
    """

    study: optuna.Study
    trial: FrozenTrial
    ended: dict[int, list[Run]] = field(default_factory=dict)
    retried: bool = False
    """Whether another trial has taken up its runs."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.trial.user_attrs.get(name, default)

    def set(self, **attributes: Any) -> None:
        changed = {name: value for name, value in attributes.items() if self.trial.user_attrs.get(name) != value}
        for name, value in changed.items():
            self.study._storage.set_trial_user_attr(self.trial._trial_id, name, value)
        if changed:
            self.trial = self.study._storage.get_trial(self.trial._trial_id)

    def move(self, state: TrialState, values: list[float] | None = None) -> None:
        self.study._storage.set_trial_state_values(self.trial._trial_id, state, values)
        self.trial = self.study._storage.get_trial(self.trial._trial_id)

    @property
    def state(self) -> TrialState:
        return self.trial.state

    @property
    def status(self) -> str:
        """In the ledger's words."""
        ended = {TrialState.COMPLETE: "complete", TrialState.PRUNED: PRUNED, TrialState.FAIL: self.get("status", "failed")}
        return ended.get(self.state) or ("running" if self.state == TrialState.RUNNING else "queued")

    @property
    def is_reference(self) -> bool:
        """Whether it only measures what the others are compared with."""
        return bool(self.get("reference"))

    @property
    def stands(self) -> bool:
        """Whether it has a place in tables: it was planned, and no other trial takes it up again."""
        return bool(self.get("stages")) and not self.retried

    def runs(self, out: Path) -> list[Run]:
        """Its runs, as far as they were made. Those of a trial at its end are read once; none, where one of them is gone."""
        found = self.ended.get(self.trial._trial_id)
        if found is None:
            folders = [out / name for name in self.get("runs", [])]
            found = [Run.open(folder) for folder in folders if folder.exists()]
            if self.state not in TO_DO:
                found = found if len(found) == len(folders) else []
                self.ended[self.trial._trial_id] = found
        return found


class Sweep:
    """A sweep's folder: `run` is its record; the trials' runs lie beside it, in `out`."""

    def __init__(self, run: Run, config: Settings):
        self.run, self.out = run, run.path.parent
        self.config = dataclasses.replace(config, out=str(self.out))  # it may have been moved, or named from elsewhere
        self.lock = FileLock(run.path / "sweep.lock")
        self.ended: dict[int, list[Run]] = {}
        self.recorded = -math.inf
        self.planner: Planner = planner_of(self.config)
        self.study, self.references = journal.studies(
            config.storage,
            run.path,
            f"{run.record['name']} {run.id}",
            directions=self.planner.directions,
            sampler=self.planner.sampler(),
        )

    @classmethod
    def open(cls, name: str, out: str, trusts: bool = False) -> Sweep:
        """The sweep of that id, or folder. `trusts`: the user agrees to what its record runs or opens.

        Raises:
            LetheError: there is none, or its record runs or opens what the user has not agreed to.
        """
        run = find_run(name.removeprefix("run:"), out)
        if run.record["kind"] != "sweep":
            raise LetheError(f"sweep: '{name}' is of kind {run.record['kind']}; `lethe runs` lists the sweeps")
        refuse_links(run.path)
        config = settings_of(run, config_of(run))
        consented(config, trusts)
        return cls(run, config)

    def tasks(self, *states: TrialState, references_only: bool = False) -> list[Task]:
        """The trials in these states (none: in any), those that measure references first, in order of proposal."""
        found = []
        for study in (self.references,) if references_only else (self.references, self.study):
            every = study.get_trials(deepcopy=False)
            retried = {trial.user_attrs.get("retry_of") for trial in every}
            chosen = [trial for trial in every if not states or trial.state in states]
            found += [Task(study, trial, self.ended, trial.number in retried) for trial in chosen]
        return found

    def control(self) -> None:
        """Go round until there is nothing left to do; the record follows the results, a second behind at most."""
        settings = self.config
        launcher = launchers.make(settings.launcher, self.run.path, settings.jobs, settings.slurm)
        pause = SECONDS_BETWEEN_SLURM_ROUNDS if settings.launcher == "slurm" else SECONDS_BETWEEN_ROUNDS
        # A request to stop waits for the end of a round: raised inside of one, it would leave Optuna's log half read.
        with self.run.deferring(), bar(self.planner.title, self.planner.expected, "runs") as advance:
            done = 0
            try:
                with self.lock:
                    self.discard_strays()
                    self.add(self.planner.references(), self.references)
                    self.planner.begin(self)
                more = True
                while more and not self.run.stopping:
                    more = self.round(launcher)
                    every = self.tasks()
                    ended = sum(
                        task.state not in TO_DO and task.stands and not (task.is_reference or task.get("warm"))
                        for task in every
                    )
                    advance(ended - done, _note(every))
                    done = ended
                    if time.monotonic() - self.recorded >= SECONDS_BETWEEN_RECORDS:
                        self.record(every)
                    if more:
                        launcher.wait(pause)
            finally:
                launcher.stop()
                with self.lock:
                    self.settle(launcher, stopping=True)
                self.record(self.tasks())

    def round(self, launcher: Launcher) -> bool:
        """One round; whether there is anything left to do."""
        with self.lock:
            self.settle(launcher)
            self.planner.watch(self)
            room = 0 if self.run.asked_to_stop() else launcher.room()
            if room and not any(task.state in TO_DO for task in self.tasks() if task.is_reference):
                self.add(self.planner.propose(self, max(0, room - len(self.tasks(TrialState.WAITING)))), self.study)
            waiting = self.tasks(TrialState.WAITING)
            for task in waiting[: max(0, room)]:
                self.start(task, launcher)
            return room <= 0 or bool(self.tasks(*TO_DO))  # without room, somebody is about to say that a run is done

    def add(self, plans: Iterable[Plan], study: optuna.Study) -> None:
        """Put plans into the study, each once; those that were measured before are complete at once."""
        known = {task.get("key") for task in self.tasks()}
        for plan in plans:
            if plan.key in known:
                continue
            known.add(plan.key)
            attributes = plan.attributes()
            if plan.number is not None:  # asked of Optuna: it has a place already
                task = Task(study, study.get_trials(deepcopy=False)[plan.number], self.ended)
                task.set(**attributes)
            else:
                state = TrialState.WAITING
                study.add_trial(
                    create_trial(state=state, params=plan.params, distributions=plan.distributions, user_attrs=attributes)
                )
                task = Task(study, study.get_trials(deepcopy=False)[-1], self.ended)
            found = self.measured(plan)
            if len(found) == len(plan.stages):
                task.set(runs=[run.path.name for run in found], reused=True)
                self.complete(task, found)
            elif plan.number is not None:
                task.move(TrialState.WAITING)

    def measured(self, plan: Plan) -> list[Run]:
        """Complete runs of the plan's very stages, as far as there are any."""
        found: list[Run] = []
        for kind, settings in plan.stages:
            run = self.planner.measured(kind, _on(settings, found))
            if run is None:
                break
            found.append(run)
        return found

    def discard_strays(self) -> None:
        """Remove runs, never begun, that were made for a trial by a controller that was killed before the study knew of them.

        Raises:
            LetheError: the study that the sweep's trials are in is not there.
        """
        if self.run.record.get("trials") and not self.tasks():
            where = self.config.storage or self.run.path / journal.JOURNAL
            raise LetheError(f"sweep: the study of {self.run.path} is not in {where}; put it back, or start a new sweep")
        known = {name for task in self.tasks() for name in task.get("runs", [])}
        for run in find_runs(self.out):
            ours = (run.record.get("sweep") or {}).get("id") == self.run.id and run.path.name not in known
            if ours and run.record["status"] == "queued" and run.record["started"] is None:
                run.discard()

    def start(self, task: Task, launcher: Launcher) -> None:
        """Make the trial's runs, or take those that it has, and hand them to the launcher."""
        if task.state == TrialState.WAITING:
            task.move(TrialState.RUNNING)
        if not task.get("runs"):
            task.set(runs=[run.path.name for run in self.make_runs(task)])
        else:
            for run in task.runs(self.out):
                (run.path / STOP).unlink(missing_ok=True)
                if run.status not in {"complete", "running"}:  # it is not to be taken for what it was before
                    run.update(status="queued", reason=None, finished=None, job_id=None)
        folders = [self.out / name for name in task.get("runs")]
        try:
            task.set(owner=launcher.start(f"lethe-{self.run.id}-{task.get('name')}", folders))
        except LetheError as error:
            self.fail(task, "failed", str(error))
            raise

    def make_runs(self, task: Task) -> list[Run]:
        """The runs of a trial, `queued`; a later one's model may be an earlier one's result."""
        runs: list[Run] = []
        for kind, settings in task.get("stages"):
            run = Run.create(kind, settings["name"], _on(settings, runs), self.out)
            run.update(
                launcher=self.config.launcher,
                sweep={"id": self.run.id, "trial": task.get("name")},
                inputs=inputs(run.record["config"], self.out),
                **self.planner.record_of(task, settings),
            )
            runs.append(run)
        return runs

    def settle(self, launcher: Launcher, stopping: bool = False) -> None:
        """Look at every running trial's runs and, where they are not at their end, at who works on them."""
        owned: list[tuple[Task, list[Run]]] = []
        for task in self.tasks(TrialState.RUNNING):
            runs = task.runs(self.out)
            if self._ended(task, runs):
                continue
            if len(runs) < len(task.get("runs", [])):
                self.fail(task, "failed", "a folder of its runs is gone", runs)
                continue
            if task.get("owner"):
                owned.append((task, runs))
            elif task.get("stages"):  # a controller was killed between claiming the trial and starting it
                self._again(task, "its controller was killed before it began", counts=False)
            else:
                self.fail(task, "failed", "its controller was killed before it was planned")
        fates = launcher.fates([(task.get("owner"), runs) for task, runs in owned])
        for (task, _), fate in zip(owned, fates, strict=True):
            runs = task.runs(self.out)
            if fate is None or self._ended(task, runs):  # it may have ended in the meantime
                continue
            if any(run.status == "running" for run in runs):  # somebody else has it at work
                continue
            if asked := next(filter(None, (run.asked_to_stop() for run in runs)), None):
                self.fail(task, "cancelled", asked, runs)
            elif fate.cancelled:
                self.fail(task, "cancelled", fate.reason, runs)
            elif stopping:
                self._again(task, "the sweep was stopped", counts=False)
            else:
                self._again(task, fate.reason)

    def _ended(self, task: Task, runs: list[Run]) -> bool:
        """Settle a trial whose runs say themselves how it ended."""
        for run in runs:
            status, reason = run.record["status"], run.record.get("reason") or ""
            if status in {"failed", "diverged"}:
                self.fail(task, status, f"{run.record['kind']} {run.id}: {reason}", runs)
                return True
            if status == "cancelled" and (asked := run.asked_to_stop()):
                if asked.startswith(PRUNED):
                    task.set(reason=asked)
                    task.move(TrialState.PRUNED)
                else:
                    self.fail(task, "cancelled", asked, runs)
                return True
        if runs and len(runs) == len(task.get("stages")) and all(run.record["status"] == "complete" for run in runs):
            self.complete(task, runs)
            return True
        return False

    def complete(self, task: Task, runs: list[Run]) -> None:
        """Tell the study what came out; a number that is missing makes the trial failed."""
        values = [0.0] if task.is_reference else self.planner.values(runs)
        missing = next((v for v in values if isinstance(v, str)), None)
        if missing:
            self.fail(task, "failed", missing, runs)
        else:
            task.move(TrialState.COMPLETE, [float(v) for v in values])

    def fail(self, task: Task, status: str, reason: str, runs: list[Run] | None = None) -> None:
        """End a trial without a number: its status, the reason and the log's last lines."""
        files = [run.path / "log.txt" for run in runs or []]
        log = [line for file in files for line in launchers.last_lines(file)][-5:]
        if not log and (job := (task.get("owner") or {}).get("job_id")):  # it ended before its runs began
            log = launchers.last_lines(launchers.job_log(self.run.path, job))
        for run in runs or []:
            if run.record["status"] in {"queued", "running"}:
                run.update(status="cancelled" if status == "cancelled" else "failed", reason=reason)
        task.set(status=status, reason=" ".join(reason.split()), log=log)
        task.move(TrialState.FAIL)

    def _again(self, task: Task, reason: str, counts: bool = True) -> None:
        """Put a trial that was lost into the queue again; after too many losses it has failed."""
        lost = task.get("lost", 0) + counts
        if lost > self.config.retries:
            self.fail(task, "failed", f"lost {lost} times; the last time: {reason}", task.runs(self.out))
            return
        logger.warning("%s: %s; it goes on from its last save", task.get("name"), reason)
        task.set(lost=lost, owner=None)
        task.move(TrialState.WAITING)

    def retry(self) -> int:
        """Put failed and cancelled trials into the queue again, with the runs that they have; returns how many."""
        count = 0
        with self.lock:
            for task in self.tasks(TrialState.FAIL):
                if task.retried or task.get("status") == "diverged" or not task.get("stages"):
                    continue
                kept = {k: v for k, v in task.trial.user_attrs.items() if k not in {"status", "reason", "log", "owner", "lost"}}
                if len(task.runs(self.out)) < len(task.get("runs", [])):  # a folder is gone: they are made again
                    del kept["runs"]
                task.study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=task.trial.params,
                        distributions=task.trial.distributions,
                        user_attrs=kept | {"retry_of": task.trial.number},
                    )
                )
                count += 1
        return count

    def cancel(self) -> int:
        """Cancel every trial that is not at its end, and the controller; returns how many."""
        with self.lock:
            if self.run.status == "running":
                self.run.ask_to_stop(CANCELLED)
            running, waiting = self.tasks(TrialState.RUNNING), self.tasks(TrialState.WAITING)
            for task in running:
                for run in task.runs(self.out):
                    run.ask_to_stop(CANCELLED)
            for task in waiting:
                self.fail(task, "cancelled", CANCELLED, task.runs(self.out))
            if jobs := [task.get("owner") for task in running if "job_id" in (task.get("owner") or {})]:
                launchers.make("slurm", self.run.path, 1, self.config.slurm).cancel(jobs)
        return len(running) + len(waiting)

    def record(self, tasks: list[Task]) -> None:
        """Write the results so far, and what they say together, into the sweep's record."""
        self.recorded = time.monotonic()
        rows = [self.row(task) for task in tasks if task.stands]
        conclusions = self.planner.conclusions(self)
        if (rows, conclusions) != (self.run.record.get("trials"), self.run.record.get("conclusions")):
            self.run.record["trials"], self.run.record["conclusions"] = rows, conclusions
            self.run.update(runs=[name for task in tasks for name in task.get("runs", [])])

    def row(self, task: Task) -> dict[str, Any]:
        """A trial in plain data."""
        runs = task.runs(self.out)
        jobs = [job for job in dict.fromkeys(run.record.get("job_id") for run in runs) if job]
        return {
            "name": task.get("name"),
            "reference": task.is_reference,
            "point": task.get("point", {}),
            "seed": task.get("seed"),
            "status": task.status,
            "reason": task.get("reason") if task.state not in TO_DO else None,
            "log": task.get("log", []) if task.state == TrialState.FAIL else [],
            "runs": [run.id for run in runs],
            "job_id": jobs[-1] if jobs else None,
            "reused": bool(task.get("reused")),
            "lost": task.get("lost", 0),
        } | self.planner.judged(self, task, runs)


def sweep(config: Settings, run: Run | None = None) -> Run:
    """Run a sweep to its end, or go on with `run`, an interrupted one; a second controller of a sweep shares its work.

    Raises:
        LetheError: a setting of the sweep or of any run in it cannot work; nothing is left behind.
    """
    refuse_run_folder(config.out)
    if run is None:
        config = planner_of(config).checked()
        if config.storage:
            journal.storage_of(config.storage, Path(config.out))
        run = Run.create("sweep", planner_of(config).title, c.to_dict(config), config.out)
        run.update(goal=config.goal, plan={"runs": planner_of(config).expected})
        trust(config)
    with run.running():
        made = Sweep(run, config)
        made.control()
        statuses = [task.status for task in made.tasks() if task.stands]
        run.update(counts={status: statuses.count(status) for status in dict.fromkeys(statuses)})
        ended = [task.status for task in made.tasks() if task.stands and not task.is_reference]
        if ended and set(ended) <= {"failed", "diverged", "cancelled"}:
            reasons = [task.get("reason") for task in made.tasks() if task.get("reason")]
            raise LetheError(f"sweep: no run of {run.path} is complete; the first reason: {reasons[0]}")
    return run


def status(settings: c.SweepStatusConfig) -> Run:
    """The sweep's record as it stands now, read from its study and its runs."""
    found = Sweep.open(settings.sweep, settings.out, settings.trust_record)
    found.run.record["trials"] = [found.row(task) for task in found.tasks() if task.stands]
    found.run.record["conclusions"] = found.planner.conclusions(found)
    return found.run


def retry(settings: c.SweepRetryConfig) -> Run:
    """Take up failed and cancelled trials again; a sweep that nobody controls is gone on with."""
    found = Sweep.open(settings.sweep, settings.out, settings.trust_record)
    if not found.retry():
        raise LetheError(f"sweep: '{settings.sweep}' has no failed or cancelled run to take up again")
    if found.run.status == "running":
        return found.run
    (found.run.path / STOP).unlink(missing_ok=True)
    return sweep(found.config, found.run)


def cancel(settings: c.SweepCancelConfig) -> Run:
    """Cancel a sweep, and wait until its runs have saved and stopped.

    Raises:
        LetheError: there is nothing to cancel, or a run does not stop.
    """
    found = Sweep.open(settings.sweep, settings.out, settings.trust_record)
    if not found.cancel() and found.run.status != "running":
        raise LetheError(f"sweep: '{settings.sweep}' is {found.run.status}; there is nothing to cancel")
    deadline = time.monotonic() + launchers.SECONDS_TO_SAVE
    while found.tasks(*TO_DO) and time.monotonic() < deadline:
        with found.lock:
            for task in found.tasks(TrialState.WAITING):
                found.fail(task, "cancelled", CANCELLED, task.runs(found.out))
            if Run.open(found.run.path).status != "running":  # nobody else will look at what becomes of the runs
                found.settle(launchers.make(found.config.launcher, found.run.path, 1, found.config.slurm))
        time.sleep(0.5)
    if left := found.tasks(*TO_DO):
        names = ", ".join(str(task.get("name")) for task in left)
        raise LetheError(f"sweep: {names} did not stop within {launchers.SECONDS_TO_SAVE} s; look at `lethe sweep status`")
    run = Run.open(found.run.path)
    if run.status in {"queued", "lost"}:
        run.update(status="cancelled", reason=CANCELLED)
    return status(settings)


def resume_sweep(run: Run, trusts: bool = False) -> Run:
    """Do what is left of a sweep. `trusts`: the user agrees to what its record runs or opens."""
    config = settings_of(run, config_of(run))
    consented(config, trusts)
    return sweep(config, run)


def config_of(run: Run) -> type:
    """The kind of configuration that a sweep's record holds."""
    return c.SuiteConfig if "suite" in run.record["config"] else c.SweepConfig


def _on(settings: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """A stage's settings with the results of earlier stages in the places that they are named in (`@0`)."""
    model = str(settings.get("model"))
    return {**settings, "model": f"run:{runs[int(model[1:])].id}"} if model.startswith("@") else settings


def _note(tasks: list[Task]) -> str:
    words = [task.status for task in tasks]
    return "  ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words) if word != "complete")
