"""Losses on activations and on distributions, beside the formulas of whole methods (test_methods.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lethe.objectives import losses
from lethe.objectives.losses import (
    chunked_uniform_cross_entropy,
    cross_entropy,
    kl,
    norm_of_difference,
    positive_cosine,
    squared_distance,
    uniform_cross_entropy,
)

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_on_directions_and_norms_have_a_gradient_where_activations_are_equal_or_zero(activations, mask, dtype):
    """At the start of training h = a. The norm's gradient is then 0, and that of the cosine 0 up to rounding."""
    student = {n: (300 * x).to(dtype).requires_grad_() for n, x in activations[0].items()}
    equal = {n: x.detach().clone() for n, x in student.items()}
    zero = {n: torch.zeros_like(x, requires_grad=True) for n, x in student.items()}
    for loss, given, target, expected in (
        (norm_of_difference, student, equal, 0),
        (positive_cosine, student, equal, 1),
        (positive_cosine, zero, equal, 0),
        (positive_cosine, student, {n: torch.zeros_like(x) for n, x in equal.items()}, 0),
    ):
        value = loss(given, target, mask)
        gradients = torch.autograd.grad(value, list(given.values()))
        assert value.dtype == torch.promote_types(dtype, torch.float32) and value.item() == pytest.approx(expected, abs=1e-6)
        assert all(g.dtype == dtype and g.abs().max() < 1e-7 for g in gradients)


def test_the_uniform_cross_entropy_is_1_for_equal_logits_and_more_for_others(logits, mask):
    model, _ = logits
    p = torch.distributions.Categorical(logits=model.double())
    to_uniform = math.log(VOCAB) + (torch.distributions.kl_divergence(uniform(VOCAB), p) * mask).sum() / mask.sum()
    assert uniform_cross_entropy(torch.zeros_like(model), mask).item() == pytest.approx(1)
    assert uniform_cross_entropy(model, mask).item() == pytest.approx(to_uniform.item() / math.log(VOCAB), rel=1e-5)
    top = model.clone()
    top[..., :4] = 9.0
    assert uniform_cross_entropy(top, mask, top_k=4).item() == pytest.approx(1)
    assert uniform_cross_entropy(model, mask, top_k=VOCAB).item() == pytest.approx(uniform_cross_entropy(model, mask).item())


def uniform(count: int) -> torch.distributions.Categorical:
    return torch.distributions.Categorical(logits=torch.zeros(count, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [0, 3, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_uniform_cross_entropy_in_chunks_has_the_same_value_and_gradients(mask, monkeypatch, top_k, dtype):
    hidden = noise(BATCH, SEQ, HIDDEN, seed=1).to(dtype).requires_grad_()
    head = torch.nn.Linear(HIDDEN, VOCAB, dtype=dtype)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
    found = []
    for plain in (losses.PLAIN, 0):
        for name, size in (("PLAIN", plain), ("CHUNK", 3), ("LEAST", 1), ("SLICE", 2 * VOCAB)):
            monkeypatch.setattr(losses, name, size)
        value = chunked_uniform_cross_entropy(hidden, head, mask, 40, top_k)
        found.append([value, *torch.autograd.grad(value, [hidden, head.weight, head.bias])])
    for plain, chunked in zip(*found, strict=True):
        largest = plain.double().abs().max()
        assert (
            plain.dtype == chunked.dtype
            and (plain - chunked).abs().max() <= (1e-12 if dtype == torch.float64 else 0.02) * largest
        )


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
