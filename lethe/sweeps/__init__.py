"""Grid, boundary, Pareto, suites of attacks."""
