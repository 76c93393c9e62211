"""Tables about attacks: the worst case, every attack, attacks on one model side by side, and how much they recovered."""

from __future__ import annotations

from typing import Any

from lethe.report.rendering import Table, table_of
from lethe.report.table_notes import job, reasons, remarks
from lethe.results import recovery
from lethe.results.attacks import FILTERED, Attack, attack_tasks
from lethe.results.comparable import grouped, varying
from lethe.results.format import MISSING, decimal, percent, result, setting
from lethe.results.recovery import Excess, Point, Recovery, Worst
from lethe.results.regimes import number
from lethe.results.study import Study

AFTER_STEPS = 10
ABOVE = "Above filtered twin, points"
MAX_NOTES = 10
MAX_STEPS = 5


def worst_table(study: Study) -> Table:
    """One row per model: its score, the attack that reached it and where, its cost, and what is not measured."""
    forget, general = attack_tasks(study.attacks)
    rows, notes = [], []
    for model, worst in study.worst_cases.items() if study.has_several_attacks else ():
        if worst is None:
            rows.append({"Model": model})
            continue
        point, missing = worst.point, list(worst.not_measured.items())
        row = {"Model": model, f"Starting {forget}": percent(worst.start.value), "Worst case": percent(point.value)}
        row |= {"95 % interval": f"{percent(point.low)} to {percent(point.high)}"}
        row |= {"Worst attack": worst.attack or "none above the start", "At": _place(worst)}
        row |= {f"{general or 'general'} lost": f"{100 * worst.general_lost:+.1f} points"}
        row |= {"Recovered": percent(worst.recovered, 0), ABOVE: _above(worst.above)}
        rows.append(row | {"Measured": f"{len(worst.counted)} of {len(worst.counted) + len(missing)}"})
        notes += [f"{model}, {name} is not measured to its end: {why}." for name, why in missing[:MAX_NOTES]]
        if len(missing) > MAX_NOTES:
            notes.append(f"{model}: {len(missing) - MAX_NOTES} more attacks are not measured to their end.")
        if worst.never_within:
            notes.append(f"{model}: no evaluation within the bound under {', '.join(worst.never_within)}.")
    first = (
        f"Worst case: the highest {forget} that any attack reaches while it costs at most {100 * study.general_bound:g} points "
        f"of {general or 'general accuracy'}, compared with step 0. An attack that is not measured might have reached more."
    )
    return table_of("Worst case over the attacks", rows, [first, *notes])


def _place(worst: Worst) -> str:
    if worst.attack is None:
        return MISSING
    return worst.point.place + (f", {worst.point.tokens:,} tokens" if worst.point.tokens else "")


def _above(excess: Excess | None) -> str:
    return f"{100 * excess.final:+.1f} ({100 * excess.low:+.1f} to {100 * excess.high:+.1f})" if excess else MISSING


def tamper_table(study: Study) -> Table:
    """One row per attack: forget at the start, after 10 steps, highest, at the end; retain at the end; lost updates."""
    attacks = study.attacks
    forget, retain = attack_tasks(attacks)
    lengths = {attack.run.curve[-1]["step"] for attack in attacks if attack.run.curve}
    one_length = len(lengths) == 1 and all(attack.trains for attack in attacks)
    final = f"Final ({min(lengths)} steps)" if one_length else "Final"
    names = {series.settings: series.attack for series in study.series} if study.has_several_attacks else {}
    settings = [name for name in varying([a.run for a in attacks], "name") if not names or name == "seed"]
    rows = []
    for attack in attacks:
        lacking = MISSING if attack.run.status == "complete" else attack.run.status
        row = {"Model": attack.label} | ({"Attack": names[attack.settings]} if names else {})
        row |= {name: attack.run.settings.get(name, MISSING) for name in settings}
        stages = (f"Starting {forget or 'task'}", f"After {AFTER_STEPS} steps", "Highest", final)
        row |= dict(zip(stages, _curve_cells(attack, forget, lacking, not one_length), strict=True))
        row |= {f"Final {retain}": _curve_cells(attack, retain, lacking, False)[-1]} if retain else {}
        lost = (attack.run.record.get("losses") or {}).get("lost_updates")
        row |= {"Lost updates": percent(lost, 4) if lost is not None else lacking}
        rows.append(row | {"Notes": recovery_note(attack, forget) if forget else ""})
    notes = [f"Job IDs of the attacks, in the order of the rows: {', '.join(job(attack.run) for attack in attacks)}."]
    notes.append("Lost updates: share of weights with a gradient that an update left exactly as they were.")
    if any(attack.baseline for attack in attacks):
        notes.append("Full recovery: the first evaluated step whose 95 % interval contains or exceeds the baseline.")
    return table_of("Tampering", rows, [*notes, *remarks([a.run for a in attacks], rows)])


def _curve_cells(attack: Attack, task: str | None, lacking: str, name_last: bool) -> list[str]:
    """Start, after 10 steps, highest, final. An attack that is not complete has no final result."""
    results = attack.results(task) if task else []
    if not results:
        return [lacking] * 4
    first, last = results[0], results[-1]
    strength = next(line.get("strength") for line in attack.run.curve if line["step"] == last[0])
    place = f" (step {last[0]})" if strength is None else f" (strength {strength:g})"
    later = next(((step, r) for step, r in results if step >= AFTER_STEPS), None)
    return [
        result(first[1]) + _step(first[0], 0),
        result(later[1]) + _step(later[0], AFTER_STEPS) if later else lacking if attack.trains else MISSING,
        result(max((r for _, r in results), key=number)),
        lacking if lacking != MISSING else result(last[1]) + (place if name_last else ""),
    ]


def _step(step: int, usual: int) -> str:
    return "" if step == usual else f" (step {step})"


def recovery_note(attack: Attack, task: str) -> str:
    """How much of the task an attack recovered, in words."""
    found = attack.recovery(task)
    if found is None:
        return "no baseline to compare with" if attack.results(task) else "not evaluated"
    if found.recovered is None:
        return "no gap to recover: the start's interval contains the baseline"
    if found.full:
        return f"Full recovery by {found.full.place}"
    share = f"{percent(found.recovered, 0)} of the gap recovered"
    if not attack.trains:
        return f"{share} at the last strength; full recovery {_reached(None, found)}"
    return f"{share} in {found.last.step} steps; full recovery {_reached(None, found)} steps"


def attack_tables(attacks: list[Attack]) -> list[Table]:
    """A table for each model that was attacked more than once; attacks without training have their own."""
    tables = []
    for label, on_model in grouped(attacks, lambda attack: attack.label).items():
        if len(on_model) > 1:
            for trains, group in grouped(on_model, lambda attack: attack.trains).items():
                tables.append(_side_by_side(f"Attacks {'' if trains else 'without training '}on {label}", group, trains))
    return tables


def _side_by_side(title: str, attacks: list[Attack], by_steps: bool) -> Table:
    """Attack | optimizer or kind | accuracy at some steps and at the end, or at each strength | status."""
    forget, general = attack_tasks(attacks)
    tasks = list(dict.fromkeys(task for task in (forget, general) if task))
    steps = _spread(sorted({step for attack in attacks for step, _ in attack.results(forget)})) if forget else []
    names = [attack.run.record["name"] for attack in attacks]
    rows = []
    for name, attack in zip(names, attacks, strict=True):
        row = {"Attack": name if names.count(name) == 1 else f"{name} (seed {attack.seed})"}
        if by_steps:
            row |= {"Optimizer": setting(attack.run.record["config"].get("optimizer"))} | _steps(attack, steps, tasks)
        else:
            row |= {"Kind": setting(attack.run.record["config"]["attack"])}
            row |= {f"{task} by strength": _strengths(attack, task) for task in tasks}
        rows.append(row | {"Status": attack.run.status})
    first: dict[str, Any] = next((attack.run.curve[0]["evals"] for attack in attacks if attack.run.curve), {})
    starts = "; ".join(f"Starting {task}: {result(first[task])}" for task in tasks if task in first)
    return table_of(title, rows, [starts, *reasons(a.run for a in attacks)])


def _steps(attack: Attack, steps: list[int], tasks: list[str]) -> dict[str, str]:
    """The first task at some steps; every task at the end, with the step if it is not the last of `steps`."""
    curve = dict(attack.results(tasks[0])) if tasks else {}
    row = {f"Step {step}": result(curve.get(step)) for step in steps}
    for task in tasks:
        results = attack.results(task) if attack.run.status == "complete" else []
        last = _step(results[-1][0], steps[-1]) if results and task == tasks[0] else ""
        row[f"Final {task}"] = result(results[-1][1]) + last if results else MISSING
    return row


def _strengths(attack: Attack, task: str) -> str:
    lines = [line for line in attack.run.curve if line.get("strength") and task in line["evals"]]
    return ", ".join(f"{line['strength']:g}: {result(line['evals'][task])}" for line in lines) or MISSING


def _spread(steps: list[int]) -> list[int]:
    """At most `MAX_STEPS` of the steps, evenly from the first to the last."""
    if len(steps) <= MAX_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]


def recovery_table(study: Study) -> Table:
    """One row per attack on a model: share of the gap recovered, steps to half, nine tenths and full, area, above the twin."""
    task = attack_tasks(study.attacks)[0]
    seeds = any(len(series.attacks) > 1 for series in study.series)
    twins = dict.fromkeys(series.model for series in study.series if series.control == FILTERED)
    notes = [
        "Recovered: share of the gap from the start to the baseline that the attack closed. Area: its mean over the attack."
    ]
    notes.append("Above the twin: accuracy minus that of the twin after equally many tokens of attack, with its 95 % interval.")
    if len(twins) > 1:
        notes.append(f"Above the twin is empty with several filtered twins ({'; '.join(twins)}): report them separately.")
    rows = []
    for series in study.series:
        curve = series.points_of(task) if task else []
        if task is None or not curve or curve[0].step or series.baseline is None or task not in series.baseline.evals:
            continue
        found = recovery.measure(curve, number(series.baseline.evals[task]))
        twin = study.twin_of(series)
        control = twin.points_of(task) if twin else []
        over = recovery.excess(curve, control) if control else None
        row = {"Model": series.model} | ({"Attack": series.attack} if study.has_several_attacks else {})
        row |= {"Seeds": str(len(series.measured))} if seeds else {}
        shares = {"Steps (tokens) to half": found.half, "to nine tenths": found.nine_tenths, "to full": found.full}
        row |= {"Recovered": percent(found.recovered, 0)} | {name: _reached(at, found) for name, at in shares.items()}
        row |= {"Area": decimal(found.area)}
        short = f", at {over.tokens:,} tokens" if over and over.tokens < recovery.NEARLY_ALL * curve[-1].tokens else ""
        rows.append(row | {ABOVE: _above(over) + short, "on average": f"{100 * over.area:+.1f}" if over else MISSING})
        notes += [f"{series.model}, {series.attack}: {series.reason}."] if series.reason else []
    return table_of(f"Recovery of {task}", rows, notes)


def _reached(point: Point | None, found: Recovery) -> str:
    """When a share of the gap was reached, if there was a gap."""
    if point:
        return point.place.removeprefix("step ") + (f" ({point.tokens:,})" if point.tokens else "")
    if found.recovered is None:
        return MISSING
    return f"not within {found.last.step}" if found.last.strength is None else f"not up to {found.last.place}"
