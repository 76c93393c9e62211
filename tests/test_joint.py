"""One pass over forget and retain rows gives what a pass over each gives, and forget rows end at the last forget layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lethe.objectives.blocked import head_of
from transformers import AutoModelForCausalLM

from lethe.models.activations import blocks, read, residuals, rows_can_leave
from lethe.unlearning.pipeline import not_more_work

ARCHITECTURES = ["gpt2", "llama", "qwen2", "olmo2", "gpt_neox", "gpt_neox_sequential"]
IDS = torch.arange(3, 43).view(5, 8)


@pytest.fixture(params=ARCHITECTURES)
def model(request, make_model, tmp_path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model(request.param, tmp_path / "model", seed=3))


@pytest.mark.parametrize("layers", [[0, 2], [1, 3]])
@pytest.mark.parametrize("with_head", [True, False])
def test_states_and_gradients_are_those_of_separate_passes(model, layers, with_head):
    head = head_of(model) if with_head else None
    assert rows_can_leave(model, layers, head, 8)
    gradients = []
    for joint in (True, False):
        model.zero_grad()
        if joint:
            found = read(model, IDS, layers, True, head, leave=2)
            gone, output = {n: found.activations[n][:2] for n in layers}, found.output
        else:
            gone, output = residuals(model, IDS[:2], layers), read(model, IDS[2:], [], True, head).output
        assert output.shape[0] == 3
        (sum(h.square().sum() for h in gone.values()) + output.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | gone | {"output": output})
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_blocks_after_the_last_forget_layer_see_no_forget_row(model):
    head, rows = head_of(model), []
    for block in blocks(model):
        block.register_forward_hook(lambda _, args, out: rows.append(len(out if torch.is_tensor(out) else out[0])))
    read(model, IDS, [0, 2], True, head, leave=2)
    assert rows == [5, 5, 5, 3]


def test_a_model_that_hands_its_blocks_something_for_each_row_gets_separate_passes(make_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "model"), attn_implementation="eager")
    head, was_training = head_of(model), model.training
    mask = torch.zeros(4, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)

    def with_mask(block: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask}

    for block in blocks(model):
        block.register_forward_pre_hook(with_mask, with_kwargs=True)
    assert not rows_can_leave(model, [0, 2], head, 8)
    assert model.training == was_training


def test_a_pass_for_both_is_chosen_by_the_number_of_padded_tokens():
    def rows(count: int, width: int) -> torch.Tensor:
        return torch.zeros(count, width, dtype=torch.long)

    assert not_more_work(rows(4, 64), rows(4, 64))
    assert not_more_work(rows(4, 60), rows(4, 64))
    assert not not_more_work(rows(4, 16), rows(4, 64))
