"""The result of a study in a few sentences, which stand first in tables.md and on the page."""

from __future__ import annotations

from typing import NamedTuple

from lethe.report.attacks import recovery_note
from lethe.results.attacks import Attack, attack_tasks
from lethe.results.format import percent
from lethe.results.regimes import number
from lethe.results.study import Study
from lethe.results.targets import Target
from lethe.runs.run import Run


class Ends(NamedTuple):
    """A task's value before an attack and at its last evaluated step, and that step."""

    task: str
    start: float
    final: float
    step: int


def headline(study: Study) -> list[str]:
    """The result in a few sentences. The first is about the unlearned model that did best."""
    sentences = []
    for target in study.targets:
        if target.best is None or target.baseline is None:
            continue
        sentences.append(_unlearning_sentence(target.best, target))
        attacks = _attacks_on(target.best, study)
        worst = _worst_sentence(attacks[0].model, study) if _are_several(attacks) else ""
        sentences += [worst] if worst else [_attack_sentence(attack) for attack in attacks]
    if not study.has_several_attacks and any(attack.control for attack in study.attacks):
        sentences.append(_control_sentence(study))
    found = [sentence for sentence in sentences if sentence]
    if not found and (study.runs or not study.imported):
        done = sum(run.status == "complete" for run in study.runs)
        found = [f"No unlearning result with a baseline yet: {done} of {len(study.runs)} runs are complete."]
    if study.apart:
        count = len({each.run.id for each in study.apart})
        runs = f"{count} run{'s' * (count != 1)}"
        found.append(f"Numbers of {runs} were measured in another way, and are in a table of their own.")
    if study.imported:
        files = ", ".join(dict.fromkeys(run.record["imported"]["file"] for run in study.imported))
        found.append(f"{len(study.imported)} runs are imported from {files}, and stand in tables of their own.")
    return found


def _attacks_on(run: Run, study: Study) -> list[Attack]:
    """Attacks on the model that a run made, without those on that model after another attack."""
    return [attack for attack in study.attacks if attack.unlearned is run and not attack.before]


def _are_several(attacks: list[Attack]) -> bool:
    return len({attack.settings for attack in attacks}) > 1


def _changes(target: Target) -> dict[str, str]:
    """The forget and the retain task with the values before and after the unlearning that did best."""
    if target.best is None or target.baseline is None:
        return {}
    before, after = target.baseline.evals, target.best.record["evals"]
    return {
        task: f"{percent(number(before[task]), 1)} → {percent(number(after[task]), 1)}"
        for task in target.judged
        if task and task in after
    }


def _unlearning_sentence(run: Run, target: Target) -> str:
    evals, changes = run.record["evals"], _changes(target)
    if not changes:
        return ""
    marked = [f"{task} {change}" + " (degenerate)" * bool(evals[task].get("degenerate")) for task, change in changes.items()]
    verdict = ""
    if judged := target.judge(evals):
        regime, found = judged
        interval = f"{found.low:.2f} to {found.high:.2f}"
        verdict = f"; regime {regime}, selectivity {found.value:.2f} (95 % interval {interval})"
    count = len(target.runs)
    which = f"{run.record['name']} ({run.id})" + (f", best of {count} unlearning runs" if count > 1 else "")
    return f"{', '.join(marked)}{verdict}: {which}."


def _attack_sentence(attack: Attack) -> str:
    ends = _ends(attack)
    if ends is None:
        return ""
    found = attack.recovery(ends.task)
    share = found.recovered if found else None
    gap = f", {percent(share, 0)} of what unlearning had removed" if share is not None else ""
    note = recovery_note(attack, ends.task)
    full = f". {note}" if note.startswith("Full") else ""
    status = attack.run.status
    what = f"An attack of {ends.step} steps" if status == "complete" else f"An attack, {status} after step {ends.step}, so far"
    return f"{what} brought {ends.task} from {percent(ends.start, 1)} to {percent(ends.final, 1)}{gap}{full}."


def _worst_sentence(model: str, study: Study) -> str:
    """The worst case of a model under several attacks, beside that of the controls."""
    own = study.worst_cases.get(model)
    if own is None:
        return ""
    task, general = attack_tasks(study.attacks)
    cost = f"{general or 'general'} {-100 * own.general_lost:+.1f} points"
    by = f" (by {own.attack}, {own.point.place}, {cost})" if own.attack else ""
    unfinished = f"; {len(own.not_measured)} are not measured to their end" if own.not_measured else ""
    controls = {series.model: series.control.removeprefix("Control: ") for series in study.series if series.control}
    scores = {name: worst for control, name in controls.items() if (worst := study.worst_cases[control])}
    beside = ", ".join(f"{name} {percent(worst.point.value, 1)}" for name, worst in scores.items())
    return (
        f"Worst case over {len(own.counted) + len(own.not_measured)} attacks: {task} {percent(own.start.value, 1)} → "
        f"{percent(own.point.value, 1)}{by}{unfinished}" + (f"; controls: {beside}." if beside else ".")
    )


def _control_sentence(study: Study) -> str:
    parts = []
    for attack in study.attacks:
        ends = _ends(attack) if attack.control else None
        if ends and attack.control:
            status = "" if attack.run.status == "complete" else f" ({attack.run.status})"
            change = f"{percent(ends.start, 1)} → {percent(ends.final, 1)} in {ends.step} steps{status}"
            parts.append(f"{attack.control.removeprefix('Control: ')} {change}")
    return f"Attacks on the controls, for comparison: {'; '.join(parts)}." if parts else ""


def _ends(attack: Attack) -> Ends | None:
    """The ends of the attack's curve on the forget task."""
    task = attack_tasks([attack])[0]
    results = attack.results(task) if task else []
    return Ends(task, number(results[0][1]), number(results[-1][1]), results[-1][0]) if task and results else None
