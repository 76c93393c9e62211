"""The tables of a report and of the commands, made from the runs themselves.

    Study -> all_tables() (a report)        runs -> terminal() (what a command prints)

A missing number is `-`. A run that is not complete shows its status in place of a number that it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lethe.report.attacks import attack_tables, recovery_table, tamper_table, worst_table
from lethe.report.costs import COSTS, budget_notes, cost_table
from lethe.report.imported import imported_tables
from lethe.report.provenance import MODELS, PROVENANCE_TITLE, apart_table, models_table, provenance_table
from lethe.report.rendering import Table, table_of
from lethe.report.sweeps import sweep_table
from lethe.report.table_notes import degenerate, job, reasons, remarks
from lethe.results import format, regimes
from lethe.results.comparable import Evals, Shown, tasks_of, varying
from lethe.results.format import DEGENERATE, MISSING, compact, decimal, percent, result, setting
from lethe.results.listing import DEFAULT_COLUMNS, ONLY_IF_THERE, Entry, is_imported
from lethe.results.study import Study
from lethe.results.targets import Target
from lethe.runs.run import Run

IMPORTED = "‡"
IMPORTED_NOTE = f"{IMPORTED} imported from a log, which does not record how the number was measured."
UPDATES = "Updates"
UNITS = {"checkpoints": "checkpoints", "sweep": "runs"}
HEADERS = {"id": "ID", "job_id": "Job ID", "job": "Job ID", "eta": "ETA"}
HEADERS |= {name: name.capitalize() for name in ("kind", "name", "status", "age", "time", "progress", "results", "reason")}


def all_tables(study: Study) -> list[Table]:
    """Every table that there are runs for, in the order of a report."""
    tables = [lab_table(run) for run in study.of_kind("lab")]
    tables += [checkpoints_table(run) for run in study.of_kind("checkpoints") if run.record.get("checkpoints")]
    tables += [sweep_table(run) for run in study.of_kind("sweep")]
    tables += [unlearning_table(target, len(study.targets) > 1) for target in study.targets if target.rows]
    if study.attacks:
        tables += [worst_table(study), tamper_table(study), *attack_tables(study.attacks), recovery_table(study)]
    tables += [updates_table(study.of_kind("unlearn")), cost_table(study.of_kind("unlearn") + study.of_kind("tamper"))]
    for run in study.runs:
        if scores := run.record.get("scores"):
            pair = f"{run.record['config'].get('source')} → {run.record['config'].get('model')}"
            tables.append(affine_table(scores, f"Affine maps: {pair} ({run.record['name']}, {run.id})"))
    tables += [evaluations_table(study.other_evaluations), apart_table(study.apart)]
    tables += [provenance_table(study), models_table(study), *imported_tables(study.imported)]
    return [table for table in tables if table.rows]


def terminal(runs: list[Run]) -> list[Table]:
    """The tables for these runs alone, which a command prints: those of a report without the details."""
    details = {UPDATES, COSTS, PROVENANCE_TITLE, MODELS}
    return [table for table in all_tables(Study(runs)) if table.title not in details]


def checkpoints_table(run: Run) -> Table:
    """Checkpoint | a column per task | Notes."""
    rows = run.record["checkpoints"]
    tasks = tasks_of(row["evals"] for row in rows)
    lines = [{"Checkpoint": row["name"], **_results(row["evals"]), "Notes": row.get("note") or ""} for row in rows]
    notes = [f"~Random: the lower end of the 95 % interval of {tasks[0]} is not above chance."] if tasks else []
    measured = sum(bool(row["evals"]) for row in rows)
    if run.status == "complete" and measured < len(rows):
        notes.append(f"{measured} of {len(rows)} checkpoints were measured ({MISSING}: not); --search all measures every one.")
    fell = run.record.get("not_monotone") or []
    notes += [f"Not monotone: {words}." for words in fell]
    if fell and measured < len(rows):
        notes.append("So there may be later ignorant checkpoints among those that were not measured.")
    notes += remarks([run], lines)
    return table_of("Checkpoint sweep", lines, notes, columns=["Checkpoint", *tasks])


def lab_table(run: Run) -> Table:
    """The lab's checkpoints and its filtered twin on all tasks; a note marks where the forget text enters."""
    rows = run.record.get("checkpoints") or []
    twin = [run.record["filtered"]] if run.record.get("filtered") else []
    tasks = tasks_of(row["evals"] for row in [*rows, *twin])
    onset = run.record["config"].get("onset")
    forget = regimes.forget_task(tasks)
    lines = []
    for row in [*rows, *twin]:
        notes = ["~Random"] if forget and regimes.at_chance(row["evals"][forget]) else []
        notes += ["onset: forget text enters after this step"] if row["step"] == onset else []
        notes += ["twin without forget text"] if row in twin else []
        line = {"Checkpoint": row["name"], "Step": str(row["step"]), "Tokens": f"{row['tokens']:,}"}
        lines.append(line | _results(row["evals"]) | {"Notes": "; ".join(notes)})
    return table_of(f"Lab '{run.record['name']}'", lines, remarks([run], lines))


def _results(evals: Evals) -> dict[str, str]:
    return {task: result(found) for task, found in evals.items()}


def unlearning_table(target: Target, name_target: bool) -> Table:
    """Job ID | settings | losses | a column per task | regime and selectivity, if there is a baseline."""
    tasks = tasks_of(row.evals for row in target.rows)
    losses = _loss_names(target.runs)
    settings = _settings_columns(target.runs)
    judged = target.baseline is not None and bool(target.runs)
    rows = [{"Job ID": row.label, **_results(row.evals)} for row in (target.baseline, *target.sources) if row]
    for run in target.runs:
        lacking = MISSING if run.status == "complete" else run.status
        plan, found, evals = (run.record.get(key) or {} for key in ("plan", "losses", "evals"))
        row = {"Job ID": job(run)} | {
            n: run.settings.get(key, "full" if n == "lora_r" else MISSING) for n, key in settings.items()
        }
        row |= {"Steps": str(plan["steps"]) if "steps" in plan else lacking}
        row |= {name: decimal(found[name]) if name in found else lacking for name in losses}
        row |= dict.fromkeys(tasks, lacking) | _results(evals)
        rows.append(row | (_judgement(evals, target, lacking) if judged else {}))
    title = f"Runs: {target.ref}" if name_target else "Runs"
    notes = _regime_notes(target) if judged else []
    columns = ["Job ID", *settings, "Steps", *losses, *tasks]
    return table_of(title, rows, [*notes, *budget_notes(target.runs), *remarks(target.runs, rows)], columns=columns)


def _settings_columns(runs: list[Shown]) -> dict[str, str]:
    """Setting by column: the coefficients that any run has, the rank of the adapters, and what differs between the runs."""
    differing = varying(runs)
    names = ["name"] if "name" in differing else []
    names += [key for key in ("retain_coef", "remove_coef") if any(key in run.settings for run in runs)]
    rest = [key for key in differing if key not in names]
    return {**{key: key for key in names}, "lora_r": "lora.r", **{key: key for key in rest}}


def _loss_names(runs: Sequence[Run]) -> list[str]:
    """The losses that the runs recorded, those on retain text first; of a run at work those in metrics.jsonl."""
    names: list[str] = []
    for run in runs:
        names += run.record.get("losses") or [n for n in run.last_row("metrics.jsonl") or {} if n.endswith("_loss")]
    return sorted(dict.fromkeys(names), key=lambda name: (not name.startswith("retain_"), name))


def _judgement(evals: Evals, target: Target, lacking: str) -> dict[str, str]:
    """Regime and selectivity of a run."""
    judged = target.judge(evals)
    if judged is None:
        is_missing = None not in target.judged and not set(target.judged) <= set(evals)
        return dict.fromkeys(("regime", "selectivity"), lacking if is_missing else MISSING)
    mark = DEGENERATE if any(evals[task].get("degenerate") for task in target.judged if task) else ""
    return {"regime": judged[0] + mark, "selectivity": f"{judged[1].value:.2f}{mark}"}


def _regime_notes(target: Target) -> list[str]:
    forget, retain = target.judged
    if target.baseline is None or forget is None or retain is None:
        return ["No regimes: they need a forget task and a retain task measured on the baseline and on the runs."]
    at_chance = [task for task in (forget, retain) if regimes.at_chance(target.baseline.evals[task])]
    if at_chance:
        return [f"No regimes: the baseline itself is at chance on {' and '.join(at_chance)}, so nothing could be retained."]
    retained, chance = target.thresholds
    return [
        f"selectivity = retained share of {retain} − retained share of {forget}, "
        "where retained share = (accuracy − chance) / (baseline − chance).",
        f"regime: a task is retained if the 95 % interval of its retained share reaches {retained}, and at chance if it "
        f"reaches down to {chance}. selective, the aim: {forget} at chance and {retain} retained.",
    ]


def updates_table(runs: Sequence[Run]) -> Table:
    """What training did to each model: agreement with its teachers, distance and stable rank of the update."""
    rows = []
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
        row = {"Job ID": job(run), "Name": run.record["name"]}
        row |= {"forget: top token as source's": percent(agreement.get("forget_with_source"))}
        row |= {"retain: top token as before": percent(agreement.get("retain_with_reference")), "‖θ − θ₀‖": compact(total)}
        row |= {"stable rank": f"{math.fsum(ranks) / len(ranks):.1f}" if ranks else MISSING, "by layer": by_layer}
        rows.append(row)
    return table_of(UPDATES, rows, ["By layer: distance (mean stable rank of its matrices)."])


def affine_table(scores: dict[str, dict[str, float]], title: str = "Affine maps") -> Table:
    """R² and MSE of each layer's map on held-out text, beside those of no map."""
    keys = {"R²": "r2", "MSE": "mse", "R² without map": "no_map_r2", "MSE without map": "no_map_mse"}
    rows = [
        [str(layer), *(decimal(s.get(k)) if k.endswith("r2") else compact(s.get(k)) for k in keys.values())]
        for layer, s in sorted(scores.items(), key=lambda item: int(item[0]))
    ]
    return Table(title, ["Layer", *keys], rows)


def evals_table(evals: dict[str, dict[str, Any]], title: str = "Evaluation", missing: dict[str, str] | None = None) -> Table:
    """Task | value | 95 % interval | n | chance | shots | fingerprint. Notes say why a number is missing."""
    rows = []
    for task, r in evals.items():
        row = {"Task": task, "Value": result(r), "95 % interval": format.interval(r), "n": str(r["n"])}
        row |= {"Chance": percent(r.get("chance")), "Shots": str(r.get("num_fewshot", MISSING))}
        rows.append(row | {"Fingerprint": str(r.get("fingerprint"))})
    rows += [{"Task": task} for task in missing or {}]
    return table_of(title, rows, [*_missing_notes(missing), *degenerate(rows)])


def compare_table(compared: dict[str, Any]) -> Table:
    """Task | A | B | B − A | 95 % interval | p | questions lost and gained."""
    a, b = compared["models"]
    rows, notes = [], [f"A: {a}. B: {b}."]
    for task, found in compared["tasks"].items():
        exact = "p" in found
        write = percent if exact else decimal
        row = {"Task": task, "A": write(found["a"]), "B": write(found["b"]), "B − A": write(found["difference"])}
        row |= {
            "95 % interval": f"{write(found['low'])} to {write(found['high'])}",
            "p": MISSING,
            "Lost": MISSING,
            "Gained": MISSING,
        }
        if exact:
            row |= {"p": compact(found["p"]), "Lost": str(len(found["lost"])), "Gained": str(len(found["gained"]))}
        rows.append(row | {"n": str(found["n"])})
        for side, words in (("lost", "right in A, wrong in B"), ("gained", "wrong in A, right in B")) if exact else ():
            several = len({flip["subtask"] for flip in found[side]}) > 1
            named = [f"{flip['subtask']} {flip['doc_id']}" if several else str(flip["doc_id"]) for flip in found[side]]
            notes += [f"{task}, questions {words}: {', '.join(named)}."] if named else []
    notes += ["p: exact McNemar test."] if any("p" in found for found in compared["tasks"].values()) else []
    return table_of("Comparison", rows, notes)


def _missing_notes(missing: dict[str, str] | None) -> list[str]:
    return [f"{task} was not measured: {why}." for task, why in (missing or {}).items()]


def evaluations_table(runs: Sequence[Shown]) -> Table:
    """Evaluation runs side by side: Model | Job ID | a column per task."""
    tasks = tasks_of(run.record.get("evals") or {} for run in runs)
    rows = []
    for run in runs:
        lacking = MISSING if run.status == "complete" else run.status
        row = {"Model": run.record["config"].get("model", "?"), "Name": run.record["name"], "Job ID": job(run)}
        rows.append(row | dict.fromkeys(tasks, lacking) | _results(run.record.get("evals") or {}))
    missing = [note for run in runs for note in _missing_notes(run.record.get("evals_missing"))]
    return table_of("Evaluations", rows, [*missing, *remarks(runs, rows)])


def runs_table(listed: list[Entry], columns: Sequence[str] = ()) -> Table:
    """Runs with the given fields as columns; by default with status, progress and results."""
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
    """What a run would do: a row for each fact, or for each of its parts."""
    rows: list[list[str]] = []
    unreached = plan.get("no_gradient")
    shown = plan | ({"no_gradient": f"{len(unreached)} tensors, such as {unreached[0]}"} if unreached else {})
    for key, value in shown.items():
        parts = value if isinstance(value, dict) and value else {"": value}
        rows += [[key if i == 0 else "", str(name), _fact(key, part)] for i, (name, part) in enumerate(parts.items())]
    return Table("Plan", ["", "", ""], rows)


def memory_tables(found: dict[str, Any]) -> list[Table]:
    """What `lethe check --memory` found: the memory of each phase by part, whether it fits, and what to change."""
    phases = found["phases"] | {"three copies": found["three_copies"]}
    parts = list(dict.fromkeys(part for bytes_of in phases.values() for part in bytes_of))
    rows = [[part, *(_gib(bytes_of.get(part, 0)) for bytes_of in phases.values())] for part in parts]
    rows.append(["sum", *(_gib(sum(bytes_of.values())) for bytes_of in phases.values())])
    devices, memory = found["devices"], found["memory"]
    lead = f"{found['model']['name']}: {found['model']['parameters']:,} parameters, {found['model']['trained']:,} trained. "
    lead += f"On each of {devices} devices ({found['parallel']}). " if devices > 1 else ""
    batch = found["largest_batch"]
    lead += f"The peak, {_gib(found['peak'])} GiB in {found['peak_phase']}, "
    lead += f"{'fits into' if found['fits'] else 'does not fit into'} {_gib(memory)} GiB. "
    lead += (
        f"The largest per_device_train_batch_size that fits is {batch}." if batch else "Not even a batch of one document fits."
    )
    note = "three copies: training with a whole source and a whole reference beside the model all the time, which Lethe avoids"
    tables = [Table("Memory by phase, GiB", ["", *phases], rows, [note], lead)]
    if found["changes"]:
        changes = [
            [
                ", ".join(f"{name}: {str(value).lower()}" for name, value in each["change"].items()),
                _gib(each["peak"]),
                "yes" if each["fits"] else "no",
            ]
            for each in found["changes"]
        ]
        tables.append(Table("Changes", ["change", "peak, GiB", "fits"], changes))
    return tables


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _outcome(run: Run) -> str:
    """What a checkpoint sweep or a fit of maps found, in a few words."""
    if run.record["kind"] == "checkpoints":
        return f"latest ignorant: {run.record.get('latest_ignorant') or MISSING}"
    shares = [score["r2"] for score in (run.record.get("scores") or {}).values()]
    return f"mean R² {decimal(math.fsum(shares) / len(shares))} on {len(shares)} layers" if shares else MISSING


def _fact(key: str, value: Any) -> str:
    if key.startswith("memory") and isinstance(value, int):
        return f"{value / 1e6:,.0f} MB"
    if key == "seconds":
        return f"about {format.seconds(value)}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else setting(value)
