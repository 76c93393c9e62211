"""Sweeps of kind `boundary`: bisection along one axis, and its answer in sentences. `bisection.py` chooses the values.

Every complete trial gives a verdict for each boundary that is looked for (`_judges`). `edges` collects them by value, `propose`
measures where the verdict changes, and `conclusions` says between which values it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lethe import config as c
from lethe.errors import LetheError
from lethe.results import regimes
from lethe.results.listing import number
from lethe.runs.run import find_run
from lethe.sweeps import bisection, rules_of_thumb
from lethe.sweeps.planner import Finding, Planner
from lethe.sweeps.trials import Plan, Trial

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

EVERYWHERE = {"neither": "neither task fell", "both": "both tasks are at chance", "retained": "{limit} is retained"}
SENTENCES = {
    ("neither", True): "neither task fell up to {below}, one fell from {above}",
    ("neither", False): "one task fell up to {below}, neither from {above}",
    ("both", True): "both tasks are at chance up to {below}, and no longer at {above}",
    ("both", False): "not both tasks are at chance up to {below}, both are from {above}",
    ("retained", True): "the largest value that retains {limit} is {below}; {above} does not",
    ("retained", False): "the smallest value that retains {limit} is {above}; {below} does not",
}
"""By boundary and by whether its verdict is true below it: the sentence."""


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
        left = (self.expected - len(trials)) // len(self.config.seed_list)
        values = bisection.next_values(self.axis, self.edges(sweep).values(), self.config.width)
        return [plan for value in values[: max(0, left)] for plan in self.plans({self.axis.name: value})]

    def edges(self, sweep: Sweep) -> dict[str, bisection.Verdicts]:
        """By boundary: the verdicts of every measured value, one a seed; None where a seed failed."""
        found = {finding.trial.frozen.number: finding for finding in self.findings(sweep)}
        by_value: dict[float, list[Finding] | None] = {}
        for trial in self._own_trials(sweep):
            if trial.is_done:
                value = trial.get("point")[self.axis.name]
                finding = found.get(trial.frozen.number)
                others = by_value.setdefault(value, [])
                usable = finding is not None and others is not None and self._is_decided(finding)
                by_value[value] = [*others, finding] if usable else None  # type: ignore[list-item, misc]
        judges = self._judges(sweep)
        if not judges:  # the reference was not measured
            return {"retained": dict.fromkeys(by_value)}
        return {
            name: {value: [judge(f) for f in seen] if seen else None for value, seen in by_value.items()}
            for name, judge in judges.items()
        }

    def _is_decided(self, finding: Finding) -> bool:
        """Whether a run was evaluated on enough questions to lie on one side of the boundary."""
        if self.config.find == "retained":
            return number(finding.retain) is not None
        thresholds = self.config.retained_threshold, self.config.chance_threshold
        shares = [share for share in (finding.forget_share, finding.retain_share) if share]
        return len(shares) == 2 and all(regimes.is_decided(share, *thresholds) for share in shares)

    def _judges(self, sweep: Sweep) -> dict[str, Callable[[Finding], bool]]:
        if self.config.find == "boundary":
            return {
                "neither": lambda finding: finding.regime == "neither",
                "both": lambda finding: finding.regime == "both",
            }
        reference = self._reference(self.baseline(sweep, self.recipe["model"]))
        if reference is None:
            return {}
        least = reference - (self.config.within or 0.0) - 1e-9
        return {"retained": lambda finding: (number(finding.retain) or 0.0) >= least}

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
        limit = f"{self.tasks[1]} within {100 * (self.config.within or 0):g} points of {self.config.reference}"
        if bracket.status == "not measured":
            also = "or the reference could not" if name == "retained" else "or was evaluated on too few questions"
            return f"{name}: an end of {axis} could not be measured, {also}."
        if bracket.status == "undecided":
            where = ", ".join(f"{value:g}" for value in bracket.disagreeing)
            return f"{name}: seeds disagree at {axis} {where}, an end of the axis; widen it."
        if bracket.status == "not bracketed":
            always = EVERYWHERE[name].format(limit=limit) + (" everywhere" if bracket.before else " nowhere")
            return f"Not bracketed: from {axis} {self.axis.at(0):g} to {self.axis.at(1):g}, {always}."
        sentence = SENTENCES[name, bool(bracket.before)].format(
            limit=limit, below=f"{axis} {bracket.below:g}", above=f"{axis} {bracket.above:g}"
        )
        how = f"known to a factor of {bracket.factor:.2f}" if bracket.factor else "known"
        if bracket.status == "open":
            how += f", wider than the width {self.config.width:g}: max_runs was reached, or values in between failed"
        if bracket.disagreeing:
            how += f"; seeds disagree at {', '.join(f'{value:g}' for value in bracket.disagreeing)}, so no closer"
        if not bracket.monotone:
            how += "; the verdict changes again further up, so this is the first of several boundaries"
        return f"{sentence[0].upper()}{sentence[1:]} ({how})."

    def _beyond_the_axis(self, both: bisection.Bracket, found: list[Finding]) -> list[str]:
        """What to try if no value of the axis brings both tasks to chance."""
        if both.status != "not bracketed" or both.before is not False:
            return []
        name = self.axis.name
        forget = {f.trial.get("point")[name]: f.forget_share for f in found if f.forget_share}
        retain = {f.trial.get("point")[name]: f.retain_share for f in found if f.retain_share}
        low, high = (forget.get(self.axis.at(share)) for share in (0, 1))
        level = rules_of_thumb.plateau(forget, retain, towards_high=low is None or high is None or high.value <= low.value)
        flat = f"; from {name} {level:g} on nothing changes beyond the intervals" if level is not None else ""
        return [f"No value on the axis brings both tasks to chance{flat}. Try another axis: {rules_of_thumb.next_axis(name)}."]
