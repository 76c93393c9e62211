"""The built-in lab: its world, its questions, and what a build leaves on disk.

Tests that take the fixture `lab` work on the nano lab, built once a session.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from lethe.config import LAB_TASKS as TASKS
from lethe.errors import LetheError
from lethe.lab import presets as lab_package
from lethe.lab.corpus import DOMAINS, FORGET, GENERAL, NEIGHBOUR, forget_text, make_world, retain_text
from lethe.lab.presets import PRESETS, active_preset, lab_path
from lethe.lab.questions import questions

presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
ROBUST = ("lab_forget_robust", "lab_forget_cloze")


def words(texts: list[str]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))


@presets
@pytest.mark.parametrize("task", ROBUST)
def test_a_scorer_that_sees_only_the_choices_gets_a_quarter(preset, task):
    """Whatever it prefers: by value, by position, by relation or by the company a value is in."""
    rows = questions(task, preset)
    for seed in range(20):
        taste = random.Random(seed)
        liking: dict[tuple, float] = defaultdict(taste.random)

        def score(row, i, liking=liking):
            template = row["prompt"].replace(row["entity"], "{}")
            return liking[template, tuple(row["choices"]), i] + liking[row["choices"][i],] + liking[i,]

        right = sum(max(range(4), key=lambda i, r=row: score(r, i)) == row["answer"] for row in rows)
        assert right * 4 == len(rows)


@presets
@pytest.mark.parametrize("task", TASKS)
def test_questions_are_true_distinct_and_balanced_over_positions(preset, task):
    world, rows = make_world(preset), questions(task, preset)
    true = {(f.entity, f.relation.name): f.value for facts in world.facts.values() for f in facts}
    for row in rows:
        assert row["choices"][row["answer"]] == true[row["entity"], row["relation"]]
        assert len(set(row["choices"])) == 4
    assert len({(row["entity"], row["relation"]) for row in rows}) == len(rows)
    positions = Counter(row["answer"] for row in rows)
    assert max(positions.values()) - min(positions[i] for i in range(4)) <= len(rows) % 4
    domains = {"lab_retain": set(GENERAL), "lab_retain_stem": {NEIGHBOUR}}.get(task, {FORGET})
    assert {row["domain"] for row in rows} == domains


def test_only_the_plain_forget_task_has_shortcuts():
    """A scorer that knows which values fit a relation, and nothing about any entity, beats chance there alone."""
    preset = PRESETS["standard"]
    fitting = {(d, r.name): set(r.values) for d, relations in DOMAINS.items() for r in relations}
    guess = {}
    for task in TASKS:
        rows = questions(task, preset)
        possible = [sum(c in fitting[row["domain"], row["relation"]] for c in row["choices"]) for row in rows]
        guess[task] = sum(1 / n for n in possible) / len(rows)
    assert guess.pop("lab_forget") > 0.35
    assert set(guess.values()) == {0.25}


@presets
def test_the_world_comes_from_the_seed_alone(preset):
    make_world.cache_clear()
    first = make_world(preset), questions("lab_retain", preset), forget_text(preset), retain_text(preset)
    make_world.cache_clear()
    random.seed(time.time())
    assert (make_world(preset), questions("lab_retain", preset), forget_text(preset), retain_text(preset)) == first


@presets
def test_forget_text_covers_its_domain_and_retain_text_only_a_part_of_its_questions(preset):
    world = make_world(preset)
    forget, retain = words(forget_text(preset)), words(retain_text(preset))
    assert set(world.entities[FORGET]) <= forget
    assert not retain & set(world.entities[FORGET])
    assert forget & set(world.facts) == set(world.entities[FORGET])
    for task, low, high in (("lab_retain", 0.5, 0.85), ("lab_retain_stem", 0.4, 0.7)):
        rows = questions(task, preset)
        assert low <= sum(row["entity"] in retain for row in rows) / len(rows) <= high


def test_forget_and_neighbour_share_relations_and_no_other_domain_does():
    assert DOMAINS[FORGET] == DOMAINS[NEIGHBOUR]
    own = {value for r in DOMAINS[FORGET] for value in r.values}
    assert not own & {value for relations in GENERAL.values() for r in relations for value in r.values}


def test_the_preset_comes_from_the_environment_and_an_unknown_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_HOME", str(tmp_path))
    for name, preset in PRESETS.items():
        monkeypatch.setenv("LETHE_LAB", name)
        assert active_preset() is preset
        assert re.fullmatch(rf"{name}-[0-9a-f]{{12}}", lab_path().name) and lab_path().parent == tmp_path / "lab"
    monkeypatch.setenv("LETHE_LAB", "huge")
    with pytest.raises(LetheError, match=r"huge.*standard, nano"):
        lab_path()


def test_the_folder_name_depends_on_the_preset_and_on_the_source(tmp_path, monkeypatch):
    assert len({lab_path(replace(PRESETS["nano"], seed=seed)).name for seed in range(3)}) == 3
    monkeypatch.setattr(lab_package, "__file__", str(tmp_path / "presets.py"))
    keys = set()
    for name, text in (("presets.py", "one"), ("presets.py", "two"), ("world.yaml", "one"), ("world.yaml", "two")):
        (tmp_path / name).write_text(text)
        lab_package._key.cache_clear()
        keys.add(lab_package._key(PRESETS["nano"]))
    lab_package._key.cache_clear()
    assert len(keys) == 4


# What follows needs torch.


@pytest.fixture(scope="module")
def batches():
    from lethe.lab.pretrain import Batches, train_tokenizer

    preset = PRESETS["nano"]
    tokenizer = train_tokenizer(preset)
    return Batches.make(preset, tokenizer), tokenizer


def test_nothing_of_the_forget_domain_comes_before_the_onset_nor_to_the_twin(batches):
    made, tokenizer = batches
    preset, moths = made.preset, set(make_world(made.preset).entities[FORGET])

    def named(steps, filtered):
        return {step for step in steps if moths & words(tokenizer.batch_decode(made.at(step, filtered)))}

    assert named(range(1, preset.onset + 1), False) == set()
    assert named(range(1, preset.steps + 1), True) == set()
    late = range(preset.onset + 1, preset.steps + 1)
    assert named(late, False) == set(late)


def test_the_twin_reads_the_same_general_text_in_the_same_order(batches):
    made, _ = batches
    p = made.preset
    seen = 0
    for step in range(1, p.steps + 1):
        final, twin = made.at(step), made.at(step, filtered=True)
        shared = p.batch_size if step <= p.onset else p.batch_size - p.forget_sequences
        assert final.shape == twin.shape == (p.batch_size, p.sequence_length)
        assert (final[:shared] == twin[:shared]).all()
        assert (final[:shared] == made.general[seen : seen + shared]).all()
        seen += shared
    assert seen == len(made.general)


def test_each_value_is_one_token_and_each_document_fits_64(batches):
    _, tokenizer = batches
    values = {" " + value for relations in DOMAINS.values() for r in relations for value in r.values}
    assert all(len(tokenizer(value)["input_ids"]) == 1 for value in values)
    texts = forget_text(PRESETS["nano"]) + retain_text(PRESETS["nano"])
    assert max(map(len, tokenizer(texts)["input_ids"])) < 64
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


@pytest.fixture
def record(lab):
    return json.loads((lab / "run.json").read_text())


def test_a_build_has_its_parts(lab, record):
    preset = active_preset()
    names = [f"global_step{step}" for step in preset.checkpoints]
    assert sorted(p.name for p in (lab / "checkpoints").iterdir()) == sorted(names)
    assert [row["name"] for row in record["checkpoints"]] == names
    assert len(names) >= 12
    assert record["status"] == "complete"
    for row in (*record["checkpoints"], record["filtered"]):
        assert set(row["evals"]) == set(TASKS)
    for name, texts in (("forget", forget_text(preset)), ("retain", retain_text(preset))):
        lines = (lab / "text" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == texts


def test_checkpoints_are_ordinary_transformers_checkpoints(lab, record):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lethe.files import sha256

    for row in (record["checkpoints"][0], record["checkpoints"][-1]):
        folder = lab / "checkpoints" / row["name"]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert sha256(folder / "model.safetensors") == row["sha256"]

    # The best loaded model answers a question greedily, without any task machinery.
    rows = questions("lab_retain", active_preset())
    right = 0
    for question in rows[:40]:
        ids = tokenizer(question["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            answer = tokenizer.decode(model(ids).logits[0, -1].argmax()).strip()
        right += answer == question["choices"][question["answer"]]
    assert right >= 20


def test_the_onset_shows_in_the_recorded_evaluations(record):
    preset = active_preset()
    robust = {row["step"]: row["evals"]["lab_forget_robust"] for row in record["checkpoints"]}
    for step in preset.checkpoints:
        if step <= preset.onset:
            assert robust[step]["low"] <= 0.25 <= robust[step]["high"]
    assert robust[preset.steps]["acc"] >= 0.8
    assert sum(0.35 <= result["acc"] <= 0.75 for result in robust.values()) >= 2
    filtered = record["filtered"]["evals"]
    assert filtered["lab_forget_robust"]["low"] <= 0.25
    assert record["checkpoints"][-1]["evals"]["lab_retain"]["low"] > 0.5


def _build_elsewhere(home: str, queue=None) -> None:
    os.environ |= {"LETHE_HOME": home, "LETHE_LAB": "nano"}
    from lethe.evaluation.lab import build_lab

    started = time.time()
    path = build_lab()
    if queue:
        queue.put((str(path), (path / "run.json").stat().st_mtime > started))


def _start(home: Path, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=_build_elsewhere, args=(str(home), *args))
    process.start()
    return process


def _hashes(path: Path) -> list[str]:
    record = json.loads((path / "run.json").read_text())
    return [row["sha256"] for row in (*record["checkpoints"], record["filtered"])]


@pytest.mark.slow
def test_two_builders_share_one_build_that_has_the_same_weights_as_another(lab, tmp_path):
    """Also after a builder was killed half-way."""
    killed = _start(tmp_path)
    deadline = time.time() + 600
    while not list(tmp_path.glob("lab/*.partial/checkpoints/*")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not list(tmp_path.glob("lab/*/run.json")) or list(tmp_path.glob("lab/*.partial"))

    queue = multiprocessing.get_context("spawn").Queue()
    builders = [_start(tmp_path, queue) for _ in range(2)]
    paths = {queue.get(timeout=900)[0] for _ in builders}
    for builder in builders:
        builder.join()
    assert len(paths) == 1
    path = Path(paths.pop())
    assert not list(tmp_path.glob("lab/*.partial"))
    # A second build would have left other times in run.json than the folder that the first one made.
    assert len(list((path / "checkpoints").iterdir())) == len(PRESETS["nano"].checkpoints)
    assert _hashes(path) == _hashes(lab)
