"""Methods that compute the gradient of an update themselves train as a plain loop does."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch
from lab_runs import assert_same, start, wait_for
from lab_runs import settings as lab_settings
from plain import Plain, assert_same_weights, settings, trained
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lethe import MUDMAN, TAR, LoraSettings, unlearn
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> str:
    return str(make_model("gpt_neox", tmp_path_factory.mktemp("procedures") / "model", seed=0))


def at(plain: Plain, weights: dict[str, Tensor]) -> None:
    """Give the plain model these weights."""
    with torch.no_grad():
        for name, value in weights.items():
            plain.parameters[name].copy_(value)


def copied(plain: Plain) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in plain.parameters.items()}


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3"])
def test_mudman_trains_as_a_plain_loop(lab, make_model, tmp_path, family):
    name = str(make_model(family, tmp_path / "model", seed=0))
    own = {"adversary_every": 2, "retain_lr": 0.02, "adversary_lr": 0.05, "retain_momentum": 0.7}
    run, trainer = trained(MUDMAN(**settings(tmp_path, name, max_steps=4, lr=0.1) | own))
    plain = Plain(run, trainer)
    theta, before = copied(plain), copied(plain)
    reading = ("dense_h_to_4h.weight", "gate_proj.weight", "up_proj.weight", "mlp.c_fc.weight")
    names = [name for name in theta if name.endswith(reading)]
    adversary: dict[str, Tensor] = {}
    mean = {name: torch.zeros_like(theta[name]) for name in names}
    for i, row in enumerate(run.rows("metrics.jsonl")):
        if i in {0, 2}:
            adversary = {name: theta[name].clone() for name in names}
        at(plain, theta)
        loss = plain.cross_entropy(i, "retain")
        assert row["retain_ce_loss"] == pytest.approx(float(loss), rel=1e-9)
        r = plain.gradient(loss)
        at(plain, adversary)
        loss = plain.cross_entropy(i, "forget")
        assert row["adversary_ce_loss"] == pytest.approx(float(loss), rel=1e-9)
        ce = plain.gradient(loss)
        adversary = {name: adversary[name] - 0.05 * ce[name] for name in names}
        at(plain, adversary)
        g = plain.gradient(plain.negative_entropy(i, "forget"))
        size = math.sqrt(sum(float(g[name].square().sum()) for name in names))
        for name in names:
            mean[name] = 0.7 * mean[name] + 0.3 * r[name]
            theta[name] = theta[name] - 0.02 * mean[name] - 0.1 / size * g[name] * (g[name].sign() == mean[name].sign())
    at(plain, theta)
    assert len(names) == (8 if family in {"llama", "qwen3"} else 4)
    assert_same_weights(trainer, plain, before)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, dropout=0.0)], ids=["full", "lora"])
def test_tar_trains_as_a_plain_loop(lab, model, tmp_path, lora):
    own = {"mapping_steps": 1, "attack_steps": 4, "attack_every": 2, "attack_lr": 1e-3, "layers": [0, 2], "seed": 3}
    config = TAR(**settings(tmp_path, model, optimizer="sgd", lr=0.01, lr_scheduler_type="constant", lora=lora) | own)
    run, trainer = trained(config)
    plain = Plain(run, trainer)
    if lora:
        plain.model = plain.adapted(config)
    theta, before = copied(plain), copied(plain)
    rows = run.rows("metrics.jsonl")
    vectors = torch.randn(plain.model.config.vocab_size, 32, generator=torch.Generator().manual_seed(3)).double()
    trained_names = [name for name, p in plain.parameters.items() if p.requires_grad]

    def mapping(ids: Tensor) -> Tensor:
        h = plain.activations(ids)
        return sum(((1 - cosine_similarity(h[n], vectors[ids[0]], dim=-1)).sum() for n in (0, 2)), torch.zeros(())) / 2

    def held(ids: Tensor) -> Tensor:
        ours, theirs = plain.activations(ids), [h.detach() for h in plain.activations(ids, "reference")]
        return sum(((ours[n] - theirs[n]).square().mean(-1).sum() for n in (0, 2)), torch.zeros(())) / 2

    tokens = lambda ids: ids.shape[1]  # noqa: E731
    for i, row in enumerate(rows):
        at(plain, theta)
        if i < 1:
            loss = plain.mean(i, "forget", mapping, tokens)
            assert row["mapping_loss"] == pytest.approx(float(loss), rel=1e-9)
            step = plain.gradient(loss + plain.cross_entropy(i, "retain"))
        else:
            step = plain.gradient(plain.cross_entropy(i, "retain") + plain.mean(i, "retain", held, tokens))
            attacker = torch.optim.AdamW([plain.parameters[name] for name in trained_names], lr=1e-3)
            for k in range(4):
                attacker.zero_grad()
                plain.cross_entropy(i, "forget").backward()
                attacker.step()
                if k in {1, 3}:
                    g = plain.gradient(plain.negative_entropy(i, "forget"))
                    step = {name: step[name] + 4 * math.exp(0.0625 * (k - 3)) * g[name] for name in step}
            assert row["attacker_ce_loss"] > 0 and row["retain_mse_loss"] >= 0 and "mapping_loss" not in row
        theta = {name: theta[name] - 0.01 * step[name] if name in trained_names else theta[name] for name in theta}
    at(plain, theta)
    assert_same_weights(trainer, plain, before, within=1e-6)  # AdamW amplifies the rounding of gradients near 0


@pytest.mark.slow
def test_a_killed_procedure_remembers_its_state(lab, tmp_path):
    def config(out: str) -> MUDMAN:
        way: dict[str, Any] = {
            "max_steps": 20,
            "save_every": 3,
            "lora": None,
            "eval": EvalSettings(["lab_forget_robust"], limit=4),
        }
        own = {name: value for name, value in lab_settings(tmp_path / out, **way).items() if name not in {"source", "layers"}}
        return MUDMAN(**own, adversary_every=8)

    whole = unlearn(config("whole"))
    process = start("unlearn", config("killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Run.open(run.path).status == "lost"
    assert_same(resume(ResumeConfig(str(run.path))), whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method mudman --lora.r 4", "lora: has no effect with method mudman, which trains the weights themselves"),
        ("--method mudman --optimizer adamw", "optimizer: adamw has no effect with method mudman"),
        (
            "--method mudman --same_sign true",
            "same_sign: True has no effect with method mudman, which computes its own gradient",
        ),
        ("--method mudman --dtype bfloat16", "dtype: the adversary's steps are lost to rounding in bfloat16"),
        ("--method tar --attack_every 9", "attack_every: no step of the attacker counts"),
        ("--method tar --sam.rho 1", "sam: has no effect with method tar"),
    ],
)
def test_a_procedure_that_cannot_work_is_refused_in_one_line(lab, capsys, words, said):
    assert main(["unlearn", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["mudman", "rmu"])
def test_experts_are_refused_where_the_matrices_of_plain_mlps_are_trained(lab, make_model, tmp_path, capsys, family, method):
    name = str(make_model(family, tmp_path / "model", seed=0))
    words = [
        f"--{key}={value}" for key, value in settings(tmp_path, name).items() if key in {"model", "forget", "retain", "out"}
    ]
    words += ["--num_train_examples=12", "--max_length=24", "--lora=null", "--eval.tasks=lab_retain"]
    assert main(["unlearn", "--method", method, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lethe")]
    assert "it trains the matrices of plain MLPs, and block" in line and "such as npo" in line
