"""Tables of imported runs: each table of a log by itself, so that its numbers never share a column with measured ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lethe.report.layout import Table
from lethe.report.remarks import reasons
from lethe.results.comparable import Evals, grouped
from lethe.results.format import MISSING, decimal, result, setting
from lethe.runs.run import Run

PARTS = ["Checkpoint", "Job ID", "Name", "retain_coef", "remove_coef", "lora_r", "optimizer", "lr", "Steps", "Updates"]
PARTS += ["Forward passes", "losses", "tasks", "points", "Status", "Notes"]
"""The order of columns; losses, tasks and points stand for several."""
_AT_STEP = re.compile(r" at step (\d+)$")


def imported_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each table of a log, in the log's order."""

    def place(run: Run) -> tuple[str, str, int]:
        facts = run.record["imported"]
        return facts["file"], facts["group"], facts["table"]

    in_order = sorted(runs, key=lambda run: (run.record["imported"]["file"], run.record["imported"]["line"]))
    return [_table(group) for group in grouped(in_order, place).values()]


def _table(runs: list[Run]) -> Table:
    """The columns that any of the rows has: job, name, settings, steps, losses, tasks, tasks by step, status, notes."""
    facts = runs[0].record["imported"]
    again = f" ({facts['table']})" if facts["table"] > 1 else ""
    lines = [line for run in runs for line in _lines(run)]
    columns = _ordered(dict.fromkeys(name for line in lines for name in line))
    cells = [[line.get(column, MISSING) for column in columns] for line in lines]
    notes = [f"Imported from {facts['file']}, which does not record how the numbers were measured, so they have no intervals."]
    notes += ["~: approximate, as the log writes it."] if any(re.match(r"~\d", cell) for row in cells for cell in row) else []
    if "Steps" in columns:
        notes.append("Steps: the log's number, which may count updates or forward passes.")
    for run in runs:
        notes += [f"{run.record['name']}: {text}" for text in run.record["imported"].get("footnotes", [])]
    return Table(f"Imported: {facts['group'] or facts['file']}{again}", columns, cells, [*notes, *reasons(runs)])


def _ordered(names: dict[str, None]) -> list[str]:
    def place(name: str) -> tuple[int, int]:
        at = _AT_STEP.search(name)
        part = name if name in PARTS else "points" if at else "losses" if name.endswith("_loss") else "tasks"
        return PARTS.index(part), int(at[1]) if at else 0

    return sorted(names, key=place)


def _lines(run: Run) -> list[dict[str, str]]:
    """A run's row as text by column. A checkpoint sweep has one row for each checkpoint."""
    record, facts = run.record, run.record["imported"]
    if record["kind"] == "checkpoints":
        return [{"Checkpoint": row["name"]} | _results(row["evals"]) | {"Notes": row["note"]} for row in record["checkpoints"]]
    config, plan = record["config"], record.get("plan") or {}
    line = {"Job ID": str(record["job_id"])} if record["job_id"] else {}
    line["Name"] = record["name"]
    inherited = facts.get("inherited", [])
    shown = [name for name in ("retain_coef", "remove_coef", "optimizer", "lr") if name in config]
    line |= {name: setting(config[name]) for name in shown if name not in inherited or name.endswith("_coef")}
    if "lora" in config:
        line["lora_r"] = "full" if config["lora"] is None else setting(config["lora"].get("r"))
    line |= {"Steps": str(facts["steps"])} if "steps" in facts else {}
    line |= {name: str(plan[key]) for name, key in (("Updates", "steps"), ("Forward passes", "forward_passes")) if key in plan}
    line |= {name: decimal(value) for name, value in record["losses"].items()}
    curve = run.rows("curve.jsonl")
    for point in curve:
        line |= {f"{name} at step {point['step']}": text for name, text in _results(point["evals"]).items()}
    # The curve has a final result only if the log names its step.
    line |= _results({task: r for task, r in record["evals"].items() if all(p["evals"].get(task) != r for p in curve)})
    line |= {"Status": run.status} if run.status != "complete" else {}
    return [line | ({"Notes": facts["notes"]} if facts.get("notes") else {})]


def _results(evals: Evals) -> dict[str, str]:
    return {task: result(found) for task, found in evals.items()}
