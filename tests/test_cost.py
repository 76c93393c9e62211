"""What a run costs: tokens counted exactly, operations compared with those that PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from lab_runs import recipe, settings
from torch.utils.flop_counter import FlopCounterMode

from lethe import Distill, LoraSettings, TamperConfig, Transfer, tamper, unlearn
from lethe.config import EvalSettings
from lethe.config.unlearning import SamSettings
from lethe.models import refs
from lethe.models.activations import blocks, read
from lethe.models.adapters import add_adapters
from lethe.models.flops import Flops
from lethe.objectives.losses import cross_entropy
from lethe.report.tables import all_tables
from lethe.results.study import Study
from lethe.runs.run import Run

DEPTH = 16
"""Blocks. In the lowest trained one some gradients of inputs are not needed, which the formula counts."""
FEW = EvalSettings(["lab_forget_robust"], limit=4)


def counted(model, ids, layers: list[int], logits: bool) -> tuple[int, int]:
    """The operations of a pass forward and back, as PyTorch counts them."""
    with FlopCounterMode(display=False) as forward:
        states = read(model, ids, layers, logits)
    loss = (
        cross_entropy(states.output, ids, torch.ones_like(ids), ids.numel())
        if logits
        else states.activations[max(layers)].sum()
    )
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("training", ["lora", "full", "upper half"])
@pytest.mark.parametrize(("layers", "logits"), [([], True), ([11], False), ([9, 13], False)])
def test_operations_are_those_that_pytorch_counts(make_model, tmp_path, family, training, layers, logits):
    model, _ = refs.load(refs.resolve(str(make_model(family, tmp_path / "model", num_hidden_layers=DEPTH))))
    if training == "lora":
        model = add_adapters(model, LoraSettings(r=4, dropout=0.0), [DEPTH - 1], 0)
    elif training == "full":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        blocks(model)[DEPTH // 2 :].requires_grad_(True)
    ids = torch.randint(3, 300, (8, 2))  # short, since PyTorch counts no attention on a CPU
    flops = Flops(model)
    passes = ([2] * 8, max(layers, default=-1) + 1, logits)
    forward, backward = counted(model, ids, layers, logits)
    assert flops.forward(*passes) == pytest.approx(forward, rel=0.04)
    assert flops.backward(*passes) == pytest.approx(backward, rel=0.06)
    again = flops.backward(*passes, again=True) - flops.backward(*passes)
    assert again == flops.forward([2] * 8, DEPTH if logits else passes[1], False)


def test_of_experts_those_that_a_token_passes_count(make_model, tmp_path):
    folder = make_model("qwen3_moe", tmp_path / "model")
    model, _ = refs.load(refs.resolve(str(folder)))
    text = model.config.get_text_config()
    experts, active = text.num_experts, text.num_experts_per_tok
    assert active < experts
    inside = [p for p in blocks(model)[0].parameters() if p.ndim > 1]
    fused = sum(p.numel() for p in inside if p.ndim == 3)
    assert fused and Flops(model).matrices[0] == sum(p.numel() for p in inside) - fused + fused * active // experts


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["live", "cached"])
def test_tokens_of_a_run_are_those_of_its_documents(lab, tmp_path, cache):
    made = settings(tmp_path, teacher_cache=cache, max_steps=3, num_train_examples=24, gradient_accumulation_steps=1)
    run = unlearn(Distill(**{**made, "eval": FEW}))
    cost, rows = run.record["cost"], run.rows("metrics.jsonl")
    forget, retain = (sum(row[f"{name}_tokens"] for row in rows) for name in ("forget", "retain"))
    assert len(rows) == 3 and {row["forget_documents"] for row in rows} == {8}  # one epoch: every document once
    assert cost["tokens"] == {
        "model_forward": forget + retain,
        "model_backward": forget + retain,
        "source_forward": forget,
        "reference_forward": retain,
    }
    works = {"training"} | ({"forget teacher", "retain teacher"} if cache == "cached" else set())
    assert set(cost["flops_by_work"]) == works and cost["flops"] == sum(cost["flops_by_work"].values())
    lab_tokens = Run.open(refs.lab_folder()).record["plan"]["tokens"]
    assert cost["pretraining"]["tokens"] == lab_tokens
    assert cost["pretraining"]["share_of_tokens"] == pytest.approx((forget + retain) / lab_tokens)
    assert cost["pretraining"]["share_of_flops"] == pytest.approx(cost["flops"] / cost["pretraining"]["flops"])
    assert cost["seconds"]["training"] > 0 and cost["peak_memory"]["process"] > 2**20


@pytest.mark.slow
def test_a_second_pass_over_the_forget_text_counts(lab, tmp_path):
    made = settings(tmp_path, teacher_cache="live", max_steps=2, num_train_examples=16, sam=SamSettings(0.01))
    run = unlearn(Distill(**{**made, "eval": FEW}))
    forget, retain = (sum(row[f"{name}_tokens"] for row in run.rows("metrics.jsonl")) for name in ("forget", "retain"))
    tokens = run.record["cost"]["tokens"]
    assert tokens["model_forward"] == tokens["model_backward"] == 2 * forget + retain
    assert tokens["source_forward"] == 2 * forget and tokens["reference_forward"] == retain


@pytest.mark.slow
def test_maps_a_repeated_cache_and_an_attack_are_counted(lab, tmp_path):
    made = recipe(tmp_path / "runs", max_steps=10, affine_examples=64)  # more than one epoch: teachers are cached
    first, second = unlearn(made), unlearn(made)
    assert first.record["cost"]["tokens"] == second.record["cost"]["tokens"]
    assert first.record["cost"]["flops_by_work"] == second.record["cost"]["flops_by_work"]
    maps = first.record["cost"]["before"]["maps"]
    assert maps["tokens"]["source_forward"] == maps["tokens"]["reference_forward"] > 0 and maps["flops"] > 0
    attack = tamper(
        TamperConfig(model=f"run:{first.id}", num_train_examples=16, max_steps=2, eval=FEW, out=str(tmp_path / "runs"))
    )
    cost, trained = attack.record["cost"], sum(row["attack_tokens"] for row in attack.rows("metrics.jsonl"))
    assert cost["tokens"] == {"model_forward": trained, "model_backward": trained}
    assert cost["pretraining"]["tokens"] == first.record["cost"]["pretraining"]["tokens"]  # that of the lab's model
    table = next(table for table in all_tables(Study([first, attack])) if table.title == "Cost")
    assert [row[table.columns.index("Tokens")] for row in table.rows] == [
        f"{run.record['cost']['tokens']['model_backward']:,}" for run in (first, attack)
    ]


@pytest.mark.slow
def test_a_model_that_is_not_of_the_lab_has_no_share_and_says_why(make_model, texts, tmp_path):
    make_model("llama", tmp_path / "model")
    make_model("llama", tmp_path / "source", seed=1)
    for name, part in (("forget", texts[:30]), ("retain", texts[30:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    run = unlearn(
        Transfer(
            model=str(tmp_path / "model"), source=str(tmp_path / "source"), layers=[1], max_length=64, max_steps=1,
            affine="none",
            forget=str(tmp_path / "forget.txt"), retain=str(tmp_path / "retain.txt"), eval=FEW,
            out=str(tmp_path / "out"),
        )
    )  # fmt: skip
    assert "pretraining" not in run.record["cost"]
    assert run.record["cost"]["missing"]["pretraining"].startswith("the model is not one of the lab")


def test_attention_counts_its_unmasked_half(make_model, tmp_path):
    model, _ = refs.load(refs.resolve(str(make_model("llama", tmp_path / "model", num_hidden_layers=2))))
    model.set_attn_implementation("eager")
    ids, flops = torch.randint(3, 300, (1, 64)), Flops(model.requires_grad_(True))
    forward, backward = counted(model, ids, [], True)
    masked = 2 * 2 * flops.attention * 64**2
    assert flops.forward([64], 0, True) == pytest.approx(forward - masked, rel=0.01)
    assert flops.backward([64], 0, True) == pytest.approx(backward - 2 * masked, rel=0.01)
