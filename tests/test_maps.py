"""Maps are fitted on one part of the text and scored on the other, belong to one pair of weights, and are cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_runs import assert_same, interruptible, start, wait_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import Transfer, unlearn
from lethe.config import AffineConfig, AffineScoreConfig, ResumeConfig, TextSource
from lethe.errors import LetheError
from lethe.maps import affine
from lethe.maps.affine import AffineMap, load_maps
from lethe.maps.folder import HASH, METADATA, WEIGHTS, check_maps, find_maps
from lethe.maps.pipeline import fit_affine, score_affine
from lethe.models import refs
from lethe.sweeps.resuming import resume
from lethe.text import corpora
from lethe.unlearning.check import check

HIDDEN = 12


def test_maps_are_saved_in_the_published_layout_and_come_back(tmp_path):
    layers = (0, 10)
    maps = AffineMap({n: torch.randn(HIDDEN, HIDDEN) for n in layers}, {n: torch.randn(HIDDEN) for n in layers}, {"alpha": 0.5})
    maps.save(tmp_path)
    with safe_open(tmp_path / "affine_transforms.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["layer_0.bias", "layer_0.weight", "layer_10.bias", "layer_10.weight"]
        assert torch.equal(file.get_tensor("layer_10.weight"), maps.weight[10])
    facts = json.loads((tmp_path / "metadata.json").read_text())
    assert (facts["layer_indices"], facts["hidden_dim"], facts["alpha"]) == ([0, 10], HIDDEN, 0.5)
    x = {10: torch.randn(2, 3, HIDDEN)}
    assert torch.equal(load_maps(tmp_path)(x)[10], maps(x)[10])
    assert (load_maps(tmp_path).layers, load_maps(tmp_path, [10]).layers) == ([0, 10], [10])
    save_file({"layer_3.weight": torch.eye(4).half(), "layer_3.bias": torch.ones(4).half()}, tmp_path / WEIGHTS)
    (tmp_path / METADATA).write_text(json.dumps({"layer_indices": [3], "hidden_dim": 4, "alpha": 0.01}))  # as published
    assert torch.allclose(load_maps(tmp_path)({3: x[10][0, :, :4]})[3], x[10][0, :, :4] + 1)


@pytest.fixture(scope="module")
def world(make_model, texts, tmp_path_factory):
    """A target, a source, a stranger and 60 documents."""
    home = tmp_path_factory.mktemp("affine")
    for seed, name in enumerate(("target", "source", "stranger"), 1):
        make_model("llama", home / name, seed=seed)
    (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return home


def config(world: Path, out: Path, **changes: Any) -> AffineConfig:
    settings: dict[str, Any] = {"text": str(world / "text.jsonl"), "layers": [0, 3], "max_length": 16, "batch_size": 7}
    settings |= {"model": str(world / "target"), "source": str(world / "source"), "alpha": 0.5, "out": str(out)}
    return AffineConfig(**(settings | changes))


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    return fit_affine(config(world, tmp_path_factory.mktemp("runs")))


def activations(folder: Path, documents: list[corpora.Document], layer: int) -> np.ndarray:
    """Activations at every token, by hidden_states, a document at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for document in documents:
            ids = tokenizer(document.text, return_tensors="pt")["input_ids"][:, :16]
            found.append(model(ids, output_hidden_states=True).hidden_states[layer + 1][0])
    return torch.cat(found).double().numpy()


def test_fit_and_scores_are_those_of_scikit_learn_on_the_models_own_activations(world, fitted):
    documents = corpora.read(str(world / "text.jsonl"))
    fit, held = documents[:54], documents[54:]
    x, y = activations(world / "source", fit, 0), activations(world / "target", fit, 0)
    ridge = Ridge(alpha=0.5, solver="svd").fit(x, y)
    maps = load_maps(fitted.path / "affine")
    assert np.abs(maps.weight[0].numpy() - ridge.coef_).max() < 1e-4 * np.abs(ridge.coef_).max()
    x, y = activations(world / "source", held, 0), activations(world / "target", held, 0)
    scores = fitted.record["scores"]["0"]
    assert scores["r2"] == pytest.approx(r2_score(y, ridge.predict(x), multioutput="variance_weighted"), abs=1e-4)
    assert scores["mse"] == pytest.approx(((y - ridge.predict(x)) ** 2).mean(), rel=1e-4)
    assert scores["no_map_mse"] == pytest.approx(((y - x) ** 2).mean(), rel=1e-4)
    assert scores["no_map_r2"] == pytest.approx(r2_score(y, x, multioutput="variance_weighted"), rel=1e-4)


def test_record_says_what_the_maps_belong_to(world, fitted):
    facts = json.loads((fitted.path / "affine" / METADATA).read_text())
    assert facts["convention"] == "block_output"
    for role, folder in (("model", "target"), ("source", "source")):
        assert facts[role]["sha256"] == refs.weight_hash(refs.resolve(str(world / folder)))
    assert checked(fitted.path / "affine", world) == ["block_output"]
    assert facts["text"]["documents"] + facts["held_out"]["documents"] == 60
    tokenizer = AutoTokenizer.from_pretrained(world / "target")
    lengths = [len(tokenizer(d.text)["input_ids"][:16]) for d in corpora.read(str(world / "text.jsonl"))]
    assert (facts["tokens"], facts["held_out_tokens"]) == (sum(lengths[:54]), sum(lengths[54:]))
    assert fitted.record["artifacts"]["affine"]["path"] == "affine"


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"text": "lab:forget"}, {}, "never fitted on forget text"),
        ({"text": TextSource("lab:forget")}, {}, "never fitted on forget text"),
        ({"layers": [4]}, {}, "out of range"),
        ({"num_examples": 61}, {}, "60 documents, 61 are requested"),
        ({"num_examples": 1}, {}, "too few"),
        ({"text": "nowhere.jsonl"}, {}, "no such file"),
        ({"max_length": 65}, {}, "max_length: 65 is beyond the window .* 64 tokens"),
        ({}, {"num_hidden_layers": 2}, "out of range"),
        ({"max_length": 64}, {"max_position_embeddings": 32}, "max_length: 64 is beyond the window of .*source', 32 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(world, make_model, tmp_path, changes, source, message):
    if source:
        changes = changes | {"source": str(make_model("llama", tmp_path / "source", seed=9, **source))}
    with pytest.raises(LetheError, match=message):
        fit_affine(config(world, tmp_path / "runs", **changes))
    if changes.get("max_length") == 64:
        settings = {"model": str(world / "target"), "source": changes["source"], "layers": [0], "max_length": 64}
        with pytest.raises(LetheError, match=message):
            check(Transfer(**settings, out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_maps_are_found_by_run_by_id_and_by_folder(fitted):
    folder = fitted.path / "affine"
    assert find_maps(str(folder)) == find_maps(str(fitted.path)) == folder
    assert find_maps(f"run:{fitted.id}", fitted.path.parent) == folder
    with pytest.raises(LetheError, match=WEIGHTS.replace(".", r"\.")):
        find_maps(str(fitted.path.parent))


def checked(folder: Path, world: Path, layers: tuple[int, ...] = (0, 3)) -> list[str]:
    return check_maps(folder, refs.resolve(str(world / "target")), refs.resolve(str(world / "source")), list(layers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "stranger"}, "fitted for model.*lethe affine fit"),
        ({"source": "stranger"}, "fitted for source.*lethe affine fit"),
    ],
)
def test_maps_of_another_pair_are_refused(world, fitted, changes, message):
    pair = {"model": "target", "source": "source"} | changes
    with pytest.raises(LetheError, match=message):
        score_affine(AffineScoreConfig(str(fitted.path), *(str(world / name) for name in pair.values())))


def test_maps_without_a_record_may_be_read_by_each_convention_that_has_the_layers(world, tmp_path):
    numbers = (1, 3, 4)
    tensors = {f"layer_{n}.weight": torch.eye(32) for n in numbers} | {f"layer_{n}.bias": torch.zeros(32) for n in numbers}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(LetheError, match=r"metadata\.json"):
        checked(tmp_path, world, layers=(0,))
    (tmp_path / METADATA).write_text(json.dumps({"layer_indices": [1, 3, 4], "hidden_dim": 32, "alpha": 0.01}))
    assert checked(tmp_path, world, layers=(0, 2)) == ["hidden_states"]
    assert checked(tmp_path, world, layers=(1,)) == ["block_output"]
    assert checked(tmp_path, world, layers=(3,)) == ["block_output", "hidden_states"]
    with pytest.raises(LetheError, match=r"lack some of the layers .* \[1, 3\] as block_output or .* as hidden_states"):
        checked(tmp_path, world, layers=(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layer_3.bias"), r"layers \[0, 3\]; they have \[0\]"),
        (lambda tensors: tensors["layer_3.bias"].fill_(torch.inf), r"layer 3 in .* not finite"),
        (lambda tensors: tensors.update({"layer_0.weight": torch.eye(31)}), r"layer_0\.weight in .* is \[31, 31\]"),
        (lambda tensors: tensors.update({"layer_0.bias": torch.ones(1, 32)}), r"layer_0\.bias in .* is \[1, 32\]"),
    ],
)
def test_damaged_maps_are_refused(world, fitted, tmp_path, change, message):
    folder = shutil.copytree(fitted.path / "affine", tmp_path / "maps")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(LetheError, match="was altered after it was written"):
        load_maps(folder)
    facts = json.loads((folder / METADATA).read_text())
    del facts[HASH]
    (folder / METADATA).write_text(json.dumps(facts))
    with pytest.raises(LetheError, match=message):
        checked(folder, world)
        load_maps(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"ref": "x"}}, "which weights they belong to"),
        ({"convention": ["block_output"]}, "convention"),
        ({"fitted_ids": 5}, "fitted_ids"),
        ({HASH: 7}, "was altered"),
        ("[]", r"metadata\.json"),
        ("{half", r"metadata\.json"),
    ],
)
def test_damaged_metadata_is_refused(world, fitted, tmp_path, changes, message):
    folder = shutil.copytree(fitted.path / "affine", tmp_path / "maps")
    facts = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(changes if isinstance(changes, str) else json.dumps(facts | changes))
    with pytest.raises(LetheError, match=message):
        checked(folder, world)


def score_config(world: Path, fitted, **changes: Any) -> AffineScoreConfig:
    settings: dict[str, Any] = {"text": str(world / "text.jsonl"), "num_examples": 6, "max_length": 16}
    pair = str(world / "target"), str(world / "source")
    return AffineScoreConfig(str(fitted.path / "affine"), *pair, **(settings | changes))


def test_scores_are_of_documents_the_maps_were_not_fitted_on(monkeypatch, world, fitted, tmp_path):
    seen: list[corpora.Document] = []
    real = corpora.tokenise
    monkeypatch.setattr(corpora, "tokenise", lambda documents, *rest: seen.extend(documents) or real(documents, *rest))
    documents = corpora.read(str(world / "text.jsonl"))
    new = [f"A new document, number {i}, about mills and lanterns." for i in range(5)]
    lines = [json.dumps({"text": t}) + "\n" for t in new + [d.text for d in documents[:3]]]
    (tmp_path / "new.jsonl").write_text("".join(lines))
    for changes, count in (({}, 6), ({"num_examples": 0}, 6), ({"num_examples": 0, "text": str(tmp_path / "new.jsonl")}, 5)):
        seen.clear()
        score_affine(score_config(world, fitted, **changes))
        assert len(seen) == count and not {d.id for d in seen} & {d.id for d in documents[:54]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_examples": 7}, "6 documents, 7 are requested"), ({"max_length": 65}, "max_length: 65 is beyond the window")],
)
def test_what_cannot_be_scored_is_refused(world, fitted, changes, message):
    """Six documents were held out: the maps were fitted on the seventh."""
    with pytest.raises(LetheError, match=message):
        score_affine(score_config(world, fitted, **changes))


def test_scoring_the_held_out_documents_gives_the_scores_of_the_fit(world, fitted):
    again = score_affine(score_config(world, fitted))
    assert again.recorded and again.convention == "block_output"
    for layer, scores in fitted.record["scores"].items():
        assert again.scores[layer] == pytest.approx(scores, rel=1e-6)


PARENTS = {"model": {"ref": "m", "sha256": "1"}, "source": {"ref": "s", "sha256": "2"}}


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """One entry for each fit."""
    found: list[int] = []
    fit = affine.fit_on_text
    monkeypatch.setattr(affine, "fit_on_text", lambda *args: found.append(1) or fit(*args))
    return found


@pytest.fixture
def cached(world, tmp_path, monkeypatch):
    """cached(...): the maps of the pair on some documents, from an empty home or fitted."""
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    (model, tokenizer), (source, _) = (refs.load(refs.resolve(str(world / name))) for name in ("target", "source"))

    def maps(documents: int = 40, parents: dict[str, Any] = PARENTS, **changes: Any) -> AffineMap:
        settings, some = config(world, tmp_path, **changes), corpora.read(str(world / "text.jsonl"))[:documents]
        fit = lambda: affine.fit_on_text(model, source, tokenizer, some, settings, settings.text)  # noqa: E731
        return affine.fit_once(fit, tokenizer, some, settings, parents)

    return maps


def assert_equal(one: AffineMap, other: AffineMap) -> None:
    assert one.layers == other.layers
    assert all(torch.equal(one.weight[n], other.weight[n]) and torch.equal(one.bias[n], other.bias[n]) for n in one.layers)


def test_the_same_maps_are_fitted_once_whatever_their_models_are_called(cached, fits):
    first, second = cached(), cached(parents={role: parent | {"ref": "elsewhere"} for role, parent in PARENTS.items()})
    assert fits == [1]
    assert_equal(first, second)
    assert first.record["scores"] == second.record["scores"] and second.record["model"]["ref"] == "elsewhere"


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
def test_other_text_settings_or_weights_are_fitted_separately(cached, fits, other):
    for _ in range(2):
        cached()
        cached(**other)
    assert len(fits) == 2


@pytest.mark.parametrize("damage", ["changed", "gone", "metadata"])
def test_damaged_cached_maps_are_fitted_again(cached, fits, tmp_path, damage):
    first = cached()
    file = next((tmp_path / "home").glob(f"maps/*/{WEIGHTS}"))
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "metadata":
        (file.parent / METADATA).write_text("{half")
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        assert_equal(cached(), first)
    assert len(fits) == 2


def test_a_home_that_cannot_be_written_is_a_warning(cached, fits, tmp_path, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(affine.logger, "warning", lambda text, *args: warned.append(text % args))
    first = cached()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "maps").write_text("")  # not even root makes a folder in a file
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "other"))
    assert_equal(cached(), first)
    assert len(fits) == 2 and len(warned) == 1 and "cannot be cached" in warned[0]


@pytest.mark.slow
def test_a_killed_run_resumes_with_its_own_maps_without_the_cached_ones(lab, tmp_path, monkeypatch):
    whole = unlearn(interruptible(tmp_path / "whole"))
    process = start("unlearn", interruptible(tmp_path / "killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", 8)
    process.kill()
    process.communicate()
    monkeypatch.setattr(affine, "lethe_home", lambda: tmp_path / "empty")
    monkeypatch.setattr(affine, "fit_on_text", lambda *args: pytest.fail("fitted again"))
    assert_same(resume(ResumeConfig(str(run.path))), whole)


FITTER = """
import json, sys, time
from lethe.maps import affine
from lethe.text import corpora
from lethe.models import refs
from lethe.config import AffineConfig
plain = affine.fit_on_text
def slow(*args):
    with open(sys.argv[4], "a") as log:
        log.write("fit\\n")
    time.sleep(1)
    return plain(*args)
affine.fit_on_text = slow
(model, tokenizer), (source, _) = (refs.load(refs.resolve(name)) for name in sys.argv[1:3])
config = AffineConfig("m", "s", text=sys.argv[3], layers=[0, 3], max_length=16, batch_size=7)
parents = {"model": {"sha256": "1"}, "source": {"sha256": "2"}}
some = corpora.read(sys.argv[3])[:40]
fit = lambda: affine.fit_on_text(model, source, tokenizer, some, config, config.text)
maps = affine.fit_once(fit, tokenizer, some, config, parents)
print(maps.weight[3].double().sum().item())
"""


def test_of_two_processes_at_once_one_fits_and_both_have_the_maps(world, tmp_path):
    files = [world / "target", world / "source", world / "text.jsonl", tmp_path / "log"]
    command = [sys.executable, "-c", FITTER, *map(str, files)]
    home = os.environ | {"LETHE_HOME": str(tmp_path / "home")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": home}
    results = [process.communicate() for process in [subprocess.Popen(command, **pipes) for _ in range(2)]]
    assert results[0][0] == results[1][0] != "", results
    assert (tmp_path / "log").read_text() == "fit\n"
