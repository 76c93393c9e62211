"""Losses from final hidden states in chunks are the plain formulas' of full logits: values, gradients, memory."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lethe.models.activations import read
from lethe.objectives import losses
from lethe.objectives.losses import (
    chunked_cross_entropy,
    chunked_kl,
    chunked_log_likelihood,
    cross_entropy,
    head_of,
    kl,
    log_likelihood,
)

BATCH, SEQ, HIDDEN, WORDS = 3, 7, 5, 11
MASK = torch.tensor([[1] * n + [0] * (SEQ - n) for n in (7, 4, 2)])


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks of at most three tokens, worked on two at a time, panels of four words."""
    monkeypatch.setattr(losses, "PLAIN", 1)
    monkeypatch.setattr(losses, "LEAST", 1)
    monkeypatch.setattr(losses, "CHUNK", 3)
    monkeypatch.setattr(losses, "PANEL", 4 * HIDDEN)
    monkeypatch.setattr(losses, "SLICE", 2 * WORDS)


class Problem:
    """Hidden states and heads of a model and a teacher, and the words of the text."""

    def __init__(self, dtype=torch.float64, bias=True, trained=True, teacher_hidden=HIDDEN + 2, words=WORDS, scale=2.0):
        rng = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

        self.hidden, self.teacher = noise(BATCH, SEQ, HIDDEN).requires_grad_(), noise(BATCH, SEQ, teacher_hidden)
        self.head, self.teacher_head = (
            nn.Linear(n, words, bias=bias, dtype=dtype).requires_grad_(on)
            for n, on in ((HIDDEN, trained), (teacher_hidden, False))
        )
        for parameter in (*self.head.parameters(), *self.teacher_head.parameters()):
            parameter.data = scale * noise(*parameter.shape)
        self.ids = torch.randint(words, (BATCH, SEQ), generator=rng)

    def loss(self, kind: str, how: str, mask: Tensor = MASK, tokens: int | None = None) -> Tensor:
        if how == "plain":
            logits, teacher = self.head(self.hidden), self.teacher_head(self.teacher)
            if kind == "kl":
                return kl(logits, teacher, mask, tokens)
            return cross_entropy(logits, self.ids, mask, tokens)
        if kind == "kl":
            return chunked_kl(self.hidden, self.head, self.teacher, self.teacher_head, mask, tokens)
        return chunked_cross_entropy(self.hidden, self.head, self.ids, mask, tokens)

    def gradients(self, kind: str, how: str, **settings) -> list[Tensor]:
        """Of 3.7 times the loss: the loss, and the gradients of all that has one."""
        loss = self.loss(kind, how, **settings)
        wanted = [x for x in (self.hidden, *self.head.parameters()) if x.requires_grad]
        return [loss.detach(), *torch.autograd.grad(3.7 * loss, wanted)]

    def to(self, dtype: torch.dtype) -> Problem:
        other = copy.deepcopy(self)
        other.hidden = self.hidden.detach().to(dtype).requires_grad_()
        other.teacher = self.teacher.to(dtype)
        other.head.to(dtype)
        other.teacher_head.to(dtype)
        return other


@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize(("bias", "trained"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_values_and_gradients_are_the_plain_formulas(tiny_chunks, kind, bias, trained, tokens):
    problem = Problem(bias=bias, trained=trained)
    plain, ours = (problem.gradients(kind, how, tokens=tokens) for how in ("plain", "chunked"))
    assert len(plain) == len(ours) == 2 + trained * (1 + bias)
    for expected, found in zip(plain, ours, strict=True):
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("bias", "trained"), [(True, True), (False, False)])
def test_log_likelihoods_of_documents_and_their_gradients_are_the_plain_formulas(tiny_chunks, bias, trained, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 3)
    problem = Problem(bias=bias, trained=trained)
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)  # a loss that is no mean over tokens
    wanted = [x for x in (problem.hidden, *problem.head.parameters()) if x.requires_grad]
    found = []
    for values in (
        log_likelihood(problem.head(problem.hidden), problem.ids, MASK),
        chunked_log_likelihood(problem.hidden, problem.head, problem.ids, MASK),
    ):
        assert values.shape == (BATCH,)
        found.append([values.detach(), *torch.autograd.grad((weights * values.square()).sum(), wanted)])
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).abs().max() < 1e-10 * expected.abs().max()
    one = problem.head(problem.hidden)[1].log_softmax(-1)
    assert found[0][0][1].item() == pytest.approx(sum(one[t - 1, problem.ids[1, t]].item() for t in range(1, 4)), rel=1e-12)


def test_kl_of_a_model_with_itself_is_zero(tiny_chunks):
    problem = Problem(dtype=torch.float32)
    loss = chunked_kl(problem.hidden, problem.head, problem.hidden, problem.head, MASK)
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [problem.hidden, problem.head.weight]))


def test_teacher_gets_no_gradient(tiny_chunks):
    problem = Problem()
    problem.teacher.requires_grad_()
    problem.teacher_head.requires_grad_(True)
    problem.loss("kl", "chunked").backward()
    assert problem.teacher.grad is None
    assert problem.teacher_head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_rounding_in_float32_is_no_worse_than_the_plain_formulas(kind, trained, monkeypatch):
    monkeypatch.setattr(losses, "PLAIN", 1)
    monkeypatch.setattr(losses, "LEAST", 1)
    problem = Problem(dtype=torch.float32, trained=trained, words=2000, scale=1.0)
    exact = problem.to(torch.float64).gradients(kind, "plain")
    plain, ours = (problem.gradients(kind, how) for how in ("plain", "chunked"))
    for truth, theirs, found in zip(exact, plain, ours, strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_bfloat16_is_reduced_in_float32_and_gives_bfloat16_gradients(tiny_chunks, kind):
    problem = Problem(dtype=torch.bfloat16)
    exact = problem.to(torch.float64).gradients(kind, "plain")
    plain, ours = (problem.gradients(kind, how) for how in ("plain", "chunked"))
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    for truth, theirs, found in zip(exact[1:], plain[1:], ours[1:], strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_padding_weighs_nothing_and_is_not_computed(tiny_chunks, kind):
    problem, other = Problem(), Problem()
    padding = MASK == 0
    other.hidden.data[padding], other.teacher[padding] = torch.nan, torch.nan
    for expected, found in zip(problem.gradients(kind, "chunked"), other.gradients(kind, "chunked"), strict=True):
        assert torch.equal(expected, found)
    assert not problem.gradients(kind, "chunked")[1][padding].any()


def test_a_batch_without_a_token_adds_nothing(tiny_chunks):
    problem = Problem()
    loss, *gradients = problem.gradients("kl", "chunked", mask=torch.zeros_like(MASK), tokens=9)
    assert loss == 0
    assert not any(g.any() for g in gradients)


def test_a_second_backward_pass_through_the_same_graph_gives_the_same(tiny_chunks):
    problem = Problem()
    loss = problem.loss("kl", "chunked")
    wanted = [problem.hidden, *problem.head.parameters()]
    once, twice = torch.autograd.grad(loss, wanted, retain_graph=True), torch.autograd.grad(2 * loss, wanted)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(2 * a, b)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation's floating-point output had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, tuple | list) else [output]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return output


@pytest.mark.parametrize("kind", ["kl", "ce", "ll"])
def test_no_tensor_has_the_logits_of_all_tokens(kind):
    tokens, words, hidden = 2048, 3000, 4
    head = nn.Linear(hidden, words).requires_grad_(False)
    x = torch.randn(4, tokens // 4, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.ones(4, tokens // 4, dtype=torch.long)
    with Largest() as largest:
        if kind == "kl":
            chunked_kl(x, head, x.detach() + 1, head, mask).backward()
        else:
            {"ce": chunked_cross_entropy, "ll": lambda *args: chunked_log_likelihood(*args).sum()}[kind](
                x, head, mask, mask
            ).backward()
    assert words < largest.numel <= tokens * words / 10
    with Largest() as largest:
        kl(head(x), head(x), mask).backward()
    assert largest.numel == tokens * words


@pytest.fixture(params=families.PLAIN)
def architecture(request) -> str:
    return request.param


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


IDS = torch.randint(3, 250, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))


def final_hidden(model, head) -> Tensor:
    return read(model, IDS, [], True, head).output


@pytest.mark.parametrize("lora", [False, True])
def test_training_gradients_are_those_of_the_models_own_logits(architecture, lora, make_model, tmp_path, monkeypatch):
    """Full-rank (GPT-2's head is tied to its embedding) and with adapters, against full forward passes of both models."""
    monkeypatch.setattr(losses, "PLAIN", 1)
    monkeypatch.setattr(losses, "LEAST", 1)
    model, reference = (load(make_model(architecture, tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    if lora:
        from lethe.config import LoraSettings
        from lethe.models.adapters import add_adapters

        model = add_adapters(model, LoraSettings(), [2], 0).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    head, reference_head = head_of(model), head_of(reference)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert lora or any(p is head.weight for p in trained.values())

    with torch.no_grad():
        logits, hidden = reference(input_ids=IDS).logits, final_hidden(reference, reference_head)
    plain = kl(model(input_ids=IDS, use_cache=False).logits, logits, MASK)
    ours = chunked_kl(final_hidden(model, head), head, hidden, reference_head, MASK)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    pairs = [torch.autograd.grad(loss, list(trained.values()), allow_unused=True) for loss in (plain, ours)]
    for name, expected, found in zip(trained, *pairs, strict=True):
        assert (expected is None) == (found is None), name
        if expected is not None:
            assert (found - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_head_does_not_run_and_layers_can_be_captured_on_the_way(architecture, make_model, tmp_path):
    model = load(make_model(architecture, tmp_path))
    head = head_of(model)
    whole = model(input_ids=IDS, output_hidden_states=True)
    ran = []
    head.register_forward_hook(lambda module, args, output: ran.append(output is not args[0]))
    states = read(model, IDS, [1, 3], True, head)
    assert not any(ran)
    assert torch.equal(states.output, whole.hidden_states[-1])
    assert torch.equal(states.activations[1], whole.hidden_states[2])
    assert set(states.activations) == {1, 3}
    assert torch.equal(model(input_ids=IDS).logits, whole.logits)  # no hook is left behind
    assert ran


def test_heads_whose_logits_are_more_than_a_product_are_told_apart():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    models = {
        "cap": Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=30.0)),
        "no cap": Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=None)),
        "scaled": CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625)),
        "divided": GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0)),
    }
    assert {name for name, model in models.items() if head_of(model) is not None} == {"no cap"}


def test_a_head_with_an_adapter_is_told_apart_even_while_the_adapter_adds_nothing(make_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(make_model("llama", tmp_path)), LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert head_of(model) is None


def test_looking_for_the_head_changes_nothing(make_model, tmp_path):
    model = load(make_model("gpt2", tmp_path)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    head_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
