"""Wrappers of a method's gradient: `sam` and `same_sign` train as a plain loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import Plain, assert_same_weights, settings, trained
from torch import Tensor

from lethe import NPO, RMU, Distill, LoraSettings
from lethe.cli import main
from lethe.config.unlearning import SamSettings
from lethe.unlearning.pipeline import inspect


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("update")
    return str(make_model("gpt_neox", folder / "model", seed=0)), str(make_model("gpt_neox", folder / "source", seed=1))


METHODS = {
    "npo": (lambda pair, **more: NPO(beta=0.5, retain_coef=2, retain_loss="ce", **more), lambda plain, i: plain.npo(i, 0.5),
            lambda plain, i: 2 * plain.cross_entropy(i, "retain")),
    "distill": (lambda pair, **more: Distill(source=pair[1], remove_coef=3, retain_coef=1, rewind=0.3, schedule="constant",
                                             **more),
                lambda plain, i: 3 * plain.kl(i, "forget", "source"), lambda plain, i: plain.kl(i, "retain", "reference")),
}  # fmt: skip


def stepped(plain: Plain, i: int, forget: Any, retain: Any, rho: float, same_sign: bool) -> dict[str, Tensor]:
    """The gradient of update i, entry by entry."""
    g = plain.gradient(forget(plain, i))
    if rho:
        size = torch.cat([part.flatten() for part in g.values()]).norm()
        with torch.no_grad():
            for name, p in plain.parameters.items():
                p.add_(rho * g[name] / size)
        moved = plain.gradient(forget(plain, i))
        with torch.no_grad():
            for name, p in plain.parameters.items():
                p.sub_(rho * g[name] / size)
        g = moved
    r = plain.gradient(retain(plain, i))
    if same_sign:
        g = {name: part * (part * r[name] > 0) for name, part in g.items()}
    return {name: g[name] + r[name] for name in g}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", ["sam", "same_sign", "both"])
def test_a_wrapped_method_trains_as_a_plain_loop(lab, pair, tmp_path, method, wrapper):
    make, forget, retain = METHODS[method]
    sam = SamSettings(rho=0.05) if wrapper != "same_sign" else None
    given = settings(tmp_path, pair[0], sam=sam, optimizer="sgd", lr=0.02)
    run, trainer = trained(make(pair, **given, same_sign=wrapper != "sam"))
    plain = Plain(run, trainer)
    if method == "distill":
        with torch.no_grad():
            for ours, theirs in zip(plain.model.parameters(), plain.others["source"].parameters(), strict=True):
                ours.lerp_(theirs, 0.3)
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    rows = run.rows("metrics.jsonl")
    assert len(rows) == len(plain.batches) == 3 and len(plain.batches[0]["forget"]) == 4
    for i, row in enumerate(rows):
        assert row["loss"] == pytest.approx(float(forget(plain, i) + retain(plain, i)), rel=1e-6)
        change = stepped(plain, i, forget, retain, 0.05 if sam else 0, wrapper != "sam")
        with torch.no_grad():
            for name, p in plain.parameters.items():
                p.sub_(0.02 * (3 - i) / 3 * change[name])
    assert_same_weights(trainer, plain, before)


def test_passes_over_a_text_before_training_add_up_in_the_cost(lab, pair, tmp_path):
    run, trainer = trained(NPO(**settings(tmp_path, pair[0])))
    model: Any = trainer.model
    for _ in range(2):
        for update in trainer.updates_over("forget", dict(model.named_parameters()), "work"):
            assert update.gradient("forget") and not update.gradient("forget").keys() - dict(model.named_parameters()).keys()
    rows: Any = trainer.train_dataset
    tokens = 2 * 2 * sum(map(len, rows.texts["forget"]))  # two gradients, two passes over the text
    counted = run.record["cost"]["before"]["work"]["tokens"]
    assert counted["model_forward"] == counted["model_backward"] == counted["reference_forward"] == tokens


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, dropout=0.0)], ids=["full", "lora"])
def test_rmu_trains_the_output_matrices_of_three_mlps(lab, make_model, tmp_path, family, lora):
    name = str(make_model(family, tmp_path / "model", seed=0))
    _, trainer = trained(RMU(**settings(tmp_path, name, lora=lora, layers=[3], steering=3.0)))
    model: Any = trainer.model
    own = {name.split(".lora_")[0].removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == 3 and {name.rsplit(".", 1)[-1] for name in own} <= {"dense_4h_to_h", "down_proj", "c_proj"}
    assert {int(number) for name in own for number in name.split(".") if number.isdigit()} == {1, 2, 3}
    assert not [name for name in own if "attn" in name]


def test_signs_of_a_retain_gradient_that_is_0_at_the_start_are_warned_of(lab, pair, tmp_path):
    plans = [inspect(NPO(**settings(tmp_path, pair[0], retain_loss=loss, same_sign=True))) for loss in ("kl", "ce")]
    assert [any("signs of the first update" in text for text in plan["warnings"]) for plan in plans] == [True, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sam.rho 0", "sam.rho: must be above 0"),
        ("--sam.rho 0.1 --dtype bfloat16 --lora null", "sam: rounding of bfloat16 weights is larger than its moves"),
        ("--same_sign true --retain_coef 0", "same_sign: True has no effect on a recipe without a retain loss"),
        ("--sam.rho 0.1 --remove_coef 0", "sam: has no effect on a recipe without a forget loss"),
    ],
)
def test_a_wrapper_that_cannot_work_is_refused_in_one_line(lab, capsys, words, said):
    assert main(["unlearn", "--method", "npo", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
