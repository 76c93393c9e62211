"""Unlearning: the losses are the formulas', recomputed by hand from the saved models; what is trained is what was said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lab_runs import recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import LoraSettings, unlearn
from lethe.config import EvalSettings
from lethe.errors import LetheError
from lethe.models.refs import resolve
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.unlearning import changes
from lethe.unlearning.check import check

pytestmark = pytest.mark.slow


def by_hand(model: torch.nn.Module, run: Run, row: int) -> tuple[float, float]:
    """cb_loss and the retain KL of a batch, from hidden_states and the saved maps, document by document."""
    config, batch = run.record["config"], run.rows("batches.jsonl")[row]
    source = AutoModelForCausalLM.from_pretrained(resolve(config["source"]).path)
    target = AutoModelForCausalLM.from_pretrained(resolve(config["model"]).path)
    tokenizer = AutoTokenizer.from_pretrained(resolve(config["model"]).path)
    maps = load_file(run.path / "affine" / "affine_transforms.safetensors")
    texts = {name: corpora.read(config[name])[: config["num_train_examples"]] for name in ("forget", "retain")}
    cb, retain, forget_tokens, retain_tokens = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for i in batch["forget"]:
            ids = torch.tensor([tokenizer(texts["forget"][i].text)["input_ids"][: config["max_length"]]])
            h = model(ids, output_hidden_states=True).hidden_states
            c = source(ids, output_hidden_states=True).hidden_states
            for layer in config["layers"]:
                mapped = c[layer + 1] @ maps[f"layer_{layer}.weight"].T + maps[f"layer_{layer}.bias"]
                cb += ((h[layer + 1] - mapped) ** 2).mean(-1).sum().item() / len(config["layers"])
            forget_tokens += ids.numel()
        for i in batch["retain"]:
            ids = torch.tensor([tokenizer(texts["retain"][i].text)["input_ids"][: config["max_length"]]])
            theirs, ours = (which(ids, output_hidden_states=True) for which in (target, model))
            p, q = theirs.logits.softmax(-1), ours.logits.softmax(-1)
            retain += (p * (p / q).log()).sum().item()
            retain_tokens += ids.numel()
    return cb / forget_tokens, retain / retain_tokens


def test_losses_of_first_and_later_steps_are_those_of_the_formulas(lab, tmp_path):
    shorter, longer = (unlearn(recipe(tmp_path, max_steps=steps)) for steps in (5, 6))
    rows = longer.rows("metrics.jsonl")
    assert rows[:5] == [
        row | {"tokens_per_second": rows[i]["tokens_per_second"]} for i, row in enumerate(shorter.rows("metrics.jsonl"))
    ]

    target = AutoModelForCausalLM.from_pretrained(resolve("lab:final").path)
    cb, kl = by_hand(target, longer, 0)
    assert rows[0]["cb_loss"] == pytest.approx(cb, rel=1e-4)
    assert rows[0]["retain_kl_loss"] == pytest.approx(0, abs=1e-6) and kl == pytest.approx(0, abs=1e-6)

    cb, kl = by_hand(PeftModel.from_pretrained(target, shorter.path / "adapter").eval(), longer, 5)
    assert kl > 1e-5
    assert rows[5]["cb_loss"] == pytest.approx(cb, rel=1e-3)
    assert rows[5]["retain_kl_loss"] == pytest.approx(kl, rel=1e-2, abs=1e-7)


def test_loss_is_the_weighted_sum_of_its_terms_and_the_ramp_is_the_formulas(lab, tmp_path):
    run = unlearn(recipe(tmp_path, max_steps=4, num_train_examples=16, remove_coef=7, retain_coef=3))
    for done, row in enumerate(run.rows("metrics.jsonl")):
        s = min(1, done / 2)
        assert row["remove_coef_t"] == pytest.approx(7 * (1 - 0.25 * s))
        assert row["retain_coef_t"] == pytest.approx(3 * s)
        expected = row["remove_coef_t"] * row["cb_loss"] + row["retain_coef_t"] * row["retain_kl_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulation_changes_nothing_but_the_batches(lab, tmp_path):
    whole = unlearn(recipe(tmp_path, per_device_train_batch_size=8, max_steps=2))
    parts = unlearn(recipe(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2))
    assert parts.record["plan"]["forward_passes"] == 8 and parts.record["plan"]["steps"] == 2
    for a, b in zip(whole.rows("metrics.jsonl"), parts.rows("metrics.jsonl"), strict=True):
        assert a["forget_tokens"] == b["forget_tokens"]
        for term in ("cb_loss", "retain_kl_loss", "grad_norm", "loss"):
            assert a[term] == pytest.approx(b[term], rel=2e-3, abs=1e-6)


def test_equal_seeds_give_equal_weights_and_other_seeds_other_ones(lab, tmp_path):
    hashes = [
        unlearn(recipe(tmp_path, seed=s, lora=LoraSettings())).record["artifacts"]["adapter"]["sha256"] for s in (1, 1, 2)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_loss_that_is_not_a_number_ends_the_run_as_diverged(lab, tmp_path):
    run = unlearn(recipe(tmp_path, lora=None, lr=1e18, max_grad_norm=0, max_steps=30))
    assert run.status == "diverged" and "step" in run.record["reason"]
    assert len(run.rows("metrics.jsonl")) < 30


def test_record_holds_what_the_design_promises(lab, tmp_path):
    run = unlearn(recipe(tmp_path, eval=EvalSettings(["lab_forget_robust", "lab_retain"], every=2, limit=8)))
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "complete" and record["kind"] == "unlearn"
    for key in (
        "id",
        "created",
        "started",
        "finished",
        "heartbeat",
        "config",
        "plan",
        "losses",
        "evals",
        "parents",
        "artifacts",
    ):
        assert record[key], key
    assert set(record["plan"]) >= {"unique_examples", "steps", "forward_passes", "effective_batch", "epochs", "tokens"}
    assert record["plan"]["trainable_parameters"] == sum(
        t.numel() for t in load_file(run.path / "adapter/adapter_model.safetensors").values()
    )
    assert [line["step"] for line in run.rows("curve.jsonl")] == [2, 3]
    assert record["environment"]["seconds"] > 0 and record["environment"]["peak_memory"] > 1e8
    assert (run.path / "log.txt").exists()


def test_maps_of_another_pair_and_the_model_as_its_own_source_are_refused(lab, tmp_path):
    run = unlearn(recipe(tmp_path, max_steps=1))
    with pytest.raises(LetheError, match="fitted for source"):
        unlearn(recipe(tmp_path, source="lab:filtered", affine=str(run.path / "affine")))
    with pytest.raises(LetheError, match="is the model itself"):
        unlearn(recipe(tmp_path, source="lab:final"))
    check(recipe(tmp_path, source="random:lab:final"))  # fresh weights are not the model itself


@pytest.mark.parametrize("lora", [LoraSettings(r=4, dropout=0.0), None], ids=["lora", "full"])
def test_gradient_checkpointing_changes_memory_alone(lab, tmp_path, lora):
    plain, lean = (unlearn(recipe(tmp_path, lora=lora, gradient_checkpointing=on)) for on in (False, True))
    for a, b in zip(plain.rows("metrics.jsonl"), lean.rows("metrics.jsonl"), strict=True):
        for term in ("cb_loss", "retain_kl_loss", "grad_norm"):
            assert a[term] == pytest.approx(b[term], rel=1e-4, abs=1e-6)


def test_rewinding_starts_at_the_source_or_at_the_mean_of_the_weights(lab, tmp_path):
    run = unlearn(recipe(tmp_path, rewind=1.0, affine="none", schedule="constant", remove_coef=1, max_steps=1))
    assert run.rows("metrics.jsonl")[0]["cb_loss"] == pytest.approx(0, abs=1e-8)
    assert run.rows("metrics.jsonl")[0]["retain_kl_loss"] > 0.05
    assert {"base", "adapter"} <= run.record["artifacts"].keys()
    half = unlearn(recipe(tmp_path, rewind=0.5, max_steps=1, lr=1e-12))
    ends = [load_file(Path(resolve(ref).path) / "model.safetensors") for ref in ("lab:final", run.record["config"]["source"])]
    bases = [load_file(each.path / "base" / "model.safetensors") for each in (run, half)]
    for name, weight in ends[1].items():
        assert torch.equal(bases[0][name], weight)
        torch.testing.assert_close(bases[1][name], (ends[0][name] + weight) / 2)


def test_muon_trains_and_each_groups_rate_is_logged(lab, tmp_path):
    settings = {"optimizer": "muon", "lora": None, "warmup_steps": 2, "lr_scheduler_type": "linear", "max_steps": 12}
    run, other = (unlearn(recipe(tmp_path, **settings, num_train_examples=8, lr=lr)) for lr in (2e-3, 4e-3))
    rows = run.rows("metrics.jsonl")
    assert rows[0]["lr"].keys() == {"adamw", "muon", "adamw_no_decay"}
    assert [row["lr"]["muon"] for row in rows[:4]] == pytest.approx([0, 1e-3, 2e-3, 1.8e-3])
    assert rows[-1]["cb_loss"] < 0.9 * rows[0]["cb_loss"]
    assert {(r["algorithm"], r["role"]) for r in run.record["plan"]["routing"]} >= {("muon", "matrix"), ("adamw", "embedding")}
    assert other.record["artifacts"]["model"]["sha256"] != run.record["artifacts"]["model"]["sha256"]


def test_parameters_that_no_term_reaches_are_named_before_training(lab, tmp_path):
    run = unlearn(recipe(tmp_path, lora=None, retain_coef=0, layers=[1], max_steps=1))
    unreached = run.record["plan"]["no_gradient"]
    assert any(".layers.5." in name for name in unreached) and not any(".layers.1." in name for name in unreached)
    assert unlearn(recipe(tmp_path, lora=None, layers=[1], max_steps=1)).record["plan"]["no_gradient"] == []


def test_packed_blocks_lose_no_token_and_merged_adapters_are_the_model(lab, tmp_path):
    run = unlearn(recipe(tmp_path, packing="packed", merge=True, max_steps=-1, num_train_examples=32, max_length=50))
    tokenizer = AutoTokenizer.from_pretrained(resolve("lab:final").path)
    expected = sum(
        len(tokenizer(d.text)["input_ids"]) + 1 for name in ("forget", "retain") for d in corpora.read(f"lab:{name}")[:32]
    )
    assert run.record["plan"]["tokens"] == pytest.approx(expected, abs=50)
    assert (run.path / "model" / "model.safetensors").exists() and "adapter" not in run.record["artifacts"]
    distances = run.record["update_by_layer"]
    target, merged = (load_file(p / "model.safetensors") for p in (Path(resolve("lab:final").path), run.path / "model"))
    squares = sum((merged[n] - target[n]).square().sum().item() for n in target if ".layers.0." in n)
    assert distances["0"]["distance"] == pytest.approx(squares**0.5, rel=1e-3)
    assert 1 <= distances["0"]["stable_rank"] <= 16


def test_a_run_reports_to_tensorboard_as_to_any_of_transformers_loggers(lab, tmp_path):
    run = unlearn(recipe(tmp_path, report_to=["tensorboard"], max_steps=2))
    events = list(run.path.rglob("events.out.tfevents*"))
    assert len(events) == 1
    assert all(tag in events[0].read_bytes() for tag in (b"cb_loss", b"retain_kl_loss"))


@pytest.mark.parametrize("merge", [False, True])
def test_what_cannot_be_recorded_at_the_end_never_loses_the_model(lab, tmp_path, monkeypatch, merge):
    def broken(*args):
        assert list(next(tmp_path.iterdir()).glob("[am][do]*/*.safetensors"))  # saved before anything is recorded
        raise KeyError("model.layers.1.mlp.experts.base_layer.gate_up_proj")

    monkeypatch.setattr(changes, "update_by_layer", broken)
    run = unlearn(recipe(tmp_path, merge=merge, max_steps=1))
    assert run.status == "complete" and run.record["evals"] and run.record["agreement"]
    assert "base_layer" in run.record["missing"]["update_by_layer"] and "update_by_layer" not in run.record
    assert "update_by_layer could not be recorded" in (run.path / "log.txt").read_text()
    assert resolve(f"run:{run.id}", str(tmp_path))
