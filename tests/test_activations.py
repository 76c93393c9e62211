"""Layer L is the output of block L, on every architecture, and nothing after the last layer needed is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from families import PLAIN
from transformers import AutoModelForCausalLM

from lethe.errors import LetheError
from lethe.models.activations import blocks, read

LAST = 3
FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt_neox_sequential": "gpt_neox.final_layer_norm",
}


@pytest.fixture(scope="module", params=PLAIN)
def model(request, make_model, tmp_path_factory):
    folder = make_model(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.kind = request.param
    return model


def ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def residuals(model, ids: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
    return read(model, ids, layers).activations


def final_norm(model):
    return model.get_submodule(FINAL_NORM.get(model.kind, "model.norm"))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layer_is_the_output_of_its_block(model):
    hidden = model(ids(), output_hidden_states=True).hidden_states
    found = residuals(model, ids(), list(range(LAST + 1)))
    for layer in range(LAST):
        assert same(found[layer], hidden[layer + 1])
        assert not same(found[layer], hidden[layer])


def test_last_layer_is_before_the_final_norm(model):
    hidden = model(ids(), output_hidden_states=True).hidden_states
    found = residuals(model, ids(), [LAST])[LAST]
    assert not same(found, hidden[-1])
    assert same(final_norm(model)(found), hidden[-1])


def test_activations_and_logits_come_from_one_pass(model):
    states = read(model, ids(), [2, 0], output=True)
    assert sorted(states.activations) == [0, 2]
    assert same(states.output, model(ids()).logits)
    for layer, found in residuals(model, ids(), [0, 2]).items():
        assert torch.equal(states.activations[layer], found)


def test_nothing_after_the_last_layer_runs(model):
    calls = []
    named = {f"block {n}": block for n, block in enumerate(blocks(model))}
    named |= {"norm": final_norm(model), "head": model.get_output_embeddings()}
    handles = [m.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, m in named.items()]
    residuals(model, ids(), [0, 2])
    assert calls == ["block 0", "block 1", "block 2"]
    for handle in handles:
        handle.remove()


def hooks(model) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_no_hook_stays_behind_even_if_the_forward_pass_fails(model):
    before = hooks(model)  # transformers has some of its own
    read(model, ids(), [1], output=True, head=model.get_output_embeddings())
    with pytest.raises((IndexError, RuntimeError)):
        residuals(model, torch.full((1, 3), 10**6), [1])
    assert hooks(model) == before


def test_works_through_a_peft_model_and_sees_its_adapters(model):
    from peft import LoraConfig, get_peft_model

    plain = residuals(model, ids(), [0, 2])
    names = [n for n, m in model.named_modules() if ".1." in n and type(m).__name__ in {"Linear", "Conv1D"}]
    fan = model.kind == "gpt2"
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=fan)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    hidden = wrapped(ids(), output_hidden_states=True).hidden_states
    found = residuals(wrapped, ids(), [0, 2])
    assert same(found[2], hidden[3])
    assert same(found[0], plain[0])
    assert not same(found[2], plain[2])


@pytest.mark.parametrize("layers", [[LAST + 1], [0, 99], [-1], []])
def test_a_layer_the_model_does_not_have_is_refused(model, layers):
    with pytest.raises(LetheError, match=r"out of range.*layers 0 to 3"):
        residuals(model, ids(), layers)


def test_a_model_without_a_list_of_blocks_is_refused(model):
    block = blocks(model)
    block.append(block[0])  # as many as the configuration says no longer
    try:
        with pytest.raises(LetheError, match="0 lists of 4 blocks"):
            blocks(model)
    finally:
        del block[-1]


def test_a_list_of_blocks_that_was_replaced_is_found_again(make_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "model"))
    model.model.layers = torch.nn.ModuleList(reversed(blocks(model)))
    assert blocks(model) is model.model.layers
    model.model.stack = model.model.layers
    del model.model.layers
    assert blocks(model) is model.model.stack
