"""Routing by module role on several architectures, and the updates against torch's own optimizers."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from families import PLAIN
from torch import nn
from transformers import AutoModelForCausalLM

from lethe import LoraSettings, Transfer
from lethe.errors import LetheError
from lethe.models.adapters import add_adapters
from lethe.training.optimizers import Muon, eight_bit_adamw, make_optimizer, orthogonalise, routes, routing_table
from lethe.unlearning.check import refuse_types


@pytest.mark.parametrize("architecture", PLAIN)
def test_hidden_matrices_go_to_muon_and_all_else_to_adamw(make_model, tmp_path, architecture):
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture, tmp_path))
    found = {route.name: route for route in routes(model, "muon")}
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        outside = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        expected = "muon" if parameter.ndim == 2 and not outside else "adamw"
        assert found[name].algorithm == expected, name
    assert {row["role"] for row in routing_table(list(found.values())) if row["algorithm"] == "muon"} == {"matrix"}


def test_the_two_matrices_of_an_adapter_go_to_muon(make_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model("gpt_neox", tmp_path))
    found = routes(add_adapters(model, LoraSettings(r=2), [0, 1], seed=0), "muon")
    assert len(found) == 16 and {route.algorithm for route in found} == {"muon"}


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torchs_muon(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "algorithm": "muon", "weight_decay": 0.1, "transposed": False}
    mine = train([ours], Muon([group], lr=0.02, newton_schulz_dtype=torch.bfloat16))
    other = train([theirs], torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1))
    torch.testing.assert_close(mine[0], other[0], atol=2e-3, rtol=2e-2)
    assert (mine[0] - start).abs().max() > 0.02


def test_its_adamw_is_torchs_adamw():
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = train([ours], Muon([{"params": [ours], "algorithm": "adamw", "weight_decay": 0.1}], lr=0.02))
    other = train([theirs], torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1))
    torch.testing.assert_close(mine[0], other[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sgd_is_torchs_sgd_and_small_steps_of_bfloat16_weights_add_up(make_model, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(make_model("gpt2", tmp_path), dtype=dtype)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Transfer(source="x", optimizer="sgd", weight_decay=0.1, lr=1e-3))
    assert {group["algorithm"] for group in optimizer.param_groups} == {"sgd"}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(50):
        optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.0 if name.endswith("bias") or ".ln_" in name else 0.1
        expected = before[name]
        for _ in range(50):
            expected = expected * (1 - 1e-3 * decay) - 1e-3
        torch.testing.assert_close(p.detach().float(), expected, rtol=0.004 if dtype == "bfloat16" else 1e-5, atol=2e-6)


def test_orthogonalise_keeps_directions_and_evens_out_singular_values():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    result = orthogonalise(matrix, torch.float32)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ v.T
    assert (inner.diagonal() > 0.6).all() and (inner.diagonal() < 1.3).all()
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


def test_groups_have_names_and_norms_and_biases_do_not_decay(make_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model("gpt2", tmp_path))
    optimizer = make_optimizer(model, Transfer(source="x", optimizer="muon", weight_decay=0.1, lr=0.3))
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"adamw": 0.1, "adamw_no_decay": 0.0, "muon_transposed": 0.1}
    assert all(group["lr"] == 0.3 for group in optimizer.param_groups)


def test_8_bit_updates_below_a_rounding_step_of_bfloat16_count_on_average():
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))  # the step below 1 is 2^-8
    optimizer = eight_bit_adamw()([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(1 - weight.float().mean()) == pytest.approx(20e-4, rel=0.1)


@pytest.mark.parametrize(("package", "refused"), [("torchao", False), ("bitsandbytes", True)])
def test_8_bit_full_rank_training_in_bfloat16_needs_rounding_at_random(package, refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == package or None)
    config = Transfer(source="lab:global_step1", lora=None, dtype="bfloat16", optimizer="adamw_8bit")
    expected = pytest.raises(LetheError, match="lost to rounding, except with torchao") if refused else contextlib.nullcontext()
    with expected:
        refuse_types(config)
