"""Training with `fast` on and off gives the same losses and weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import PLAIN
from safetensors.torch import load_file

from lethe import LoraSettings, TamperConfig, Transfer, tamper, unlearn
from lethe.config import EvalSettings
from lethe.lab.presets import active_preset
from lethe.models import refs
from lethe.models.activations import read
from lethe.models.adapters import add_adapters
from lethe.training import merged_lora
from lethe.training.merged_lora import compile_blocks, fast_passes

works = merged_lora._works
IDS = torch.arange(3, 43).view(5, 8)


def adapted(make_model, folder, architecture="llama", dropout=0.0, dtype="float32") -> Any:
    base, _ = refs.load(refs.resolve(str(make_model(architecture, folder / "model", seed=3))), dtype)  # its own dropout is off
    model: Any = add_adapters(base, LoraSettings(r=4, alpha=6, dropout=dropout), [2], seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first: the gradient of A would be 0, too
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The logits and every gradient of a loss."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"logits": logits.detach()}


def assert_close(ours: dict[str, torch.Tensor], peft: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == peft.keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, peft[name], rtol=1e-4, atol=1e-5 * float(peft[name].abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", PLAIN)
def test_outputs_and_gradients_are_pefts_before_and_after_an_update(architecture, checkpointing, make_model, tmp_path):
    model = adapted(make_model, tmp_path, architecture)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        peft = gradients(model)
        with fast_passes(model, True) as names:
            assert names and all(f".{block}." in "".join(names) for block in range(3))
            assert_close(gradients(model), peft)
        optimizer.step()


def test_evaluation_within_and_training_afterwards_are_pefts_own(make_model, tmp_path):
    model = adapted(make_model, tmp_path)
    with torch.no_grad():
        before = model.eval()(IDS).logits
        with fast_passes(model, True) as names:
            assert torch.equal(model(IDS).logits, before)
    assert names and not any("forward" in vars(model.get_submodule(name)) for name in names)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", PLAIN)
def test_in_bfloat16_values_are_as_near_to_those_of_float32_as_pefts(architecture, dropout, make_model, tmp_path):
    half = adapted(make_model, tmp_path / "half", architecture, dropout, "bfloat16")
    whole = copy.deepcopy(half).float()
    results = []
    for model, fast in ((whole, False), (half, False), (half, True)):
        torch.manual_seed(0)  # the same dropout
        with fast_passes(model, fast) as names:
            assert bool(names) == fast
            results.append(gradients(model))
    exact, peft, ours = results
    assert ours.keys() == peft.keys() and all(ours[name].dtype == peft[name].dtype for name in peft)
    for name, value in exact.items():
        far, peft_far = (float((found[name].float() - value).norm()) for found in (ours, peft))
        assert far <= 1.5 * peft_far + 2**-8 * float(value.norm()), name


def test_in_bfloat16_an_adapter_below_a_rounding_step_of_the_output_counts(make_model, tmp_path):
    model = adapted(make_model, tmp_path, dtype="bfloat16")
    module: Any = next(m for m in model.modules() if hasattr(m, "lora_A"))
    x = torch.randn(4096, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    plain = module.get_base_layer()(x).float()
    with torch.no_grad():
        b *= 2**-11 * plain.norm() / (module.scaling["default"] * (x.float() @ a.T @ b.T)).norm()  # a step is 2^-8 to 2^-7
        part = module.scaling["default"] * (x.float() @ a.T @ b.T)

    def share(found: torch.Tensor) -> float:
        return float(((found.detach().float() - plain) * part).sum() / part.square().sum())

    with fast_passes(model, True):
        assert share(module(x)) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(("fast", "dropout"), [(False, 0.0), (True, 0.1)])
def test_adapters_stay_with_peft_when_fast_is_off_or_dropout_forbids_it(fast, dropout, make_model, tmp_path):
    model = adapted(make_model, tmp_path, dropout=dropout)
    with fast_passes(model, fast) as names:
        assert names == [] and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients_and_leave_hooks_outside(checkpointing, make_model, tmp_path):
    model = adapted(make_model, tmp_path, dropout=0.2)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for compiled in (False, True):
        replaced = compile_blocks(model) if compiled else []
        torch.manual_seed(0)
        found.append(gradients(model))
        found[-1]["layer"] = read(model, IDS, [1]).activations[1].detach()
        for block in replaced:
            del block.forward
    plain, ours = found
    assert_close(ours, plain)


def broken(function):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nwith details")

    return fail


def wrong(function):
    """The output is right, the gradient is not."""

    def forward(*args, **kwargs):
        out = function(*args, **kwargs)
        return out / 2 + out.detach() / 2

    return forward


@pytest.mark.parametrize(("compiled", "why"), [(broken, "RuntimeError: no compiler)"), (wrong, "gives other values")])
def test_blocks_run_as_they_are_where_compiling_fails_or_is_wrong(compiled, why, make_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function))
    model = adapted(make_model, tmp_path)
    plain = gradients(model)
    blocks = compile_blocks(model)
    assert_close(gradients(model), plain)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and why in record.message
    for block in blocks:
        del block.forward


def losses(run) -> list[float]:
    return [value for row in run.rows("metrics.jsonl") for name, value in row.items() if name.endswith("loss")]


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(next(path for kind in ("adapter", "model") for path in (run.path / kind).glob("*.safetensors")))


SHORT = {"max_steps": 4, "lr": 1e-3, "per_device_train_batch_size": 4, "eval": EvalSettings(["lab_forget_robust"], limit=4)}


def unlearned(out, **settings):
    common = {"source": f"lab:global_step{active_preset().onset}", "affine": "none", "num_train_examples": 16, "out": str(out)}
    return unlearn(Transfer(**common | SHORT | settings))


def same(one, other) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-5, abs=1e-7)  # a KL of 1e-5 is a sum of terms near 1, rounded
    ours, plain = weights(one), weights(other)
    assert ours.keys() == plain.keys()
    # As a norm: where a gradient is 0 up to rounding, as that of key biases, AdamW takes steps of full length all the same.
    apart, size = (
        sum(float(w.square().sum()) for w in some) ** 0.5 for some in ([ours[n] - plain[n] for n in ours], plain.values())
    )
    assert apart < 1e-4 * size


def test_an_unlearning_run_has_the_same_losses_and_weights_with_fast_on_and_off(lab, tmp_path):
    fast, plain = (unlearned(tmp_path, lora=LoraSettings(dropout=0.0), fast=on) for on in (True, False))
    same(fast, plain)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_unlearning_run_with_compiled_blocks_has_the_same_losses_and_weights(lab, checkpointing, tmp_path, monkeypatch):
    settings = {"lora": LoraSettings(dropout=0.0), "gradient_checkpointing": checkpointing}
    plain = unlearned(tmp_path, fast=False, **settings)
    monkeypatch.setattr(merged_lora, "_worth_compiling", lambda model: True)
    compiled = []
    monkeypatch.setattr(merged_lora, "_works", lambda *given: compiled.append(works(*given)) or compiled[-1])
    same(unlearned(tmp_path, **settings), plain)
    assert compiled and all(compiled)


def test_an_attack_has_the_same_losses_and_weights_with_fast_on_and_off(lab, tmp_path):
    fast, plain = (
        tamper(
            TamperConfig(
                model="lab:filtered", out=str(tmp_path), lora=LoraSettings(r=4, dropout=0.0), fast=on, save_model=True, **SHORT
            )
        )
        for on in (True, False)
    )
    same(fast, plain)
