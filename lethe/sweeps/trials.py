"""A sweep's unit of work: a `Plan` says what to run, a `Trial` is a plan in the Optuna study.

A planner makes plans. The controller adds each to the Optuna study as a trial whose user attributes hold the plan, the names of
its runs and its owner (the worker or Slurm job that has it). Optuna counts a trial as RUNNING until it has ended. Here it is
`queued` until it has an owner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lethe.runs.run import Run
from lethe.sweeps.axes import Axis, Point
from lethe.sweeps.reuse import key_of

Stage = tuple[str, dict[str, Any]]
"""A kind of run and its settings. `@0` as the model stands for the result of the trial's first stage."""
STOPPED_EARLY = "stopped early"


@dataclass
class Plan:
    """What a trial runs, and its point on the axes.

    `facts` are further attributes of the trial. `number` is one if Optuna proposed the point and has a trial for it.
    """

    name: str
    stages: list[Stage]
    point: Point = field(default_factory=dict)
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Equal for plans that run the same."""
        return "-".join(key_of(kind, settings) for kind, settings in self.stages)

    def attributes(self) -> dict[str, Any]:
        """The user attributes of its trial."""
        own = {"name": self.name, "stages": self.stages, "point": self.point, "seed": self.seed, "key": self.key}
        return own | self.facts

    def frozen(self, values: list[float] | None = None) -> FrozenTrial:
        """The trial to add to the Optuna study: complete if it has values, else still to be run."""
        varied = [axis for axis in self.axes if axis.name in self.point]
        return create_trial(
            state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
            values=values,
            params={axis.name: as_optuna_value(self.point[axis.name]) for axis in varied},
            distributions={axis.name: distribution(axis) for axis in varied},
            user_attrs=self.attributes(),
        )


@dataclass
class Trial:
    """One trial of the Optuna study. `frozen` is Optuna's own object; `ended_runs` caches runs of trials that are done."""

    study: optuna.Study
    frozen: FrozenTrial
    ended_runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    is_retried: bool = False
    """Whether a later trial has its runs now."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.frozen.user_attrs.get(name, default)

    def set(self, **attributes: Any) -> None:
        changed = {name: value for name, value in attributes.items() if self.frozen.user_attrs.get(name) != value}
        if changed:
            live = optuna.trial.Trial(self.study, self.frozen._trial_id)  # Optuna has no public way to reopen a trial
            for name, value in changed.items():
                live.set_user_attr(name, value)
            self.frozen = self.study.get_trials(deepcopy=False)[self.frozen.number]

    def end(self, state: TrialState, values: list[float] | None = None, **attributes: Any) -> None:
        """Report to Optuna how it ended."""
        self.set(**attributes)
        self.frozen = self.study.tell(self.frozen.number, values, state)

    @property
    def status(self) -> str:
        """As a run's status, or `stopped early`."""
        if not self.is_done:
            return "running" if self.get("owner") else "queued"
        ended = {TrialState.COMPLETE: "complete", TrialState.PRUNED: STOPPED_EARLY}
        return ended.get(self.frozen.state) or self.get("status", "failed")

    @property
    def is_done(self) -> bool:
        return self.frozen.state.is_finished()

    @property
    def is_reference(self) -> bool:
        """Whether it only measures what the others are compared with."""
        return bool(self.get("reference"))

    @property
    def is_shown(self) -> bool:
        """Whether tables show it: it was planned, and no later trial has its runs."""
        return bool(self.get("stages")) and not self.is_retried

    def runs(self, out: Path) -> list[Run]:
        """The runs that it has so far. Those of a trial that is done are read once, and are none if a folder is gone."""
        key = self.study.study_name, self.frozen.number
        if key in self.ended_runs:
            return self.ended_runs[key]
        warm = self.get("warm")  # the absolute path of a run that Optuna starts from
        folders = [out / name for name in ([warm] if warm else self.get("runs", []))]
        found = [Run.open(folder) for folder in folders if folder.exists()]
        if self.is_done:
            found = self.ended_runs[key] = found if len(found) == len(folders) else []
        return found


def distribution(axis: Axis) -> BaseDistribution:
    """An axis for Optuna."""
    if choices := axis.choices():
        return CategoricalDistribution([as_optuna_value(value) for value in choices])
    if axis.whole:
        return IntDistribution(round(axis.low), round(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def suggested(trial: optuna.Trial, axis: Axis) -> Any:
    """The value that Optuna chooses on an axis."""
    if choices := axis.choices():
        chosen = trial.suggest_categorical(axis.name, [as_optuna_value(value) for value in choices])
        return next(value for value in choices if as_optuna_value(value) == chosen)
    if axis.whole:
        return trial.suggest_int(axis.name, round(axis.low), round(axis.high), log=axis.log)
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def as_optuna_value(value: Any) -> Any:
    """A value that Optuna can store: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
