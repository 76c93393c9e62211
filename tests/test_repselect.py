"""RepSelect, step by step against plain formulas; its refusals, runs, resuming and memory."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import assert_same, start, wait_for
from lab_runs import settings as settings_of_lab
from plain import Plain, assert_same_weights, settings
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lethe import RepSelect, unlearn
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig, to_dict
from lethe.errors import LetheError
from lethe.methods.repselect import filtered
from lethe.models import refs
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.unlearning.beginning import begin
from lethe.unlearning.check import check
from lethe.unlearning.memory import Load, estimate
from lethe.unlearning.prepare import prepare

MATRICES = {
    "gpt_neox": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "llama": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen3": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
}
EXACT = 32
"""The smaller side of every matrix: with so many components, the decomposition is exact."""


def slow_attack(plain: Plain, names: list[str], updates: list[list[Tensor]], lr: float, r: int, seed: int) -> dict[str, Tensor]:
    """G: explicit weights W + B A, document by document, and the gradient of the summed log-likelihood by autograd."""
    weights, modules = plain.parameters, dict(plain.model.named_modules())
    draws = torch.Generator().manual_seed(seed)
    low: dict[str, list[Tensor]] = {}
    for name in names:
        shape = weights[name].shape
        outputs, inputs = shape[::-1] if isinstance(modules[name.removesuffix(".weight")], Conv1D) else shape
        bound = inputs**-0.5
        a = (torch.rand(r, inputs, generator=draws, dtype=torch.float64) * 2 - 1) * bound
        low[name] = [a.requires_grad_(), torch.zeros(outputs, r, dtype=torch.float64, requires_grad=True)]

    def attacked(name: str) -> Tensor:
        a, b = low[name]
        change = b @ a
        return weights[name] + (change if change.shape == weights[name].shape else change.T)

    def cross_entropy(documents: list[Tensor]) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        changed = {name: attacked(name) for name in names}
        for ids in documents:
            logits = functional_call(plain.model, changed, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
            for t in range(1, ids.shape[1]):
                total = total - logits[t - 1].log_softmax(-1)[ids[0, t]]
                count += 1
        return total / count

    for documents in updates:
        pairs = [tensor for pair in low.values() for tensor in pair]
        gradients = torch.autograd.grad(cross_entropy(documents), pairs)
        with torch.no_grad():
            for tensor, g in zip(pairs, gradients, strict=True):
                tensor.sub_(lr * g)
    assert all(float(b.detach().abs().max()) > 0 for _, b in low.values())
    total = {name: torch.zeros_like(weights[name]) for name in names}
    for documents in updates:
        gradients = torch.autograd.grad(-cross_entropy(documents), [weights[name] for name in names])
        for name, g in zip(names, gradients, strict=True):
            total[name] = total[name] + g
    return total


def slow_filter(gradient: Tensor) -> Tensor:
    """Σ over all singular directions of s_min² / s · u vᵀ. What a LayerNorm writes into has one of singular value 0."""
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    count = int((s > 1e-12 * s[0]).sum())
    assert count >= EXACT - 1
    return sum((s[count - 1] ** 2 / s[i] * torch.outer(u[:, i], vt[i]) for i in range(count)), torch.zeros_like(gradient))


@pytest.mark.parametrize("family", MATRICES)
def test_a_run_is_the_procedure_step_by_step(lab, make_model, tmp_path, family):
    model = str(make_model(family, tmp_path / "model", seed=0))
    given = settings(tmp_path, model, lr=10.0, budget=None)
    config = RepSelect(**given, components=EXACT, attack_lr=0.5, attack_r=3, seed=5)
    checked = check(config)
    run = Run.create("unlearn", "plain", to_dict(config), config.out)
    made = prepare(run, config, checked)
    begin(run, made.config, made.trainer)
    trainer = made.trainer
    texts = [torch.tensor([ids]) for ids in made.sequences["forget"]]
    assert len(texts) == 12
    trainer.train_with_bar("plain")
    plain = Plain(run, trainer)
    names = [name for name in plain.parameters if any(f"{part}.weight" in name for part in MATRICES[family])]
    assert set(trainer.given) == set(names) and len(names) == 4 * len(MATRICES[family])
    total = slow_attack(plain, names, [texts[i : i + 4] for i in (0, 4, 8)], lr=0.5, r=3, seed=5)
    step = {name: slow_filter(g) for name, g in total.items()}
    for name, found in trainer.given.items():
        assert (found - step[name]).abs().max() <= 1e-9 * step[name].abs().max(), name
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    rows = run.rows("metrics.jsonl")
    for i, row in enumerate(rows):
        assert row["forget_ce_loss"] == pytest.approx(-float(plain.cross_entropy(i, "forget")), rel=1e-9)
        assert row["loss"] == pytest.approx(row["forget_ce_loss"], rel=1e-6)
        with torch.no_grad():
            for name, value in step.items():
                plain.parameters[name].sub_(10.0 * value)
    assert len(rows) == 3 and rows[2]["loss"] < rows[0]["loss"]
    assert_same_weights(trainer, plain, before)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_few_components_are_those_of_svd_lowrank(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = torch.get_rng_state()
    found = filtered(gradient, 5, seed=7)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.manual_seed(7)
    u, s, v = torch.svd_lowrank(gradient, q=5)
    expected = gradient.clone()
    for i in range(5):  # the published order: inputs, then outputs
        expected -= torch.outer(gradient @ v[:, i], v[:, i]) * (1 - s[4] / s[i])
    right = expected.clone()
    for i in range(5):
        expected -= torch.outer(u[:, i], u[:, i] @ right) * (1 - s[4] / s[i])
    assert (found - expected).abs().max() <= 1e-12
    torch.set_rng_state(drawn)


def test_singular_values_of_rounding_are_left_alone():
    """Of a matrix of rank 3, the three singular values are filtered, and the zeros beside them do not count."""
    rng = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(20, 3, generator=rng))[0] for _ in range(2))
    s = torch.tensor([8.0, 4.0, 2.0])
    found = filtered(u * s @ v.T, 10, seed=0)
    assert torch.allclose(found, u * (4 / s) @ v.T, atol=1e-5)
    assert torch.equal(filtered(torch.zeros(6, 4), 2, seed=0), torch.zeros(6, 4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora.r 4", "lora: has no effect with method repselect, which trains the weights themselves"),
        ("--optimizer adamw", "optimizer: adamw has no effect with method repselect"),
        ("--max_grad_norm 1", "max_grad_norm: 1.0 has no effect with method repselect, whose step is its own"),
        ("--same_sign true", "same_sign: True has no effect with method repselect, which computes its own gradient"),
        ("--components 4096", "components: 4096 is above the width of 'lab:final'"),
        ("--max_steps -1", "max_steps: must be above 0"),
        ("--attack_lr 0", "attack_lr: must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(lab, capsys, words, said):
    assert main(["unlearn", "--method", "repselect", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_mixture_of_experts_is_refused(lab, make_model, tmp_path, family, capsys):
    make_model(family, tmp_path / "model")
    text = settings(tmp_path, str(tmp_path / "model"))
    words = [
        "--model",
        text["model"],
        "--forget",
        text["forget"],
        "--retain",
        text["retain"],
        "--components",
        "4",
        "--budget",
        "null",
    ]
    assert main(["unlearn", "--method", "repselect", *words, "--out", str(tmp_path / "runs")]) == 2
    assert "it trains the matrices of plain MLPs" in capsys.readouterr().err


def test_an_attacker_that_diverges_ends_the_run_with_the_reason(lab, make_model, tmp_path):
    given = settings(tmp_path, str(make_model("llama", tmp_path / "model")), dtype="float32", budget=None)
    with pytest.raises(LetheError, match=r"attack_lr: with 1e\+38, the attacker diverges; lower it"):
        unlearn(RepSelect(**given, components=4, attack_lr=1e38))


def of_lab(out: Path, **changes: Any) -> RepSelect:
    given = settings_of_lab(out, num_train_examples=64, max_steps=12, save_every=3, budget=None, **changes)
    return RepSelect(**{n: v for n, v in given.items() if n not in {"source", "layers", "lora"}}, components=8, lr=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [0, 5])
def test_a_run_killed_before_or_after_the_first_update_ends_in_the_same_bits(lab, tmp_path, updates):
    config = of_lab(tmp_path / "whole", eval=EvalSettings(["lab_forget_robust"], every=4, limit=8))
    whole = unlearn(config)
    rows = whole.rows("metrics.jsonl")
    assert whole.status == "complete" and rows[-1]["forget_ce_loss"] < rows[0]["forget_ce_loss"]
    assert set(whole.record["artifacts"]) == {"method", "model"} and (whole.path / "method.safetensors").is_file()
    process = start("unlearn", dataclasses.replace(config, out=str(tmp_path / "killed")), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", updates)
    while Run.open(run.path).status == "queued":  # a run computes the gradient when it has started
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if Run.open(run.path).status == "lost":
        run = resume(ResumeConfig(str(run.path)))
    assert_same(Run.open(run.path), whole)


@pytest.mark.slow
def test_small_steps_of_bfloat16_weights_add_up(lab, tmp_path):
    """Ten updates of a tenth are one update, up to the rounding of the weights at the end."""
    few = EvalSettings(["lab_forget_robust"], limit=8)
    ten, one = (
        unlearn(dataclasses.replace(of_lab(tmp_path / str(n), dtype="bfloat16", eval=few), max_steps=n, lr=0.05 / n))
        for n in (10, 1)
    )
    found, expected = (load_file(run.path / "model" / "model.safetensors") for run in (ten, one))
    changed = load_file(ten.path / "method.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in changed.values())
    for name in changed:
        difference = (found[name].float() - expected[name].float()).abs()
        assert (difference <= 2**-7 * expected[name].float().abs()).all() and (difference > 0).float().mean() < 0.02
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() - changed.keys())


def test_the_plan_counts_the_gradient_of_all_matrices_in_float32(lab, tmp_path):
    """G in float32 and a gradient in the weights' type, beside the attacker; afterwards the result in the weights' type."""
    model = refs.resolve("lab:final")
    config = of_lab(tmp_path, dtype="bfloat16")
    load = Load(width=32, tokens={"forget": 64 * 32}, libraries=1)
    found = estimate(config, lambda: refs.outline(model, "bfloat16"), load)
    numbers = found.facts["trained"]
    assert 6 * numbers <= found.phases["method"]["gradients"] <= 9 * numbers
    assert found.phases["training"]["method"] == 2 * numbers and "method" not in found.phases["trial"]
