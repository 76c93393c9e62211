"""The tables of a report, with the columns of a hand-kept experiment log, made from the runs themselves.

A missing number is `-`, and a run that is not complete shows its status where it lacks one. Numbers of a task that were
measured in different ways never stand in one table. The same `Table` goes into tables.md, the page and the terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lethe.report.apart import apart_table
from lethe.report.attacks import attack_tables, recovery_table, tamper_table, worst_table
from lethe.report.layout import Table
from lethe.report.remarks import job, reasons, remarks
from lethe.report.sweeps import sweep_table
from lethe.results import format, regimes
from lethe.results.comparable import Evals, Shown
from lethe.results.format import DEGENERATE, MISSING, compact, decimal, percent, result, setting, short
from lethe.results.listing import DEFAULT_COLUMNS, ONLY_IF_THERE, Entry, is_imported
from lethe.results.study import (
    Study,
    Target,
    judge,
    row_of,
    settings_columns,
    tasks_of,
)
from lethe.runs.run import Run

IMPORTED = "‡"
IMPORTED_NOTE = f"{IMPORTED} imported from a table: how the number was measured is not recorded."
IMPORTED_PARTS = ["Checkpoint", "Job ID", "Name", "retain_coef", "remove_coef", "lora_r", "optimizer", "lr", "Steps"]
IMPORTED_PARTS += ["Updates", "Forward passes", "losses", "tasks", "points", "Status", "Notes"]
UNITS = {"checkpoints": "checkpoints", "sweep": "runs"}
HEADERS = {"id": "ID", "job_id": "Job ID", "job": "Job ID", "eta": "ETA"}
HEADERS |= {name: name.capitalize() for name in ("kind", "name", "status", "age", "time", "progress", "results", "reason")}


def all_tables(study: Study) -> list[Table]:
    """Every table that there are runs for, in the order of a report."""
    tables = [lab_table(run) for run in study.of_kind("lab")]
    tables += [checkpoints_table(run) for run in study.of_kind("checkpoints") if run.record.get("checkpoints")]
    tables += [sweep_table(run) for run in study.of_kind("sweep")]
    tables += [unlearning_table(target, len(study.targets) > 1) for target in study.targets if target.rows]
    tables += [worst_table(study), tamper_table(study), *attack_tables(study.attacks)] if study.attacks else []
    tables += [recovery_table(study)] if study.attacks else []
    tables += [updates_table(study.of_kind("unlearn"))]
    tables += [affine_table(run.record["scores"], f"Affine maps: {affine_name(run)}") for run in scored(study)]
    tables += [evaluations_table(study.other_evaluations)] if study.other_evaluations else []
    tables += [apart_table(study.apart), provenance_table(study), models_table(study)]
    tables += imported_tables(study.imported)
    return [table for table in tables if table.rows]


def terminal(runs: list[Run]) -> list[Table]:
    """The tables for these runs alone; rich prints them."""
    study = Study(runs)
    tables = [checkpoints_table(run) for run in study.of_kind("checkpoints") if run.record.get("checkpoints")]
    tables += [unlearning_table(target, False) for target in study.targets if target.runs]
    tables += [tamper_table(study)] if study.attacks else []
    tables += [affine_table(run.record["scores"]) for run in study.of_kind("affine") if run.record.get("scores")]
    tables += [evaluations_table(study.of_kind("evaluate"))] if study.of_kind("evaluate") else []
    return [*tables, *([apart_table(study.apart)] if study.apart else [])]


def checkpoints_table(run: Run) -> Table:
    """Checkpoint | a column a task | Notes."""
    rows = run.record["checkpoints"]
    tasks = tasks_of(row["evals"] for row in rows)
    cells = [[row["name"], *(result(row["evals"].get(task)) for task in tasks), row.get("note") or ""] for row in rows]
    notes = [f"~Random: the lower end of the 95 % interval of {tasks[0]} is not above chance."] if tasks else []
    if run.status == "complete" and not all(row["evals"] for row in rows):
        count = sum(bool(row["evals"]) for row in rows)
        notes.append(f"{count} of {len(rows)} checkpoints were measured ({MISSING}: not); --search all measures every one.")
    fell = run.record.get("not_monotone") or []
    notes += [f"Not monotone: {words}." for words in fell]
    if fell and not all(row["evals"] for row in rows):
        notes.append("So there may be later ignorant checkpoints among those that were not measured.")
    return Table("Checkpoint sweep", ["Checkpoint", *tasks, "Notes"], cells, [*notes, *remarks([run], cells)])


def lab_table(run: Run) -> Table:
    """The lab's checkpoints and its filtered twin on all tasks, marking where the forget domain enters."""
    rows = run.record.get("checkpoints") or []
    twin = [run.record["filtered"]] if run.record.get("filtered") else []
    tasks = tasks_of(row["evals"] for row in [*rows, *twin])
    onset = run.record["config"].get("onset")
    decider = regimes.forget_task(tasks)
    cells = []
    for row in [*rows, *twin]:
        notes = ["~Random"] if decider and regimes.at_chance(row["evals"][decider]) else []
        notes += ["onset: forget text enters after this step"] if row["step"] == onset else []
        notes += ["twin without forget text"] if row in twin else []
        values = [result(row["evals"].get(task)) for task in tasks]
        cells.append([row["name"], str(row["step"]), f"{row['tokens']:,}", *values, "; ".join(notes)])
    columns = ["Checkpoint", "Step", "Tokens", *tasks, "Notes"]
    return Table(f"Lab '{run.record['name']}'", columns, cells, remarks([run], cells))


def unlearning_table(target: Target, name_target: bool) -> Table:
    """Job ID | settings | losses | a column a task | regime and selectivity, when there is a baseline."""
    tasks = tasks_of(row.evals for row in target.rows)
    losses = _loss_names(target.runs)
    settings = settings_columns(target.runs)
    judged = target.baseline is not None and bool(target.runs)
    columns = ["Job ID", *settings, "Steps", *losses, *tasks, *(["regime", "selectivity"] if judged else [])]
    cells = []
    for row in [target.baseline, *target.sources]:
        if row:
            blank = [MISSING] * (len(settings) + 1 + len(losses))
            tail = [MISSING] * (2 if judged else 0)
            cells.append([row.label, *blank, *(result(row.evals.get(task)) for task in tasks), *tail])
    for run in target.runs:
        lacking = MISSING if run.status == "complete" else run.status
        plan, found, evals = (run.record.get(key) or {} for key in ("plan", "losses", "evals"))
        line = [read(run) for read in settings.values()]
        line += [str(plan["steps"]) if "steps" in plan else lacking]
        line += [decimal(found[name]) if name in found else lacking for name in losses]
        line += [result(evals[task]) if task in evals else lacking for task in tasks]
        line += _judgement(evals, target, lacking) if judged else []
        cells.append([job(run), *line])
    title = f"Runs: {target.ref}" if name_target else "Runs"
    notes = _regime_notes(target) if judged else []
    return Table(title, columns, cells, [*notes, *remarks(target.runs, cells)])


def updates_table(runs: Sequence[Run]) -> Table:
    """What training did to each model: agreement with its teachers, distance and stable rank of the update."""
    cells = []
    for run in runs:
        layers, agreement = run.record.get("update_by_layer"), run.record.get("agreement")
        if not layers or not agreement:
            continue
        ranks = [layer["stable_rank"] for layer in layers.values() if "stable_rank" in layer]
        total = math.sqrt(math.fsum(layer["distance"] ** 2 for layer in layers.values()))
        by_layer = "; ".join(
            f"{name}: {compact(layer['distance'])}" + (f" ({layer['stable_rank']:.1f})" if "stable_rank" in layer else "")
            for name, layer in layers.items()
            if layer["distance"] > 0
        )
        shares = [percent(agreement["forget_with_source"]), percent(agreement["retain_with_reference"])]
        mean_rank = f"{math.fsum(ranks) / len(ranks):.1f}" if ranks else MISSING
        cells.append([job(run), run.record["name"], *shares, compact(total), mean_rank, by_layer])
    columns = [
        "Job ID",
        "Name",
        "forget: top token as source's",
        "retain: top token as before",
        "‖θ − θ₀‖",
        "stable rank",
        "by layer",
    ]
    return Table("Updates", columns, cells, ["By layer: distance (mean stable rank of its matrices)."])


def affine_table(scores: dict[str, dict[str, float]], title: str = "Affine maps") -> Table:
    """R² and MSE of each layer's map on held-out text, beside those of no map."""
    keys = {"R²": "r2", "MSE": "mse", "R² without map": "no_map_r2", "MSE without map": "no_map_mse"}
    rows = [
        [str(layer), *(decimal(s.get(k)) if k.endswith("r2") else compact(s.get(k)) for k in keys.values())]
        for layer, s in sorted(scores.items(), key=lambda item: int(item[0]))
    ]
    return Table(title, ["Layer", *keys], rows)


def scored(study: Study) -> list[Run]:
    """Runs that fitted maps and scored them."""
    return [run for run in study.runs if run.record.get("scores")]


def affine_name(run: Run) -> str:
    """Source → model of fitted maps, and the run."""
    config = run.record["config"]
    return f"{config.get('source')} → {config.get('model')} ({run.record['name']}, {run.id})"


def evals_table(evals: dict[str, dict[str, Any]], title: str = "Evaluation", missing: dict[str, str] | None = None) -> Table:
    """Task | value | 95 % interval | n | chance | shots | fingerprint; below it why a number is missing."""
    rows = [
        [
            task,
            result(r),
            format.interval(r),
            str(r["n"]),
            percent(r.get("chance")),
            str(r.get("num_fewshot", MISSING)),
            str(r.get("fingerprint")),
        ]
        for task, r in evals.items()
    ]
    rows += [[task, *[MISSING] * 6] for task in missing or {}]
    columns = ["Task", "Value", "95 % interval", "n", "Chance", "Shots", "Fingerprint"]
    return Table(title, columns, rows, [*_missing_notes(missing), *remarks([], rows)])


def compare_table(compared: dict[str, Any]) -> Table:
    """Task | A | B | B − A | 95 % interval | p | questions lost and gained."""
    a, b = compared["models"]
    rows, notes = [], [f"A: {a}. B: {b}."]
    for task, found in compared["tasks"].items():
        exact = "p" in found
        write = percent if exact else decimal
        interval = f"{write(found['low'])} to {write(found['high'])}"
        flips = [str(len(found[side])) if exact else MISSING for side in ("lost", "gained")]
        p = compact(found["p"]) if exact else MISSING
        rows.append(
            [task, write(found["a"]), write(found["b"]), write(found["difference"]), interval, p, *flips, str(found["n"])]
        )
        for side, words in (("lost", "right in A, wrong in B"), ("gained", "wrong in A, right in B")) if exact else ():
            several = len({flip["subtask"] for flip in found[side]}) > 1
            named = [f"{flip['subtask']} {flip['doc_id']}" if several else str(flip["doc_id"]) for flip in found[side]]
            notes += [f"{task}, questions {words}: {', '.join(named)}."] if named else []
    notes += ["p: exact McNemar test."] if any("p" in found for found in compared["tasks"].values()) else []
    columns = ["Task", "A", "B", "B − A", "95 % interval", "p", "Lost", "Gained", "n"]
    return Table("Comparison", columns, rows, notes)


def _missing_notes(missing: dict[str, str] | None) -> list[str]:
    return [f"{task} was not measured: {why}." for task, why in (missing or {}).items()]


def evaluations_table(runs: Sequence[Shown]) -> Table:
    """Evaluation runs side by side: Model | Job ID | a column a task."""
    rows = [row_of(run, run.record["config"].get("model", "?")) for run in runs]
    tasks = tasks_of(row.evals for row in rows)
    cells = []
    for run, row in zip(runs, rows, strict=True):
        lacking = MISSING if run.status == "complete" else run.status
        values = [result(row.evals[task]) if task in row.evals else lacking for task in tasks]
        cells.append([row.label, run.record["name"], job(run), *values])
    missing = [note for run in runs for note in _missing_notes(run.record.get("evals_missing"))]
    return Table("Evaluations", ["Model", "Name", "Job ID", *tasks], cells, [*missing, *remarks(runs, cells)])


def provenance_table(study: Study) -> Table:
    """How each task was measured, and in how many of the evaluations."""
    counts: dict[tuple[str, tuple[Any, ...]], int] = {}
    for evals in _every_evals(study):
        for task, evaluated in evals.items():
            key = (task, regimes.provenance(evaluated))
            counts[key] = counts.get(key, 0) + 1
    order = tasks_of(_every_evals(study))
    rows = [
        [task, *(MISSING if item is None else str(item) for item in how), str(count)]
        for (task, how), count in sorted(counts.items(), key=lambda item: order.index(item[0][0]))
    ]
    columns = [name.replace("num_fewshot", "shots") for name in regimes.PROVENANCE]
    return Table("Provenance of the numbers", ["Task", *columns, "evaluations"], rows)


def models_table(study: Study) -> Table:
    """The models and maps that runs were made from, by reference and hash of their weights."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in study.runs:
        for role, parent in (run.record.get("parents") or {}).items():
            if (
                isinstance(parent, dict)
                and "documents" not in parent
                and "sha256" in parent
                and run.record["kind"] != "checkpoints"
            ):
                found.setdefault((parent["ref"], parent["sha256"]), []).append(
                    f"{role} of {run.record['kind']} {run.record['name']}"
                )
    rows = [[ref, short(sha), ", ".join(dict.fromkeys(uses))] for (ref, sha), uses in found.items()]
    return Table("Models and maps", ["Reference", "Weights (SHA-256 or commit)", "Used as"], rows)


def imported_tables(runs: Sequence[Run]) -> list[Table]:
    """Each imported table by itself, in the log's order: its numbers never share a column with measured ones."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.record["imported"]["file"], run.record["imported"]["line"])):
        facts = run.record["imported"]
        groups.setdefault((facts["file"], facts["group"], facts["table"]), []).append(run)
    return [_imported_table(group) for group in groups.values()]


def _imported_table(runs: list[Run]) -> Table:
    """The columns that any of the rows has: job, name, settings, steps, losses, a column a task (and step), status, notes."""
    facts = runs[0].record["imported"]
    again = f" ({facts['table']})" if facts["table"] > 1 else ""
    notes = [f"Imported from {facts['file']}: how the numbers were measured is not recorded, so they have no intervals."]
    lines = [line for run in runs for line in _imported_rows(run)]
    columns = list(dict.fromkeys(column for column in _imported_order(lines)))
    cells = [[line.get(column, MISSING) for column in columns] for line in lines]
    notes += ["~ as the log says: approximate."] if any(re.match(r"~\d", cell) for row in cells for cell in row) else []
    if any("Steps" in line for line in lines):
        notes.append("Steps: the log's number; whether it counts updates or forward passes is not recorded.")
    for run in runs:
        notes += [f"{run.record['name']}: {text}" for text in run.record["imported"].get("footnotes", [])]
    return Table(f"Imported: {facts['group'] or facts['file']}{again}", columns, cells, [*notes, *reasons(runs)])


def _imported_order(lines: list[dict[str, str]]) -> list[str]:
    """Columns of all lines: what comes first in a line comes first, curves by step, statuses and notes at the end."""
    names = dict.fromkeys(name for line in lines for name in line)
    step = {name: int(found[1]) for name in names if (found := re.search(r" at step (\d+)$", name))}
    return sorted(names, key=lambda name: (IMPORTED_PARTS.index(_part_of(name)), step.get(name, 0)))


def _part_of(name: str) -> str:
    if name in IMPORTED_PARTS:
        return name
    return "points" if re.search(r" at step \d+$", name) else "losses" if name.endswith("_loss") else "tasks"


def _imported_rows(run: Run) -> list[dict[str, str]]:
    """A run's row, as text by column; a checkpoint sweep has one a checkpoint."""
    record, facts = run.record, run.record["imported"]
    if record["kind"] == "checkpoints":
        return [{"Checkpoint": row["name"]} | _results(row["evals"]) | {"Notes": row["note"]} for row in record["checkpoints"]]
    config = record["config"]
    line = {"Job ID": str(record["job_id"])} if record["job_id"] else {}
    line["Name"] = record["name"]
    own = {name: config[name] for name in ("retain_coef", "remove_coef", "optimizer", "lr") if name in config}
    inherited = facts.get("inherited", [])
    line |= {name: setting(value) for name, value in own.items() if name not in inherited or name.endswith("_coef")}
    if "lora" in config:
        line["lora_r"] = "full" if config["lora"] is None else setting(config["lora"].get("r"))
    line |= {"Steps": str(facts["steps"])} if "steps" in facts else {}
    units = {"Updates": "steps", "Forward passes": "forward_passes"}
    line |= {name: str(record["plan"][key]) for name, key in units.items() if key in (record.get("plan") or {})}
    line |= {name: decimal(value) for name, value in record["losses"].items()}
    curve = run.rows("curve.jsonl")
    for point in curve:
        line |= {f"{name} at step {point['step']}": text for name, text in _results(point["evals"]).items()}
    on_curve = [point["evals"] for point in curve]  # a final result whose step the log does not tell is not on it
    line |= _results({task: r for task, r in record["evals"].items() if all(p.get(task) != r for p in on_curve)})
    line |= {"Status": run.status} if run.status != "complete" else {}
    return [line | ({"Notes": facts["notes"]} if facts.get("notes") else {})]


def _results(evals: Evals) -> dict[str, str]:
    return {task: result(found) for task, found in evals.items()}


def runs_table(listed: list[Entry], columns: Sequence[str] = ()) -> Table:
    """Runs with the fields asked for, or else with status, progress and what came out."""
    names = columns or [
        name for name in DEFAULT_COLUMNS if name not in ONLY_IF_THERE or any(entry.value(name) is not None for entry in listed)
    ]
    rows = [[_field(entry, name) for name in names] for entry in listed]
    imported = any(cell.endswith(IMPORTED) or f"{IMPORTED}," in cell for row in rows for cell in row)
    notes = [IMPORTED_NOTE] if imported else []
    notes += [] if columns else reasons(listed)
    return Table("Runs", [HEADERS.get(name, name) for name in names], rows, notes)


def _field(entry: Entry, name: str) -> str:
    """A field of a run as text: durations and accuracies in the units of the other tables."""
    value = entry.value(name)
    evals = entry.run.record.get("evals") or {}
    mark = IMPORTED if is_imported(entry.run) else ""
    if name == "results" and entry.run.record["kind"] in {"checkpoints", "affine"}:
        return _outcome(entry.run)
    if value is None:
        return MISSING
    if name == "results":
        return ", ".join(f"{task} {result(evals[task])}{mark}" for task in value)
    if name == "progress" and entry.done:
        return f"{entry.done[0]}/{entry.done[1]} {UNITS.get(entry.run.record['kind'], 'steps')}"
    if name in {"age", "time", "eta", "seconds"}:
        return format.seconds(value)
    if name.removeprefix("evals.") in evals:
        return result(evals[name.removeprefix("evals.")]) + mark
    return setting(value) + (mark if name.startswith("evals.") else "")


def plan_table(plan: dict[str, Any]) -> Table:
    """What a run would do: one row a fact; a fact with parts has a row a part."""
    rows: list[list[str]] = []
    unreached = plan.get("no_gradient")
    shown = plan | ({"no_gradient": f"{len(unreached)} tensors, such as {unreached[0]}"} if unreached else {})
    for key, value in shown.items():
        parts = value if isinstance(value, dict) and value else {"": value}
        rows += [[key if i == 0 else "", str(name), _fact(key, part)] for i, (name, part) in enumerate(parts.items())]
    return Table("Plan", ["", "", ""], rows)


def _judgement(evals: Evals, target: Target, lacking: str) -> list[str]:
    """Regime and selectivity of a run."""
    forget, retain = target.judged
    if forget is None or retain is None:
        return [MISSING, MISSING]
    if forget not in evals or retain not in evals:
        return [lacking, lacking]
    judged = judge(evals, target)
    if judged is None:
        return [MISSING, MISSING]
    mark = DEGENERATE if any(evals[task].get("degenerate") for task in (forget, retain)) else ""
    return [judged[0] + mark, f"{judged[1].value:.2f}{mark}"]


def _regime_notes(target: Target) -> list[str]:
    forget, retain = target.judged
    if target.baseline is None or forget is None or retain is None:
        return ["No regimes: they need a forget task and a retain task measured on the baseline and on the runs."]
    at_chance = [task for task in (forget, retain) if regimes.at_chance(target.baseline.evals[task])]
    if at_chance:
        return [f"No regimes: the baseline itself is at chance on {' and '.join(at_chance)}, so there was nothing to keep."]
    return [
        f"selectivity = kept({retain}) − kept({forget}), where kept = (after − chance) / (baseline − chance).",
        f"regime: kept when the 95 % interval of kept reaches {target.thresholds[0]}, at chance when it reaches down to "
        f"{target.thresholds[1]}; selective: forget at chance and retain kept.",
    ]


def _loss_names(runs: Sequence[Run]) -> list[str]:
    """The losses that the runs have or, where a run has none yet, will have: retain terms first."""
    names: list[str] = []
    for run in runs:
        config = run.record["config"]
        names += run.record.get("losses") or [f"retain_{config.get('retain_loss', 'kl')}_loss", "cb_loss"]
    return sorted(dict.fromkeys(names), key=lambda name: (not name.startswith("retain_"), name))


def _outcome(run: Run) -> str:
    scores = run.record.get("scores")
    if run.record["kind"] == "checkpoints":
        return f"latest ignorant: {run.record.get('latest_ignorant') or MISSING}"
    return (
        f"mean R² {decimal(sum(s['r2'] for s in scores.values()) / len(scores))} on {len(scores)} layers" if scores else MISSING
    )


def _fact(key: str, value: Any) -> str:
    if key == "memory" and isinstance(value, int):
        return f"{value / 1e6:,.0f} MB"
    if key == "seconds":
        return f"about {format.seconds(value)}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else setting(value)


def _every_evals(study: Study) -> list[Evals]:
    """Every evaluation in the runs, each once: an attack's last one stands in its curve and in its record."""
    found: list[Evals] = []
    for run in study.runs:
        last = run.curve[-1]["evals"] if run.curve else None
        found += [evals for place, evals in run.evaluations() if evals and (place or evals != last)]
    return found
