"""The memory that a run takes, from shapes alone: parts, phases, devices, and what `lethe check --memory` says."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, configuration
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPTNeoXConfig

from lethe import NPO, Distill, LetheError, Transfer
from lethe.cli import main
from lethe.config import LoraSettings, memory_bytes, recipes
from lethe.config.parse import from_recipe
from lethe.methods.method import Method
from lethe.models.loading import on_meta
from lethe.unlearning import scores
from lethe.unlearning.memory import Estimate, Load, Phases, choose_parallel, estimate
from lethe.unlearning.passes import Passes
from lethe.unlearning.simulation import META, recording

ROOT = Path(__file__).parent.parent
NEOX_7B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32,
    "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def recipe(kind: Any = Transfer, **changes: Any) -> Any:
    settings: dict[str, Any] = {"layers": [0, 2], "max_length": 64, "per_device_train_batch_size": 4, "lora": None}
    if kind is not Transfer:
        del settings["layers"]
    source = {"source": "lab:early"} if kind is not NPO else {}
    return kind(**(settings | source | changes))


def training(config: Any, shape: dict[str, Any] = SMALL, **load: Any) -> dict[str, int]:
    return estimated(config, shape, **load).phases["training"]


def estimated(config: Any, shape: dict[str, Any] = SMALL, dtype: torch.dtype = torch.float32, **load: Any) -> Estimate:
    tokens = dict.fromkeys(config.needs(), 100 * config.max_length)
    made = Load(config.max_length, tokens, **{"gpu": True} | load)
    return estimate(config, lambda: on_meta(GPTNeoXConfig(**shape), dtype), made)


def test_what_operations_allocate_is_counted_until_it_is_freed():
    x, w = torch.zeros(8, 16, device=META), torch.zeros(32, 16, device=META, requires_grad=True)
    with recording() as record:
        y = (x @ w.T).relu()  # [8, 32] float32 twice; the matmul's output is freed, relu saves its own
        z = y.double()
        del y
        z.sum().backward()
    assert record.most >= 4 * 8 * 32 + 8 * 8 * 32
    assert record.peak(lambda number, size, shape: str(shape))[str((8, 32))] <= 3 * 4 * 8 * 32 + 8 * 8 * 32
    assert record.of(x, w) == set() and record.of(w.grad) != set()
    assert torch.zeros(1).sum().item() == 0  # tensors with values are left alone


def test_attention_saves_no_matrix_of_all_pairs_of_tokens_and_is_itself_again_afterwards():
    made = torch.rand(1, 2, 512, 16)
    plain = scaled_dot_product_attention(made, made, made)
    q = torch.zeros(1, 2, 512, 16, device=META, requires_grad=True)
    with recording() as record:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert record.most < 4 * 512 * 512
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(made, made, made), plain)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer) -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_of_every_family_is_simulated(family, tokenizer):
    config = configuration(family, tokenizer)
    passes = Passes(recipe(max_length=16), lambda: on_meta(config, torch.float32), 16, frozenset())
    trained = sum(4 * p.numel() for p in passes.student.parameters())
    assert passes.update["activations"] > 0 and 0.2 * trained < passes.optimizer[0] == 2 * trained


def test_activations_grow_with_the_batch_and_are_those_of_one_text():
    one, four, forget, retain = (
        training(recipe(lora=LoraSettings(r=4), **{"per_device_train_batch_size": 1} | changes))["activations"]
        for changes in ({}, {"per_device_train_batch_size": 4}, {"retain_coef": 0.0}, {"remove_coef": 0.0})
    )
    assert 3 * one < four < 4.5 * one and one == max(forget, retain)


def test_parts_are_what_closed_forms_say():
    config = recipe(gradient_accumulation_steps=2)
    frozen = on_meta(GPTNeoXConfig(**SMALL), torch.float32)
    whole = sum(4 * p.numel() for p in frozen.parameters())
    block = sum(4 * p.numel() for p in frozen.gpt_neox.layers[0].parameters())
    parts = training(config)
    # a whole reference, and a source of blocks 0 to 2 without its head
    assert parts["teachers"] == whole + whole - block - 4 * 512 * 64
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (whole, whole, 2 * whole)
    assert parts["maps"] == 4 * 2 * 64 * 65
    cached = training(config, cached=frozenset({"forget", "retain"}))
    assert cached["teachers"] == 4 * 512 * 64 and "maps" not in cached  # the reference's head makes logits
    lora = training(recipe(lora=LoraSettings(r=4)))
    assert lora["teachers"] == whole - block - 4 * 512 * 64  # the reference is the model without adapters
    assert training(recipe(optimizer="muon"))["optimizer"] < 2 * whole


@pytest.mark.parametrize(
    "config",
    [recipe(), recipe(Distill), recipe(NPO), recipe(retain_loss="ce"), recipe(retain_loss="mse"), recipe(cb_scale="relative")],
)
def test_every_loss_is_simulated(config):
    parts = training(config)
    assert parts["activations"] > 4 * 4 * 64 * 64


@pytest.mark.slow
def test_checkpointing_takes_less():
    shape, config = SMALL | {"num_hidden_layers": 12}, recipe(lora=LoraSettings(r=4), layers=[11])
    plain, less = (training(dataclasses.replace(config, gradient_checkpointing=again), shape) for again in (False, True))
    assert 4 * less["activations"] < plain["activations"]


def test_fsdp_divides_weights_gradients_and_optimizer_and_ddp_does_not():
    phases = Phases(recipe(gradient_accumulation_steps=2), lambda: on_meta(GPTNeoXConfig(**SMALL), torch.float32), Load(64, {}))
    one, ddp, fsdp = (phases.estimate(*how).phases["training"] for how in ((1, "ddp"), (4, "ddp"), (4, "fsdp")))
    for part in ("weights", "gradients", "optimizer"):
        assert fsdp[part] == one[part] // 4 and ddp[part] == one[part]
    gathered = 2 * phases.shapes.plain_block + phases.shapes.plain_outside
    assert fsdp["teachers"] == one["teachers"] // 4 and ddp["teachers"] == fsdp["teachers"] + gathered
    assert ddp["buckets"] == one["gradients"] and "gathered" in fsdp
    lora = Phases(recipe(lora=LoraSettings(r=4)), lambda: on_meta(GPTNeoXConfig(**SMALL), torch.float32), Load(64, {}))
    one, fsdp = (lora.estimate(*how).phases["training"] for how in ((1, "ddp"), (4, "fsdp")))
    adapters = lora.shapes.trained  # each device has them whole
    assert fsdp["weights"] == (one["weights"] - adapters) // 4 + adapters
    assert fsdp["optimizer"] == one["optimizer"] and fsdp["gradients"] == one["gradients"]
    small, large = Estimate({"training": {"weights": 5}}), Estimate({"training": {"weights": 15}})
    assert (choose_parallel(small, 10), choose_parallel(large, 10)) == ("ddp", "fsdp")


@pytest.fixture
def shapes(tmp_path, tokenizer) -> Path:
    """A folder with config.json and a tokenizer, and no weights."""
    GPTNeoXConfig(**SMALL, architectures=["GPTNeoXForCausalLM"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def check(capsys: Any, *words: Any) -> dict[str, Any]:
    assert main(["check", "--json", "--config", "deep-ignorance-7b/lora", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_check_needs_only_config_json_and_finds_the_largest_batch(shapes, capsys, tmp_path):
    words = ["--model", shapes, "--layers", "0", "2", "--max_length", "64", "--forget", tmp_path / "none.jsonl"]
    found = check(capsys, *words, "--memory", "1GiB")
    assert found["fits"] and found["peak"] == sum(found["phases"][found["peak_phase"]].values())
    assert found == check(capsys, *words, "--model", f"random:{shapes}", "--memory", "1GiB") | {"model": found["model"]}
    largest = found["largest_batch"]
    at = check(capsys, *words, "--memory", "1GiB", "--per_device_train_batch_size", largest)
    above = check(capsys, *words, "--memory", "1GiB", "--per_device_train_batch_size", round(1.1 * largest) + 1)
    assert at["fits"] and not above["fits"] and above["changes"]
    assert main(["check", "--config", "deep-ignorance-7b/lora", *map(str, words), "--memory", "600MiB", "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "Not even a batch of one document fits" in shown and "devices: 64" in shown
    assert not list(shapes.glob("*.safetensors"))


def test_check_refuses_what_it_cannot_plan(shapes, capsys):
    for words, said in (
        (["--memory", "80 apples"], "memory: expected a size such as 80GiB, got '80 apples'"),
        (["--device", "cpu"], "device: cpu has no effect without memory or devices"),
        (["--memory", "1GiB", "--layers", "9"], "layers: 9 is out of range"),
        (
            [
                "--layers",
                "0",
                "--max_length",
                "64",
                "--devices",
                "2",
                "--lora",
                "null",
                "--optimizer",
                "adamw_8bit",
                "--dtype",
                "float32",
            ],
            "adamw_8bit trains all weights on one device only",
        ),
    ):
        assert main(["check", "--config", "deep-ignorance-7b/lora", "--model", str(shapes), *words]) == 2
        assert said in capsys.readouterr().err


def test_sizes_are_read():
    assert [memory_bytes(text) for text in ("80GiB", "80G", "1.5GB", "500 MiB")] == [80 * 2**30] * 2 + [1500000000, 500 * 2**20]
    with pytest.raises(LetheError, match="expected a size"):
        memory_bytes("0G")


@pytest.mark.parametrize("name", ["unconstrained-full", "unconstrained-muon"])
def test_a_full_rank_7b_recipe_says_that_one_device_is_too_small(name):
    text = recipes.named(f"deep-ignorance-7b/{name}").text
    said = [int(size) for size in re.findall(r"(\d+) GiB", text.splitlines()[2])]
    config = from_recipe(Method, f"deep-ignorance-7b/{name}")
    load = Load(config.max_length, dict.fromkeys(config.needs(), 2048 * config.max_length), gpu=True)
    phases = Phases(config, lambda: on_meta(GPTNeoXConfig(**NEOX_7B), torch.bfloat16), load)
    needed = [phases.estimate(*how).total / 2**30 for how in ((1, "ddp"), (2, "fsdp"))]
    assert said == pytest.approx(needed, abs=1)
    assert needed[0] > 80 > needed[1] and "too small" in text.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("deep-ignorance-7b/")])
def test_a_7b_recipe_fits_one_device_or_says_that_it_does_not(name):
    """No hub is asked: the model is one of the same shape, without weights."""
    config = from_recipe(Method, name)
    load = Load(config.max_length, dict.fromkeys(config.compared(), 2048 * config.max_length), gpu=True)
    phases = Phases(config, lambda: on_meta(GPTNeoXConfig(**NEOX_7B), getattr(torch, config.dtype)), load)
    comment = [line for line in recipes.named(name).text.splitlines() if line.startswith("#")]
    assert (phases.estimate(1, "ddp").total < 80 * 2**30) != ("too small" in " ".join(comment[:5]))


@pytest.mark.slow
def test_the_tables_of_the_page_on_scaling_are_up_to_date():
    sys.path.insert(0, str(ROOT / "scripts"))
    import scaling

    page = scaling.PAGE.read_text(encoding="utf-8")
    assert page == scaling.updated(page)


def test_scoring_weights_holds_a_group_of_gradients_and_sums(monkeypatch):
    config = recipe(Distill, rewind=1.0, rewind_weights="fisher")
    model = on_meta(GPTNeoXConfig(**SMALL), torch.float32)
    sizes = [12 * p.numel() for p in model.parameters()]  # a gradient and two sums in float32
    found = estimated(config).phases["scores"]
    assert found["scores"] == sum(sizes) and found["activations"] > 0 and "gradients" not in found
    monkeypatch.setattr(scores, "GROUP", max(sizes) + 1000)
    assert estimated(config).phases["scores"]["scores"] == max(sizes) + 1000
    shared = estimated(config, processes=4, parallel="fsdp").phases["scores"]
    assert shared["gradients"] == sum(sizes) // 12 and shared["weights"] == found["weights"] // 4
    assert "scores" not in estimated(recipe(Distill, rewind=1.0)).phases
