"""Rotary embedding as one operation: the values and gradients of the models' own."""

from __future__ import annotations

import sys

import pytest
import torch

from lethe.models import refs
from lethe.models.activations import blocks
from lethe.training.rotary import NAME, one_operation

IDS = torch.arange(3, 43).view(5, 8)


def outcome(model) -> dict[str, torch.Tensor]:
    """Logits, and every gradient of a loss."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"logits": logits.detach()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "olmo2", "gpt_neox", "gpt_neox_sequential"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_the_same_bits_and_gradients_the_same(architecture, dtype, make_model, tmp_path):
    model, _ = refs.load(refs.resolve(str(make_model(architecture, tmp_path / "model", seed=3))), dtype)
    model.train()
    theirs = outcome(model)
    module = sys.modules[type(blocks(model)[0]).__module__]
    plain = getattr(module, NAME)
    with one_operation(model) as fits:
        assert fits and getattr(module, NAME) is not plain
        ours = outcome(model)
        with torch.no_grad():
            assert torch.equal(model(IDS, use_cache=False).logits, theirs["logits"])
    assert getattr(module, NAME) is plain
    assert torch.equal(ours.pop("logits"), theirs.pop("logits"))
    close = 1e-5 if dtype == "float32" else 2e-2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=close, atol=close * float(gradient.abs().max()))


def test_a_model_with_positions_of_another_kind_keeps_its_own(make_model, tmp_path, monkeypatch):
    model, _ = refs.load(refs.resolve(str(make_model("gpt2", tmp_path / "model"))))
    with one_operation(model) as fits:
        assert not fits
    model, _ = refs.load(refs.resolve(str(make_model("llama", tmp_path / "other"))))
    module = sys.modules[type(blocks(model)[0]).__module__]
    monkeypatch.setattr(module, "rotate_half", lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2))
    with one_operation(model) as fits:
        assert not fits
