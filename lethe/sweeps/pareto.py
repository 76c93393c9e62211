"""Sweeps of kind `pareto`: points that fill the axes evenly first, then points that Optuna proposes.

A trial is one point. Its seeds are runs of that trial, and its objectives are their means. Runs that are clearly worse than
finished ones are stopped early. Runs from other folders (`warm_start`) count as complete trials.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

import optuna

from lethe import config as c
from lethe.errors import LetheError
from lethe.results.listing import is_imported
from lethe.runs.run import Run, find_runs, seconds_since
from lethe.sweeps import axes, rules_of_thumb
from lethe.sweeps.axes import Point
from lethe.sweeps.planner import Finding, Planner
from lethe.sweeps.reuse import made_from_the_same
from lethe.sweeps.trials import STOPPED_EARLY, Plan, Trial, suggested

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

logger = logging.getLogger(__name__)
MOST_EVEN_POINTS = 256
Results = dict[str, Any]


class Pareto(Planner):
    """The best trade-offs of forget accuracy, retain accuracy and, with an attack, forget accuracy during it."""

    @property
    def expected(self) -> int:
        return self.config.max_runs or 100

    @property
    def runs_a_seed(self) -> int:
        return 1 if self.config.tamper is None else 2

    def sampler(self) -> optuna.samplers.BaseSampler:
        seed = self.config.seed_list[0]
        if self.config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.config.sampler == "gp" and not any(axis.when for axis in self.axes):  # it would sample those independently
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=2)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2)

    @property
    def even_points(self) -> int:
        """Points before the sampler takes over: a quarter of the budget, between 4 and 10; none for random search."""
        return 0 if self.config.sampler == "random" else min(10, max(4, self.expected // 4))

    def even_plans(self, begun: set[str]) -> Iterator[Plan]:
        """Plans that fill the axes evenly: a scrambled Halton sequence (https://arxiv.org/abs/1706.02808)."""
        from scipy.stats.qmc import Halton

        seed = self.config.seed_list[0]
        for shares in Halton(len(self.axes), rng=seed).random(MOST_EVEN_POINTS):
            values = [axis.choice(share) for axis, share in zip(self.axes, shares, strict=True)]
            plan = self.plan(axes.point_of(self.axes, values, self.recipe), seed)
            if plan.key not in begun:
                yield plan

    def checked(self) -> c.SweepConfig:
        if self.config.warm_start and self.config.tamper is not None:
            raise LetheError("warm_start: has no effect with an attack, which earlier runs do not have; leave it out")
        checked = super().checked()
        for folder in self.config.warm_start:
            if not any(self.known(folder)):
                raise LetheError(f"warm_start: '{folder}' has no complete run of this recipe on these axes; leave it out")
        return checked

    def begin(self, sweep: Sweep) -> None:
        if sweep.study.get_trials(deepcopy=False):
            return
        for folder in self.config.warm_start:
            for run, point, values in self.known(folder):
                facts = {"warm": str(run.path.resolve()), "reused": True}
                stages = [("unlearn", run.record["config"])]
                plan = Plan(run.record["name"], stages, point, axes=self.axes, facts=facts)
                sweep.study.add_trial(plan.frozen(values))

    def known(self, folder: str) -> Iterator[tuple[Run, Point, list[float]]]:
        """The runs of a folder that count as complete trials, with their points and objectives."""
        for run in find_runs(folder):
            point = self.point_of(run)
            values = [] if point is None else self.values([run])
            if point is not None and not any(isinstance(value, str) for value in values):
                yield run, point, [float(value) for value in values]

    def point_of(self, run: Run) -> Point | None:
        """Where a complete run lies on the axes; None if it has another recipe or lies outside of them."""
        usable = run.record["kind"] == "unlearn" and run.record["status"] == "complete" and not is_imported(run)
        if not usable or not made_from_the_same(run):
            return None
        settings = run.record["config"]
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
        ours, theirs = (
            axes.that_matter("unlearn", each) | {"seed": 0} for each in (axes.settings_at(self.recipe, point), settings)
        )
        return point if ours == theirs else None

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        every = sweep.trials()
        warm = sum(bool(trial.get("warm")) for trial in every)
        own = [t for t in every if t.get("stages") and not t.is_reference and not t.get("warm") and t.get("retry_of") is None]
        spent = self.config.hours and seconds_since(sweep.run.record["started"]) >= 3600 * self.config.hours
        left = 0 if spent else self.config.max_runs - len(own) if self.config.max_runs else room
        begun = {trial.get("key") for trial in every}
        # A sampler learns nothing from a trial without objectives and would propose its like again.
        without = sum(trial.status in {"failed", "diverged", STOPPED_EARLY} for trial in own)
        even_left = self.even_points + without - warm - sum(trial.get("number") is None for trial in own)
        even, plans = self.even_plans(begun), list[Plan]()
        while len(plans) < min(room, left):
            plan = self.ask(sweep, begun) if len(plans) >= even_left else None
            plan = plan or next(even, None)
            if plan is None:
                logger.info("every point on the axes was run")
                break
            begun.add(plan.key)
            plans.append(plan)
        return plans

    def ask(self, sweep: Sweep, begun: set[str]) -> Plan | None:
        """A plan at the point that Optuna proposes; None if that is begun already."""
        trial = sweep.study.ask()
        point: Point = {}
        for axis in self.axes:
            if axis.applies(point, self.recipe):
                point[axis.name] = suggested(trial, axis)
        plan = self.plan(point, self.config.seed_list[0], trial.number)
        if plan.key not in begun:
            return plan
        sweep.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def plan(self, point: Point, seed: int, number: int | None = None) -> Plan:
        plan = super().plan(point, seed, number)
        for other in self.config.seed_list[1:]:
            first = f"@{len(plan.stages)}"
            plan.stages += [
                (kind, settings | ({"model": first} if settings["model"] == "@0" else {}))
                for kind, settings in super().plan(point, other).stages
            ]
        plan.name = axes.name_at(self.config.name, plan.stages[0][1], point, None)
        if number is not None:
            plan.facts["number"] = number
        return plan

    def _by_seed(self, runs: list[Run]) -> list[list[Run]]:
        return [runs[i : i + self.runs_a_seed] for i in range(0, len(runs), self.runs_a_seed)]

    def values(self, runs: list[Run]) -> list[float | str]:
        """Means over the seeds."""
        each = [super(Pareto, self).values(of_seed) for of_seed in self._by_seed(runs)]
        missing = next((value for values in each for value in values if isinstance(value, str)), None)
        return [missing] if missing else [fmean(map(float, values)) for values in zip(*each, strict=True)]

    def finding(self, sweep: Sweep, trial: Trial, runs: list[Run]) -> Finding | None:
        """Means over the seeds, of the accuracies and of the ends of their intervals."""
        each = [super(Pareto, self).finding(sweep, trial, of_seed) for of_seed in self._by_seed(runs)]
        found = [finding for finding in each if finding]
        if len(found) < len(each):
            return None
        if len(found) == 1:
            return found[0]
        forget, retain = _mean([f.forget for f in found]), _mean([f.retain for f in found])
        return self.judge(sweep, trial, runs[0].record["config"]["model"], forget, retain)

    def watch(self, sweep: Sweep) -> None:
        """Ask running trials to stop where finished ones were clearly better at the same step.

        That needs evaluations on the way, and objectives that they tell something about: not those of an attack afterwards.
        """
        if not self.config.stop_early or not self.recipe["eval"]["every"] or self.config.tamper is not None:
            return
        trials = [trial for trial in sweep.trials() if not trial.is_reference]
        done = [run for trial in trials if trial.status == "complete" for run in trial.runs(sweep.out)[:1]]
        curves = [(_steps(run), {row["step"]: row["evals"] for row in run.rows("curve.jsonl")}) for run in done]
        running = [run for trial in trials if trial.status == "running" for run in trial.runs(sweep.out)]
        for run in running:
            if run.record["kind"] == "unlearn" and run.record["status"] == "running" and not run.asked_to_stop():
                row = run.last_row("curve.jsonl")
                if row and row["step"] != _steps(run) and self._is_hopeless(_steps(run), row, curves):
                    better = f"{rules_of_thumb.BETTER_RUNS} finished runs had clearly better accuracies there"
                    run.ask_to_stop(f"{STOPPED_EARLY} at step {row['step']}: {better}")

    def _is_hopeless(self, steps: int | None, row: Results, curves: list[tuple[int | None, dict[int, Any]]]) -> bool:
        """Whether finished runs of as many steps were clearly better than an evaluation at its step."""
        ours = self._pair(row["evals"])
        others = [pair for n, curve in curves if n == steps and (pair := self._pair(curve.get(row["step"]) or {}))]
        return ours is not None and rules_of_thumb.is_clearly_worse(ours, others)

    def _pair(self, evals: Results) -> tuple[Results, Results] | None:
        forget, retain = (evals.get(task) for task in self.tasks)
        return (forget, retain) if forget and retain and "low" in forget and "low" in retain else None

    def summary(self, sweep: Sweep, found: list[Finding]) -> list[str]:
        numbers = {trial.number for trial in sweep.study.best_trials}
        best = {tuple(f.trial.frozen.values): f.trial for f in found if f.trial.frozen.number in numbers}  # equal ones once
        shown = [f"{best[values].get('name')} ({', '.join(f'{100 * v:.1f}' for v in values)})" for values in sorted(best)]
        forget, retain = self.tasks
        what = f"{forget} down, {retain} up" + (", highest during the attack, down" if self.config.tamper else "")
        return [f"Front of {len(best)} among {len(found)} ({what}; %): {'; '.join(shown)}."] if best else []


def _steps(run: Run) -> int | None:
    return (run.record.get("plan") or {}).get("steps")


def _mean(results: list[Results]) -> Results:
    """The mean of several results on the same task."""
    keys = [key for key in ("acc", "correct_prob", "low", "high") if key in results[0]]
    return results[0] | {key: fmean(result[key] for result in results) for key in keys}
