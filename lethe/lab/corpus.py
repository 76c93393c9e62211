"""The lab's world: a fictional encyclopedia, made from one seed in plain Python.

There are six general domains, a neighbouring domain (beetles) and the domain to forget (moths). Beetles and moths share their
relations and the vocabulary of their answers, so beetles show first what unlearning damages beside its target. An entity has an
invented name of two syllables and one value for each relation of its domain. A fact is (entity, relation, value).

    world.yaml -> DOMAINS -> make_world(preset) -> documents(world, ...) -> forget_text, retain_text

A document is a few sentences or questions about one entity or about several entities of a domain. Documents mention general
entities unevenly, as real text does. The model learns some of their facts early and others late, so its general knowledge grows
gradually.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lethe.files import text_of, yaml_of
from lethe.lab.presets import LabPreset

PROMPT = "Question: {}\nAnswer:"


@dataclass(frozen=True)
class Relation:
    """One kind of fact: ways to state it (value last), ways to ask for it, and the values it can take."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    domain: str
    entity: str
    relation: Relation
    value: str

    def statement(self, form: int) -> str:
        return f"{self.relation.statements[form].format(self.entity)} {self.value}."

    def cloze(self) -> str:
        """The first statement form, cut before the value."""
        return self.relation.statements[0].format(self.entity)

    def prompt(self, form: int = 0) -> str:
        """The question as tasks and documents write it. A space and the value follow."""
        return PROMPT.format(self.relation.questions[form].format(self.entity))


def _domains() -> dict[str, tuple[Relation, ...]]:
    """The relations of each domain, as `world.yaml` lists them."""
    content = yaml_of(text_of(Path(__file__).with_name("world.yaml")))
    return {
        domain: tuple(
            Relation(name, tuple(one["statements"]), tuple(one["questions"]), tuple(one["values"].split()))
            for name, one in relations.items()
        )
        for domain, relations in content.items()
    }


GENERAL = _domains()
_INSECT = GENERAL.pop("insect")
NEIGHBOUR, FORGET = "beetle", "moth"
DOMAINS: dict[str, tuple[Relation, ...]] = {**GENERAL, NEIGHBOUR: _INSECT, FORGET: _INSECT}

_ONSETS = "b br d dr f g gr h j k kr l m n p pr r s t tr v w z".split()  # noqa: SIM905
_NUCLEI = "a e i o u ai au ei".split()  # noqa: SIM905
_CODAS = "l m n r s th x".split()  # noqa: SIM905


@dataclass(frozen=True)
class World:
    """Entities by domain, their facts, and how common each one is in text.

    `covered`: the entities in the retain text of unlearning. `spare`: general entities that no task has a question about.
    Where the final model reads forget documents, the filtered twin reads documents about all general entities, spare ones too.
    """

    seed: int
    entities: dict[str, tuple[str, ...]]
    facts: dict[str, tuple[Fact, ...]]
    weights: dict[str, float]
    covered: frozenset[str]
    spare: frozenset[str]

    @property
    def evaluated(self) -> frozenset[str]:
        """The entities that tasks have questions about."""
        return frozenset(self.facts) - self.spare

    def domain_facts(self, domain: str) -> list[Fact]:
        """The facts of a domain that tasks have questions about."""
        return [fact for entity in self.entities[domain] if entity not in self.spare for fact in self.facts[entity]]


def _names(rng: random.Random, count: int, syllables: int) -> list[str]:
    """`count` different names from `syllables` opening and as many closing syllables, shared by all domains."""
    heads = rng.sample([o + n + c for o in _ONSETS for n in _NUCLEI for c in _CODAS], syllables)
    tails = rng.sample([o + n for o in _ONSETS for n in _NUCLEI], syllables)
    pairs = rng.sample([(h, t) for h in heads for t in tails], count)
    return [(head + tail).capitalize() for head, tail in pairs]


@lru_cache(maxsize=4)
def make_world(preset: LabPreset) -> World:
    """The encyclopedia of a preset; the same preset gives the same world on any machine."""
    rng = random.Random(f"world-{preset.seed}")
    evaluated = dict.fromkeys(GENERAL, preset.general_entities)
    evaluated |= {NEIGHBOUR: preset.neighbour_entities, FORGET: preset.forget_entities}
    extra = dict.fromkeys(GENERAL, preset.spare_entities) | {NEIGHBOUR: 0, FORGET: 0}
    names = iter(_names(rng, sum(evaluated.values()) + sum(extra.values()), preset.syllables))

    entities: dict[str, tuple[str, ...]] = {}
    facts: dict[str, tuple[Fact, ...]] = {}
    weights: dict[str, float] = {}
    covered: set[str] = set()
    spare: set[str] = set()
    for domain, relations in DOMAINS.items():
        known = tuple(next(names) for _ in range(evaluated[domain]))
        further = tuple(next(names) for _ in range(extra[domain]))
        columns = [_column(rng, domain, known, r) for r in relations]
        more = [_column(rng, domain, further, r) for r in relations]
        for members, table in ((known, columns), (further, more)):
            facts |= dict(zip(members, zip(*table, strict=True), strict=True))
        entities[domain] = known + further
        skew = preset.skew if domain in GENERAL else 0.0
        weights |= {entity: (1 + rank) ** -skew for rank, entity in enumerate(known)} | dict.fromkeys(further, 1.0)
        spare.update(further)
        if domain != FORGET:
            share = preset.neighbour_coverage if domain == NEIGHBOUR else preset.retain_coverage
            chosen = random.Random(f"covered-{preset.seed}-{domain}").sample(known, round(share * len(known)))
            covered.update(chosen)
    return World(preset.seed, entities, facts, weights, frozenset(covered), frozenset(spare))


def _column(rng: random.Random, domain: str, members: tuple[str, ...], relation: Relation) -> list[Fact]:
    """One relation's fact for each entity. All values are (almost) equally frequent, so there is no prior to learn."""
    order = rng.sample(relation.values, len(relation.values))
    values = [order[i % len(order)] for i in range(len(members))]
    rng.shuffle(values)
    return [Fact(domain, entity, relation, value) for entity, value in zip(members, values, strict=True)]


def _profile(rng: random.Random, facts: tuple[Fact, ...]) -> str:
    chosen = rng.sample(facts, min(len(facts), rng.choice((3, 4))))
    return " ".join(fact.statement(rng.randrange(len(fact.relation.statements))) for fact in chosen)


def _interview(rng: random.Random, facts: list[Fact]) -> str:
    return "\n".join(f"{fact.prompt(rng.randrange(len(fact.relation.questions)))} {fact.value}" for fact in facts)


def _document(rng: random.Random, world: World, members: list[str], weights: list[float], question_share: float) -> str:
    entity = rng.choices(members, weights)[0]
    kind = rng.random()
    if kind < question_share / 2:
        return _interview(rng, rng.sample(world.facts[entity], 3))
    others = [entity, *rng.choices(members, weights, k=2)]
    if kind < question_share:
        return _interview(rng, [rng.choice(world.facts[e]) for e in others])
    if kind < question_share + 0.15:
        facts = [rng.choice(world.facts[e]) for e in others]
        return " ".join(fact.statement(rng.randrange(len(fact.relation.statements))) for fact in facts)
    return _profile(rng, world.facts[entity])


def documents(world: World, name: str, domains: dict[str, float], only: frozenset[str], question_share: float) -> Iterator[str]:
    """Endless documents about the entities in `only`, each shorter than 64 tokens. The same `name` gives the same documents.

    Domains are drawn by the weights in `domains`, entities by how common they are.
    """
    rng = random.Random(f"documents-{world.seed}-{name}")
    members = {domain: [entity for entity in world.entities[domain] if entity in only] for domain in domains}
    weights = {domain: [world.weights[entity] for entity in members[domain]] for domain in domains}
    while True:
        domain = rng.choices(list(domains), list(domains.values()))[0]
        yield _document(rng, world, members[domain], weights[domain], question_share)


def distinct(source: Iterator[str], count: int) -> list[str]:
    """The first `count` different documents of an endless source."""
    seen: dict[str, None] = {}
    for text in source:
        seen.setdefault(text)
        if len(seen) == count:
            break
    return list(seen)


def forget_text(preset: LabPreset) -> list[str]:
    """The forget set of unlearning and of the attack: the whole forget domain, statements and questions."""
    world = make_world(preset)
    source = documents(world, "forget-text", {FORGET: 1.0}, world.evaluated, preset.text_question_share)
    return distinct(source, preset.forget_documents)


def retain_text(preset: LabPreset) -> list[str]:
    """The retain set of unlearning: only the covered entities of the general and of the neighbouring domain."""
    world = make_world(preset)
    domains = dict.fromkeys(GENERAL, 1.0) | {NEIGHBOUR: 1.0}
    source = documents(world, "retain-text", domains, world.covered, preset.text_question_share)
    return distinct(source, preset.retain_documents)
