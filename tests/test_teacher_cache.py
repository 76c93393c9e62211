"""The teachers' cache: the same losses as live teachers, never stale, whole or absent, shared by processes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab_runs import interruptible, written

import lethe.home
from lethe import LoraSettings, unlearn
from lethe.maps.affine import AffineMap
from lethe.methods.method import Need
from lethe.models import refs
from lethe.runs import locks
from lethe.text import corpora
from lethe.unlearning import teacher_cache as caching
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.trainer import UnlearnTrainer
from lethe.unlearning.view import Teacher

ROWS = [list(range(3, 3 + n)) for n in (5, 30, 17, 1, 24)]


def values(run: Run) -> list[Any]:
    """What a run logged, without the passes that it took."""
    metrics, batches, _ = written(run)
    return [[{key: row[key] for key in row if key not in {"passes", "flops"}} for row in metrics], batches]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, request) -> Path:
    """An empty folder of caches; runs on the lab need the lab's own home."""
    if "lab" not in request.fixturenames:
        monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    else:
        request.getfixturevalue("lab")
        monkeypatch.setattr(caching, "lethe_home", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """Warnings of the cache; not caplog, since the command line, run by other tests, turns handlers off."""
    found: list[str] = []
    for module in (caching, locks):
        monkeypatch.setattr(module.logger, "warning", lambda text, *args: found.append(text % args))
    return found


@pytest.fixture
def teacher(make_model, tmp_path) -> Teacher:
    """A source with maps."""
    model = Frozen(refs.resolve(str(make_model("llama", tmp_path / "1", seed=1))), "float32")
    rng = torch.Generator().manual_seed(0)
    maps = AffineMap(
        {n: torch.randn(32, 32, generator=rng) for n in (0, 2)}, {n: torch.randn(32, generator=rng) for n in (0, 2)}
    )
    return Teacher(Need("source", (0, 2), True, True), model, "w", model.head(), maps)


def built(teacher: Teacher, rows: list[list[int]] = ROWS, weights: str = "w") -> caching.Cache:
    cache = caching.open_or_build(dataclasses.replace(teacher, weights=weights), "forget", rows)
    assert cache is not None
    return cache


@pytest.mark.parametrize(
    "need", [Need("source", (0, 2), True, True), Need("reference", logits=True)], ids=["source", "reference"]
)
@pytest.mark.parametrize("heads", [True, False])
def test_cached_states_are_the_live_ones(teacher, need, heads):
    teacher.need, teacher.maps = need, teacher.maps if need.mapped else None
    teacher.head = teacher.head if heads else None
    cache = built(teacher)
    index = torch.tensor([4, 0, 3, 0])
    ids, mask = corpora.pad([ROWS[i] for i in index], 0)
    live, cached = teacher.live(ids), cache.states(index, ids.shape[1])
    assert live.activations.keys() == cached.activations.keys() == set(need.layers)
    keep = mask.bool()
    pairs = [(live.output, cached.output), *((live.activations[n], cached.activations[n]) for n in live.activations)]
    for one, other in pairs:
        torch.testing.assert_close(one[keep], other[keep], rtol=1e-5, atol=1e-6 * float(one[keep].abs().max()))
    sizes = sum(f.stat().st_size for f in cache.folder.glob("*.bin"))
    assert sizes == caching.size_of(teacher, ROWS)


def test_every_part_of_the_key_makes_another_cache(teacher):
    rows = [*ROWS[:-1], [*ROWS[-1][:-1], 7]]
    other_map = AffineMap({n: w + (n == 2) * 1e-6 for n, w in teacher.maps.weight.items()}, teacher.maps.bias)

    def key(rows: list[list[int]] = ROWS, **changes: Any) -> Path:
        return caching.folder_of(caching.key_of(dataclasses.replace(teacher, **changes), rows))

    folders = [
        key(), key(weights="other"), key(rows), key(ROWS[::-1]), key([[3, 4], [5]]), key([[3], [4, 5]]), key(maps=other_map),
        key(maps=None), key(head=None), key(need=Need("source", (0,), True)), key(need=Need("source", (0, 2))),
    ]  # fmt: skip
    assert key() == folders[0]
    teacher.model.config.rope_parameters["rope_theta"] = 5.0
    folders.append(key())
    teacher.model.dtype = torch.bfloat16
    folders.append(key())
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("damage", ["short", "gone", "changed", "manifest"])
def test_a_damaged_cache_is_noticed_and_built_anew(teacher, damage, warned):
    file = built(teacher).folder / "layer_2.bin"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "manifest":
        (file.parent / caching.MANIFEST).write_text("{")
    else:
        file.write_bytes(content[:-4] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1]))
    built(teacher)
    assert file.read_bytes() == content and "damaged" in warned[0]


def test_a_whole_cache_is_not_built_again(teacher, monkeypatch):
    built(teacher)
    monkeypatch.setattr(Teacher, "live", lambda *args: pytest.fail("the teacher ran"))
    built(teacher)


def test_a_full_disk_leaves_the_teacher_live_and_nothing_behind(teacher, home, monkeypatch, warned):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert caching.open_or_build(teacher, "forget", ROWS) is None
    assert "No space left" in warned[0]
    assert [p.suffix for p in (home / "teachers").iterdir()] == [".lock"]


def test_caches_not_used_for_longest_make_room_and_those_in_use_stay(teacher, monkeypatch):
    size = caching.size_of(teacher, ROWS)
    monkeypatch.setattr(lethe.home, "SHARE", 0.5)
    monkeypatch.setattr(lethe.home.shutil, "disk_usage", lambda path: SimpleNamespace(total=6 * size))  # for two with manifests
    used = built(teacher, weights="first")
    folders = [used.folder, built(teacher, weights="second").folder, built(teacher, weights="third").folder]
    assert [f.exists() for f in folders] == [True, False, True]
    again = built(teacher, weights="second")
    index = torch.tensor([0, 4])
    assert torch.equal(again.states(index, 30).output, used.states(index, 30).output)


BUILDER = """
import sys, time, torch
from pathlib import Path
from lethe.models import refs
from lethe.unlearning import teacher_cache as caching
from lethe.methods.method import Need
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.view import Teacher
teacher = Teacher(Need("source", (0,)), Frozen(refs.resolve(sys.argv[1]), "float32"), "w")
caching.TOKENS = 1
plain = Teacher.live
def slow(self, *args):
    with open(sys.argv[2], "a") as log:
        log.write("pass\\n")
    time.sleep(0.3)
    return plain(self, *args)
Teacher.live = slow
print(caching.open_or_build(teacher, "forget", [[3, 4], [5, 6], [7, 8], [9]]).states(torch.tensor([3]), 1))
"""


def builder(model: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(model), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def passes(log: Path, at_least: int = 0) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        count = len(log.read_text().splitlines()) if log.exists() else 0
        if count >= at_least:
            return count
        time.sleep(0.01)
    raise AssertionError("the builder did not come so far")


@pytest.mark.slow
def test_of_two_processes_one_builds_and_both_have_the_cache(make_model, tmp_path):
    model, log = make_model("llama", tmp_path / "m"), tmp_path / "log"
    results = [p.communicate() for p in [builder(model, log), builder(model, log)]]
    assert results[0][0] == results[1][0] != "", results
    assert passes(log) == 4


@pytest.mark.slow
def test_a_killed_builder_leaves_nothing_that_counts(make_model, tmp_path, home):
    model, log = make_model("llama", tmp_path / "m"), tmp_path / "log"
    killed = builder(model, log)
    passes(log, 2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list((home / "teachers").glob("[!.]*/manifest.json"))
    out, errors = builder(model, log).communicate()
    assert "activations" in out, errors
    assert not list((home / "teachers").glob(".*.partial"))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"retain_loss": "mse", "lora": None, "affine": "none"},
        {"forget_kl_coef": 1.0, "retain_loss": "ce"},
        {"packing": "packed"},
    ],
    ids=["kl", "mse", "both", "packed"],
)
def test_a_run_has_the_losses_of_live_teachers_without_running_them(lab, tmp_path, settings, monkeypatch):
    settings = {"lora": LoraSettings(dropout=0.0), "max_steps": 20} | settings
    live = unlearn(interruptible(tmp_path / "runs", teacher_cache="live", **settings))
    train = UnlearnTrainer.train

    def without_teachers(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "live", lambda *args: pytest.fail("a teacher ran in training"))
            return train(self, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "train", without_teachers)
    cached = unlearn(interruptible(tmp_path / "runs", teacher_cache="cached", **settings))
    assert all(how == "cached: as set" for how in cached.record["plan"]["teachers"].values())
    assert values(cached) == values(live)  # to the last bit: Teacher.live pads to whole vectors


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "tolerance"), [("packed", 0.0), ("none", 0.02)], ids=["one length", "many lengths"])
def test_bfloat16_teachers_have_a_bfloat16_cache_within_the_stated_tolerance_of_live_ones(lab, tmp_path, packing, tolerance):
    """Exact on rows of one length, where only the number of rows differs between a batch and the cache's building."""
    settings = {"dtype": "bfloat16", "affine": "none", "packing": packing, "lora": LoraSettings(dropout=0.0), "max_steps": 8}
    live, cached = (unlearn(interruptible(tmp_path / "runs", teacher_cache=how, **settings)) for how in ("live", "cached"))
    files = list((tmp_path / "home" / "teachers").glob("*/manifest.json"))
    types = {fact["dtype"] for file in files for fact in json.loads(file.read_text())["files"].values()}
    assert types == {"bfloat16"} and len(files) == 2
    for ours, theirs in zip(written(cached)[0], written(live)[0], strict=True):
        for term in ("loss", "cb_loss", "retain_kl_loss"):
            assert ours[term] == pytest.approx(theirs[term], rel=tolerance, abs=0), term


@pytest.mark.slow
def test_a_run_whose_cache_does_not_fit_on_the_disk_goes_on_live(lab, tmp_path, small, warned, monkeypatch):
    folder = small(64)
    monkeypatch.setattr(caching, "lethe_home", lambda: folder)
    run = unlearn(interruptible(tmp_path / "runs", teacher_cache="cached", max_steps=8))
    assert run.status == "complete" and len(warned) == 2 and all("No space left" in text for text in warned)
    assert run.record["plan"]["teachers"] == dict.fromkeys(("forget", "retain"), "live: a cache could not be written")


@pytest.mark.slow
def test_auto_caches_what_is_seen_again_and_says_why(lab, tmp_path):
    once = unlearn(interruptible(tmp_path / "runs", max_steps=8))
    assert once.record["plan"]["teachers"] == dict.fromkeys(("forget", "retain"), "live: no document is seen twice")
    twice = unlearn(interruptible(tmp_path / "runs", max_steps=16))
    assert all(how.startswith("cached: documents are seen 2 times") for how in twice.record["plan"]["teachers"].values())
    again = unlearn(interruptible(tmp_path / "runs", max_steps=8))
    assert all(how == "cached: a complete cache exists" for how in again.record["plan"]["teachers"].values())
    assert values(again) == values(once)
