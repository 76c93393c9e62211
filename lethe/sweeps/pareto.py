"""Sweeps of kind `pareto`: an even start, then what Optuna proposes; hopeless runs are stopped, earlier ones may be known."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lethe import config as c
from lethe.errors import LetheError
from lethe.results.listing import is_imported
from lethe.runs.run import Run, find_runs, seconds_since
from lethe.sweeps import axes, search
from lethe.sweeps.axes import Axis, Point
from lethe.sweeps.planner import Finding, Plan, Planner, made_from_the_same, optunas

if TYPE_CHECKING:
    import optuna

    from lethe.sweeps.controller import Sweep, Task

logger = logging.getLogger(__name__)
MOST_FILLING = 256


class Pareto(Planner):
    """The best trade-offs between forgetting and keeping (and holding against an attack), by Optuna."""

    @property
    def expected(self) -> int:
        return self.config.max_runs or 100

    def sampler(self) -> optuna.samplers.BaseSampler:
        from optuna.samplers import GPSampler, RandomSampler, TPESampler

        seed = self.config.seed_list[0]
        if self.config.sampler == "random":
            return RandomSampler(seed=seed)
        if self.config.sampler == "gp" and not any(axis.when for axis in self.axes):  # it draws such axes blindly
            return GPSampler(seed=seed, n_startup_trials=2)
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2)

    @property
    def startup(self) -> int:
        """Settings before the sampler takes over: a quarter of the budget, between 4 and 10; none for random search."""
        return 0 if self.config.sampler == "random" else min(10, max(4, self.expected // 4))

    def filling(self, begun: set[str]) -> Iterator[Plan]:
        """Settings that fill the axes evenly, less those begun: a scrambled Halton sequence (https://arxiv.org/abs/1706.02808)."""
        from scipy.stats.qmc import Halton

        seed = self.config.seed_list[0]
        for shares in Halton(len(self.axes), rng=seed).random(MOST_FILLING):
            point: Point = {}
            for axis, share in zip(self.axes, shares, strict=True):
                if axis.applies(point, self.recipe):
                    point[axis.name] = axis.choice(share)
            plan = self.plan(point, seed)
            if plan.key not in begun:
                yield plan

    def checked(self) -> c.SweepConfig:
        if self.config.warm_start and self.config.tamper is not None:
            raise LetheError("warm_start: has no effect with an attack, which earlier runs do not have; leave it out")
        checked = super().checked()
        for folder in self.config.warm_start:
            if not any(self.known(folder)):
                raise LetheError(f"warm_start: no run in '{folder}' is complete, of this recipe and on the axes; leave it out")
        return checked

    def begin(self, sweep: Sweep) -> None:
        from optuna.trial import TrialState, create_trial

        if sweep.study.get_trials(deepcopy=False):
            return
        for folder in self.config.warm_start:
            for run, point, values in self.known(folder):
                plan = Plan(
                    run.record["name"],
                    [("unlearn", run.record["config"])],
                    point,
                    axes=self.axes,
                    facts={"warm": True, "reused": True, "runs": [str(run.path.resolve())]},
                )
                sweep.study.add_trial(
                    create_trial(
                        state=TrialState.COMPLETE,
                        values=values,
                        params=plan.params,
                        distributions=plan.distributions,
                        user_attrs=plan.attributes(),
                    )
                )

    def known(self, folder: str) -> Iterator[tuple[Run, Point, list[float]]]:
        """Runs in a folder that count as made, each with where it lies and what it measured."""
        for run in find_runs(folder):
            point = self.point_of(run)
            values = [] if point is None else self.values([run])
            if point is not None and not any(isinstance(value, str) for value in values):
                yield run, point, [float(value) for value in values]

    def point_of(self, run: Run) -> Point | None:
        """Where a complete run lies on the axes; None where it is of another recipe or outside of them."""
        usable = run.record["kind"] == "unlearn" and run.record["status"] == "complete" and not is_imported(run)
        if not usable or not made_from_the_same(run):
            return None
        point: Point = {}
        for axis in self.axes:
            if not axis.applies(point, self.recipe):
                continue
            field, _, below = axis.name.partition(axes.RATIO)
            value, unit = axes.value_at(run.record["config"], field), axes.value_at(run.record["config"], below) if below else 1
            value = value / unit if below and value is not None and unit else value
            listed = axis.values or (axis.grid() if axis.steps else ())
            inside = value in listed if listed else value is not None and axis.low <= value <= axis.high
            if not inside:
                return None
            point[axis.name] = value
        settings = axes.settings_at(self.recipe, point)
        ours, theirs = (axes.that_matter("unlearn", s) | {"seed": 0} for s in (settings, run.record["config"]))
        return point if ours == theirs else None

    def watch(self, sweep: Sweep) -> None:
        # Nothing to judge by before the end without evaluations, or where an attack after it is one of the objectives.
        if self.config.prune and self.recipe["eval"]["every"] and self.config.tamper is None:
            self.stop_hopeless(sweep)

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        trials = [
            t
            for t in sweep.tasks()
            if t.get("stages") and not t.is_reference and not t.get("warm") and t.get("retry_of") is None
        ]
        spent = self.config.hours and seconds_since(sweep.run.record["started"]) >= 3600 * self.config.hours
        left = 0 if spent else self.config.max_runs - len(trials) if self.config.max_runs else room
        if any(task.status == "queued" and not task.is_reference for task in sweep.tasks()):  # Optuna would hand it out again
            return []
        begun = {task.get("key") for task in sweep.tasks()}
        warm = sum(bool(task.get("warm")) for task in sweep.tasks())
        filling = self.filling(begun)
        # A sampler knows nothing of a run without numbers, and would propose the like again: another even one in its place.
        lost = sum(task.status in {"failed", "diverged", "pruned"} for task in trials)
        even = self.startup + lost - warm - sum(task.get("number") is None for task in trials)
        plans: list[Plan] = []
        while len(plans) < min(room, left):
            asked = self.ask(sweep, begun) if len(plans) >= even else None
            plan = asked or next(filling, None)
            if plan is None:
                logger.info("every setting on the axes was run")
                break
            begun.add(plan.key)
            plans.append(plan)
        return plans

    def ask(self, sweep: Sweep, begun: set[str]) -> Plan | None:
        """A plan at the point that Optuna chooses; None when that is begun."""
        from optuna.trial import TrialState

        trial = sweep.study.ask()
        point: Point = {}
        for axis in self.axes:
            if axis.applies(point, self.recipe):
                point[axis.name] = suggested(trial, axis)
        plan = self.plan(point, self.config.seed_list[0], trial.number)
        if plan.key not in begun:
            return plan
        sweep.study.tell(trial, state=TrialState.FAIL)
        return None

    def plan(self, point: Point, seed: int, number: int | None = None) -> Plan:
        plan = super().plan(point, seed, number)
        for other in self.config.seed_list[1:]:  # a trial is a setting; its seeds are runs of that trial
            here = f"@{len(plan.stages)}"
            plan.stages += [
                (kind, made | ({"model": here} if made["model"] == "@0" else {}))
                for kind, made in super().plan(point, other).stages
            ]
        plan.name = axes.name_at(self.config.name, plan.stages[0][1], point, None)
        if number is not None:
            plan.facts["number"] = number
        return plan

    def values(self, runs: list[Run]) -> list[float | str]:
        """Means over the seeds."""
        size = 2 if self.config.tamper is not None else 1
        each = [super(Pareto, self).values(runs[i : i + size]) for i in range(0, len(runs), size)]
        missing = next((value for values in each for value in values if isinstance(value, str)), None)
        if missing:
            return [missing]
        return [search.mean(float(values[i]) for values in each) for i in range(len(each[0]))]

    def finding(self, sweep: Sweep, task: Task, runs: list[Run]) -> Finding | None:
        """Means over the seeds; the ends of intervals are means, too."""
        size = 2 if self.config.tamper is not None else 1
        each = [super(Pareto, self).finding(sweep, task, runs[i : i + size]) for i in range(0, len(runs), size)]
        found = [finding for finding in each if finding]
        if len(found) < len(each) or len(found) < 2:
            return found[0] if len(found) == len(each) and found else None
        forget, retain = _mean([f.forget for f in found]), _mean([f.retain for f in found])
        return self.judge(sweep, task, runs[0].record["config"], forget, retain)

    def stop_hopeless(self, sweep: Sweep) -> None:
        """Ask running trials to stop that finished ones were clearly better than at the same step."""
        tasks = [task for task in sweep.tasks() if not task.is_reference and task.get("runs")]
        done = [run for task in tasks if task.status == "complete" for run in task.runs(sweep.out)[:1]]
        curves = [(_steps(run), {row["step"]: row["evals"] for row in run.rows("curve.jsonl")}) for run in done]
        for task in tasks:
            for run in task.runs(sweep.out) if task.status == "running" else []:
                if run.record["kind"] == "unlearn" and run.record["status"] == "running" and not run.asked_to_stop():
                    row = run.last_row("curve.jsonl")
                    if row and row["step"] != _steps(run) and self.hopeless(_steps(run), row, curves):
                        better = f"{search.DOMINATORS} finished runs were clearly better in both accuracies there"
                        run.ask_to_stop(f"pruned at step {row['step']}: {better}")

    def hopeless(self, steps: int | None, row: dict[str, Any], curves: list[tuple[int | None, dict[int, Any]]]) -> bool:
        """Whether finished runs, of as many steps, were clearly better than an evaluation at its step."""
        at = self._pair(row["evals"])
        others = [pair for n, curve in curves if n == steps and (pair := self._pair(curve.get(row["step"]) or {}))]
        return at is not None and search.clearly_worse(at, others)

    def _pair(self, evals: dict[str, Any]) -> tuple[dict, dict] | None:
        forget, retain = (evals.get(task) for task in self.tasks)
        return (forget, retain) if forget and retain and "low" in forget and "low" in retain else None

    def said(self, found: list[Finding]) -> list[str]:
        values = [
            tuple(v if d == "minimize" else -v for v, d in zip(f.task.trial.values, self.directions, strict=True))
            for f in found
        ]
        best = [found[i] for i in search.front(values)]
        best.sort(key=lambda f: f.task.trial.values[0])
        shown = "; ".join(f"{f.task.get('name')} ({', '.join(f'{100 * v:.1f}' for v in f.task.trial.values)})" for f in best)
        what = ", ".join(
            [
                f"{self.tasks[0]} down",
                f"{self.tasks[1]} up",
                *(["highest during the attack, down"] if self.config.tamper else []),
            ]
        )
        return [f"Front of {len(best)} among {len(found)} ({what}; %): {shown}."] if best else []


def suggested(trial: optuna.Trial, axis: Axis) -> Any:
    """The value that Optuna chooses on an axis."""
    if axis.values or axis.steps:
        values = axis.values or axis.grid()
        chosen = trial.suggest_categorical(axis.name, [optunas(axis, value) for value in values])
        return next(value for value in values if optunas(axis, value) == chosen)
    if axis.whole:
        return trial.suggest_int(axis.name, round(axis.low), round(axis.high), log=axis.log)
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def _steps(run: Run) -> int | None:
    return (run.record.get("plan") or {}).get("steps")


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several of the same task."""
    means = {key: search.mean(r[key] for r in results) for key in ("acc", "correct_prob", "low", "high") if key in results[0]}
    return results[0] | means
