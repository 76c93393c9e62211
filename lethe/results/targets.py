"""The models of a study that were unlearned, each with its baseline, its sources and its unlearning runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lethe.results import regimes
from lethe.results.comparable import Evals, Shown


@dataclass(frozen=True)
class Row:
    """One model's results: its name in tables, the results, and the runs that they come from."""

    label: str
    evals: Evals
    runs: list[Shown]


@dataclass(frozen=True)
class Target:
    """A model that was unlearned: its unlearning runs, and rows for itself and its sources as far as they were evaluated."""

    ref: str
    runs: list[Shown]
    baseline: Row | None
    sources: list[Row]
    thresholds: tuple[float, float] = (regimes.RETAINED_THRESHOLD, regimes.CHANCE_THRESHOLD)
    """The retained share from which a task counts as retained, and the one down to which it counts as at chance."""

    @property
    def rows(self) -> list[Row]:
        """The baseline and the sources, then a row for each run."""
        first = [self.baseline] if self.baseline else []
        return [*first, *self.sources, *(Row(run.record["name"], run.record.get("evals") or {}, [run]) for run in self.runs)]

    @cached_property
    def judged(self) -> tuple[str | None, str | None]:
        """The forget task and the retain task that decide the regime: evaluated on the baseline and on a run."""
        there = set(self.baseline.evals if self.baseline else ())
        there &= {task for run in self.runs for task in run.record.get("evals") or {}}
        return regimes.forget_task(there), regimes.retain_task(there)

    @cached_property
    def best(self) -> Shown | None:
        """The complete run with the highest selectivity. Without any selectivity: the first evaluated run."""
        evaluated = [run for run in self.runs if run.status == "complete" and run.record.get("evals")]
        judged = [(found[1].value, run) for run in evaluated if (found := self.judge(run.record["evals"]))]
        return max(judged, key=lambda pair: pair[0])[1] if judged else next(iter(evaluated), None)

    def judge(self, evals: Evals) -> tuple[regimes.Regime, regimes.Estimate] | None:
        """Regime and selectivity of results against the baseline; None if a task is missing, or the baseline is at chance."""
        forget, retain = self.judged
        if self.baseline is None or forget is None or retain is None or forget not in evals or retain not in evals:
            return None
        before = self.baseline.evals
        shares = [regimes.retained_share(evals[task], before[task]) for task in (forget, retain)]
        if shares[0] is None or shares[1] is None:
            return None
        return regimes.regime(shares[0], shares[1], *self.thresholds), regimes.selectivity(shares[0], shares[1])
