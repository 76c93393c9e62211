"""A model's own ending, and the methods that use it: tuned_lens and sequential."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch
from families import FAMILIES, configuration
from lab_runs import assert_same, start, wait_for
from lab_runs import settings as lab_settings
from plain import Plain, assert_same_weights, settings
from test_memory import estimated, training
from torch import Tensor

from lethe import LoraSettings, Sequential, TunedLens, unlearn
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig, to_dict
from lethe.errors import LetheError
from lethe.methods.method import Progress
from lethe.models import refs
from lethe.models.activations import blocks, ending, read
from lethe.models.adapters import without_adapters
from lethe.models.loading import on_meta
from lethe.objectives import losses
from lethe.objectives.losses import head_of
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.text import corpora
from lethe.unlearning.beginning import begin
from lethe.unlearning.check import check
from lethe.unlearning.frozen import Frozen, WithoutAdapters
from lethe.unlearning.passes import Passes
from lethe.unlearning.prepare import prepare
from lethe.unlearning.trained import trainable
from lethe.unlearning.trainer import UnlearnTrainer
from lethe.unlearning.view import Teacher, View

DOCUMENTS = [[5, 9, 3, 7, 11], [4, 8], [6, 3, 9]]
SHAPES = ["gpt_neox", "llama", "qwen3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_continues_from_its_own_activations(make_model, tmp_path, family):
    """In every family: with a block's own output, later blocks, norm and head give the logits of the whole model."""
    model, _ = refs.load(refs.resolve(str(make_model(family, tmp_path / family))), "float32")
    model.eval().requires_grad_(False)
    ids = torch.tensor([[5, 9, 3, 7, 11], [6, 3, 9, 0, 0]])
    states = read(model, ids, [0, 2, 3], output=True)
    for layer, h in states.activations.items():
        given = h.clone().requires_grad_(True)
        found = ending(model, ids, layer, given)
        assert torch.allclose(found, states.output, rtol=1e-4, atol=1e-5 * float(states.output.abs().max()))
        found.square().sum().backward()
        assert given.grad is not None and given.grad.abs().max() > 0
        assert not torch.allclose(ending(model, ids, layer, h + h.roll(1, 0)), states.output, atol=1e-2)
    assert torch.equal(ending(model, ids, None, states.activations[3]), ending(model, ids, 3, states.activations[3]))
    assert torch.equal(read(model, ids, [0], output=True).output, states.output)  # its blocks are as they were
    head = head_of(model)
    if head is not None:
        assert torch.allclose(head(ending(model, ids, 0, states.activations[0], head)), states.output, rtol=1e-4, atol=1e-3)


def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms in float64, which transformers computes in float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def parts_of(model: Any, family: str) -> tuple[Any, Any]:
    """The final norm and the output head, by their names in each architecture."""
    if family == "gpt_neox":
        return model.gpt_neox.final_layer_norm, model.embed_out if hasattr(model, "embed_out") else model.lm_head
    if family == "gpt2":
        return model.transformer.ln_f, model.lm_head
    return model.model.norm, model.lm_head


def uniform(z: Tensor) -> Tensor:
    """Σ over tokens of H(uniform, p) / ln V, token by token."""
    return sum((-(row - row.exp().sum().log()).mean() / math.log(len(row)) for row in z), torch.zeros((), dtype=z.dtype))


def hidden(model: Any, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    """The output of each block of one document, and the logits."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_hook(keep) for block in blocks(model)]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return found, logits


def from_layer(model: Any, ids: list[int], layer: int, h: Tensor) -> Tensor:
    """The logits of one document, with `h` in place of the output of a block, whose pass runs whole before."""
    hook = blocks(model)[layer].register_forward_hook(
        lambda module, args, output: h if isinstance(output, Tensor) else (h, *output[1:])
    )
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    hook.remove()
    return logits


@pytest.mark.parametrize("heads", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize("lora", [LoraSettings(r=4, dropout=0.0), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("name", ["tuned_lens", "sequential"])
def test_the_forget_loss_and_its_gradient_are_the_formula(make_model, tmp_path, monkeypatch, name, family, lora, heads):
    for constant, value in (("LEAST", 1), ("CHUNK", 3), ("PLAIN", 1)):
        monkeypatch.setattr(losses, constant, value)
    exact_norms(monkeypatch)
    ref = refs.resolve(str(make_model(family, tmp_path / family)))
    plain = refs.load(ref, "float64")[0].requires_grad_(False).eval()
    kind: Any = {"tuned_lens": TunedLens, "sequential": Sequential}[name]
    method = kind(layers=[0, 1, 2], lora=lora)
    model: Any = trainable(method, refs.load(ref, "float64")[0]).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=rng, dtype=torch.float64) * p.requires_grad)
    lens = {f"{n}.weight": 0.1 * torch.randn(32, 32, generator=rng, dtype=torch.float64) for n in (0, 1, 2)}
    lens |= {f"{n}.bias": torch.randn(32, generator=rng, dtype=torch.float64) for n in (0, 1, 2)}
    progress = Progress(1, 3, 3)  # the second of three turns: layer 1

    frozen = Frozen(ref, "float64") if lora is None else WithoutAdapters(ref, "float64", model)
    need, (ids, mask) = method.need_at("forget", progress), corpora.pad(DOCUMENTS, 0)
    head = head_of(model) if heads else None
    states = read(model, ids, list(need.layers), need.logits, head)
    teacher = Teacher(need, frozen, "", frozen.head() if heads else None)
    view = View(ids, mask, torch.arange(3), states, int(mask.sum()), 3, head, teacher, given=lens)
    found, _ = method.forget_loss(view)

    norm, last = parts_of(plain, family)
    expected, count = torch.zeros((), dtype=torch.float64), sum(map(len, DOCUMENTS))
    for document in DOCUMENTS:
        ours = hidden(model, document)[0]
        if name == "sequential":
            expected = expected + uniform(from_layer(plain, document, 1, ours[1])) / count
        for n in (0, 1, 2) if name == "tuned_lens" else ():
            h = ours[n][0]
            z = last(norm(torch.stack([row + lens[f"{n}.weight"] @ row + lens[f"{n}.bias"] for row in h])))
            expected = expected + uniform(z) / count / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    both = [
        dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))
        for loss in (found, expected)
    ]
    largest = max(float(g.abs().max()) for g in both[1].values() if g is not None)
    for key in parameters:
        ours, theirs = both[0][key], both[1][key]
        assert (ours is None) == (theirs is None), key
        assert ours is None or (ours - theirs).abs().max() <= 1e-9 * largest, key
    assert largest > 1e-6
    if lora:
        with without_adapters(model) as inner:
            assert torch.equal(inner(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> str:
    return str(make_model("gpt_neox", tmp_path_factory.mktemp("lens") / "model", seed=0))


def begun(config: Any) -> tuple[Run, UnlearnTrainer]:
    """A run, trained by Lethe after what the method computes first."""
    run = Run.create("unlearn", "plain", to_dict(config), config.out)
    made = prepare(run, config, check(config))
    begin(run, config, made.trainer)
    made.trainer.train_with_bar("plain")
    return run, made.trainer


def stepped(plain: Plain, change: dict[str, Tensor], lr: float) -> None:
    with torch.no_grad():
        for name, p in plain.parameters.items():
            p.sub_(lr * change[name])


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, dropout=0.0)], ids=["full", "lora"])
def test_sequential_trains_one_block_after_the_other_as_a_plain_loop(lab, model, tmp_path, lora):
    way = {"optimizer": "sgd", "lr": 0.02, "lora": lora, "max_steps": 5, "layers": [0, 2, 3]}
    run, trainer = begun(Sequential(**settings(tmp_path, model, **way), retain_coef=2.0))
    plain = Plain(run, trainer)
    if lora:
        plain.model = plain.adapted(trainer.config)
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    turns = [3, 3, 2, 2, 0]  # update i of 5, three layers: floor(3 i / 5)
    for i, row in enumerate(run.rows("metrics.jsonl")):
        layer = turns[i]

        def loss(ids: Tensor, layer: int = layer) -> Tensor:
            row = ids[0].tolist()
            return uniform(from_layer(plain.others["reference"], row, layer, hidden(plain.model, row)[0][layer]))

        forget, retain = plain.mean(i, "forget", loss, lambda ids: ids.shape[1]), plain.kl(i, "retain", "reference")
        assert row["sequential_loss"] == pytest.approx(float(forget), rel=1e-9) and row["layer_t"] == layer
        assert row["retain_kl_loss"] == pytest.approx(float(retain), rel=1e-9, abs=1e-12)
        change = plain.gradient(10 * forget + 2 * retain)
        stepped(plain, {name: g * (f"layers.{layer}." in name) for name, g in change.items()}, 0.02)
    assert_same_weights(trainer, plain, before)
    moved = {name for name, p in plain.parameters.items() if not torch.equal(p, before[name])}
    assert {n for n in range(4) if any(f"layers.{n}." in name for name in moved)} == {0, 2, 3}
    assert all("layers." in name for name in moved)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, dropout=0.0)], ids=["full", "lora"])
def test_the_lens_is_fitted_and_trained_with_as_in_a_plain_loop(lab, model, tmp_path, lora):
    way = {"optimizer": "sgd", "lr": 0.02, "lora": lora, "layers": [0, 2]}
    own = {"lens_lr": 0.01, "lens_epochs": 2, "schedule": "constant", "remove_coef": 3.0, "retain_coef": 2.0}
    run, trainer = begun(TunedLens(**settings(tmp_path, model, **way) | own))
    plain = Plain(run, trainer)
    reference: Any = plain.others["reference"].requires_grad_(False)
    rows: Any = trainer.train_dataset
    texts = list(rows.texts["retain"])

    lens = {f"{n}.{part}": torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
            for n in (0, 2) for part, shape in (("weight", (32, 32)), ("bias", (32,)))}  # fmt: skip
    adam = torch.optim.Adam(lens.values())

    def logits(h: Tensor, n: int) -> Tensor:
        norm, head = parts_of(reference, "gpt_neox")
        return head(norm(h + h @ lens[f"{n}.weight"].T + lens[f"{n}.bias"]))

    groups = [texts[i : i + 4] for i in range(0, len(texts), 4)]
    for step, group in enumerate(groups + groups):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / (2 * len(groups)))
        divergence = {0: torch.zeros(()), 2: torch.zeros(())}
        untranslated = {0: 0.0, 2: 0.0}
        for ids in group:
            streams, final = hidden(reference, ids)
            p = final.log_softmax(-1)
            for n in (0, 2):
                norm, head = parts_of(reference, "gpt_neox")
                divergence[n] = divergence[n] + (p.exp() * (p - logits(streams[n][0], n).log_softmax(-1))).sum()
                untranslated[n] += float((p.exp() * (p - head(norm(streams[n][0])).log_softmax(-1))).sum())
        tokens = sum(map(len, group))
        adam.zero_grad()
        ((divergence[0] + divergence[2]) / 2 / tokens).backward()
        adam.step()
    values = run.record["artifacts"]["method"]["values"]
    for n in (0, 2):
        assert values[f"kl_{n}"] == pytest.approx(float(divergence[n]) / tokens, rel=1e-6)
        assert values[f"untranslated_kl_{n}"] == pytest.approx(untranslated[n] / tokens, rel=1e-9)
        assert values[f"kl_{n}"] < values[f"untranslated_kl_{n}"]
    for name, value in lens.items():
        assert (trainer.given[name] - value).abs().max() <= 1e-6 * value.abs().max()  # Adam amplifies rounding near 0

    lens = {name: value.detach() for name, value in trainer.given.items()}
    if lora:
        plain.model = plain.adapted(trainer.config)
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    for i, row in enumerate(run.rows("metrics.jsonl")):

        def loss(ids: Tensor) -> Tensor:
            streams, _ = hidden(plain.model, ids[0].tolist())
            return (uniform(logits(streams[0][0], 0)) + uniform(logits(streams[2][0], 2))) / 2

        forget, retain = plain.mean(i, "forget", loss, lambda ids: ids.shape[1]), plain.kl(i, "retain", "reference")
        assert row["lens_loss"] == pytest.approx(float(forget), rel=1e-9)
        stepped(plain, plain.gradient(3 * forget + 2 * retain), 0.02 * (3 - i) / 3)
    assert_same_weights(trainer, plain, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TunedLens, Sequential])
def test_a_killed_run_has_its_lens_and_its_turns_again(lab, tmp_path, kind):
    def config(out: str) -> Any:
        way: dict[str, Any] = {
            "max_steps": 20,
            "save_every": 3,
            "layers": [0, 1],
            "eval": EvalSettings(["lab_forget_robust"], limit=4),
        }
        return kind(**{name: value for name, value in lab_settings(tmp_path / out, **way).items() if name != "source"})

    whole = unlearn(config("whole"))
    process = start("unlearn", config("killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", 11)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Run.open(run.path).status == "lost"
    lens = run.path / "method.safetensors"
    written = lens.stat().st_mtime_ns if lens.is_file() else None
    assert (written is not None) == (kind is TunedLens)
    assert_same(resume(ResumeConfig(str(run.path))), whole)
    assert written is None or lens.stat().st_mtime_ns == written  # it is not fitted again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method tuned_lens --retain_coef 0", "retain_coef: tuned_lens fits its lens on the retain text; set it above 0"),
        ("--method tuned_lens --layers null", "layers: name at least one layer whose lens is made uniform"),
        ("--method tuned_lens --remove_coef 0 --lens_lr 0.1", "lens_lr: 0.1 has no effect while remove_coef is 0"),
        ("--method tuned_lens --layers [0,LAST]", "is the last one, whose prediction is the model's own"),
        ("--method sequential --layers null", "layers: name the layers that have a turn"),
        ("--method sequential --same_sign true", "same_sign: True has no effect with method sequential"),
        ("--method sequential --layered.parts 2", "layered: has no effect with method sequential, whose layers have turns"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(lab, capsys, words, said):
    last = str(refs.resolve("lab:final").depth - 1)
    assert main(["unlearn", *words.replace("LAST", last).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_lens_that_predicts_no_better_than_none_is_refused(lab, model, tmp_path):
    config = TunedLens(**settings(tmp_path, model, layers=[2], lens_lr=1e4))
    run = Run.create("unlearn", "plain", to_dict(config), config.out)
    with pytest.raises(LetheError, match=r"lens_lr: the lens of layer 2 predicts no better than without its fit \(KL"):
        begin(run, config, prepare(run, config, check(config)).trainer)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(r=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", [TunedLens, Sequential])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_simulated(make_tokenizer, family, kind, lora):
    passes = Passes(
        kind(layers=[0, 1], lora=lora), lambda: on_meta(configuration(family, make_tokenizer()), torch.float32), 16, frozenset()
    )
    assert passes.update["activations"] > 0
    assert bool(passes.begun[1]) == (kind is TunedLens)
    assert sum(value.numel() for value in passes.begun[0].values() if value.ndim) == (2 * 32 * 33 if kind is TunedLens else 0)


def recipe(kind: Any, **changes: Any) -> Any:
    return kind(max_length=64, per_device_train_batch_size=4, lora=None, **changes)


def test_the_plan_counts_the_lens_and_the_deepest_turn():
    lens = estimated(recipe(TunedLens, layers=[0, 2]))
    assert (
        lens.phases["training"]["method"] == 4 * (2 * 64 * 65 + 4)
        and lens.phases["method"]["activations"] > 3 * 4 * 2 * 64 * 65
    )
    early, late = (training(recipe(Sequential, layers=[layer]))["activations"] for layer in (0, 3))
    assert early > 2 * late
    whole = training(recipe(Sequential, layers=[0, 1, 2, 3]))
    some = training(recipe(Sequential, layers=[0]))
    assert some["optimizer"] < whole["optimizer"] / 3
