"""Maps of the same weights, text and settings are fitted once, by whoever comes first; if anything is wrong, anew."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same, recipe, start, wait_for

from lethe import unlearn
from lethe.config import AffineConfig, ResumeConfig
from lethe.maps import affine
from lethe.maps.folder import WEIGHTS
from lethe.models import refs
from lethe.sweeps.resuming import resume
from lethe.text import corpora

PARENTS = {"model": {"ref": "m", "sha256": "1"}, "source": {"ref": "s", "sha256": "2"}}


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """One entry for each fit that is made."""
    found: list[int] = []
    fit = affine.fit_on_text
    monkeypatch.setattr(affine, "fit_on_text", lambda *args: found.append(1) or fit(*args))
    return found


class World:
    """A pair of models, a text, and an empty home."""

    def __init__(self, folder: Path, make_model: Any, texts: list[str], monkeypatch: Any):
        self.home = folder / "home"
        monkeypatch.setenv("LETHE_HOME", str(self.home))
        self.model, self.tokenizer = refs.load(refs.resolve(str(make_model("llama", folder / "model", seed=1))))
        self.source, _ = refs.load(refs.resolve(str(make_model("llama", folder / "source", seed=2))))
        self.texts = folder / "text.jsonl"
        self.texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        self.config = AffineConfig("m", "s", text=str(self.texts), layers=[0, 3], max_length=16, batch_size=7)

    def maps(self, documents: int = 40, parents: dict[str, Any] = PARENTS, **changes: Any) -> affine.AffineMap:
        config, texts = dataclasses.replace(self.config, **changes), corpora.read(str(self.texts))[:documents]
        return affine.fit_once(self.model, self.source, self.tokenizer, texts, config, config.text, parents)


@pytest.fixture
def world(tmp_path, make_model, texts, monkeypatch) -> World:
    return World(tmp_path, make_model, texts, monkeypatch)


def assert_equal(one: affine.AffineMap, other: affine.AffineMap) -> None:
    assert one.layers == other.layers
    assert all(torch.equal(one.weight[n], other.weight[n]) and torch.equal(one.bias[n], other.bias[n]) for n in one.layers)


def test_the_second_has_the_firsts_maps_without_a_fit(world, fits):
    first, second = world.maps(), world.maps()
    assert fits == [1]
    assert_equal(first, second)
    assert first.record["scores"] == second.record["scores"]
    assert second.record["model"] == PARENTS["model"]


@pytest.mark.parametrize(
    "other",
    [
        {"documents": 39},
        {"layers": [0]},
        {"layers": [0, 2]},
        {"alpha": 0.1},
        {"max_length": 15},
        {"parents": PARENTS | {"model": {"ref": "m", "sha256": "3"}}},
        {"parents": PARENTS | {"source": {"ref": "s", "sha256": "3"}}},
    ],
    ids=["text", "fewer layers", "other layers", "alpha", "length", "model", "source"],
)
def test_other_text_layers_settings_or_weights_are_fitted_for_themselves(world, fits, other):
    world.maps()
    world.maps(**other)
    assert len(fits) == 2
    world.maps()
    world.maps(**other)
    assert len(fits) == 2


def test_the_name_of_the_same_weights_does_not_matter(world, fits):
    world.maps()
    renamed = world.maps(parents={role: parent | {"ref": "elsewhere"} for role, parent in PARENTS.items()})
    assert fits == [1] and renamed.record["model"]["ref"] == "elsewhere"


@pytest.mark.parametrize("damage", ["changed", "short", "gone", "metadata"])
def test_damaged_maps_are_fitted_anew(world, fits, damage):
    first = world.maps()
    file = next(world.home.glob(f"maps/*/{WEIGHTS}"))
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "metadata":
        (file.parent / "metadata.json").write_text("{half")
    else:
        file.write_bytes(content[:-4] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1]))
    assert_equal(world.maps(), first)
    assert len(fits) == 2
    world.maps()
    assert len(fits) == 2


def test_a_home_that_cannot_be_written_is_a_warning_and_the_maps_are_fitted(world, fits, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(affine.logger, "warning", lambda text, *args: warned.append(text % args))
    first = world.maps()
    home = world.home / "other"
    home.mkdir()
    (home / "maps").write_text("")  # no folder can be made of a file, by root neither
    monkeypatch.setenv("LETHE_HOME", str(home))
    assert_equal(world.maps(), first)
    assert len(fits) == 2 and len(warned) == 1 and "cannot be kept" in warned[0]


FITTER = """
import json, sys, time
from lethe.maps import affine
from lethe.text import corpora
from lethe.models import refs
from lethe.config import AffineConfig
fit = affine.fit_on_text
def slow(*args):
    with open(sys.argv[4], "a") as log:
        log.write("fit\\n")
    time.sleep(1)
    return fit(*args)
affine.fit_on_text = slow
(model, tokenizer), (source, _) = (refs.load(refs.resolve(name)) for name in sys.argv[1:3])
config = AffineConfig("m", "s", text=sys.argv[3], layers=[0, 3], max_length=16, batch_size=7)
parents = {"model": {"sha256": "1"}, "source": {"sha256": "2"}}
maps = affine.fit_once(model, source, tokenizer, corpora.read(sys.argv[3])[:40], config, config.text, parents)
print(maps.weight[3].double().sum().item())
"""


def test_of_two_processes_at_once_one_fits_and_both_have_the_maps(world, tmp_path):
    command = [sys.executable, "-c", FITTER, str(tmp_path / "model"), str(tmp_path / "source"), str(world.texts)]
    command.append(str(tmp_path / "log"))
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    results = [process.communicate() for process in [subprocess.Popen(command, **pipes) for _ in range(2)]]
    assert results[0][0] == results[1][0] != "", results
    assert (tmp_path / "log").read_text() == "fit\n"


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_own_maps_when_the_kept_ones_are_gone(lab, tmp_path, monkeypatch):
    whole = unlearn(recipe(tmp_path / "whole"))
    process = start("unlearn", recipe(tmp_path / "killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", 8)
    process.kill()
    process.communicate()
    monkeypatch.setattr(affine, "lethe_home", lambda: tmp_path / "empty")
    monkeypatch.setattr(affine, "fit_on_text", lambda *args: pytest.fail("fitted again"))
    assert_same(resume(ResumeConfig(str(run.path))), whole)
