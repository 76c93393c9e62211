"""The tables about attacks: the worst case over a set of them, what each brought back, by step and in measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lethe.report.layout import Table
from lethe.report.remarks import job, reasons, remarks
from lethe.results import recovery
from lethe.results.format import MISSING, decimal, percent, result, setting
from lethe.results.recovery import Excess, Worst
from lethe.results.study import (
    AFTER_STEPS,
    FILTERED,
    Attack,
    Series,
    Study,
    attack_tasks,
    value_of,
    varying,
)

MAX_NOTES = 10


def trains(attack: Attack) -> bool:
    """Whether it is a fine-tuning attack, whose curve goes over steps and not over strengths."""
    return attack.run.record["config"].get("attack", "finetune") == "finetune"


def worst_table(study: Study) -> Table:
    """A row a model: its score, the attack that reached it and where, what that cost, what is not measured."""
    forget, general = attack_tasks(study.attacks)
    columns = [
        "Model",
        f"Starting {forget}",
        "Worst case",
        "95 % interval",
        "Worst attack",
        "At",
        f"{general or 'general'} lost",
    ]
    columns += ["Recovered", "Above filtered twin, points", "Measured"]
    if len({series.settings for series in study.series}) < 2:
        return Table("Worst case", columns, [])
    cells, notes = [], []
    for model, (_, worst) in study.worst_cases.items():
        if worst is None:
            cells.append([model, *(len(columns) - 1) * [MISSING]])
            continue
        point, total = worst.point, len(worst.counted) + len(worst.not_measured)
        line = [percent(worst.start.value), percent(point.value), f"{percent(point.low)} to {percent(point.high)}"]
        line += [worst.attack or "none above the start", _at(worst), f"{100 * worst.general_lost:+.1f} points"]
        line += [percent(worst.recovered, 0), _above(worst.above), f"{len(worst.counted)} of {total}"]
        cells.append([model, *line])
        missing = list(worst.not_measured.items())
        notes += [f"{model}, {name} is not measured to its end: {why}." for name, why in missing[:MAX_NOTES]]
        if len(missing) > MAX_NOTES:
            notes.append(f"{model}: {len(missing) - MAX_NOTES} more attacks are not measured to their end.")
        if worst.never_within:
            notes.append(f"{model}: no evaluation within the bound under {', '.join(worst.never_within)}.")
    bound = study.general_bound
    first = (
        f"Worst case: the highest {forget} that any attack reaches where it has cost at most {100 * bound:g} points of "
        f"{general or 'general accuracy'}, against step 0. An attack that is not measured is not one resisted."
    )
    return Table("Worst case over the attacks", columns, cells, [first, *notes])


def _at(worst: Worst) -> str:
    if worst.attack is None:
        return MISSING
    return worst.point.place + (f", {worst.point.tokens:,} tokens" if worst.point.tokens else "")


def _above(excess: Excess | None) -> str:
    return f"{100 * excess.final:+.1f} ({100 * excess.low:+.1f} to {100 * excess.high:+.1f})" if excess else MISSING


def tamper_table(study: Study) -> Table:
    """Model | forget at the start, after 10 steps, highest, at the end | retain at the end | lost updates | Notes."""
    attacks = study.attacks
    forget, retain = attack_tasks(attacks)
    lengths = {attack.curve[-1]["step"] for attack in attacks if attack.curve}
    alike = len(lengths) == 1 and all(map(trains, attacks))
    final = f"Final ({min(lengths)} steps)" if alike else "Final"
    settings = _told(study)
    columns = ["Model", *settings, f"Starting {forget or 'task'}", f"After {AFTER_STEPS} steps", "Highest", final]
    columns += [f"{final[:5]} {retain}"] if retain else []
    cells = []
    for attack in attacks:
        lacking = MISSING if attack.run.status == "complete" else attack.run.status
        line = _curve_cells(attack, forget, lacking, not alike)
        line += _curve_cells(attack, retain, lacking, False)[-1:] if retain else []
        lost = (attack.run.record.get("losses") or {}).get("lost_updates")
        line += [percent(lost, 4) if lost is not None else lacking, recovery_note(attack, forget) if forget else ""]
        cells.append([attack.label, *(read(attack) for read in settings.values()), *line])
    jobs = ", ".join(job(attack.run) for attack in attacks)
    notes = [f"Job IDs of the attacks, in the order of the rows: {jobs}."]
    notes.append("Lost updates: share of weights with a gradient that an update left exactly as they were.")
    if any(attack.baseline for attack in attacks):
        notes.append("Full recovery: the first evaluated step whose 95 % interval holds or exceeds the baseline.")
    return Table("Tampering", [*columns, "Lost updates", "Notes"], cells, [*notes, *remarks([a.run for a in attacks], cells)])


def _told(study: Study) -> dict[str, Callable[[Attack], str]]:
    """What tells attacks apart: their names and seeds where there are several attacks, else the settings that differ."""
    names = {series.settings: series.attack for series in study.series}
    differing = varying([attack.run for attack in study.attacks], {"name"})
    told: dict[str, Callable[[Attack], str]] = {"Attack": lambda attack: names[attack.settings]} if len(names) > 1 else {}
    shown = {name: read for name, read in differing.items() if not told or name == "seed"}
    return told | {name: (lambda attack, read=read: read(attack.run)) for name, read in shown.items()}  # type: ignore[misc]


def recovery_note(attack: Attack, task: str) -> str:
    """How much of the task an attack brought back, in words."""
    found = attack.recovery(task)
    if found is None:
        return "no baseline to compare with" if attack.points(task) else "not evaluated"
    if found.recovered is None:
        return "no gap to recover: the start's interval holds the baseline"
    if not trains(attack):
        share = f"{percent(found.recovered, 0)} of the gap recovered at the last strength"
        return f"Full recovery by {found.full}" if found.full.step is not None else f"{share}; full recovery {found.full}"
    if found.full.step is not None:
        return f"Full recovery by step {found.full}"
    last = found.full.within
    return f"{percent(found.recovered, 0)} of the gap recovered in {last} steps; full recovery not within {last} steps"


def attack_tables(attacks: list[Attack]) -> list[Table]:
    """For each model that was attacked more than once: Attack | accuracy at some steps | at the end, with its step | status."""
    groups: dict[tuple[str, bool], list[Attack]] = {}
    for attack in attacks:
        groups.setdefault((attack.label, trains(attack)), []).append(attack)
    several = {label for label, _ in groups if sum(attack.label == label for attack in attacks) > 1}
    return [
        _attacks_on(label, group) if training else _without_training_on(label, group)
        for (label, training), group in groups.items()
        if label in several
    ]


def _attacks_on(label: str, attacks: list[Attack]) -> Table:
    forget, retain = attack_tasks(attacks)
    curves = [dict(attack.points(forget)) if forget else {} for attack in attacks]
    steps = _some(sorted({step for curve in curves for step in curve}))
    cells = []
    for name, attack, curve in zip(_names(attacks), attacks, curves, strict=True):
        ended = attack.run.status == "complete"
        last = max(curve, default=None)
        line = [result(curve[step]) if step in curve else MISSING for step in steps]
        line.append(
            result(curve[last]) + (f" (step {last})" if last != steps[-1] else "") if ended and last is not None else MISSING
        )
        if retain:
            points = attack.points(retain)
            line.append(result(points[-1][1]) if ended and points else MISSING)
        cells.append([name, setting(attack.run.record["config"].get("optimizer")), *line, attack.run.status])
    columns = ["Attack", "Optimizer", *(f"Step {step}" for step in steps), f"Final {forget}"]
    columns += [f"Final {retain}"] if retain else []
    notes = [_starts(attacks, forget, retain), *reasons(a.run for a in attacks)]
    return Table(f"Attacks on {label}", [*columns, "Status"], cells, notes)


def _without_training_on(label: str, attacks: list[Attack]) -> Table:
    forget, retain = attack_tasks(attacks)
    cells = []
    for name, attack in zip(_names(attacks), attacks, strict=True):
        line = [_by_strength(attack, task) for task in (forget, retain) if task]
        cells.append([name, setting(attack.run.record["config"]["attack"]), *line, attack.run.status])
    columns = ["Attack", "Kind", *(f"{task} by strength" for task in (forget, retain) if task), "Status"]
    notes = [_starts(attacks, forget, retain), *reasons(a.run for a in attacks)]
    return Table(f"Attacks without training on {label}", columns, cells, notes)


def _by_strength(attack: Attack, task: str) -> str:
    lines = [line for line in attack.curve if line.get("strength") and task in line["evals"]]
    return ", ".join(f"{line['strength']:g}: {result(line['evals'][task])}" for line in lines) or MISSING


def _names(attacks: list[Attack]) -> list[str]:
    """The runs' names; with the seed where several share one."""
    names = [attack.run.record["name"] for attack in attacks]
    seeds = [attack.run.record["config"].get("seed") for attack in attacks]
    return [name if names.count(name) == 1 else f"{name} (seed {seed})" for name, seed in zip(names, seeds, strict=True)]


def _starts(attacks: list[Attack], *tasks: str | None) -> str:
    first: dict[str, Any] = next((attack.curve[0]["evals"] for attack in attacks if attack.curve), {})
    return "; ".join(f"Starting {task}: {result(first[task])}" for task in tasks if task in first)


def _some(steps: list[int], count: int = 5) -> list[int]:
    """At most `count` of the steps, spread from the first to the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def recovery_table(study: Study) -> Table:
    """Model | share of the gap recovered | steps to half, nine tenths, full | area | above the filtered twin."""
    task = attack_tasks(study.attacks)[0]
    several = len({series.settings for series in study.series}) > 1
    seeds = any(len(series.attacks) > 1 for series in study.series)
    twins = dict.fromkeys(series.model for series in study.series if series.control == FILTERED)
    notes = ["Definitions: docs/reference/measures.md. Above the twin: accuracy at equal tokens, with its 95 % interval."]
    if len(twins) > 1:
        notes.append(f"Above none of several filtered twins ({'; '.join(twins)}): report them apart.")
    cells = []
    for series in study.series:
        curve = series.points_of(task) if task else []
        if task is None or not curve or curve[0].step or series.baseline is None or task not in series.baseline.evals:
            continue
        found = recovery.measure(curve, value_of(series.baseline.evals[task]))
        line = [series.model, *([series.attack] if several else []), *([str(len(series.measured))] if seeds else [])]
        line += [percent(found.recovered, 0), *(_reached(r) for r in (found.half, found.nine_tenths, found.full))]
        over = _over_twin(study, series, task)
        short = f", at {over.tokens:,} tokens" if over and over.tokens < recovery.AS_FAR * curve[-1].tokens else ""
        cells.append([*line, decimal(found.area), _above(over) + short, f"{100 * over.area:+.1f}" if over else MISSING])
        notes += [f"{series.model}, {series.attack}: {series.reason}."] if series.reason else []
    columns = ["Model", *(["Attack"] if several else []), *(["Seeds"] if seeds else []), "Recovered", "Steps (tokens) to half"]
    columns += ["to nine tenths", "to full", "Area", "Above filtered twin, points", "on average"]
    return Table(f"Recovery of {task}", columns, cells, notes)


def _reached(reached: recovery.Reached | None) -> str:
    if reached is None:
        return MISSING
    return f"{reached} ({reached.tokens:,})" if reached.step and reached.tokens else str(reached)


def _over_twin(study: Study, series: Series, task: str) -> Excess | None:
    twin = study.twin_of(series) if series.control != FILTERED else None
    control = twin.points_of(task) if twin else []
    return recovery.excess(series.points_of(task), control) if control else None


def _curve_cells(attack: Attack, task: str | None, lacking: str, name_last: bool) -> list[str]:
    """Start, after 10 steps, highest, final. An attack that is not complete has no final result."""
    points = attack.points(task) if task else []
    if not points:
        return [lacking] * 4
    strengths: dict[int, Any] = {line["step"]: line.get("strength") for line in attack.curve}
    later = next(((step, r) for step, r in points if step >= AFTER_STEPS), None)
    last = points[-1]
    place = f"step {last[0]}" if strengths[last[0]] is None else f"strength {strengths[last[0]]:g}"
    after = MISSING if not trains(attack) else lacking
    return [
        result(points[0][1]) + (f" (step {points[0][0]})" if points[0][0] else ""),
        result(later[1]) + (f" (step {later[0]})" if later[0] != AFTER_STEPS else "") if later else after,
        result(max((r for _, r in points), key=value_of)),
        lacking if lacking != MISSING else result(last[1]) + (f" ({place})" if name_last else ""),
    ]
