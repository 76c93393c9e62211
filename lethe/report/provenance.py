"""Tables of where numbers come from: how each task was measured, which models were used, which numbers stand apart."""

from __future__ import annotations

from typing import Any

from lethe.report.rendering import Table
from lethe.results.comparable import Apart, Evals, tasks_of
from lethe.results.format import MISSING, compact, percent, short
from lethe.results.regimes import PROVENANCE, number, provenance
from lethe.results.study import Study

PROVENANCE_TITLE, MODELS = "Provenance of the numbers", "Models and maps"


def apart_table(apart: list[Apart]) -> Table:
    """The results that stand beside no others, and in what they differ; of a curve the first and the last."""
    groups: dict[tuple[int, str], list[Apart]] = {}
    for each in apart:
        groups.setdefault((id(each.run), each.task), []).append(each)
    rows = []
    for several in groups.values():
        for each in several[:1] + several[1:][-1:]:
            result, usual, record = each.result, each.usual, each.run.record
            value = percent(result["acc"]) if usual and "acc" in result else compact(number(result))
            keys = [key for key in PROVENANCE if usual and result.get(key) != usual.get(key)]
            why = "; ".join(f"{key} {_brief(key, result)}, not {_brief(key, usual or {})}" for key in keys)
            name = f"{record['kind']} {record['name']} ({each.run.id})"
            rows.append([name, each.place, each.task, value, why or "no number from 0 to 1"])
    lead = "These results were measured in another way than the same task in the other tables, which therefore leave them out."
    notes = ["To compare them, evaluate again with the same --limit, --num_fewshot, task and tokenizer."]
    return Table("Measured in another way", ["Run", "At", "Task", "Value", "What differs"], rows, notes, lead)


def _brief(key: str, result: dict[str, Any]) -> str:
    value = result.get(key)
    return short(str(value)) if key == "fingerprint" and value else str(value)


def provenance_table(study: Study) -> Table:
    """How each task was measured, and how many evaluations measured it."""
    every = _every_evals(study)
    counts: dict[tuple[str, tuple[Any, ...]], int] = {}
    for evals in every:
        for task, evaluated in evals.items():
            key = (task, provenance(evaluated))
            counts[key] = counts.get(key, 0) + 1
    order = tasks_of(every)
    rows = [
        [task, *(MISSING if item is None else str(item) for item in how), str(count)]
        for (task, how), count in sorted(counts.items(), key=lambda item: order.index(item[0][0]))
    ]
    columns = [name.replace("num_fewshot", "shots") for name in PROVENANCE]
    return Table(PROVENANCE_TITLE, ["Task", *columns, "evaluations"], rows)


def _every_evals(study: Study) -> list[Evals]:
    """Every evaluation of the runs, once. An attack's last evaluation is in its curve and in its record."""
    found: list[Evals] = []
    for run in study.runs:
        last = run.curve[-1]["evals"] if run.curve else None
        found += [evals for place, evals in run.evaluations() if evals and (place or evals != last)]
    return found


def models_table(study: Study) -> Table:
    """The models and affine maps that runs used, by reference and hash of their weights."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in study.runs:
        if run.record["kind"] == "checkpoints":
            continue
        for role, parent in (run.record.get("parents") or {}).items():
            if isinstance(parent, dict) and "documents" not in parent and "sha256" in parent:
                use = f"{role} of {run.record['kind']} {run.record['name']}"
                found.setdefault((parent["ref"], parent["sha256"]), []).append(use)
    rows = [[ref, short(sha), ", ".join(dict.fromkeys(uses))] for (ref, sha), uses in found.items()]
    return Table(MODELS, ["Reference", "Weights (SHA-256 or commit)", "Used as"], rows)
