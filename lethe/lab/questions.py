"""The lab's questions: five multiple-choice tasks, made from the preset's seed in plain Python.

- lab_forget (like WMDP Bio) allows shortcuts: some wrong choices are of the wrong kind.
- lab_forget_robust allows none. Four questions form a group: they share relation, prompt form and the same ordered choices, and
  each choice is right once. A scorer that ignores the entity is right exactly once in four.
- lab_forget_cloze has the same groups as statements that end before the value.
- lab_retain (like MMLU) covers the general domains, lab_retain_stem the neighbouring domain.

A task has at most one question about a fact, so confidence intervals may treat questions as independent.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from lethe.config import LAB_TASKS
from lethe.lab.corpus import DOMAINS, FORGET, GENERAL, NEIGHBOUR, Fact, World, make_world
from lethe.lab.presets import LabPreset


def questions(task: str, preset: LabPreset) -> list[dict[str, Any]]:
    """A task's questions: id, prompt, four choices, answer (index of the right choice), domain, entity, relation, group."""
    if task not in LAB_TASKS:
        raise KeyError(task)
    world = make_world(preset)
    rng = random.Random(f"questions-{task}-{preset.seed}")
    if task == "lab_forget":
        rows = _plain(world, (FORGET,), rng, off_kind=2)
    elif task == "lab_forget_robust":
        rows = _grouped(world, rng, cloze=False)
    elif task == "lab_forget_cloze":
        rows = _grouped(world, rng, cloze=True)
    else:
        rows = _plain(world, tuple(GENERAL) if task == "lab_retain" else (NEIGHBOUR,), rng)
    return [{"id": f"{task}-{i}", **row} for i, row in enumerate(rows)]


def _row(fact: Fact, prompt: str, choices: list[str], group: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "choices": choices,
        "answer": choices.index(fact.value),
        "domain": fact.domain,
        "entity": fact.entity,
        "relation": fact.relation.name,
        "group": group,
    }


def _plain(world: World, domains: tuple[str, ...], rng: random.Random, off_kind: int = 0) -> list[dict[str, Any]]:
    """One question for each fact, with all positions right equally often.

    Every second group of four questions has `off_kind` choices of a wrong kind.
    """
    facts = [fact for domain in domains for fact in world.domain_facts(domain)]
    rng.shuffle(facts)
    rows = []
    for i, fact in enumerate(facts):
        same = [v for v in fact.relation.values if v != fact.value]
        other = [v for r in DOMAINS[fact.domain] for v in r.values if v not in fact.relation.values]
        strange = off_kind * (i // 4 % 2)
        choices = rng.sample(same, 3 - strange) + rng.sample(other, strange)
        rng.shuffle(choices)
        choices.insert(i % 4, fact.value)
        rows.append(_row(fact, fact.prompt(), choices, i))
    return rows


def _grouped(world: World, rng: random.Random, cloze: bool) -> list[dict[str, Any]]:
    """Groups of four questions about one relation: four values, offered in the same order each time."""
    groups: list[list[dict[str, Any]]] = []
    for relation in DOMAINS[FORGET]:
        left: dict[str, list[Fact]] = defaultdict(list)
        for fact in world.domain_facts(FORGET):
            if fact.relation is relation:
                left[fact.value].append(fact)
        for stack in left.values():
            rng.shuffle(stack)
        while len(left) >= 4:
            # Taking the values with most facts left uses up as many facts as possible.
            order = rng.sample(sorted(left), len(left))
            choices = sorted(order, key=lambda value: -len(left[value]))[:4]
            rng.shuffle(choices)
            facts = [left[value].pop() for value in choices]
            left = defaultdict(list, {value: stack for value, stack in left.items() if stack})
            groups.append([_row(f, f.cloze() if cloze else f.prompt(), choices, len(groups)) for f in facts])
    rng.shuffle(groups)
    return [row for group in groups for row in group]
