"""Losses on activations and on distributions, beside the formulas of whole methods (test_methods.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lethe.objectives.losses import cross_entropy, kl, squared_distance

BATCH, SEQ, HIDDEN, VOCAB = 3, 7, 5, 11
LENGTHS = [7, 4, 2]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int], width: int = SEQ) -> Tensor:
    return torch.tensor([[1] * n + [0] * (width - n) for n in lengths])


@pytest.fixture
def mask() -> Tensor:
    return mask_of(LENGTHS)


@pytest.fixture
def activations() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    layers = (0, 2, 5)
    student = {n: noise(BATCH, SEQ, HIDDEN, seed=n) for n in layers}
    return student, {n: 3 * noise(BATCH, SEQ, HIDDEN, seed=10 + n) for n in layers}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    return 2 * noise(BATCH, SEQ, VOCAB, seed=1), 2 * noise(BATCH, SEQ, VOCAB, seed=2)


def slow_cb(student: dict[int, Tensor], teacher: dict[int, Tensor], lengths: list[int]) -> float:
    layers = []
    for n in student:
        tokens = []
        for row, length in enumerate(lengths):
            for t in range(length):
                pairs = zip(student[n][row, t].double().tolist(), teacher[n][row, t].double().tolist(), strict=True)
                tokens.append(math.fsum((h - c) ** 2 for h, c in pairs) / student[n].shape[-1])
        layers.append(math.fsum(tokens) / len(tokens))
    return math.fsum(layers) / len(layers)


def test_squared_distance_relative_to_variances_divides_each_layer_and_has_no_unit(activations, mask):
    student, teacher = activations
    variance = {0: 0.5, 2: 3.0, 5: 20.0}
    each = [slow_cb({n: student[n]}, {n: teacher[n]}, LENGTHS) / variance[n] for n in student]
    assert squared_distance(student, teacher, mask, variance=variance).item() == pytest.approx(sum(each) / 3, rel=1e-5)
    larger = [{n: 50 * x for n, x in side.items()} for side in activations]
    units = {n: 2500 * value for n, value in variance.items()}
    assert squared_distance(*larger, mask, variance=units).item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_squared_distance_of_half_precision_activations_is_computed_in_float32(activations, mask):
    student, teacher = ({n: (300 * x).half() for n, x in side.items()} for side in activations)  # squares overflow float16
    assert squared_distance(student, teacher, mask).item() == pytest.approx(slow_cb(student, teacher, LENGTHS), rel=1e-5)


def test_kl_is_that_of_torch_distributions(logits, mask):
    model, reference = logits
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (reference, model))
    expected = (torch.distributions.kl_divergence(p, q) * mask).sum() / mask.sum()
    assert kl(model, reference, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_is_zero_for_equal_distributions_and_positive_for_others(logits, mask):
    model, reference = logits
    assert kl(model, model.clone(), mask).item() == 0
    assert kl(model + 5, model, mask).item() == pytest.approx(0, abs=1e-6)  # softmax does not see a shift
    assert kl(model, reference, mask).item() > 0.1


def test_kl_of_distributions_far_apart_is_finite(mask):
    model, reference = torch.zeros(BATCH, SEQ, VOCAB), torch.zeros(BATCH, SEQ, VOCAB)
    reference[..., 0], model[..., 1] = 200.0, 200.0
    assert kl(model, reference, mask).item() == pytest.approx(200, rel=1e-5)


def test_ce_is_that_of_transformers(logits, mask, make_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path)).eval()
    ids = torch.randint(3, 250, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))
    labels = torch.where(mask.bool(), ids, -100)
    output = model(input_ids=ids, labels=labels)
    assert cross_entropy(output.logits, ids, mask).item() == pytest.approx(output.loss.item(), rel=1e-5)


@pytest.mark.parametrize("term", ["cb", "kl", "ce"])
def test_accumulation_does_not_change_the_gradient(term):
    """Eight documents of very different lengths at once, and as four batches of unequal token counts."""
    lengths = [12, 2, 9, 1, 3, 12, 7, 2]
    parts = [[0, 1, 2], [3], [4, 5], [6, 7]]
    mask = mask_of(lengths, 12)
    ids = torch.randint(VOCAB, (8, 12), generator=torch.Generator().manual_seed(4))
    x, target, reference = noise(8, 12, HIDDEN, seed=5), noise(8, 12, HIDDEN, seed=6), noise(8, 12, VOCAB, seed=7)
    weight, head = noise(HIDDEN, HIDDEN, seed=8).requires_grad_(), noise(VOCAB, HIDDEN, seed=9).requires_grad_()

    def loss(rows: list[int], tokens: int | None) -> Tensor:
        h = x[rows] @ weight.T
        if term == "cb":
            return squared_distance({0: h, 3: h * 2}, {0: target[rows], 3: target[rows]}, mask[rows], tokens)
        if term == "kl":
            return kl(h @ head.T, reference[rows], mask[rows], tokens)
        return cross_entropy(h @ head.T, ids[rows], mask[rows], tokens)

    def gradient(batches: list[list[int]], tokens: int | None) -> Tensor:
        weight.grad = None
        for rows in batches:
            loss(rows, tokens).backward()
        return weight.grad.clone()

    total = sum(lengths) - (8 if term == "ce" else 0)
    whole = gradient([list(range(8))], None)
    assert torch.allclose(gradient(parts, total), whole, rtol=1e-5, atol=1e-6)
    own = [rows for rows in parts if term != "ce" or rows != [3]]  # one token alone has no next one
    assert not torch.allclose(gradient(own, None) / len(own), whole, rtol=1e-2)  # the mean of the batches' means is another
