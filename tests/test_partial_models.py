"""Models of which only a part is in memory compute what the whole model computes, to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, WITHOUT_LORA
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lethe.config import LoraSettings
from lethe.models import loading, refs, streaming
from lethe.models.activations import blocks, read
from lethe.models.adapters import add_adapters

IDS = torch.arange(3, 23).view(2, 10)
REFUSED = {"bert", "gemma3n_text", "jamba", "mpt"}
"""Families that Lethe refuses, whatever is in memory."""


@pytest.fixture
def ref(make_model, tmp_path) -> Any:
    return lambda family, **more: refs.resolve(str(make_model(family, tmp_path / family, seed=1, **more)))


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *WITHOUT_LORA, *OTHERS) if name not in REFUSED])
@torch.no_grad()
def test_the_first_blocks_and_streamed_blocks_compute_what_the_whole_model_does(family, ref):
    model = ref(family)
    whole, part = refs.load(model)[0], refs.load(model, "float32", 1)[0]
    assert loading.first_blocks(model.folder, refs.configuration(model)[0], torch.float32, 1) is not None
    expected, found = (read(each, IDS, [0, 1]).activations for each in (whole, part))
    assert all(torch.equal(expected[n], found[n]) for n in (0, 1))
    assert not any(p.device.type != "meta" for block in blocks(part)[2:] for p in block.parameters())
    with streaming.streamed(model, "float32") as streamed:
        assert any(p.is_meta for p in streamed.parameters())
        ours, theirs = (each(input_ids=IDS, use_cache=False).logits for each in (streamed, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # by their place in memory, weights round otherwise
        for name, parameter in whole.named_parameters():
            assert torch.equal(streaming.weight_of(streamed, name), parameter), name


@pytest.mark.parametrize("kind", ["random", "adapter"])
@torch.no_grad()
def test_a_model_without_weights_of_its_own_on_disk_is_loaded_whole_and_then_cut(kind, ref, tmp_path):
    made = ref("llama")
    if kind == "adapter":
        adapted: Any = add_adapters(refs.load(made)[0], LoraSettings(r=2), [3], 0)
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        made = dataclasses.replace(made, adapter=str(tmp_path / "adapter"))
    else:
        made = refs.resolve(f"random:{made.path}")
    whole, part = refs.load(made)[0], refs.load(made, "float32", 1)[0]
    expected, found = (read(each, IDS, [0, 1]).activations for each in (whole, part))
    assert all(torch.equal(expected[n], found[n]) for n in (0, 1))
    assert all(p.is_meta for block in blocks(part)[2:] for p in block.parameters())
    with streaming.streamed(made, "float32") as streamed:
        assert torch.equal(streamed(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_a_model_whose_first_blocks_depend_on_its_depth_is_loaded_whole(ref, monkeypatch):
    """Such as one that scales residuals by the number of its blocks."""
    made, plain = ref("llama"), LlamaDecoderLayer.__init__

    def scaled(self: Any, config: Any, *args: Any) -> None:
        plain(self, config, *args)
        self.scale = config.num_hidden_layers**-0.5

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", scaled)
    assert loading.first_blocks(made.folder, refs.configuration(made)[0], torch.float32, 1) is None
    part = refs.load(made, "float32", 1)[0]
    assert len(blocks(part)) == 4 and blocks(part)[0].scale == 0.5 and next(blocks(part)[3].parameters()).is_meta
