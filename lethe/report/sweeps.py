"""The table of a sweep: its goal, every trial with its job, status and results, and the sweep's conclusions."""

from __future__ import annotations

from typing import Any

from lethe.report.rendering import Table, table_of
from lethe.report.table_notes import degenerate
from lethe.results.comparable import tasks_of
from lethe.results.format import MISSING, percent, result, setting
from lethe.runs.run import Run


def sweep_table(run: Run) -> Table:
    """One row per trial. A trial without numbers has its status, and a note with its reason and the end of its log."""
    trials: list[dict[str, Any]] = run.record.get("trials") or []
    varied = list(dict.fromkeys(name for trial in trials for name in trial["point"]))
    tasks = tasks_of(trial["evals"] for trial in trials)
    if run.record["config"].get("kind") == "boundary":  # along the axis, not in the order in which values were chosen
        trials = sorted(trials, key=lambda trial: (trial["point"].get(varied[0], float("-inf")), trial["seed"] or 0))
    seeds = len({trial["seed"] for trial in trials if trial["seed"] is not None}) > 1
    judged = any(trial.get("regime") for trial in trials)
    columns = ["run", "job", *varied, *["seed"] * seeds, *tasks, *["regime", "selectivity"] * judged]
    rows, notes = [], []
    for trial in trials:
        row = {"run": trial["name"], "job": str(trial.get("job_id") or ", ".join(trial["runs"]) or MISSING)}
        row |= {name: setting(value) for name, value in trial["point"].items()}
        row |= {"seed": str(trial["seed"])} if seeds and trial["seed"] is not None else {}
        row |= {task: result(found) for task, found in trial["evals"].items()}
        row |= {"regime": trial["regime"]} if trial.get("regime") else {}
        row |= {"selectivity": f"{trial['selectivity']['value']:.2f}"} if trial.get("selectivity") else {}
        row |= {"highest in attack": percent(trial["after_attack"])} if "after_attack" in trial else {}
        rows.append(row | {"status": trial["status"] + (" (measured before)" if trial["reused"] else "")})
        if trial["reason"] and trial["status"] != "complete":
            log = f" Its log ends: {' / '.join(trial['log'])}" if trial["log"] else ""
            notes.append(f"{trial['name']} {trial['status']}: {trial['reason']}.{log}")
    notes += [*degenerate(rows), *(run.record.get("conclusions") or [])]
    title = f"{'Suite' if 'suite' in run.record['config'] else 'Sweep'} {run.record['name']} ({run.id})"
    return table_of(title, rows, notes, run.record.get("goal") or "", columns)
