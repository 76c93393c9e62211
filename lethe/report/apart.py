"""The table of numbers that were measured in another way than the others of their task."""

from __future__ import annotations

from typing import Any

from lethe.report.layout import Table
from lethe.results.comparable import Apart
from lethe.results.format import compact, percent, short
from lethe.results.listing import number
from lethe.results.regimes import PROVENANCE


def apart_table(apart: list[Apart]) -> Table:
    """What was set apart: of a curve the first and the last."""
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
    lead = (
        "Each of these numbers was measured otherwise than those of its task in the other tables, so it stands in none of them."
    )
    notes = ["To compare it, evaluate again in the same way: --limit, --num_fewshot, the same task and tokenizer."]
    return Table("Measured in another way", ["Run", "At", "Task", "Value", "What differs"], rows, notes, lead)


def _brief(key: str, result: dict[str, Any]) -> str:
    value = result.get(key)
    return short(str(value)) if key == "fingerprint" and value else str(value)
