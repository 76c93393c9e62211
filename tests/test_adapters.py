"""LoRA as one product: PEFT's outputs and gradients, from PEFT itself; everything else stays PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lethe.config import LoraSettings
from lethe.models import refs
from lethe.models.adapters import add_adapters
from lethe.training import merged_lora
from lethe.training.merged_lora import merged_bytes, one_product

IDS = torch.arange(3, 43).view(5, 8)


def adapted(make_model, folder, architecture="llama", dropout=0.0, dtype="float32") -> Any:
    base, _ = refs.load(refs.resolve(str(make_model(architecture, folder / "model", seed=3))), dtype)  # its own dropout is off
    model: Any = add_adapters(base, LoraSettings(r=4, alpha=6, dropout=dropout), [2], seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first: the gradient of A would be 0, too
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model.train()


def outcome(model: Any) -> dict[str, torch.Tensor]:
    """Logits and every gradient of a loss."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"logits": logits.detach()}


def assert_close(ours: dict[str, torch.Tensor], peft: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == peft.keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, peft[name], rtol=1e-4, atol=1e-5 * float(peft[name].abs().max()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "olmo2", "gpt_neox", "gpt_neox_sequential"])
def test_outputs_and_gradients_are_pefts_before_and_after_an_update(architecture, make_model, tmp_path):
    model = adapted(make_model, tmp_path, architecture)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    with one_product(model) as merged:
        names = merged.names
        assert names and all(".0." in n or ".1." in n or ".2." in n for n in names)
        for _ in range(2):
            ours = outcome(model)
            forwards = {n: m.__dict__.pop("forward") for n, m in model.named_modules() if n in names}
            assert_close(ours, outcome(model))
            for n, m in model.named_modules():
                if n in names:
                    m.forward = forwards[n]
            optimizer.step()
            merged.renew()


def test_rows_taken_some_at_a_time_give_the_same_gradients(make_model, tmp_path, monkeypatch):
    model = adapted(make_model, tmp_path)
    peft = outcome(model)
    with one_product(model):
        monkeypatch.setattr(merged_lora, "ROWS", 16)  # of 40
        assert_close(outcome(model), peft)


def test_no_gradient_as_large_as_a_weight_and_one_merge_an_update(make_model, tmp_path, monkeypatch):
    model, merges = adapted(make_model, tmp_path), []
    plain = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: merges.append(1) or plain(*args, **kwargs))
    with one_product(model) as merged:
        for _ in range(3):
            outcome(model)
    names = merged.names
    assert len(merges) == len(names)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert merged_bytes(model) == sum(4 * model.get_submodule(n).weight.numel() for n in names)


def test_evaluation_within_and_training_afterwards_are_pefts_own(make_model, tmp_path):
    model = adapted(make_model, tmp_path)
    with torch.no_grad():
        before = model.eval()(IDS).logits
        with one_product(model) as merged:
            assert torch.equal(model(IDS).logits, before)
    assert not any("forward" in model.get_submodule(n).__dict__ for n in merged.names)
    assert torch.equal(model(IDS).logits, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dropout", "dtype"), [(0.1, "float32"), (0.0, "bfloat16")])
def test_adapters_with_dropout_or_of_another_type_are_left_to_peft(make_model, tmp_path, dropout, dtype):
    model = adapted(make_model, tmp_path, dropout=dropout, dtype=dtype)
    with one_product(model) as merged:
        assert merged.names == [] and merged_bytes(model) == 0


def test_gradient_checkpointing_gives_the_same_gradients(make_model, tmp_path):
    model = adapted(make_model, tmp_path)
    with one_product(model):
        plain = outcome(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        assert_close(outcome(model), plain)
