"""The table of what runs cost, and notes on runs that their budget ended."""

from __future__ import annotations

from collections.abc import Sequence

from lethe.report.rendering import Table, table_of
from lethe.report.table_notes import job
from lethe.results import format
from lethe.results.format import MISSING, compact, percent
from lethe.runs.run import Run

COSTS = "Cost"
NOTES = [
    "Tokens: those that the model passed forward and back, once for each pass, in training and before it. FLOPs: by formula,"
    " of all models, with maps, cached teachers and budget checks, without evaluation.",
    "Of pretraining: the same numbers over those of the lab's pretraining, where the model is one of the lab.",
]


def cost_table(runs: Sequence[Run]) -> Table:
    """One row per run: tokens and FLOPs, both also as a share of the pretraining, time, peak memory."""
    rows = []
    for run in runs:
        cost = run.record.get("cost") or {}
        if "flops" not in cost:
            continue
        shares, seconds, memory = cost.get("pretraining") or {}, cost.get("seconds") or {}, cost.get("peak_memory") or {}
        row = {"Job ID": job(run), "Kind": run.record["kind"], "Name": run.record["name"]}
        row |= {"Tokens": f"{cost['tokens'].get('model_backward', 0):,}"}
        row |= {"Tokens of pretraining": percent(shares.get("share_of_tokens"))}
        row |= {"FLOPs": compact(cost["flops"]), "FLOPs of pretraining": percent(shares.get("share_of_flops"))}
        row |= {
            name.capitalize(): format.seconds(seconds[name]) if name in seconds else MISSING
            for name in ("training", "evaluation")
        }
        most = memory.get("gpu", memory.get("process"))
        rows.append(row | {"Peak memory": f"{most / 2**30:.2f} GiB" if most else MISSING})
    return table_of(COSTS, rows, NOTES)


def budget_notes(runs: Sequence[Run]) -> list[str]:
    """A note for each run that its budget ended."""
    found = [(run, (run.record.get("budget") or {}).get("reason")) for run in runs]
    return [f"{run.record['name']} ({run.id}) ended by its budget: {reason}." for run, reason in found if reason]
