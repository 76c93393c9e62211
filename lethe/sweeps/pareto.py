"""Sweeps of kind `pareto`: points that fill the axes evenly first, then points that Optuna proposes.

A trial is one point. Its seeds are runs of that trial, and its objectives are their means. Runs that are clearly worse than
finished ones are stopped early. Runs from other folders (`warm_start`) count as complete trials.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import optuna

from lethe import config as c
from lethe.errors import LetheError
from lethe.results.listing import is_imported
from lethe.runs.finding import find_runs
from lethe.runs.run import Run, seconds_since
from lethe.sweeps import axes
from lethe.sweeps.axes import Point
from lethe.sweeps.planner import Finding, Planner, Result
from lethe.sweeps.reuse import made_from_the_same, that_matter
from lethe.sweeps.trials import STOPPED_EARLY, Plan, suggested

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

logger = logging.getLogger(__name__)
MOST_EVEN_POINTS = 256
BETTER_RUNS = 2
"""How many finished runs must be clearly better before a run is stopped early."""


class Pareto(Planner):
    """The best trade-offs of forget accuracy, retain accuracy and, with an attack, forget accuracy during it."""

    @property
    def expected(self) -> int:
        return self.config.max_runs or 100

    def sampler(self) -> optuna.samplers.BaseSampler:
        seed = self.config.seed_list[0]
        if self.config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.config.sampler == "gp" and not any(axis.when for axis in self.axes):  # it would sample those independently
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=2)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2)

    def checked(self) -> c.SweepConfig:
        if self.config.warm_start and self.config.tamper is not None:
            raise LetheError("warm_start: has no effect with an attack, which earlier runs do not have; leave it out")
        checked = super().checked()
        for folder in self.config.warm_start:
            if not any(self._known(folder)):
                raise LetheError(f"warm_start: '{folder}' has no complete run of this recipe on these axes; leave it out")
        return checked

    # -- known runs

    def begin(self, sweep: Sweep) -> None:
        if sweep.study.get_trials(deepcopy=False):
            return
        for folder in self.config.warm_start:
            for run, point, values in self._known(folder):
                facts = {"warm": str(run.path.resolve()), "reused": True}
                plan = Plan(run.record["name"], [("unlearn", run.record["config"])], point, axes=self.axes, facts=facts)
                sweep.study.add_trial(plan.frozen(values))

    def _known(self, folder: str) -> Iterator[tuple[Run, Point, list[float]]]:
        """The complete runs of the recipe in a folder, with their points and objectives."""
        for run in find_runs(folder):
            usable = run.record["kind"] == "unlearn" and run.record["status"] == "complete" and not is_imported(run)
            point = self._point_of(run.record["config"]) if usable else None
            if point is not None and made_from_the_same(run, self.config.processes):
                with contextlib.suppress(LetheError):  # it was not evaluated on the sweep's tasks
                    yield run, point, self.values([run])

    def _point_of(self, settings: dict[str, object]) -> Point | None:
        """Where settings lie on the axes; None for those of another recipe, or outside of the axes."""
        point: Point = {}
        for axis in self.axes:
            if not axis.applies(point, self.recipe):
                continue
            field, _, below = axis.name.partition(axes.RATIO)
            value, unit = axes.value_at(settings, field), axes.value_at(settings, below) if below else 1
            value = value / unit if below and value is not None and unit else value
            choices = axis.choices()
            inside = value in choices if choices else value is not None and axis.low <= value <= axis.high
            if not inside:
                return None
            point[axis.name] = value
        ours, theirs = (that_matter("unlearn", each) | {"seed": 0} for each in (self.settings_at(point), settings))
        return point if ours == theirs else None

    # -- new points

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        every = sweep.trials()
        warm = sum(bool(trial.get("warm")) for trial in every)
        own = [t for t in every if t.get("stages") and not t.is_reference and not t.get("warm") and t.get("retry_of") is None]
        spent = self.config.hours and seconds_since(sweep.run.record["started"]) >= 3600 * self.config.hours
        left = 0 if spent else self.config.max_runs - len(own) if self.config.max_runs else room
        begun = {trial.get("key") for trial in every}
        # A quarter of the budget is spread evenly. A trial without objectives teaches the sampler nothing, so that it would
        # propose its like again: one more even point for each.
        even_points = 0 if self.config.sampler == "random" else min(10, max(4, self.expected // 4))
        without = sum(trial.status in {"failed", "diverged", STOPPED_EARLY} for trial in own)
        even_left = even_points + without - warm - sum(trial.get("number") is None for trial in own)
        even, plans = self._even_plans(begun), list[Plan]()
        while len(plans) < min(room, left):
            plan = self._ask(sweep, begun) if len(plans) >= even_left else None
            plan = plan or next(even, None)
            if plan is None:
                logger.info("every point on the axes was run")
                break
            begun.add(plan.key)
            plans.append(plan)
        return plans

    def _even_plans(self, begun: set[str]) -> Iterator[Plan]:
        """Plans that fill the axes evenly: a scrambled Halton sequence (https://arxiv.org/abs/1706.02808)."""
        from scipy.stats.qmc import Halton

        for shares in Halton(len(self.axes), rng=self.config.seed_list[0]).random(MOST_EVEN_POINTS):
            values = [axis.choice(share) for axis, share in zip(self.axes, shares, strict=True)]
            plan = self.plan(axes.point_of(self.axes, values, self.recipe), self.config.seed_list)
            if plan.key not in begun:
                yield plan

    def _ask(self, sweep: Sweep, begun: set[str]) -> Plan | None:
        """A plan at the point that Optuna proposes; None if that is begun already."""
        trial = sweep.study.ask()
        point: Point = {}
        for axis in self.axes:
            if axis.applies(point, self.recipe):
                point[axis.name] = suggested(trial, axis)
        plan = self.plan(point, self.config.seed_list, number=trial.number)
        if plan.key not in begun:
            return plan
        sweep.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    # -- early stops

    def watch(self, sweep: Sweep) -> None:
        """Ask running trials to stop where finished ones were clearly better at the same step.

        That needs evaluations on the way, and objectives that they tell something about: not those of an attack afterwards.
        Optuna's pruners know one objective only.
        """
        if not self.config.stop_early or not self.recipe["eval"]["every"] or self.config.tamper is not None:
            return
        trials = [trial for trial in sweep.trials() if not trial.is_reference]
        done = [run for trial in trials if trial.status == "complete" for run in trial.runs(sweep.out)[:1]]
        curves = [(_steps(run), {row["step"]: row["evals"] for row in run.rows("curve.jsonl")}) for run in done]
        running = [run for trial in trials if trial.status == "running" for run in trial.runs(sweep.out)]
        for run in running:
            row = run.last_row("curve.jsonl")
            if not row or run.record["status"] != "running" or run.asked_to_stop() or row["step"] == _steps(run):
                continue
            others = [self._pair(curve.get(row["step"])) for steps, curve in curves if steps == _steps(run)]
            if is_clearly_worse(self._pair(row["evals"]), others):
                better = f"{BETTER_RUNS} finished runs had clearly better accuracies there"
                run.ask_to_stop(f"{STOPPED_EARLY} at step {row['step']}: {better}")

    def _pair(self, evals: dict[str, Result] | None) -> tuple[Result, ...]:
        """The forget and the retain result; nothing if one of them is missing."""
        found = [evals[task] for task in self.tasks if evals and "low" in evals.get(task, {})]
        return tuple(found) if len(found) == 2 else ()

    def summary(self, sweep: Sweep, found: list[Finding]) -> list[str]:
        numbers = {trial.number for trial in sweep.study.best_trials}
        best = {tuple(f.trial.frozen.values): f.trial for f in found if f.trial.frozen.number in numbers}  # equal ones once
        shown = [f"{best[values].get('name')} ({', '.join(f'{100 * v:.1f}' for v in values)})" for values in sorted(best)]
        forget, retain = self.tasks
        what = f"{forget} down, {retain} up" + (", highest during the attack, down" if self.config.tamper else "")
        return [f"Front of {len(best)} among {len(found)} ({what}; %): {'; '.join(shown)}."] if best else []


def is_clearly_worse(run: tuple[Result, ...], others: Iterable[tuple[Result, ...]]) -> bool:
    """Whether `BETTER_RUNS` others have lower forget and higher retain accuracy, each by more than the intervals.

    Each item is (forget result, retain result), at the same step of the same number of steps, or () without results.
    """
    if not run:
        return False
    forget, retain = run
    better = [pair for pair in others if pair and pair[0]["high"] < forget["low"] and pair[1]["low"] > retain["high"]]
    return len(better) >= BETTER_RUNS


def _steps(run: Run) -> int | None:
    return (run.record.get("plan") or {}).get("steps")
