"""Lists of runs, and what numbers mean: intervals, regimes, recovery."""
