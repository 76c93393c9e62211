"""Sweeps of kind `boundary`: bisection along one axis, and what it found in sentences. The search itself is in `search.py`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lethe import config as c
from lethe.errors import LetheError
from lethe.results import regimes
from lethe.results.listing import number
from lethe.runs.run import find_run
from lethe.sweeps import search
from lethe.sweeps.planner import Finding, Plan, Planner

if TYPE_CHECKING:
    from lethe.sweeps.controller import Sweep


class Boundary(Planner):
    """Bisection along one axis."""

    def __init__(self, config: c.SweepConfig):
        super().__init__(config)
        if len(self.axes) != 1 or self.axes[0].values or self.axes[0].when:
            raise LetheError(
                f"vary: a boundary is looked for along one axis with low and high, got {', '.join(config.vary)}; "
                "a grid or pareto takes several"
            )
        if self.axes[0].steps:
            raise LetheError("vary: steps has no effect on a boundary, which chooses its own values; leave it out")
        self.axis = self.axes[0]
        if self.expected < 2 * len(config.seed_list):
            raise LetheError(
                f"max_runs: {config.max_runs} are too few for both ends of the axis with {len(config.seed_list)} seeds each"
            )

    @property
    def expected(self) -> int:
        return self.config.max_runs or 10 * len(self.config.seed_list)

    def checked(self) -> c.SweepConfig:
        if self.config.find == "keeps" and self.config.reference != "baseline":
            self._reference({})
        return super().checked()

    def propose(self, sweep: Sweep, room: int) -> list[Plan]:
        trials = [task for task in sweep.tasks() if not task.is_reference and not task.retried]
        if any(task.status in {"queued", "running"} for task in trials) or room == 0:
            return []
        seeds = len(self.config.seed_list)
        left = (self.expected - len(trials)) // seeds
        values = search.next_values(self.axis, self.edges(sweep).values(), self.config.width)
        return [plan for value in values[: max(0, left)] for plan in self.plans({self.axis.name: value})]

    def edges(self, sweep: Sweep) -> dict[str, dict[float, list[bool] | None]]:
        """By what changes there: the verdicts of every measured value, one a seed; None where it failed."""
        found = {finding.task.trial.number: finding for finding in self.findings(sweep)}
        by_value: dict[float, list[Finding] | None] = {}
        for task in sweep.tasks():
            if task.is_reference or task.retried or task.status in {"queued", "running"}:
                continue
            value = task.get("point")[self.axis.name]
            finding = found.get(task.trial.number)
            seen = by_value.setdefault(value, [])
            if finding is None or seen is None or not self._tells(finding):
                by_value[value] = None
            else:
                seen.append(finding)
        judges = self._judges(sweep)
        if not judges:  # what losses count from was not measured
            return {"keeps": dict.fromkeys(by_value)}
        return {
            name: {value: [judge(f) for f in seen] if seen else None for value, seen in by_value.items()}
            for name, judge in judges.items()
        }

    def _tells(self, finding: Finding) -> bool:
        """Whether a run's results say which side of a boundary it is on: they are there, and of enough questions."""
        if self.config.find == "keeps":
            return number(finding.retain) is not None
        thresholds = self.config.kept_threshold, self.config.chance_threshold
        kept = [estimate for estimate in (finding.kept_forget, finding.kept_retain) if estimate]
        return len(kept) == 2 and all(regimes.is_decided(estimate, *thresholds) for estimate in kept)

    def _judges(self, sweep: Sweep) -> dict[str, Any]:
        if self.config.find == "boundary":
            return {
                "neither": lambda finding: finding.regime == "neither",
                "both": lambda finding: finding.regime == "both",
            }
        least = self._reference(self.baseline(sweep, self.recipe) or {})
        if least is None:
            return {}
        bound = least - (self.config.within or 0.0) - 1e-9
        return {"keeps": lambda finding: (number(finding.retain) or 0.0) >= bound}

    def _reference(self, baseline: dict[str, Any]) -> float | None:
        """The retain accuracy that losses count from.

        Raises:
            LetheError: the run that should have it has not.
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
                    f"reference: {given} was measured in another way on {task}; evaluate it as the sweep's runs are"
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
        found, edges = self.findings(sweep), self.edges(sweep)
        said: list[str] = []
        brackets = {name: search.bracket(self.axis, verdicts, self.config.width) for name, verdicts in edges.items()}
        for name, bracket in brackets.items():
            said += self._spoken(name, bracket)
        if self.config.find == "boundary" and found:
            said += self._not_bracketed(brackets, found)
        if len(self.config.seed_list) == 1 and found:
            said.append("One seed: how far repetitions spread is not known, and the boundary may be no sharper than that.")
        return [*said, *super().conclusions(sweep)] if found else []

    def _spoken(self, name: str, bracket: search.Bracket) -> list[str]:
        axis = self.axis.name
        if bracket.status == "not measured":
            also = "or what losses count from" if name == "keeps" else "or has too few questions to tell"
            return [f"{name}: an end of {axis} could not be measured, {also}."]
        if bracket.status == "undecided":
            where = ", ".join(f"{x:g}" for x in bracket.disagreeing)
            return [f"{name}: seeds disagree at {axis} {where}, an end of the axis; widen it."]
        if bracket.status == "not bracketed":
            always = {True: "everywhere", False: "nowhere", None: "with some seeds only"}[bracket.before]
            said = {"neither": "nothing has fallen", "both": "both are at chance", "keeps": f"{self._kept_words()} is kept"}[
                name
            ]
            return [f"Not bracketed: from {axis} {self.axis.at(0):g} to {self.axis.at(1):g}, {said} {always}."]
        below, above = f"{axis} {bracket.below:g}", f"{bracket.above:g}"
        holds_below = bool(bracket.before)
        words = {
            "neither": (
                "nothing has fallen up to {0}, something has from {1}",
                "something has fallen up to {0}, nothing has from {1}",
            ),
            "both": (
                "both are at chance up to {0}, and no longer at {1}",
                "both are not at chance up to {0}, and are from {1}",
            ),
            "keeps": (
                "the largest value that keeps " + self._kept_words() + " is {0}; {1} does not",
                "the smallest value that keeps " + self._kept_words() + " is {1}; {0} does not",
            ),
        }[name][0 if holds_below else 1]
        how = f"known to a factor of {bracket.factor:.2f}" if bracket.factor else "known"
        if bracket.status == "open":
            how += f", wider than the {self.config.width:g} asked for: the runs were spent, or values in between failed"
        if bracket.disagreeing:
            how += f"; seeds disagree at {', '.join(f'{x:g}' for x in bracket.disagreeing)}, so it is no sharper than that"
        if not bracket.monotone:
            how += "; further up the verdict changes again, so this is the first of several boundaries"
        sentence = words.format(below, above)
        return [f"{sentence[0].upper()}{sentence[1:]} ({how})."]

    def _kept_words(self) -> str:
        return f"{self.tasks[1]} within {100 * (self.config.within or 0):g} points of {self.config.reference}"

    def _not_bracketed(self, brackets: dict[str, search.Bracket], found: list[Finding]) -> list[str]:
        if brackets["both"].status != "not bracketed" or brackets["both"].before is not False:
            return []
        forget = {f.task.get("point")[self.axis.name]: f.kept_forget for f in found if f.kept_forget}
        retain = {f.task.get("point")[self.axis.name]: f.kept_retain for f in found if f.kept_retain}
        ends = [forget.get(self.axis.at(share)) for share in (0, 1)]
        up = ends[0] is None or ends[1] is None or ends[1].value <= ends[0].value
        level = search.plateau(forget, retain, towards_high=up)
        flat = f"; from {self.axis.name} {level:g} on nothing changes beyond the intervals" if level is not None else ""
        return [f"The axis does not reach both{flat}. Try another one: {search.next_axis(self.axis.name)}."]
