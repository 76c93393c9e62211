"""The scale of a loss: what `check` measures before training, `cb_scale: relative`, and the memory that a run will take."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import Transfer, unlearn
from lethe.config import EvalSettings, LoraSettings, to_dict
from lethe.errors import LetheError
from lethe.lab.presets import active_preset
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.unlearning import maps, probe
from lethe.unlearning.check import check
from lethe.unlearning.pipeline import inspect
from lethe.unlearning.prepare import prepare

LAYERS = [0, 2]


@pytest.fixture(scope="module")
def world(make_model, texts, tmp_path_factory) -> Path:
    """A target and a source, both also with hidden states eight times as large (`…-large`), forget and retain text."""
    home = tmp_path_factory.mktemp("scale")
    for i, name in enumerate(("target", "source")):
        make_model("llama", home / name, seed=i + 1, rms_norm_eps=1e-12)
        model = AutoModelForCausalLM.from_pretrained(home / name)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(8)
            for block in model.model.layers:
                block.self_attn.o_proj.weight.mul_(8)
                block.mlp.down_proj.weight.mul_(8)
        model.save_pretrained(home / f"{name}-large")
        AutoTokenizer.from_pretrained(home / name).save_pretrained(home / f"{name}-large")
    for name, part in (("forget", texts[:30]), ("retain", texts[30:])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return home


def recipe(world: Path, out: Path, large: str = "", **changes: Any) -> Transfer:
    settings: dict[str, Any] = {
        "model": str(world / f"target{large}"),
        "source": str(world / f"source{large}"),
        "forget": str(world / "forget.jsonl"),
        "retain": str(world / "retain.jsonl"),
        "affine": "none",
        "layers": LAYERS,
        "max_length": 16,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "lora": LoraSettings(r=4, dropout=0.0),
        "eval": EvalSettings(["lab_forget_robust"], limit=4),
        "out": str(out),
    }
    return Transfer(**(settings | changes))


def prepared(config: Transfer) -> tuple[Run, Any]:
    """The run and the trainer of a recipe, as they are before training."""
    run = Run.create("check", "check", to_dict(config), config.out)
    return run, prepare(run, config, check(config)).trainer


def states(folder: Path, text: Path) -> list[np.ndarray]:
    """Outputs of blocks at every token, [tokens, hidden] each, by hidden_states and a document at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.no_grad():
        for document in corpora.read(str(text)):
            ids = tokenizer(document.text, return_tensors="pt")["input_ids"][:, :16]
            rows.append(torch.stack(model(ids, output_hidden_states=True).hidden_states[1:])[:, 0])
    return list(torch.cat(rows, 1).double().numpy())


# --- cb_scale --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_relative_losses_do_not_depend_on_the_size_of_hidden_states(world, tmp_path):
    first = {
        (large, scale): unlearn(recipe(world, tmp_path, large, cb_scale=scale, max_steps=1)).rows("metrics.jsonl")[0]["cb_loss"]
        for large in ("", "-large")
        for scale in ("raw", "relative")
    }
    assert first["-large", "raw"] == pytest.approx(64 * first["", "raw"], rel=1e-3)
    assert first["-large", "relative"] == pytest.approx(first["", "relative"], rel=1e-3)
    target, source = (states(world / name, world / "forget.jsonl") for name in ("target", "source"))
    shares = [((target[n] - source[n]) ** 2).mean() / source[n].var(0).mean() for n in LAYERS]
    batch = unlearn(recipe(world, tmp_path, cb_scale="relative", max_steps=1, per_device_train_batch_size=30))
    assert batch.rows("metrics.jsonl")[0]["cb_loss"] == pytest.approx(np.mean(shares), rel=1e-4)


@pytest.mark.slow
def test_the_variance_is_of_the_mapped_activations_and_the_same_for_cached_teachers(world, tmp_path):
    live, cached = (
        unlearn(recipe(world, tmp_path, affine="fit", cb_scale="relative", teacher_cache=how)) for how in ("live", "cached")
    )
    found = live.record["target_variance"]
    maps = sys.modules["lethe.maps.affine"].load_maps(live.path / "affine")
    for layer in LAYERS:
        mapped = states(world / "source", world / "forget.jsonl")[layer] @ maps.weight[layer].double().numpy().T
        assert found[str(layer)] == pytest.approx(mapped.var(0).mean(), rel=1e-4)
    assert cached.record["target_variance"] == found
    losses = [[row["cb_loss"] for row in run.rows("metrics.jsonl")] for run in (live, cached)]
    assert losses[0] == losses[1]


def test_a_resumed_run_has_the_variance_that_it_began_with(world, tmp_path):
    run, trainer = prepared(recipe(world, tmp_path, cb_scale="relative"))
    rows = trainer.train_dataset.texts["forget"]
    found = maps.variances(run, trainer.teachers["forget"], rows, 0)
    assert found == trainer.target_variance and sorted(found) == LAYERS
    assert maps.variances(Run.open(run.path), None, [], 0) == found  # type: ignore[arg-type]


def test_a_target_that_does_not_vary_is_refused(world, tmp_path):
    _, trainer = prepared(recipe(world, tmp_path))
    with pytest.raises(LetheError, match=r"cb_scale: the target of layer 0 has variance 0"):
        maps.variances_of(trainer.teachers["forget"], [[5]], 0)


# --- what check measures ---------------------------------------------------------------------------------------------


def plain_gradients(config: Transfer) -> tuple[float, float, float]:
    """cb_loss, the norm of its gradient, and that of KL's where weights are moved: by transformers and autograd alone."""
    model, source, reference = (AutoModelForCausalLM.from_pretrained(x) for x in (config.model, config.source, config.model))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    ids = {
        name: [tokenizer(d.text, return_tensors="pt")["input_ids"][:, :16] for d in corpora.read(getattr(config, name))]
        for name in ("forget", "retain")
    }
    count = {name: sum(row.numel() for row in rows) for name, rows in ids.items()}

    def hidden(which: Any, row: torch.Tensor) -> list[torch.Tensor]:
        states = which(row, output_hidden_states=True).hidden_states
        return [states[layer + 1][0] for layer in config.layers]

    cb = torch.zeros(())
    for row in ids["forget"]:
        pairs = zip(hidden(model, row), hidden(source, row), strict=True)
        cb = cb + torch.stack([(h - c).square().mean(-1).sum() for h, c in pairs]).mean() / count["forget"]
    trained = list(model.parameters())
    gradients = [g if g is not None else None for g in torch.autograd.grad(cb, trained, allow_unused=True)]
    slope = sum(float(g.abs().sum()) for g in gradients if g is not None)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(0.1 * cb.detach() / slope * gradient.sign())
    kl = torch.zeros(())
    for row in ids["retain"]:
        p, q = reference(row).logits.log_softmax(-1), model(row).logits.log_softmax(-1)
        kl = kl + (p.exp() * (p - q)).sum() / count["retain"]
    norm = [
        torch.cat([g.flatten() for g in gs if g is not None]).norm() for gs in (gradients, torch.autograd.grad(kl, trained))
    ]
    return float(cb), float(norm[0]), float(norm[1])


def test_the_gradients_are_those_of_a_plain_model_and_nothing_has_moved(world, tmp_path):
    config = recipe(world, tmp_path, lora=None, per_device_train_batch_size=30, remove_coef=3, retain_coef=7)
    before = torch.get_rng_state()
    run, trainer = prepared(config)
    scale, (cb, forget, retain) = run.record["plan"]["scale"], plain_gradients(config)
    assert scale["cb_loss"] == pytest.approx(cb, rel=1e-3)
    assert scale["forget_gradient"] == pytest.approx(3 * forget, rel=1e-3)
    assert scale["retain_gradient_after"] == pytest.approx(7 * retain, rel=1e-2)
    assert scale["ratio"] == pytest.approx(3 * forget / (7 * retain), rel=1e-2)
    fresh = AutoModelForCausalLM.from_pretrained(config.model).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scale", ["raw", "relative"])
def test_the_proposed_coefficient_has_the_labs_balance(world, tmp_path, scale):
    config = recipe(world, tmp_path, affine="fit", cb_scale=scale, lr=1e-4)
    proposed = inspect(config)["scale"]["proposed_remove_coef"]
    found = inspect(dataclasses.replace(config, remove_coef=proposed))
    assert found["scale"]["ratio"] == pytest.approx(probe.BALANCE, rel=0.06) and found["scale"]["dominates"] == "neither"
    assert not any("dominates" in warning for warning in found["warnings"])


@pytest.mark.parametrize(("factor", "term"), [(1e5, "forget loss"), (1e-5, "retain loss")])
def test_a_term_without_weight_is_said_with_coefficients_to_try(world, tmp_path, factor, term):
    balanced = inspect(recipe(world, tmp_path))["scale"]["proposed_remove_coef"]
    plan = inspect(recipe(world, tmp_path, remove_coef=balanced * factor))
    assert plan["scale"]["dominates"] == term
    said = " ".join(plan["warnings"])
    assert f"the {term} dominates" in said and f"remove_coef to {balanced:g} for the lab's balance" in said


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"retain_coef": 0.0}, ["cb_loss", "forget_gradient"]),
        ({"remove_coef": 0.0}, ["retain_kl_loss", "retain_gradient"]),
        ({"retain_loss": "ce"}, ["cb_loss", "forget_gradient", "retain_ce_loss", "retain_gradient"]),
        ({"rewind": 1.0, "affine": "none"}, ["cb_loss", "forget_gradient", "retain_kl_loss", "retain_gradient"]),
        ({"dtype": "bfloat16", "lora": None}, ["cb_loss", "forget_gradient", "retain_kl_loss", "retain_gradient"]),
    ],
)
def test_nothing_is_compared_where_there_is_nothing_to_compare(world, tmp_path, changes, names):
    plan = inspect(recipe(world, tmp_path, **changes))
    assert list(plan["scale"]) == names and not any("dominates" in warning for warning in plan["warnings"])


# --- maps that are to be fitted --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_maps_are_fitted_on_so_many_documents_at_most_and_the_plan_says_how_long_it_takes(world, tmp_path):
    run = unlearn(recipe(world, tmp_path, affine="fit", affine_examples=20, max_steps=1))
    facts = json.loads((run.path / "affine" / "metadata.json").read_text())
    assert (facts["text"]["documents"], facts["held_out"]["documents"]) == (18, 2)
    assert run.record["plan"]["maps"].startswith("fitted on 20 documents")
    assert run.record["plan"]["seconds"]["fitting maps"] > 0
    assert "fitted on 30 documents" in inspect(recipe(world, tmp_path, affine="fit", affine_examples=0))["maps"]
    with pytest.raises(LetheError, match="affine_examples: 20 has no effect"):
        recipe(world, tmp_path, affine_examples=20)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--gradient_checkpointing", "true", "--per_device_train_batch_size", "64"),
        ("--optimizer", "muon", "--teacher_cache", "cached", "--per_device_train_batch_size", "64"),
    ],
)
@pytest.mark.parametrize("lora", ["{r: 16, alpha: 16, dropout: 0.0}", "null"], ids=["lora", "full"])
def test_the_peak_of_the_process_is_within_15_per_cent_of_the_estimate(lab, tmp_path, lora, more):
    source = f"lab:global_step{active_preset().onset}"
    words = ["--source", source, "--max_steps", "3", "--lora", lora, "--out", str(tmp_path), "--eval.limit", "16", *more]
    command = [sys.executable, "-m", "lethe.cli", "unlearn", *words]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (folder,) = tmp_path.glob("unlearn-*")
    record = json.loads((folder / "run.json").read_text())
    estimate, peak = sum(record["plan"]["memory"].values()), record["environment"]["peak_memory"]
    assert 0.85 * peak <= estimate <= 1.15 * peak, record["plan"]["memory"]
