"""Affine maps: the ridge regression is scikit-learn's, scores are of documents that nothing was fitted on, and a map
knows which pair of weights it belongs to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import Transfer
from lethe.config import AffineConfig, AffineScoreConfig, TextSource
from lethe.errors import LetheError
from lethe.maps import affine
from lethe.maps.affine import AffineMap, RidgeSums, Score, fit_affine, load_maps, score_affine
from lethe.maps.check import split
from lethe.maps.folder import HASH, check_maps, find_maps
from lethe.models import refs
from lethe.text import corpora
from lethe.unlearning.check import check

HIDDEN = 12


def planted(n: int, mean: float, seed: int = 0, rank: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """x with spread 1 about a mean, y an affine function of it with a little noise, both float32."""
    rng = np.random.default_rng(seed)
    centre = mean * rng.choice([-1.0, 1.0], HIDDEN)
    x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, HIDDEN)) / np.sqrt(rank) + centre
    y = x @ rng.normal(size=(HIDDEN, HIDDEN)) / np.sqrt(HIDDEN) + 3 * mean + 0.1 * rng.normal(size=(n, HIDDEN))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def streamed(x: torch.Tensor, y: torch.Tensor, batch: int) -> RidgeSums:
    sums = RidgeSums()
    for start in range(0, len(x), batch):
        sums.add(x[start : start + batch], y[start : start + batch])
    return sums


def against_sklearn(x, y, alpha, batch, tolerance):
    weight, bias = streamed(x, y, batch).solve(alpha)
    ridge = Ridge(alpha=alpha, solver="svd").fit(x.double().numpy(), y.double().numpy())
    scale = np.abs(ridge.coef_).max()
    assert np.abs(weight.double().numpy() - ridge.coef_).max() < tolerance * scale
    predicted = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    spread = y.double().numpy().std()
    assert np.abs(predicted - ridge.predict(x.double().numpy())).max() < 10 * tolerance * spread


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """The sums' blocks as they are, which a small text does not fill, and so small that most of it is in later ones."""
    if request.param == "many blocks":
        monkeypatch.setattr(affine, "BLOCK", 64)
        monkeypatch.setattr(affine, "PANEL", 5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("mean", [0.0, 1.0, 20.0, 200.0])
def test_ridge_is_scikit_learns_whatever_the_means(mean, alpha):
    x, y = planted(3000, mean)
    against_sklearn(x, y, alpha, 500, 1e-3 if mean > 1 else 1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mean", [0.0, 200.0])
def test_many_small_batches_give_the_same_map(mean):
    x, y = planted(3000, mean)
    against_sklearn(x, y, 0.01, 3, 1e-3)
    one, many = streamed(x, y, 3000).solve(0.01), streamed(x, y, 3).solve(0.01)
    assert torch.allclose(one[0], many[0], atol=1e-3)


@pytest.mark.usefixtures("blocks")
def test_a_first_batch_unlike_the_rest_does_no_harm():
    """The sums' centre and basis are the first block's: here its mean is up to fifty spreads away from that of all."""
    x, y = planted(3000, 20.0)
    x[:4] += 50
    against_sklearn(x, y, 0.01, 4, 1e-3)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_rank_deficient_activations_are_solved_by_the_penalty(alpha):
    """Rounding of the sums must stay well below the penalty: the default one is 0.01."""
    x, y = planted(2000, 1.0, rank=4)
    against_sklearn(x, y, alpha, 100, 1e-3)


@pytest.mark.usefixtures("blocks")
def test_a_direction_with_massive_activations_does_not_drown_the_others():
    """As language models have them: one direction's spread is thousands of times that of most."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))
    spread = np.array([300.0, 3.0, 3.0] + [0.05] * (HIDDEN - 3))
    x = rng.normal(size=(20000, HIDDEN)) * spread @ basis
    y = x @ rng.normal(size=(HIDDEN, HIDDEN)) / np.sqrt(HIDDEN) + 0.02 * rng.normal(size=x.shape)
    against_sklearn(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32), 0.01, 2000, 1e-3)


WIDE = 40


def hard_text(case: str) -> np.ndarray:
    """6,000 tokens of 40 dimensions, as hard as language models have them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, WIDE))
    own = x.copy()
    match case:
        case "means of 20 spreads":
            x += 20 * rng.choice([-1, 1], WIDE)
        case "a massive dimension":
            x[:, 3] = 5000 + 1000 * own[:, 3]
        case "two massive dimensions, almost one":
            x[:, 3], x[:, 7] = 1000 * own[:, 3], 900 * own[:, 3] + own[:, 7]
        case "a few massive tokens":
            x[rng.random(6000) < 0.01, 5:7] += [3000, -1500]
        case "dimensions that nearly follow from others":
            x[:, 1] = own[:, 0] + 1e-3 * own[:, 1]
            x[:, 9] = own[:, 2:8].sum(1) + 1e-3 * own[:, 9]
        case "massive directions across dimensions":
            x = own * np.array([300, 3, 3] + [0.05] * (WIDE - 3)) @ np.linalg.qr(rng.normal(size=(WIDE, WIDE)))[0]
        case "a first block unlike the rest":
            x[:300] *= np.logspace(0, -2, WIDE)
            x[300:] += 3
    return x


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("nothing special", 1e-6),
        ("means of 20 spreads", 1e-6),
        ("a first block unlike the rest", 1e-5),
        ("a few massive tokens", 2e-5),
        ("a massive dimension", 2e-5),
        ("two massive dimensions, almost one", 2e-4),
        ("dimensions that nearly follow from others", 1e-3),
        ("massive directions across dimensions", 1e-3),
    ],
)
def test_hard_activations_are_solved_as_in_float64(case, tolerance):
    """R² to 1e-9 and predictions to 3e-6 spreads of y whatever the text; W as far as the text determines it."""
    x = hard_text(case)
    rng = np.random.default_rng(1)
    y = x @ rng.normal(size=(WIDE, WIDE)) / np.sqrt(WIDE)
    y += 0.1 * np.median(np.abs(y - y.mean(0))) * rng.normal(size=y.shape)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    weight, bias = (t.double().numpy() for t in streamed(x, y, 100).solve(0.01))
    x, y = x.double().numpy(), y.double().numpy()
    exact = Ridge(alpha=0.01, solver="svd").fit(x, y)
    found, truth = x @ weight.T + bias, exact.predict(x)
    scores = [r2_score(y, predicted, multioutput="variance_weighted") for predicted in (found, truth)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert (((found - truth) / y.std(0)) ** 2).mean() < 1e-11
    assert np.abs(weight - exact.coef_).max() < tolerance * np.abs(exact.coef_).max()


def test_what_is_kept_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(affine, "BLOCK", 64)

    def kept(tokens: int) -> int:
        sums = streamed(*planted(tokens, 0.0), 50)
        return sum(t.nbytes for t in vars(sums).values() if isinstance(t, torch.Tensor))

    assert kept(6000) == kept(100)


def test_activations_that_are_not_finite_are_an_error():
    x, y = planted(100, 0.0)
    x[3, 2] = torch.inf
    with pytest.raises(LetheError, match="not finite"):
        streamed(x, y, 100).solve(0.01)


@pytest.mark.usefixtures("blocks")
def test_fewer_tokens_than_dimensions_are_solved_by_the_penalty():
    x, y = planted(5, 0.0)
    against_sklearn(x, y, 0.5, 2, 1e-4)


@pytest.mark.usefixtures("blocks")
def test_bias_is_not_penalised():
    x, y = planted(500, 0.0)
    weight, bias = streamed(x, y + 1000, 100).solve(1e9)
    assert weight.abs().max() < 1e-3
    assert torch.allclose(bias, (y + 1000).mean(0), rtol=1e-4)


def test_no_penalty_on_degenerate_activations_is_an_error_or_a_solution():
    x, y = planted(2000, 0.0, rank=4)
    try:
        weight, _ = streamed(x, y, 100).solve(0.0)
    except LetheError:
        return
    assert torch.isfinite(weight).all()


def test_score_is_scikit_learns():
    x, y = planted(500, 20.0)
    predicted = y + 0.3 * x.roll(1, 0) - 5
    score = Score()
    for start in range(0, 500, 7):
        score.add(y[start : start + 7], predicted[start : start + 7])
    found = score.result()
    a, b = y.double().numpy(), predicted.double().numpy()
    assert found["r2"] == pytest.approx(r2_score(a, b, multioutput="variance_weighted"), rel=1e-9)
    assert found["mse"] == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)


def test_score_of_text_that_does_not_vary_is_no_crash():
    """One token of held-out text: R² has no denominator, MSE is defined."""
    score = Score()
    score.add(torch.ones(1, 4), torch.zeros(1, 4))
    assert score.result()["mse"] == pytest.approx(1.0)


def test_fit_recovers_a_planted_map_and_score_says_so():
    rng = torch.Generator().manual_seed(0)
    w, b = torch.randn(HIDDEN, HIDDEN, generator=rng), torch.randn(HIDDEN, generator=rng)
    batches = [torch.randn(100, HIDDEN, generator=rng) + 5 for _ in range(10)]
    pairs = [{2: (x, x @ w.T + b), 4: (x, 2 * x)} for x in batches]
    maps = affine.fit(pairs, 1e-6)
    assert maps.layers == [2, 4]
    assert torch.allclose(maps.weight[2], w, atol=1e-3)
    assert torch.allclose(maps.bias[2], b, atol=1e-2)
    assert torch.allclose(maps({4: batches[0]})[4], 2 * batches[0], atol=1e-3)
    scores = affine.score(pairs, maps)
    assert scores["2"]["r2"] > 0.9999
    x = torch.cat(batches).double()
    assert scores["4"]["no_map_mse"] == pytest.approx(x.square().mean().item(), rel=1e-6)
    assert scores["4"]["no_map_r2"] == pytest.approx(r2_score(2 * x, x, multioutput="variance_weighted"), rel=1e-6)


def test_maps_are_saved_in_the_published_layout_and_come_back(tmp_path):
    maps = AffineMap(
        {n: torch.randn(HIDDEN, HIDDEN) for n in (0, 10)}, {n: torch.randn(HIDDEN) for n in (0, 10)}, {"alpha": 0.5}
    )
    maps.save(tmp_path)
    with safe_open(tmp_path / "affine_transforms.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["layer_0.bias", "layer_0.weight", "layer_10.bias", "layer_10.weight"]
        assert torch.equal(file.get_tensor("layer_10.weight"), maps.weight[10])
    facts = json.loads((tmp_path / "metadata.json").read_text())
    assert (facts["layer_indices"], facts["hidden_dim"], facts["alpha"]) == ([0, 10], HIDDEN, 0.5)
    back = load_maps(tmp_path)
    assert back.layers == [0, 10]
    x = {10: torch.randn(2, 3, HIDDEN)}
    assert torch.equal(back(x)[10], maps(x)[10])
    assert load_maps(tmp_path, [10]).layers == [10]


def test_maps_of_the_published_layout_without_our_extras_can_be_read(tmp_path):
    save_file({"layer_3.weight": torch.eye(4).half(), "layer_3.bias": torch.ones(4).half()}, tmp_path / affine.WEIGHTS)
    (tmp_path / affine.METADATA).write_text(json.dumps({"layer_indices": [3], "hidden_dim": 4, "alpha": 0.01}))
    x = torch.randn(5, 4)
    assert torch.allclose(load_maps(tmp_path)({3: x})[3], x + 1)


def test_split_is_by_document_and_nothing_is_on_both_sides():
    documents = [corpora.Document(str(i), str(i)) for i in range(25)]
    fitted, held = split(documents, 0.1)
    assert (len(fitted), len(held)) == (23, 2)
    assert not {d.id for d in fitted} & {d.id for d in held}
    assert fitted + held == documents
    with pytest.raises(LetheError, match="too few"):
        split(documents[:1], 0.1)


# --- with models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(make_model, texts, tmp_path_factory):
    """A target, a source and 60 documents."""
    home = tmp_path_factory.mktemp("affine")
    make_model("llama", home / "target", seed=1)
    make_model("llama", home / "source", seed=2)
    make_model("llama", home / "stranger", seed=3)
    (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return home


def config(world: Path, out: Path, **changes) -> AffineConfig:
    settings = {
        "text": str(world / "text.jsonl"),
        "layers": [0, 3],
        "max_length": 16,
        "batch_size": 7,
        "alpha": 0.5,
        "out": str(out),
    }
    return AffineConfig(str(world / "target"), str(world / "source"), **(settings | changes))


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    return fit_affine(config(world, tmp_path_factory.mktemp("runs")))


def activations(folder: Path, documents: list[corpora.Document], layer: int) -> np.ndarray:
    """Activations at every token, by hidden_states, a document at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.no_grad():
        for document in documents:
            ids = tokenizer(document.text, return_tensors="pt")["input_ids"][:, :16]
            rows.append(model(ids, output_hidden_states=True).hidden_states[layer + 1][0])
    return torch.cat(rows).double().numpy()


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
    facts = json.loads((fitted.path / "affine" / affine.METADATA).read_text())
    assert facts["convention"] == "block_output"
    for role, folder in (("model", "target"), ("source", "source")):
        assert facts[role]["sha256"] == refs.weight_hash(refs.resolve(str(world / folder)))
    assert facts["text"]["documents"] + facts["held_out"]["documents"] == 60
    tokenizer = AutoTokenizer.from_pretrained(world / "target")
    rows = [tokenizer(d.text)["input_ids"][:16] for d in corpora.read(str(world / "text.jsonl"))]
    assert (facts["tokens"], facts["held_out_tokens"]) == (sum(map(len, rows[:54])), sum(map(len, rows[54:])))
    assert fitted.record["artifacts"]["affine"]["path"] == "affine"


def test_the_layer_is_the_block_output_not_its_input(world, fitted):
    """Maps fitted one layer off would predict the target's layer 0 much worse."""
    documents = corpora.read(str(world / "text.jsonl"))[:54]
    weight, bias = (
        t.double().numpy() for t in (load_maps(fitted.path / "affine").weight[0], load_maps(fitted.path / "affine").bias[0])
    )
    y = activations(world / "target", documents, 0)
    right = ((activations(world / "source", documents, 0) @ weight.T + bias - y) ** 2).mean()
    off = ((activations(world / "source", documents, -1) @ weight.T + bias - y) ** 2).mean()
    assert right < 0.95 * off


def test_maps_are_found_by_run_by_id_and_by_folder(fitted):
    folder = fitted.path / "affine"
    assert find_maps(str(folder)) == folder
    assert find_maps(str(fitted.path)) == folder
    assert find_maps(f"run:{fitted.id}", fitted.path.parent) == folder
    with pytest.raises(LetheError, match=affine.WEIGHTS.replace(".", r"\.")):
        find_maps(str(fitted.path.parent))


def checked_maps(folder: Path, world: Path, model: str = "target", source: str = "source", layers: tuple[int, ...] = (0, 3)):
    return check_maps(folder, refs.resolve(str(world / model)), refs.resolve(str(world / source)), list(layers))


def test_maps_are_accepted_for_their_own_pair_wherever_it_lies(world, fitted, tmp_path):
    assert checked_maps(fitted.path / "affine", world) == ["block_output"]
    shutil.copytree(world / "source", tmp_path / "copy")
    check_maps(fitted.path / "affine", refs.resolve(str(world / "target")), refs.resolve(str(tmp_path / "copy")), [3])


@pytest.mark.parametrize(("model", "source", "word"), [("stranger", "source", "model"), ("target", "stranger", "source")])
def test_maps_of_another_pair_of_weights_are_refused(world, fitted, model, source, word):
    with pytest.raises(LetheError, match=rf"fitted for {word}.*lethe affine fit"):
        checked_maps(fitted.path / "affine", world, model, source)


def test_maps_that_lack_a_layer_are_refused(world, fitted):
    with pytest.raises(LetheError, match=r"lack layers \[1\]"):
        checked_maps(fitted.path / "affine", world, layers=(0, 1))


def test_maps_without_a_record_may_be_read_by_each_convention_that_has_the_layers(world, tmp_path):
    save_file({"layer_1.weight": torch.eye(32), "layer_1.bias": torch.zeros(32)}, tmp_path / affine.WEIGHTS)
    with pytest.raises(LetheError, match=r"metadata\.json"):
        checked_maps(tmp_path, world, layers=(0,))
    (tmp_path / affine.METADATA).write_text(json.dumps({"layer_indices": [1, 3, 4], "hidden_dim": 32, "alpha": 0.01}))
    assert checked_maps(tmp_path, world, layers=(0, 2)) == ["hidden_states"]
    assert checked_maps(tmp_path, world, layers=(1,)) == ["block_output"]
    assert checked_maps(tmp_path, world, layers=(3,)) == ["block_output", "hidden_states"]
    with pytest.raises(LetheError, match=r"lack layers .* as block_output or .* as hidden_states"):
        checked_maps(tmp_path, world, layers=(0, 1))
    (tmp_path / affine.METADATA).write_text(json.dumps({"layer_indices": [1], "hidden_dim": 64}))
    with pytest.raises(LetheError, match="width 64"):
        checked_maps(tmp_path, world, layers=(1,))


@pytest.mark.parametrize("metadata", ["{}", "[]", '"text"', "{half"])
def test_maps_with_damaged_metadata_are_refused(world, tmp_path, metadata):
    save_file({"layer_0.weight": torch.eye(32), "layer_0.bias": torch.zeros(32)}, tmp_path / affine.WEIGHTS)
    (tmp_path / affine.METADATA).write_text(metadata)
    with pytest.raises(LetheError, match=r"metadata\.json"):
        checked_maps(tmp_path, world, layers=(0,))


@pytest.mark.parametrize("text", ["lab:forget", TextSource("lab:forget")])
def test_fitting_on_forget_text_is_refused(world, tmp_path, text):
    with pytest.raises(LetheError, match="never fitted on forget text"):
        fit_affine(config(world, tmp_path / "runs", text=text))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [4]}, "out of range"),
        ({"num_examples": 61}, "60 documents, 61 are asked for"),
        ({"num_examples": 1}, "too few"),
        ({"text": "nowhere.jsonl"}, "no such file"),
        ({"max_length": 65}, "max_length: 65 is beyond the window .* 64 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(world, tmp_path, changes, message):
    with pytest.raises(LetheError, match=message):
        fit_affine(config(world, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


def test_a_source_with_fewer_blocks_than_the_last_layer_is_refused_before_anything_is_written(world, make_model, tmp_path):
    shallow = make_model("llama", tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(LetheError, match="out of range"):
        fit_affine(
            AffineConfig(str(world / "target"), str(shallow), str(world / "text.jsonl"), [0, 3], out=str(tmp_path / "runs"))
        )
    assert not (tmp_path / "runs").exists()


def test_rows_beyond_the_sources_window_are_refused(world, make_model, tmp_path):
    narrow = str(make_model("llama", tmp_path / "narrow", seed=9, max_position_embeddings=32))
    with pytest.raises(LetheError, match=r"max_length: 64 is beyond the window of .*narrow', 32 tokens"):
        fit_affine(AffineConfig(str(world / "target"), narrow, str(world / "text.jsonl"), [0], out=str(tmp_path / "runs")))
    recipe = Transfer(model=str(world / "target"), source=narrow, layers=[0], max_length=64, out=str(tmp_path / "runs"))
    with pytest.raises(LetheError, match=r"max_length: 64 is beyond the window of .*narrow', 32 tokens"):
        check(recipe)
    assert not (tmp_path / "runs").exists()


def scored_documents(monkeypatch, fitted, world, **changes) -> set[str]:
    """Which documents `score_affine` makes tokens of."""
    seen: list[corpora.Document] = []
    real = corpora.tokenise
    monkeypatch.setattr(corpora, "tokenise", lambda documents, *rest: seen.extend(documents) or real(documents, *rest))
    settings = {"text": str(world / "text.jsonl"), "num_examples": 0, "max_length": 16}
    score_affine(
        AffineScoreConfig(str(fitted.path / "affine"), str(world / "target"), str(world / "source"), **(settings | changes))
    )
    return {d.id for d in seen}


@pytest.mark.parametrize("num_examples", [0, 6])
def test_scores_are_of_documents_the_maps_were_not_fitted_on(monkeypatch, world, fitted, num_examples):
    documents = corpora.read(str(world / "text.jsonl"))
    seen = scored_documents(monkeypatch, fitted, world, num_examples=num_examples)
    assert seen
    assert not seen & {d.id for d in documents[:54]}


def test_asking_for_more_documents_than_were_held_out_is_refused(world, fitted):
    """Six were held out: the seventh would be one that the maps were fitted on."""
    asked = AffineScoreConfig(
        str(fitted.path / "affine"), str(world / "target"), str(world / "source"), str(world / "text.jsonl"), 7
    )
    with pytest.raises(LetheError, match="6 documents, 7 are asked for"):
        score_affine(asked)
    with pytest.raises(LetheError, match="max_length: 65 is beyond the window"):
        score_affine(dataclasses.replace(asked, num_examples=6, max_length=65))


def test_other_text_is_scored_whole_but_for_documents_that_were_fitted_on(monkeypatch, world, fitted, tmp_path):
    documents = corpora.read(str(world / "text.jsonl"))
    new = [f"A new document, number {i}, about mills and lanterns." for i in range(5)]
    old = [d.text for d in documents[:3]]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in new + old))
    seen = scored_documents(monkeypatch, fitted, world, text=str(tmp_path / "new.jsonl"))
    assert not seen & {d.id for d in documents[:54]}
    assert len(seen) == 5


def test_scoring_the_held_out_documents_gives_the_scores_of_the_fit(world, fitted):
    again = score_affine(
        AffineScoreConfig(
            str(fitted.path / "affine"),
            str(world / "target"),
            str(world / "source"),
            str(world / "text.jsonl"),
            6,
            max_length=16,
        )
    )
    assert again.recorded and again.convention == "block_output"
    for layer, scores in fitted.record["scores"].items():
        assert again.scores[layer] == pytest.approx(scores, rel=1e-6)


def test_scoring_maps_of_another_pair_is_refused(world, fitted):
    with pytest.raises(LetheError, match="fitted for source"):
        score_affine(AffineScoreConfig(str(fitted.path), str(world / "target"), str(world / "stranger")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layer_3.bias"), r"lacks layer_3\.bias"),
        (lambda tensors: tensors["layer_3.bias"].fill_(torch.inf), r"layer_3\.bias in .* not finite"),
        (lambda tensors: tensors.update({"layer_0.weight": torch.eye(31)}), r"layer_0\.weight in .* is \[31, 31\]"),
        (lambda tensors: tensors.update({"layer_0.bias": torch.ones(1, 32)}), r"layer_0\.bias in .* is \[1, 32\]"),
    ],
)
def test_a_map_file_that_is_not_what_it_should_be_is_refused_in_words(world, fitted, tmp_path, change, message):
    folder = shutil.copytree(fitted.path / "affine", tmp_path / "maps")
    tensors = load_file(folder / affine.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / affine.WEIGHTS)
    with pytest.raises(LetheError, match="was altered after it was written"):
        load_maps(folder)
    facts = json.loads((folder / affine.METADATA).read_text())
    del facts[HASH]
    (folder / affine.METADATA).write_text(json.dumps(facts))
    with pytest.raises(LetheError, match=message):
        checked_maps(folder, world)
        load_maps(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "target"}, "which weights they belong to"),
        ({"source": {"ref": "x"}}, "which weights they belong to"),
        ({"convention": ["block_output"]}, "convention"),
        ({"fitted_ids": 5}, "fitted_ids"),
        ({"layer_indices": [True]}, "layer_indices"),
        ({HASH: 7}, "was altered"),
        ({"hidden_dim": [32]}, "are for width"),
    ],
)
def test_metadata_of_another_form_is_refused_in_words(world, fitted, tmp_path, changes, message):
    folder = shutil.copytree(fitted.path / "affine", tmp_path / "maps")
    facts = json.loads((folder / affine.METADATA).read_text())
    (folder / affine.METADATA).write_text(json.dumps(facts | changes))
    with pytest.raises(LetheError, match=message):
        checked_maps(folder, world)
