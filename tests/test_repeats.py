"""Tokens that come more than once, computed once in the first block: outputs and gradients are those of the plain pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lethe import Transfer
from lethe.config import EvalSettings, LoraSettings
from lethe.lab.presets import active_preset
from lethe.models import refs
from lethe.models.activations import blocks
from lethe.models.adapters import add_adapters
from lethe.training import repeats
from lethe.training.merged_lora import one_product
from lethe.training.repeats import Places, once_a_token
from lethe.unlearning.pipeline import unlearn

IDS = torch.randint(3, 20, (6, 40), generator=torch.Generator().manual_seed(0))
ALONE = {
    "gpt_neox": ["attention.query_key_value", "mlp"],
    "gpt_neox_sequential": ["attention.query_key_value"],
    "llama": [f"self_attn.{name}_proj" for name in "qkv"],
    "qwen2": [f"self_attn.{name}_proj" for name in "qkv"],
    "qwen2_moe": [f"self_attn.{name}_proj" for name in "qkv"],
    "olmo2": [f"self_attn.{name}_proj" for name in "qkv"],
}


def loaded(make_model, folder, architecture: str, lora: bool = False, dropout: float = 0.0, dtype: str = "float32") -> Any:
    model: Any = refs.load(refs.resolve(str(make_model(architecture, folder / "model", seed=3))), dtype)[0]
    if lora:
        model = add_adapters(model, LoraSettings(r=4, alpha=6, dropout=dropout), [2], seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first: the gradient of A would be 0, too
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def outcome(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Logits and every gradient of a loss."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"logits": logits.detach()}


def rows_of(module: nn.Module, model: Any, ids: torch.Tensor = IDS) -> list[int]:
    """How many rows a module sees in a pass in training."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).shape[0]))
    outcome(model, ids)
    handle.remove()
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ALONE)
def test_outputs_and_gradients_are_those_of_all_rows(architecture, lora, make_model, tmp_path):
    model = loaded(make_model, tmp_path, architecture, lora)
    plain = outcome(model)
    with once_a_token(model) as names, one_product(model):
        assert names == ALONE[architecture]
        ours = outcome(model)
        linear = blocks(model)[0].get_submodule(names[0])
        assert rows_of(linear, model) == [64]  # 17 distinct tokens, filled up, for 240
    assert ours.keys() == plain.keys()
    for name, one in plain.items():
        torch.testing.assert_close(ours[name], one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert rows_of(linear, model) == [240]


@pytest.mark.parametrize("lora", [LoraSettings(r=4, dropout=0.0), None], ids=["lora", "full"])
def test_runs_compute_tokens_once_and_learn_what_they_learn_from_all_rows(lab, lora, tmp_path, monkeypatch):
    source, few = f"lab:global_step{active_preset().onset}", EvalSettings(["lab_forget_robust"], limit=4)
    settings = {"source": source, "num_train_examples": 64, "max_steps": 6, "lora": lora, "eval": few, "out": str(tmp_path)}
    settings |= {"lr": 1e-3, "schedule": "constant"}
    calls, apply, rows = [], repeats._Spread.apply, []
    monkeypatch.setattr(repeats._Spread, "apply", lambda *args: calls.append(torch.is_grad_enabled()) or apply(*args))
    for share in (repeats.FEW, 0.0):
        monkeypatch.setattr(repeats, "FEW", share)
        calls.clear()
        rows.append(unlearn(Transfer(**settings)).rows("metrics.jsonl"))
        assert sum(calls) >= (12 if share else 0)  # two modules an update
        assert any(calls) == bool(share)
    for term in ("cb_loss", "retain_kl_loss"):
        once, plain = ([row[term] for row in run] for run in rows)
        assert once == pytest.approx(plain, rel=1e-3, abs=1e-6)
        assert len(set(once)) == 6


def test_places_say_where_each_token_is():
    places = Places(IDS)
    distinct = IDS.unique()
    assert torch.equal(IDS.flatten()[places.first[: len(distinct)]], distinct)
    assert torch.equal(distinct[places.token].view_as(IDS), IDS)
    ends = [*places.starts[1 : len(distinct)].tolist(), IDS.numel()]
    for token, start, end in zip(distinct, places.starts.tolist(), ends, strict=False):
        assert places.order[start:end].tolist() == (IDS.flatten() == token).nonzero().flatten().tolist()
    assert len(places.first) == len(places.starts) == repeats.WHOLE


def test_a_batch_of_mostly_distinct_tokens_and_an_evaluation_take_all_rows(make_model, tmp_path):
    model = loaded(make_model, tmp_path, "gpt_neox")
    with once_a_token(model):
        mlp: Any = blocks(model)[0].mlp
        assert rows_of(mlp, model, torch.arange(3, 99).view(4, 24)) == [96]
        seen: list[int] = []
        mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).shape[0]))
        with torch.no_grad():
            model(IDS)
        model.eval()
        outcome(model)
        assert seen == [240, 240]
        model.train()
        embedded = model.get_input_embeddings()(IDS)
        model(inputs_embeds=embedded)
        model(inputs_embeds=embedded + torch.randn_like(embedded))  # tokens of which nothing is known
        model.get_input_embeddings().register_forward_hook(lambda *args: args[-1] + torch.randn_like(args[-1]))
        model(IDS)
        assert seen[2:] == [64, 240, 240]


def test_gradient_checkpointing_computes_all_rows(make_model, tmp_path):
    model = loaded(make_model, tmp_path, "llama")
    plain = outcome(model)
    with once_a_token(model) as names:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert rows_of(blocks(model)[0].get_submodule(names[0]), model)[0] == 240
        ours = outcome(model)
    assert all(torch.equal(ours[name], one) for name, one in plain.items())


def test_attention_that_adds_nothing_as_yet_is_seen(make_model, tmp_path):
    """The MLP after it is given the same for equal tokens, but has a gradient that differs by place."""
    model = loaded(make_model, tmp_path, "llama")
    nn.init.zeros_(blocks(model)[0].self_attn.o_proj.weight)
    state = torch.get_rng_state()
    with once_a_token(model) as names:
        assert names == ALONE["llama"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not blocks(model)[0].self_attn.o_proj.weight.any()


@pytest.mark.parametrize(
    "settings",
    [{"architecture": "gpt2"}, {"dtype": "bfloat16"}, {"lora": True, "dropout": 0.1}],
    ids=["learned positions", "bfloat16", "dropout"],
)
def test_models_whose_rows_would_differ_are_left_alone(settings, make_model, tmp_path):
    with once_a_token(loaded(make_model, tmp_path, **{"architecture": "gpt_neox"} | settings)) as names:
        assert names == []


def test_dropout_that_is_no_module_is_seen(make_model, tmp_path):
    folder = make_model("starcoder2", tmp_path / "model", embedding_dropout=0.1)
    with once_a_token(AutoModelForCausalLM.from_pretrained(folder).train()) as names:
        assert names == []
    with once_a_token(refs.load(refs.resolve(str(folder)))[0].train()) as names:
        assert names == ALONE["llama"]
