"""Attacks without training: each change of weights against a slow and obvious version, and what a run of them keeps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lethe import EvalSettings, EvaluateConfig, TamperConfig, evaluate, tamper
from lethe.attacks.weights import GROUP, NF4, disturb, int8, nf4, noised, prune
from lethe.attacks.without_training import prompts
from lethe.config import ResumeConfig
from lethe.errors import LetheError
from lethe.evaluation.accuracy import evaluate_model
from lethe.models import refs
from lethe.sweeps.resuming import resume
from lethe.text import corpora

TASKS = ["lab_forget_robust", "lab_retain"]
WEIGHT = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 7)[:, None]


def attack(out: Path, kind: str, model: str = "lab:final", **changes) -> TamperConfig:
    settings = {"eval": EvalSettings(TASKS, limit=40), "out": str(out), "name": kind}
    return TamperConfig(model=model, attack=kind, **(settings | changes))


def test_noise_is_a_share_of_each_matrix_own_spread():
    weight = torch.randn(400, 300) * 7
    change = (noised(weight, 0.2, torch.Generator().manual_seed(3)) - weight).double()
    assert change.std().item() == pytest.approx(0.2 * weight.double().std(correction=0).item(), rel=0.01)
    assert abs(change.mean().item()) < 4 * 0.2 * 7 / math.sqrt(weight.numel())
    further = noised(weight, 0.4, torch.Generator().manual_seed(3)) - weight
    torch.testing.assert_close(further.double(), 2 * change, rtol=1e-3, atol=1e-5)
    assert not torch.equal(noised(weight, 0.2, torch.Generator().manual_seed(4)), weight + change.float())


def test_eight_bits_are_whole_multiples_of_each_rows_largest_weight():
    found = int8(WEIGHT)
    for row, back in zip(WEIGHT.tolist(), found.tolist(), strict=True):
        scale = max(map(abs, row)) / 127
        assert back == pytest.approx([round(w / scale) * scale for w in row], rel=1e-5)
    assert torch.equal(int8(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert all(len(row.unique()) <= 255 for row in int8(torch.randn(3, 4000)))
    torch.testing.assert_close(int8(found), found)  # a second round trip changes nothing more


def test_levels_of_four_bits_are_quantiles_of_the_normal_distribution():
    """As in QLoRA: 8 positive and 7 negative quantiles, and 0, from a tail that the paper's code fixes at 0.9677083."""
    tail = 0.9677083
    positive, negative = norm.ppf(np.linspace(tail, 0.5, 9)[:-1]), -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    assert pytest.approx(levels / levels.max(), abs=1e-6) == list(NF4)


def test_four_bits_are_the_nearest_level_of_each_block():
    flat, found = WEIGHT.flatten().tolist(), nf4(WEIGHT)
    expected = []
    for begin in range(0, len(flat), GROUP):  # 350 weights: the last block is shorter
        block = flat[begin : begin + GROUP]
        scale = max(map(abs, block))
        expected += [min(NF4, key=lambda level: abs(level - w / scale)) * scale for w in block]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert found.shape == WEIGHT.shape
    assert torch.equal(nf4(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pruning_takes_the_smallest_weights_of_a_matrix(share):
    found = prune(WEIGHT, share)
    zero = found == 0
    assert int(zero.sum()) == round(share * 350)
    assert WEIGHT[zero].abs().max() <= WEIGHT[~zero].abs().min()
    assert torch.equal(found[~zero], WEIGHT[~zero])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_matrices_of_the_blocks_change_and_nothing_else(make_model, tmp_path, architecture):
    folder = make_model(architecture, tmp_path / "m")
    before, model = (refs.load(refs.resolve(str(folder)))[0] for _ in range(2))
    assert disturb(model, "quantize", 8) == (16 if architecture == "gpt2" else 28)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before.state_dict()[name])}
    assert changed and all(".h." in name or ".layers." in name for name in changed)
    assert not any("norm" in name or "ln_" in name or name.endswith("bias") for name in changed)
    name = "transformer.h.0.attn.c_attn" if architecture == "gpt2" else "model.layers.0.self_attn.q_proj"
    old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
    expected = int8(old.T).T if architecture == "gpt2" else int8(old)  # GPT-2 keeps a matrix with its inputs as rows
    assert torch.equal(new, expected)


def test_settings_that_an_attack_does_not_read_are_refused():
    for kind, setting, value in (
        ("noise", "lr", 1e-5), ("noise", "forget", "lab:retain"), ("prune", "seed", 1), ("quantize", "max_steps", 5),
        ("prompt", "save_model", True), ("prompt", "epochs", 2), ("prune", "adapter", "train"),
    ):  # fmt: skip
        with pytest.raises(LetheError, match=f"^{setting}: .* has no effect with attack {kind}; leave it out$"):
            TamperConfig(model="m", attack=kind, **{setting: value})
    for kind, strengths, why in (
        ("finetune", [1], "no effect with attack finetune"), ("noise", [0], "above 0"), ("quantize", [3], "8 or 4"),
        ("prune", [1.0], "below 1"), ("prompt", [1.5], "whole numbers"), ("noise", [0.2, 0.1], r"weakest first: \[0.1, 0.2\]"),
        ("prompt", [600], "more than num_train_examples"),
    ):  # fmt: skip
        with pytest.raises(LetheError, match=f"^strengths: .*{why}"):
            TamperConfig(model="m", attack=kind, strengths=strengths)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "quantize", "prune"])
def test_each_strength_is_done_to_the_untouched_model(lab, tmp_path, kind):
    """Not to what the strength before left: the last point is that of a model disturbed once, by hand."""
    run = tamper(attack(tmp_path, kind, save_model=True))
    curve, strengths = run.rows("curve.jsonl"), run.record["config"]["strengths"]
    assert [(line["step"], line["strength"]) for line in curve] == list(enumerate([0, *strengths]))
    assert run.record["evals"] == curve[-1]["evals"] and run.record["plan"]["steps"] == len(strengths)
    model, tokenizer = refs.load(refs.resolve("lab:final"))
    assert curve[0]["evals"] == evaluate_model(model, tokenizer, TASKS, 40)
    disturb(model, kind, strengths[-1])
    assert curve[-1]["evals"] == evaluate_model(model, tokenizer, TASKS, 40)
    kept = evaluate(EvaluateConfig(str(run.path), TASKS, limit=40, out=str(tmp_path)))
    assert kept.record["evals"] == curve[-1]["evals"]


@pytest.mark.slow
def test_a_strength_that_breaks_the_model_ends_the_attack_as_diverged_also_when_it_is_gone_on_with(lab, tmp_path):
    run = tamper(attack(tmp_path, "noise", strengths=[0.1, 1e38, 2e38], save_model=True))
    assert run.status == "diverged" and run.record["divergence"]["step"] == 2 and "not numbers" in run.record["reason"]
    assert [line["step"] for line in run.rows("curve.jsonl")] == [0, 1, 2] and run.record["evals"] == {}
    assert "artifacts" not in run.record
    before = (run.path / "curve.jsonl").read_bytes(), run.record["reason"]
    run.update(status="cancelled")  # as if it had been stopped just after
    resumed = resume(ResumeConfig(str(run.path)))
    assert resumed.status == "diverged" and resumed.record["evals"] == {}
    assert ((run.path / "curve.jsonl").read_bytes(), resumed.record["reason"]) == before


@pytest.mark.slow
def test_equal_seeds_give_equal_curves(lab, tmp_path):
    for kind, strengths in (("noise", [0.8]), ("prompt", [1])):
        curves = [tamper(attack(tmp_path, kind, seed=seed, strengths=strengths)).rows("curve.jsonl") for seed in (0, 0, 1)]
        assert curves[0] == curves[1] != curves[2]


@pytest.mark.slow
def test_documents_of_a_prompt_stand_before_each_question_as_lm_evals_description_does(lab, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lethe.evaluation import tasks

    config = attack(tmp_path, "prompt", strengths=[1, 2], eval=EvalSettings(["lab_forget_robust"], limit=40), max_length=48)
    run = tamper(config)
    model, tokenizer = refs.load(refs.resolve("lab:final"))
    text = prompts(config, corpora.read("lab:forget")[-512:], tokenizer)
    assert text[2].startswith(text[1])
    manager = TaskManager(include_path=str(Path(tasks.__file__).parent), include_defaults=False)
    (task,) = manager.load(["lab_forget_robust"])["tasks"].values()
    task.set_config(key="description", value=text[2])
    theirs = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=[task], limit=40, bootstrap_iters=0)
    ours = run.rows("curve.jsonl")[-1]
    assert ours["evals"]["lab_forget_robust"]["acc"] == theirs["results"]["lab_forget_robust"]["acc,none"]
    assert ours["tokens"] == len(tokenizer(text[2])["input_ids"])
    assert run.record["parents"]["forget"]["documents"] == 512


@pytest.mark.slow
def test_a_prompt_beyond_the_window_is_refused_before_a_run_is_made(lab, tmp_path):
    with pytest.raises(LetheError, match=r"^strengths: 16 documents \(\d+ tokens\) and the longest question .* window of 256"):
        tamper(attack(tmp_path / "runs", "prompt", strengths=[1, 16]))
    assert not (tmp_path / "runs").exists()
