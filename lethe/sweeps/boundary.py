"""Sweeps of kind `boundary`: bisection along one axis, and its answer in sentences. `bisection.py` chooses the values.

Every complete trial gives a verdict for each boundary that is looked for (`_verdict`). `edges` collects them by value,
`propose` measures where the verdict changes, and `conclusions` says between which values it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lethe import config as c
from lethe.errors import LetheError
from lethe.results import regimes
from lethe.results.listing import number
from lethe.runs.finding import find_run
from lethe.sweeps import axes, bisection
from lethe.sweeps.planner import Finding, Planner
from lethe.sweeps.trials import Plan, Trial

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

NEXT_AXES = ("max_steps", "lr", "retain_coef", "remove_coef", "lora.r")
"""The settings to vary next: updates matter most, then the learning rate."""


class Boundary(Planner):
    """Bisection along one axis."""

    def __init__(self, config: c.SweepConfig):
        super().__init__(config)
        if len(self.axes) != 1 or self.axes[0].values or self.axes[0].when:
            raise LetheError(
                f"vary: kind boundary takes one axis with low and high, got {', '.join(config.vary)}; "
                "kinds grid and pareto take several"
            )
        if self.axes[0].steps:
            raise LetheError("vary: steps has no effect with kind boundary, which chooses its own values; leave it out")
        self.axis = self.axes[0]
        if self.expected < 2 * len(config.seed_list):
            raise LetheError(
                f"max_runs: {config.max_runs} are too few for both ends of the axis with {len(config.seed_list)} seeds each"
            )

    @property
    def expected(self) -> int:
        return self.config.max_runs or 10 * len(self.config.seed_list)

    def checked(self) -> c.SweepConfig:
        if self.config.find == "retained" and self.config.reference != "baseline":
            self._reference({})
        return super().checked()

    def _own_trials(self, sweep: Sweep) -> list[Trial]:
        return [trial for trial in sweep.trials() if not trial.is_reference and not trial.is_retried]

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        trials = self._own_trials(sweep)
        if room == 0 or not all(trial.is_done for trial in trials):
            return []
        seeds = self.config.seed_list
        left = (self.expected - len(trials)) // len(seeds)
        values = bisection.next_values(self.axis, self.edges(sweep).values(), self.config.width)
        return [self.plan({self.axis.name: value}, [seed]) for value in values[: max(0, left)] for seed in seeds]

    def edges(self, sweep: Sweep) -> dict[str, bisection.Verdicts]:
        """By boundary: the verdicts of every measured value, one a seed; None where a seed has none."""
        found = {finding.trial.frozen.number: finding for finding in self.findings(sweep)}
        least = None
        if self.config.find == "retained":
            reference = self._reference(self.baseline(sweep, self.recipe["model"]))
            least = None if reference is None else reference - (self.config.within or 0.0) - 1e-9
        made: dict[str, bisection.Verdicts] = {}
        for name in ("neither", "both") if self.config.find == "boundary" else ("retained",):
            seen: dict[float, list[bool | None]] = {}
            for trial in self._own_trials(sweep):
                if trial.is_done:
                    verdict = self._verdict(name, found.get(trial.frozen.number), least)
                    seen.setdefault(trial.get("point")[self.axis.name], []).append(verdict)
            made[name] = {value: None if None in each else [bool(one) for one in each] for value, each in seen.items()}
        return made

    def _verdict(self, name: str, run: Finding | None, least: float | None) -> bool | None:
        """On which side of a boundary a run lies; None if that cannot be told."""
        if run is None or (name == "retained" and least is None):
            return None
        if least is not None:
            return number(run.results[1]) >= least
        thresholds = self.config.retained_threshold, self.config.chance_threshold
        decided = run.shares and all(regimes.is_decided(share, *thresholds) for share in run.shares)
        return run.regime == name if decided else None

    def _reference(self, baseline: dict) -> float | None:
        """The retain accuracy that losses are measured from; None if the baseline lacks it.

        Raises:
            LetheError: `reference` is no accuracy, or names a run without one.
        """
        given, task = self.config.reference, self.tasks[1]
        if given == "baseline":
            return number(baseline[task]) if task in baseline else None
        if given.startswith("run:"):
            evals = find_run(given.removeprefix("run:"), self.config.out).record.get("evals") or {}
            if task not in evals:
                raise LetheError(f"reference: {given} has no result on {task}; give another run, a number, or baseline")
            if task in baseline and regimes.provenance(evals[task]) != regimes.provenance(baseline[task]):
                raise LetheError(
                    f"reference: {given} was evaluated in another way on {task}; evaluate it as the sweep's runs are"
                )
            return number(evals[task])
        try:
            accuracy = float(given)
        except ValueError:
            accuracy = math.nan
        if not 0 <= accuracy <= 1:
            raise LetheError(f"reference: expected baseline, run:ID or an accuracy such as 0.4375, got '{given}'")
        return accuracy

    def conclusions(self, sweep: Sweep) -> list[str]:
        found = self.findings(sweep)
        if not found:
            return []
        brackets = {
            name: bisection.bracket(self.axis, verdicts, self.config.width) for name, verdicts in self.edges(sweep).items()
        }
        sentences = [self._sentence(name, bracket) for name, bracket in brackets.items()]
        if self.config.find == "boundary":
            sentences += self._beyond_the_axis(brackets["both"], found)
        if len(self.config.seed_list) == 1:
            sentences.append("One seed: the spread between seeds is unknown, and the boundary may be no sharper than that.")
        return [*sentences, *super().conclusions(sweep)]

    def _sentence(self, name: str, bracket: bisection.Bracket) -> str:
        axis = self.axis.name
        points = 100 * (self.config.within or 0)
        verdict = {
            "neither": "neither task fell",
            "both": "both tasks are at chance",
            "retained": f"retain accuracy ({self.tasks[1]}) is at most {points:g} points below {self.config.reference}",
        }[name]
        disagreeing = ", ".join(f"{value:g}" for value in bracket.disagreeing)
        if bracket.status == "not measured":
            also = "or the reference could not" if name == "retained" else "or was evaluated on too few questions"
            return f"{name}: an end of {axis} could not be measured, {also}."
        if bracket.status == "undecided":
            return f"{name}: seeds disagree at {axis} {disagreeing}, an end of the axis; widen it."
        if bracket.below is None or bracket.above is None:
            where = "everywhere" if bracket.before else "nowhere"
            return f"Not bracketed: from {axis} {self.axis.at(0):g} to {self.axis.at(1):g} it is true {where} that {verdict}."
        below, above = f"{axis} {bracket.below:g}", f"{axis} {bracket.above:g}"
        where = f"up to {below}, and no longer at {above}" if bracket.before else f"from {above} on, and not yet at {below}"
        how = f"known to a factor of {bracket.above / bracket.below:.2f}" if bracket.below > 0 else "known"
        if bracket.status == "open":
            how += f", wider than the width {self.config.width:g}: max_runs was reached, or values in between failed"
        if disagreeing:
            how += f"; seeds disagree at {disagreeing}, so no closer"
        if not bracket.monotone:
            how += "; the verdict changes again further up, so this is the first of several boundaries"
        return f"{verdict[0].upper()}{verdict[1:]} {where} ({how})."

    def _beyond_the_axis(self, both: bisection.Bracket, found: list[Finding]) -> list[str]:
        """What to try if no value of the axis brings both tasks to chance."""
        if both.status != "not bracketed" or both.before is not False:
            return []
        name = self.axis.name
        level = plateau({run.trial.get("point")[name]: run.shares for run in found if run.shares})
        flat = f"; from {name} {level:g} on nothing changes beyond the intervals" if level is not None else ""
        used = "max_steps" if name == "epochs" else name
        other = next(axis for axis in NEXT_AXES if axis not in used.split(axes.RATIO))
        return [f"No value on the axis brings both tasks to chance{flat}. Try another axis: {other}."]


def plateau(shares: Mapping[float, Sequence[regimes.Estimate]]) -> float | None:
    """The value from which on, towards stronger unlearning, the retained shares stay within their intervals; None if none.

    `shares`: by value, those of the forget and of the retain task.
    """
    values = sorted(shares, reverse=shares[max(shares)][0].value <= shares[min(shares)][0].value)  # the strongest first
    level = None
    for value in values[1:]:
        pairs = zip(shares[value], shares[values[0]], strict=True)
        if not all(one.low <= end.high and end.low <= one.high for one, end in pairs):
            break
        level = value
    return level
