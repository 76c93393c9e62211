"""What a run records of its update: the numbers of a full decomposition, without one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lethe.config import LoraSettings
from lethe.models import refs
from lethe.models.adapters import add_adapters
from lethe.unlearning import changes
from lethe.unlearning.frozen import Frozen

SPECTRA = {
    "random": torch.ones,
    "falling": lambda size: torch.arange(1.0, size + 1).pow(-0.1),
    "one large": lambda size: torch.cat([torch.tensor([50.0]), torch.ones(size - 1)]),
    "rank 2": lambda size: torch.cat([torch.ones(2), torch.zeros(size - 2)]),
}
REWOUND = {
    "llama": "model.layers.0.mlp.down_proj.weight",
    "gpt2": "transformer.h.0.mlp.c_fc.weight",
    "mixtral": "model.layers.0.mlp.experts.down_proj",
}
"""A tensor of the first block that a rewound model has otherwise: an adapted matrix, or the experts'."""


@pytest.mark.parametrize("scale", [1.0, 1e-15])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 40, 40), (3, 25, 90), (1, 400, 300)])
def test_the_largest_singular_value_is_that_of_a_full_decomposition(shape, spectrum, scale):
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(plain, full_matrices=False)
    matrices = scale * (u * (s * SPECTRA[spectrum](s.shape[-1]))[:, None, :]) @ v
    expected = torch.linalg.matrix_norm(matrices / scale, 2)
    found = changes.spectral_norm(matrices)
    torch.testing.assert_close(found / scale, expected, rtol=1e-3, atol=0)
    assert torch.equal(found, changes.spectral_norm(matrices))


def test_matrices_that_did_not_move_have_no_rank():
    assert changes.stable_ranks(torch.zeros(2, 4, 5)) == []
    assert changes.stable_ranks(torch.stack([torch.zeros(4, 4), torch.eye(4)])) == pytest.approx([4.0])


@pytest.mark.parametrize("rewound", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_update_of_adapters_is_that_of_the_merged_model(family, rewound, make_model, tmp_path):
    ref = refs.resolve(str(make_model(family, tmp_path / "m")))
    target = refs.load(ref)[0]
    student = copy.deepcopy(target)
    if rewound:
        nn.init.normal_(student.get_parameter(REWOUND[family]))
    student = add_adapters(student, LoraSettings(r=4, alpha=6, dropout=0.0), [2], seed=0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = changes.update_by_layer(student, Frozen(ref, "float32"))
    merged = student.merge_and_unload()
    before = dict(target.named_parameters())
    for layer in "0123":
        own = [
            p.detach() - before[n] for n, p in merged.named_parameters() if f".{layer}." in n and not torch.equal(p, before[n])
        ]
        assert found[layer]["distance"] == pytest.approx(sum(c.square().sum().item() for c in own) ** 0.5, rel=1e-3)
        ranks = [
            (c.norm() / torch.linalg.matrix_norm(c, 2)) ** 2 for whole in own for c in whole.reshape(-1, *whole.shape[-2:])
        ]
        assert found[layer].get("stable_rank", 0.0) == pytest.approx(float(sum(ranks)) / max(1, len(ranks)), rel=1e-3)
