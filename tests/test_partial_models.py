"""Models of which only a part is in memory compute what the whole model computes, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, WITHOUT_LORA

from lethe.models import loading, refs, streaming
from lethe.models.activations import blocks, read

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
