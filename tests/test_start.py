"""The weights that a run starts from: rewound by score, or corrupted; and UNDO, which restores corrupted weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import recipe
from lab_runs import settings as settings_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from lethe import Distill, LoraSettings, unlearn
from lethe.cli import main
from lethe.config.unlearning import CorruptSettings
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.methods.method import Progress
from lethe.methods.undo import Undo
from lethe.models import refs
from lethe.models.activations import read
from lethe.text import corpora
from lethe.unlearning import scores, start
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.pipeline import inspect
from lethe.unlearning.view import Teacher, View

FAMILIES = ["gpt_neox", "gpt2", "llama", "qwen3_moe"]
"""Separate heads, tied and transposed matrices, norms without bias, experts."""


def rows(number: int, seed: int) -> list[list[int]]:
    """Sequences of one to thirty tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (number,), generator=random).tolist()
    return [torch.randint(3, 90, (length,), generator=random).tolist() for length in lengths]


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short run; `layers` only says where adapters sit."""
    found = settings_of(out, **changes)
    return {name: value for name, value in found.items() if name != "layers" or found["lora"]}


def weights_of(name: str | Path) -> dict[str, Tensor]:
    """The weights of a model by the names of its parameters, which are not those of its file."""
    return {key: parameter.detach() for key, parameter in refs.load(refs.resolve(str(name)))[0].named_parameters()}


TEXTS = {"forget": rows(37, 1), "retain": rows(50, 2)}


def squares(model: Any, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Σ over batches of the squared gradient of the mean NLL, one document after the other."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for start_ in range(0, len(sequences), 16):
        batch = sequences[start_ : start_ + 16]
        loss: Any = 0.0
        for ids in batch:
            if len(ids) > 1:
                tokens = torch.tensor([ids])
                loss = loss + cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum")
        loss = loss / sum(len(ids) - 1 for ids in batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for value, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                value.add_(gradient**2)
    return total


def slow_scores(model: Any, smallest: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """F_f / F_r, and where it is rounding alone: biases of keys have no effect, so that their gradient is 0 in theory."""
    forget, retain = squares(model, TEXTS["forget"]), squares(model, TEXTS["retain"])
    found, rounding = {}, {}
    for name in forget:
        ratio = forget[name] / retain[name]
        ratio[forget[name] == 0] = 0
        found[name], rounding[name] = ratio.float(), (forget[name] > 0) & (forget[name] < smallest)
    return found, rounding


def slow_masks(scored: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The highest share by a full sort; of equal scores, the first ones."""
    every = torch.cat([value.float().flatten() for value in scored.values()])
    number = max(1, round(share * len(every)))
    order = sorted(range(len(every)), key=lambda i: (-every[i].item(), i))
    mask = torch.zeros(len(every), dtype=torch.bool)
    mask[order[:number]] = True
    parts = mask.split([value.numel() for value in scored.values()])
    return {name: part.view_as(value) for (name, value), part in zip(scored.items(), parts, strict=True)}


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory):
    """pair(family): references of a model and of a source."""
    folder = tmp_path_factory.mktemp("pairs")

    def make(family: str) -> tuple[refs.ModelRef, refs.ModelRef]:
        for name, seed in (("model", 1), ("source", 2)):
            if not (folder / family / name).exists():
                make_model(family, folder / family / name, seed=seed)
        return refs.resolve(str(folder / family / "model")), refs.resolve(str(folder / family / "source"))

    return make


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_rewound_by_score_are_those_of_a_loop_over_batches_and_a_full_sort(pair, tmp_path, family):
    target, source = pair(family)
    dtype = "float32" if family in {"llama", "qwen3_moe"} else "float64"  # their norms round to float32
    model, file = refs.load(target, dtype)[0], tmp_path / scores.FILE
    expected, rounding = slow_scores(model, 1e-24 if dtype == "float64" else 1e-12)
    scores.fisher(model, TEXTS, 0, file)
    found = load_file(file)
    assert list(expected) == [name for name, _ in model.named_parameters()] and found.keys() == expected.keys()
    assert sum(int(mask.sum()) for mask in rounding.values()) < 0.01 * sum(mask.numel() for mask in rounding.values())
    for name, value in expected.items():
        value[rounding[name]] = found[name][rounding[name]]
        assert torch.allclose(found[name], value, rtol=1e-6 if dtype == "float64" else 2e-2, atol=0), name
        assert torch.equal(found[name] == 0, value == 0) and torch.equal(found[name].isinf(), value.isinf())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    before, theirs = (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        dict(refs.load(source, dtype)[0].named_parameters()),
    )
    masks = slow_masks(expected if dtype == "float64" else found, 0.75)
    facts = start.rewind(model, Frozen(source, dtype), 1.0, scores.Highest(file, dict(model.named_parameters()), 0.75))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.where(masks[name], theirs[name], before[name])), name
    numbers = {n: (int(mask.sum()), mask.numel()) for n, mask in masks.items()}
    assert facts["share"] == sum(a for a, _ in numbers.values()) / sum(b for _, b in numbers.values())
    assert facts["share"] == pytest.approx(0.75, abs=1e-4)
    inside = [value for name, value in numbers.items() if ".1." in name and "experts.1" not in name]
    assert facts["by_layer"]["1"] == sum(a for a, _ in inside) / sum(b for _, b in inside)
    assert {"embedding", "matrix", "norm"} <= facts["by_role"].keys() and ("experts" in facts["by_role"]) == (
        family == "qwen3_moe"
    )


def test_a_share_of_the_way_is_rewound_too(pair, tmp_path):
    target, source = pair("gpt2")
    model, file = refs.load(target)[0], tmp_path / "mine.safetensors"
    random = torch.Generator().manual_seed(0)
    save_file({n: torch.rand(p.shape, generator=random) for n, p in model.named_parameters()}, file)
    before, theirs = {n: p.detach().clone() for n, p in model.named_parameters()}, dict(refs.load(source)[0].named_parameters())
    masks = slow_masks({n: load_file(file)[n] for n in before}, 0.3)
    start.rewind(model, Frozen(source, "float32"), 0.25, scores.Highest(file, dict(model.named_parameters()), 0.3))
    for name, parameter in model.named_parameters():
        moved = torch.where(masks[name], before[name] + 0.25 * (theirs[name] - before[name]), before[name])
        assert torch.allclose(parameter, moved, atol=1e-7, rtol=0), name
        assert torch.equal(parameter[~masks[name]], before[name][~masks[name]])


def test_scores_do_not_depend_on_groups_nor_on_the_documents_of_a_pass(pair, tmp_path, monkeypatch):
    model = refs.load(pair("gpt_neox")[0], "float64")[0]
    scores.fisher(model, TEXTS, 0, tmp_path / "whole")
    monkeypatch.setattr(scores, "GROUP", 200_000)
    assert len(scores.groups(dict(model.named_parameters()))) > 3
    scores.fisher(model, TEXTS, 0, tmp_path / "groups")
    assert (tmp_path / "groups").read_bytes() == (tmp_path / "whole").read_bytes()
    monkeypatch.setattr(scores, "TOKENS", 60)
    scores.fisher(model, TEXTS, 0, tmp_path / "passes")
    one, other = load_file(tmp_path / "passes"), load_file(tmp_path / "whole")
    without_keys = [name for name in other if not name.endswith("query_key_value.bias")]  # those of keys are rounding
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=0) for name in without_keys)


def test_bfloat16_weights_are_scored_with_sums_in_float32(pair, tmp_path):
    model = refs.load(pair("gpt_neox")[0], "bfloat16")[0]
    scores.fisher(model, TEXTS, 0, tmp_path / scores.FILE)
    total: Tensor = torch.zeros(())
    for first in range(0, 37, 16):
        batch = TEXTS["forget"][first : first + 16]
        scores._backward(model, scores.head_of(model), batch, 0)
        total = total + model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.grad.float() ** 2
        model.zero_grad()
    part = {"w": model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight}
    summed = scores._squares(model, part, scores.head_of(model), TEXTS["forget"], 0, lambda done: None)["w"]
    assert summed.dtype == torch.float32 and torch.equal(summed, total)
    assert {value.dtype for value in load_file(tmp_path / scores.FILE).values()} == {torch.float32}


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "signs", "bfloat16", "one value"])
def test_the_highest_scores_are_those_of_a_full_sort(tmp_path, monkeypatch, kind, share):
    monkeypatch.setattr(scores, "CHUNK", 97)
    random = torch.Generator().manual_seed(3)
    made = {name: torch.rand(shape, generator=random).exp() for name, shape in (("z", (40, 11)), ("a", (7,)), ("m", (3, 5, 9)))}
    if kind == "ties":
        made = {name: (5 * value).round() for name, value in made.items()}
    elif kind == "zeros":
        made = {name: torch.where(value < 1.6, 0.0, torch.where(value > 2.5, torch.inf, value)) for name, value in made.items()}
    elif kind == "signs":
        made = {name: torch.where(value < 1.5, -0.0, value - 2) for name, value in made.items()}
        made["a"] = torch.zeros(7)
        made["m"][0, 0, 0] = -torch.inf
    elif kind == "bfloat16":
        made = {name: value.bfloat16() for name, value in made.items()}
    elif kind == "one value":
        made = {name: torch.full_like(value, 0.5) for name, value in made.items()}
    save_file(made, tmp_path / "s.safetensors")
    parameters = {name: torch.nn.Parameter(torch.zeros(value.shape)) for name, value in made.items()}
    highest = scores.Highest(tmp_path / "s.safetensors", parameters, share)
    expected = slow_masks(made, share)
    assert all(torch.equal(highest.of(name), mask) for name, mask in expected.items())
    assert highest.threshold == min(float(made[name].float()[mask].min()) for name, mask in expected.items() if mask.any())


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_file(pair, tmp_path):
    model = refs.load(pair("gpt_neox")[0])[0]
    model.gpt_neox.layers[2].mlp.dense_h_to_4h.weight.data[0, 0] = torch.inf
    with pytest.raises(LetheError, match=r"rewind_weights: the gradient of .* is not finite"):
        scores.fisher(model, TEXTS, 0, tmp_path / scores.FILE)
    assert not (tmp_path / scores.FILE).exists()


# --- runs ------------------------------------------------------------------------------------------------------------


def short(out: Path, **changes: Any) -> Distill:
    return Distill(**settings(out, **({"rewind": 1.0, "rewind_weights": "fisher", "lora": None, "max_steps": 1} | changes)))


def test_a_run_keeps_its_scores_and_another_run_uses_them(lab, tmp_path):
    run = unlearn(short(tmp_path, lr=1e-12))
    file = run.path / "scores.safetensors"
    assert run.record["artifacts"]["scores"] == {"path": "scores.safetensors", "sha256": sha256(file)}
    facts = run.record["rewound"]
    assert facts["share"] == pytest.approx(0.75, abs=1e-4) and facts["threshold"] > 0 and facts["tokens"] > 1000
    assert {"outside", "0", "5"} <= facts["by_layer"].keys() and all(0 <= value <= 1 for value in facts["by_layer"].values())
    lengths = dict.fromkeys(("model_forward", "model_backward"), facts["tokens"])
    assert run.record["cost"]["before"]["scoring weights"]["tokens"] == lengths
    trained_on = sum(row["passes"]["model_backward"] for row in run.rows("metrics.jsonl"))
    assert run.record["cost"]["tokens"]["model_backward"] == trained_on + facts["tokens"]
    whole = run.record["cost"]["pretraining"]
    assert whole["share_of_tokens"] == pytest.approx((trained_on + facts["tokens"]) / whole["tokens"])
    assert run.record["plan"]["seconds"]["scoring weights"] > 0 and "scores" in run.record["plan"]["memory_by_phase"]
    model, source = weights_of("lab:final"), weights_of(run.record["config"]["source"])
    trained, scored = weights_of(run.path / "model"), load_file(file)
    masks = slow_masks({name: scored[name] for name in model}, 0.75)
    for name, value in trained.items():
        assert torch.allclose(value, torch.where(masks[name], source[name], model[name]), atol=1e-10), name

    other = unlearn(short(tmp_path, lr=1e-12, rewind_weights=f"run:{run.id}", rewind_share=0.5))
    assert other.record["parents"]["scores"] == {"ref": f"run:{run.id}", "sha256": sha256(file)}
    assert other.record["rewound"]["share"] == pytest.approx(0.5, abs=1e-4) and "scores" not in other.record["artifacts"]
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(LetheError, match="was altered after its run wrote it"):
        unlearn(short(tmp_path, rewind_weights=f"run:{run.id}"))


def test_adapters_are_trained_on_rewound_weights_and_kept_scores_are_used_again(lab, tmp_path, monkeypatch):
    run = unlearn(short(tmp_path, lora=LoraSettings(dropout=0.0), rewind_share=0.6))
    base = weights_of(run.path / "base")
    model, source = weights_of("lab:final"), weights_of(run.record["config"]["source"])
    same = sum(int((base[name] == source[name]).sum()) for name in base)
    assert same / sum(value.numel() for value in base.values()) == pytest.approx(0.6, abs=0.01)
    assert all(((base[n] == source[n]) | (base[n] == model[n])).all() for n in base)

    made = dataclasses.replace(short(tmp_path, lora=LoraSettings(dropout=0.0), rewind_share=0.6))
    monkeypatch.setattr(scores, "fisher", lambda *_: pytest.fail("the weights were scored again"))
    ref = refs.resolve("lab:final")
    student, tokenizer = refs.load(ref)
    checked: Any = dataclasses.make_dataclass("Checked", ["scores"])(None)
    start.move_start(run, made, checked, student, Frozen(refs.resolve(made.source), "float32"), tokenizer)
    assert all(torch.equal(parameter, base[name]) for name, parameter in student.named_parameters())


def test_check_scores_one_batch_and_leaves_nothing_behind(lab, tmp_path, monkeypatch):
    read_ = []
    fisher = scores.fisher
    monkeypatch.setattr(scores, "fisher", lambda model, texts, *more: (read_.append(texts), fisher(model, texts, *more)))
    plan = inspect(short(tmp_path))
    assert {name: len(part) for name, part in read_[0].items()} == {"forget": 16, "retain": 16}
    assert plan["seconds"]["scoring weights"] > 0 and not list(tmp_path.iterdir())
    parameters = sum(p.numel() for p in refs.load(refs.resolve("lab:final"))[0].parameters())
    assert plan["memory_by_phase"]["scores"] > 4 * parameters + 12 * parameters  # the weights, a gradient and two sums


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rewind_weights fisher", "rewind_weights: fisher has no effect while rewind is 0"),
        ("--rewind 1 --rewind_share 0.5", "rewind_share: 0.5 has no effect with rewind_weights all"),
        ("--rewind 1 --rewind_weights fisher --rewind_share 0", "rewind_share: must be above 0 and at most 1"),
        ("--rewind 1 --rewind_weights fischer", "rewind_weights: expected all, fisher, a .safetensors file or run:ID"),
        ("--rewind 1 --rewind_weights none.safetensors", "rewind_weights: 'none.safetensors' cannot be read"),
        ("--rewind 1 --rewind_weights run:nothing", "run:nothing is not in"),
        ("--rewind 1 --corrupt {share: 0.5}", "rewind and corrupt both set the weights to start from"),
        ("--corrupt {share: 0}", "corrupt.share: must be above 0 and at most 1"),
        ("--corrupt {noise: -1}", "corrupt.noise: must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(lab, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    source = next(value for name, value in settings(tmp_path).items() if name == "source")
    before, braces, after = words.partition("{")
    given = [*before.split(), *([braces + after] if braces else [])]
    assert main(["unlearn", "--method", "distill", "--source", source, *given]) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split()), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("gpt_neox.final_layer_norm.bias"), r"has no scores for gpt_neox.final_layer_norm.bias \[64\]"),
        (lambda s: s.update(more=torch.zeros(3)), "the model has no parameter more"),
        (
            lambda s: s.update({"gpt_neox.final_layer_norm.bias": torch.zeros(3)}),
            r"shape \[3\] for gpt_neox.final_layer_norm.bias",
        ),
        (lambda s: s["gpt_neox.final_layer_norm.bias"].fill_(torch.nan), "NaN for gpt_neox.final_layer_norm.bias"),
    ],
)
def test_scores_that_do_not_fit_the_model_are_refused(lab, tmp_path, change, said):
    made = {name: torch.rand(p.shape) for name, p in refs.load(refs.resolve("lab:final"))[0].named_parameters()}
    change(made)
    save_file(made, tmp_path / "mine.safetensors")
    with pytest.raises(LetheError, match=said):
        unlearn(short(tmp_path / "runs", rewind_weights=str(tmp_path / "mine.safetensors")))
    assert not (tmp_path / "runs").exists()


# --- noise and UNDO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_corrupted_weights_are_shrunk_with_uniform_noise_of_each_matrix(pair, family):
    model = refs.load(pair(family)[0], "float64")[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start.corrupt(model, CorruptSettings(share=0.6, noise=0.1), seed=3)
    experts = 0
    for name, parameter in model.named_parameters():
        rest = (parameter - (1 - 0.6) * before[name]).detach()
        if parameter.ndim == 1:
            assert rest.abs().max() < 1e-9
            continue
        experts += parameter.ndim == 3
        for matrix in rest.view(-1, *rest.shape[-2:]):
            bound = 0.6 * 0.1 * (6 / (matrix.shape[0] + matrix.shape[1])) ** 0.5
            assert 0.9 * bound < matrix.abs().max() <= bound + 1e-12
            assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.15) and abs(matrix.mean()) < 0.2 * bound
    assert bool(experts) == (family == "qwen3_moe")

    again = refs.load(pair(family)[0], "float64")[0]
    start.corrupt(again, CorruptSettings(share=0.6, noise=0.1), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    start.corrupt(again, CorruptSettings(share=1.0, noise=0.0), seed=3)
    assert all((p == 0).all() for p in again.parameters())


def test_noise_is_that_of_xavier_initialisation_to_the_last_digit(pair):
    model = refs.load(pair("gpt_neox")[0], "float64")[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start.corrupt(model, CorruptSettings(share=0.3, noise=0.7), seed=5)
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.zeros_like(before[name])
        if noise.ndim > 1:
            torch.nn.init.xavier_uniform_(noise, generator=random)
        assert (parameter - (0.7 * before[name] + 0.3 * 0.7 * noise)).abs().max() < 1e-9


def test_the_loss_of_undo_and_its_gradient_are_the_formula(pair):
    target, other = pair("gpt_neox")
    model, reference = refs.load(target, "float64")[0], refs.load(other, "float64")[0]
    expected: Any = 0.0
    for text in ("forget", "retain"):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids in TEXTS[text]:
            q = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            p = reference(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
            total, count = total + (p.exp() * (p - q)).sum(), count + len(ids)
        expected = expected + 0.5 * total / count
    method, found = Undo(), 0.0
    for text, need in method.needs().items():
        ids, mask = corpora.pad(TEXTS[text], 0)
        states = read(model, ids, [], need.logits)
        view = View(
            ids,
            mask,
            torch.arange(len(ids)),
            states,
            int(mask.sum()),
            len(ids),
            None,
            Teacher(need, Frozen(other, "float64"), ""),
        )
        loss, parts = method.loss(text, view, Progress(0, 1, 1))
        assert list(parts) == [f"{text}_kl_loss"] and parts[f"{text}_kl_loss"] == 2 * loss
        found = found + loss
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    parameters = list(model.parameters())
    for one, two in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert (one - two).abs().max() <= 1e-9 * two.abs().max().clamp(min=1e-6)


@pytest.mark.slow
def test_undo_restores_a_model_from_noise(lab, tmp_path):
    source = recipe(tmp_path).source
    first = unlearn(Distill(**settings(tmp_path, lora=None, max_steps=2)))
    more: dict[str, Any] = {"source": "", "model": f"run:{first.id}", "lr": 3e-3}
    run = unlearn(Undo(**settings(tmp_path, lora=None, **more | {"max_steps": 20})))
    losses = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"] and "rewound" not in run.record
    adapters = unlearn(Undo(**settings(tmp_path, lora=LoraSettings(dropout=0.0), **more)))
    base, before = weights_of(adapters.path / "base"), weights_of(first.path / "model")
    assert all(torch.allclose(base[name], 0.4 * value, atol=1e-6) for name, value in before.items() if value.ndim == 1)
    rewound = unlearn(Undo(**settings(tmp_path, lora=None, **more | {"corrupt": None, "rewind": 0.6, "source": source})))
    assert rewound.status == "complete"
    with pytest.raises(LetheError, match="corrupt: null leaves nothing to restore"):
        Undo(corrupt=None)
    with pytest.raises(LetheError, match="rewind and corrupt both set the weights to start from"):
        Undo(rewind=0.5, source=source)
