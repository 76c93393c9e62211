"""The controller of a sweep: it adds the trials that the planner proposes, starts them, and records their results.

It works in rounds, each under the sweep's lock:

    settle     look at every running trial: complete, failed, cancelled, or lost and to be restarted
    propose    add what to run next
    start      start as many queued trials as there is room for

So a controller may be killed at any moment, restarted, or run twice: no trial is lost or run twice.
"""

from __future__ import annotations

import time
from pathlib import Path

from lethe import config as c
from lethe.errors import LetheError
from lethe.files import refuse_run_folder
from lethe.launching import launchers
from lethe.progress import bar
from lethe.runs.finding import find_runs
from lethe.runs.run import STOP, Run
from lethe.sweeps import journal
from lethe.sweeps.folder import CANCELLED, Settings, Sweep, planner_of
from lethe.sweeps.trials import Trial
from lethe.sweeps.trust import consent, consent_to_methods

SECONDS_BETWEEN_ROUNDS = {"local": 0.5, "slurm": 2.0}
SECONDS_BETWEEN_RECORDS = 1.0


class Controller:
    """One process that works on a sweep."""

    def __init__(self, sweep: Sweep):
        settings = sweep.config
        self.sweep = sweep
        self.launcher = launchers.make(settings.launcher, sweep.run.path, settings.jobs, settings.slurm, sweep.planner.devices)

    def control(self) -> None:
        """Work in rounds until there is nothing left to do. The record follows the results, at most a second behind."""
        sweep = self.sweep
        # A request to stop waits for the end of a round: raised within one, it would leave Optuna's journal half read.
        with sweep.run.deferring(), bar(sweep.planner.title, sweep.planner.expected, "runs") as advance:
            done = 0
            try:
                with sweep.lock:
                    self.prepare()
                more = True
                while more and not sweep.run.stopping:
                    more = self.round()
                    trials = sweep.trials()
                    shown = [t for t in trials if t.is_shown and not (t.is_reference or t.get("warm"))]
                    ended = sum(trial.is_done for trial in shown)
                    advance(ended - done, _counts(trials))
                    done = ended
                    if time.monotonic() - sweep.recorded >= SECONDS_BETWEEN_RECORDS:
                        sweep.record(trials)
                    if more:
                        self.launcher.wait(SECONDS_BETWEEN_ROUNDS[sweep.config.launcher])
            finally:
                self.launcher.stop()
                with sweep.lock:
                    self.settle(stopping=True)
                sweep.record(sweep.trials())

    def prepare(self) -> None:
        """Bring the Optuna study into order and add the plans that are known from the start.

        Raises:
            LetheError: the Optuna study of the sweep's trials is missing.
        """
        sweep = self.sweep
        if sweep.run.record.get("trials") and not sweep.trials():
            where = sweep.config.storage or sweep.run.path / journal.JOURNAL
            raise LetheError(f"sweep: the Optuna study of {sweep.run.path} is not in {where}; restore it, or start a new sweep")
        sweep.claim_waiting()
        known = {name for trial in sweep.trials() for name in trial.get("runs", [])}
        for run in find_runs(sweep.out):  # made by a controller that was killed before it noted them in the study
            ours = (run.record.get("sweep") or {}).get("id") == sweep.run.id and run.path.name not in known
            if ours and run.record["status"] == "queued" and run.record["started"] is None:
                run.discard()
        sweep.add(sweep.planner.references(), sweep.references)
        sweep.planner.begin(sweep)

    def round(self) -> bool:
        """One round. Returns whether there is anything left to do."""
        sweep = self.sweep
        with sweep.lock:
            self.settle()
            sweep.planner.watch(sweep)
            room = 0 if sweep.run.asked_to_stop() else self.launcher.room()
            if room > 0 and all(trial.is_done for trial in sweep.trials(references_only=True)):
                plans = sweep.planner.propose(sweep, max(0, room - len(sweep.queued())))
                sweep.add(plans, sweep.study)
            for trial in sweep.queued()[: max(0, room)]:
                self.start(trial)
            return room <= 0 or bool(sweep.unfinished())  # without room, a worker is about to report that it is done

    def start(self, trial: Trial) -> None:
        """Make the trial's runs, or take those that it has, and hand them to the launcher."""
        sweep = self.sweep
        if not trial.get("runs"):
            trial.set(runs=[run.path.name for run in sweep.make_runs(trial)])
        for run in trial.runs(sweep.out):
            (run.path / STOP).unlink(missing_ok=True)
            if run.status not in {"queued", "complete", "running"}:
                run.update(status="queued", reason=None, finished=None, job_id=None)
        folders = [sweep.out / name for name in trial.get("runs")]
        try:
            trial.set(owner=self.launcher.start(f"lethe-{sweep.run.id}-{trial.get('name')}", folders))
        except LetheError as error:
            sweep.fail(trial, "failed", str(error))
            raise

    def settle(self, stopping: bool = False) -> None:
        """Look at the runs of every running trial and, where they have not ended, at whether somebody still works on them."""
        sweep = self.sweep
        owned: list[Trial] = []
        for trial in sweep.unfinished():
            if not trial.get("stages"):
                sweep.fail(trial, "failed", "its controller was killed before it had made the runs")
            elif trial.get("owner") and not sweep.has_ended(trial, runs := trial.runs(sweep.out)):
                if len(runs) < len(trial.get("runs", [])):
                    sweep.fail(trial, "failed", "a folder of its runs is missing", runs)
                else:
                    owned.append(trial)
        lost = self.launcher.lost([(trial.get("owner"), trial.runs(sweep.out)) for trial in owned])
        for trial, loss in zip(owned, lost, strict=True):
            runs = trial.runs(sweep.out)
            # It may have ended in the meantime, or be in the hands of somebody else.
            if loss is None or sweep.has_ended(trial, runs) or any(run.status == "running" for run in runs):
                continue
            if request := next(filter(None, (run.asked_to_stop() for run in runs)), None):
                sweep.fail(trial, "cancelled", request, runs)
            elif loss.cancelled:
                sweep.fail(trial, "cancelled", loss.reason, runs)
            elif stopping:
                sweep.requeue(trial, "the sweep was stopped", counts=False)
            else:
                sweep.requeue(trial, loss.reason)


def sweep(config: Settings, run: Run | None = None) -> Run:
    """Run a sweep to its end, or resume `run`, an interrupted one. Several controllers of a sweep share its work.

    Raises:
        LetheError: a setting of the sweep or of any run in it cannot work; nothing is left behind.
    """
    refuse_run_folder(config.out)
    methods = consent_to_methods(config, given=run is None)
    planner = planner_of(config)
    if run is None:
        config = planner.checked()
    if config.launcher == "local":
        launchers.refuse_too_many(config.jobs, planner.devices)
    if run is None:
        if config.storage:
            journal.storage_of(config.storage, Path(config.out))
        run = Run.create("sweep", planner.title, c.to_dict(config), config.out)
        run.update(goal=config.goal, plan={"runs": planner.expected}, method_files=methods)
        consent(config, given=True)
    with run.running():
        made = Sweep(run, config)
        Controller(made).control()
        shown = [trial for trial in made.trials() if trial.is_shown]
        statuses = [trial.status for trial in shown]
        run.update(counts={status: statuses.count(status) for status in dict.fromkeys(statuses)})
        ended = {trial.status for trial in shown if not trial.is_reference}
        if ended and ended <= {"failed", "diverged", "cancelled"}:
            reason = next((trial.get("reason") for trial in shown if trial.get("reason")), "none")
            raise LetheError(f"sweep: no run of {run.path} is complete; the first reason: {reason}")
    return run


def status(settings: c.SweepStatusConfig) -> Run:
    """The sweep's record as it is now, read from its Optuna study and its runs. Writes nothing."""
    found = Sweep.open(settings.sweep, settings.out, settings.trust_record)
    found.run.record["trials"] = [found.row(trial) for trial in found.trials() if trial.is_shown]
    found.run.record["conclusions"] = found.planner.conclusions(found)
    return found.run


def retry(settings: c.SweepRetryConfig) -> Run:
    """Retry failed and cancelled trials. A sweep without a controller is resumed."""
    found = Sweep.open(settings.sweep, settings.out, settings.trust_record)
    if not found.retry():
        raise LetheError(f"sweep: '{settings.sweep}' has no failed or cancelled run to retry; see `lethe sweep status`")
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
    controller, deadline = Controller(found), time.monotonic() + launchers.SECONDS_TO_SAVE
    while found.unfinished() and time.monotonic() < deadline:
        with found.lock:
            for trial in found.queued():
                found.fail(trial, "cancelled", CANCELLED, trial.runs(found.out))
            if Run.open(found.run.path).status != "running":  # without a controller, nobody else settles the trials
                controller.settle()
        time.sleep(0.5)
    if left := found.unfinished():
        names = ", ".join(str(trial.get("name")) for trial in left)
        raise LetheError(f"sweep: {names} did not stop within {launchers.SECONDS_TO_SAVE} s; see `lethe sweep status`")
    run = Run.open(found.run.path)
    if run.status in {"queued", "lost"}:
        run.update(status="cancelled", reason=CANCELLED)
    return status(settings)


def _counts(trials: list[Trial]) -> str:
    words = [trial.status for trial in trials]
    return "  ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words) if word != "complete")
