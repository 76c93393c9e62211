"""Mistakes that would change a result without an error are refused or reported: altered maps, rounding, idle settings.

Others of this kind: few-shot counts in one table (test_report), the held-out split and the layer's place (test_affine,
test_residual), parameter groups of Muon (test_optimizers), degenerate answers and missing numbers (test_evaluate).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import lab_runs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lethe import AffineConfig, LoraSettings, TamperConfig, Transfer, fit_affine, tamper, unlearn
from lethe.config import EvalSettings, TextSource
from lethe.config.unlearning import CorruptSettings, LayeredSettings, SamSettings
from lethe.errors import LetheError
from lethe.maps.folder import HASH, METADATA, WEIGHTS
from lethe.models import refs
from lethe.models.refs import resolve
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.unlearning import teacher_cache
from lethe.unlearning.pipeline import inspect

pytestmark = pytest.mark.slow
SHORT: dict[str, Any] = {"affine": "none", "num_train_examples": 16, "per_device_train_batch_size": 4, "max_steps": 4}
SHORT |= {"lora": LoraSettings(), "eval": EvalSettings(["lab_forget_robust"], limit=4)}


def recipe(out: Path, **changes: Any) -> Transfer:
    return lab_runs.recipe(out, **(SHORT | changes))


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maps(lab, tmp_path_factory) -> Path:
    """Maps that Lethe fitted for all blocks of the lab's pair."""
    config = recipe(tmp_path_factory.mktemp("maps"))
    run = fit_affine(AffineConfig(config.model, config.source, layers=[0, 1, 2, 3, 4, 5], num_examples=200, out=config.out))
    return run.path / "affine"


def published(maps: Path, folder: Path, shift: int) -> Path:
    """The same maps as others publish them: no record, their indices moved by `shift`."""
    folder.mkdir()
    tensors = load_file(maps / WEIGHTS)
    moved = {f"layer_{int(name.split('.')[0][6:]) + shift}.{name.split('.')[1]}": t for name, t in tensors.items()}
    save_file(moved, folder / WEIGHTS)
    indices = sorted({int(name.split(".")[0][6:]) for name in moved})
    (folder / METADATA).write_text(json.dumps({"layer_indices": indices, "hidden_dim": len(tensors["layer_0.bias"])}))
    return folder


@pytest.mark.parametrize(("shift", "convention"), [(0, "block_output"), (1, "hidden_states")])
def test_maps_without_a_record_are_read_by_the_convention_that_fits(maps, tmp_path, shift, convention):
    """Layers 1 and 3 are there by either convention; one of them is off by a layer."""
    recorded = unlearn(recipe(tmp_path, affine=str(maps), layers=[1, 3]))
    run = unlearn(recipe(tmp_path, affine=str(published(maps, tmp_path / "maps", shift)), layers=[1, 3]))
    assert f"read as {convention}" in run.record["plan"]["maps"] and run.record["plan"]["warnings"] == []
    assert run.rows("metrics.jsonl")[0]["cb_loss"] == recorded.rows("metrics.jsonl")[0]["cb_loss"]


def test_the_other_convention_is_used_when_named_and_warned_of(maps, tmp_path):
    folder = str(published(maps, tmp_path / "maps", 1))
    right, off = (
        unlearn(recipe(tmp_path, affine=folder, layers=[1, 3], affine_convention=convention))
        for convention in ("hidden_states", "block_output")
    )
    assert right.record["plan"]["warnings"] == []
    assert "fit better as hidden_states" in off.record["plan"]["warnings"][0]
    assert "fit better as hidden_states" in (off.path / "log.txt").read_text()
    assert off.rows("metrics.jsonl")[0]["cb_loss"] > right.rows("metrics.jsonl")[0]["cb_loss"]


DAMAGE: dict[str, Any] = {
    "nothing": lambda name, tensor: tensor,
    "larger": lambda name, tensor: 50 * tensor,
    "zero": lambda name, tensor: 0 * tensor,
    "not numbers": lambda name, tensor: tensor * float("nan"),
    "one layer": lambda name, tensor: 50 * tensor if name == "layer_2.weight" else tensor,
    "one layer zero": lambda name, tensor: 0 * tensor if name.startswith("layer_2") else tensor,
}


def damaged(maps: Path, folder: Path, how: str) -> Path:
    """Maps whose values were changed, and whose record has no hash, as older ones have none."""
    shutil.copytree(maps, folder)
    save_file({name: DAMAGE[how](name, tensor) for name, tensor in load_file(maps / WEIGHTS).items()}, folder / WEIGHTS)
    facts = json.loads((folder / METADATA).read_text())
    assert facts.pop(HASH)
    (folder / METADATA).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "nothing"])
def test_maps_without_a_hash_are_scored_first(maps, tmp_path, how):
    folder = damaged(maps, tmp_path / "maps", how)
    with pytest.raises(LetheError, match="not finite" if how == "not numbers" else "no better than no map"):
        unlearn(recipe(tmp_path / "runs", affine=str(folder)))
    assert not (tmp_path / "runs").exists()


def test_maps_without_a_hash_that_predict_better_than_none_are_used(maps, tmp_path):
    old = damaged(maps, tmp_path / "maps", "nothing")
    runs = [unlearn(recipe(tmp_path, affine=str(folder), max_steps=1)) for folder in (maps, old)]
    assert runs[0].rows("metrics.jsonl")[0]["cb_loss"] == runs[1].rows("metrics.jsonl")[0]["cb_loss"]
    assert all("recorded for this pair; mean R²" in run.record["plan"]["maps"] for run in runs)


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_first_update_the_retain_loss_measures_no_rounding(lab, tmp_path, dtype):
    for lora in (None, LoraSettings()):
        rows = unlearn(recipe(tmp_path, dtype=dtype, lora=lora, max_steps=1)).rows("metrics.jsonl")
        assert rows[0]["retain_kl_loss"] == pytest.approx(0, abs=1e-6)


def test_coarser_teachers_are_used_only_when_named_and_warned_of(lab, tmp_path):
    run = unlearn(recipe(tmp_path, teacher_dtype="bfloat16", max_steps=1))
    assert run.rows("metrics.jsonl")[0]["retain_kl_loss"] > 1e-6
    assert "measure rounding" in run.record["plan"]["warnings"][0]
    with pytest.raises(LetheError, match="teacher_dtype"):
        unlearn(recipe(tmp_path, dtype="bfloat16", teacher_dtype="float32"))


def test_a_source_that_holds_the_models_own_weights_is_refused_wherever_it_lies(lab, tmp_path):
    """A hub's branch for an early step may hold the final weights: the path says nothing."""
    shutil.copytree(resolve("lab:final").path, tmp_path / "copy")
    with pytest.raises(LetheError, match="has the weights of"):
        unlearn(recipe(tmp_path / "runs", source=str(tmp_path / "copy")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "starcoder2"])
def test_a_models_own_dropout_is_off_in_training_and_kept_in_its_configuration(make_model, tmp_path, architecture):
    names = [name for name in vars(AutoConfig.for_model(architecture)) if "drop" in name and name != "classifier_dropout"]
    folder = make_model(architecture, tmp_path / "model", **dict.fromkeys(names, 0.3))
    model, _ = refs.load(resolve(str(folder)))
    ids = torch.arange(3, 30)[None]
    model.train()
    torch.testing.assert_close(model(ids).logits, model.eval()(ids).logits)
    assert names and all(getattr(model.config, name) == 0.3 for name in names)


# --- updates ---------------------------------------------------------------------------------------------------------


def test_small_updates_of_bfloat16_weights_add_up(lab, tmp_path):
    """Each update is far below half a unit in the last place of most weights; forty of them are not."""
    settings = {"lora": None, "lr": 2e-5, "max_steps": 40, "retain_coef": 0, "schedule": "constant"}
    target = load_file(Path(resolve("lab:final").path) / "model.safetensors")
    moved = {}
    for dtype in ("float32", "bfloat16"):
        run = unlearn(recipe(tmp_path, dtype=dtype, **settings))
        weights = load_file(run.path / "model" / "model.safetensors")
        moved[dtype] = torch.cat(
            [(weights[n].float() - target[n].to(weights[n].dtype).float()).flatten() for n in sorted(target)]
        )
    one, other = moved["float32"], moved["bfloat16"]
    assert torch.dot(one, other) / one.square().sum() > 0.8


# --- settings --------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "method": "npo",
    "model": "lab:filtered",
    "source": "lab:filtered",
    "affine": "fit",
    "affine_convention": "hidden_states",
    "forget": TextSource("lab:retain"),
    "retain": [TextSource("lab:retain"), TextSource("{home}/extra.jsonl", weight=0.5)],
    "packing": "packed",
    "rewind": 0.5,
    "rewind_weights": "fisher",
    "rewind_share": 0.5,
    "corrupt": CorruptSettings(),
    "sam": SamSettings(rho=0.5),
    "layered": LayeredSettings(),
    "forget_kl_coef": 2.0,
    "cb_scale": "relative",
    "num_train_examples": 8,
    "layers": [0, 1],
    "max_length": 8,
    "retain_loss": "mse",
    "schedule": "constant",
    "lora": LoraSettings(targets="mlp"),
    "merge": True,
    "dtype": "bfloat16",
    "teacher_dtype": "bfloat16",
    "teacher_cache": "cached",
    "eval": EvalSettings(["lab_forget_robust"], every=1, limit=4),
    "out": "elsewhere",
    "name": "other",
    "max_steps": 5,
    "epochs": 3,
    "optimizer": "muon",
    "newton_schulz_dtype": "bfloat16",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_grad_norm": 0.01,
    "gradient_checkpointing": True,
    "report_to": ["mlflow"],
    "devices": 2,
}


FAULTS = {"save_every", "divergence_factor", "on_divergence", "time_limit", "parallel", "budget"}
"""Their effect shows when something goes wrong, or with several processes: test_resume, test_budget, test_distributed."""


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Transfer) if field.name not in FAULTS])
def test_every_setting_changes_something_or_is_refused(lab, tmp_path, field, baseline, monkeypatch):
    monkeypatch.setattr(teacher_cache, "lethe_home", lambda: tmp_path / "home")  # no test finds another's teacher cache
    (tmp_path / "extra.jsonl").write_text("".join(json.dumps({"text": f"Other text, number {i}."}) + "\n" for i in range(20)))
    default = getattr(recipe(tmp_path), field)
    changed = CHANGES[field] if field in CHANGES else default * 2 + 1
    if field == "retain":
        changed = [dataclasses.replace(text, source=text.source.format(home=tmp_path)) for text in changed]
    if field == "out":
        changed = str(tmp_path / "elsewhere")
    try:
        run = unlearn(recipe(**({"out": tmp_path / "runs"} | {field: changed})))
    except LetheError as error:
        assert str(error).startswith((f"{field}:", f"{field} "))
        assert not (tmp_path / "runs").exists()
        return
    if field == "out":
        assert run.path.parent == tmp_path / "elsewhere"
    elif field == "name":
        assert "other" in run.path.name
    else:
        assert outcome(run) != baseline


@pytest.fixture(scope="module")
def baseline(lab, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "lethe_home", lambda: tmp_path_factory.mktemp("home"))
        first, again = (outcome(unlearn(recipe(tmp_path_factory.mktemp("baseline")))) for _ in range(2))
    assert first == again
    return first


ECHOED = {"seconds", "teachers", "dtypes", "maps", "coefficients", "layers", "warnings"}
"""Parts of the plan that say what a setting is, or how long something took."""


def outcome(run: Run) -> dict[str, Any]:
    """What came of a run: nothing that only repeats its settings, and nothing that time decides."""
    record = {key: run.record[key] for key in ("losses", "artifacts", "evals", "agreement")}
    record["teachers"] = {text: how.partition(":")[0] for text, how in run.record["teachers"].items()}
    plan = {key: value for key, value in run.record["plan"].items() if key not in ECHOED}
    plan["memory"] = {part: size for part, size in plan["memory"].items() if part not in {"libraries", "buffers"}}
    del plan["memory_by_phase"]  # with the libraries of this process
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in run.rows("metrics.jsonl")]
    files = sorted(path.name for path in run.path.iterdir())
    return record | {"plan": plan, "metrics": rows, "curve": run.rows("curve.jsonl"), "files": files}


def test_the_source_is_found_by_a_sweep(lab, tmp_path):
    run = unlearn(recipe(tmp_path, source="auto", max_steps=1))
    sweep = next(other for other in find_runs(tmp_path) if other.record["kind"] == "checkpoints")
    assert run.record["config"]["source"] == sweep.record["latest_ignorant"]
    with pytest.raises(LetheError, match="checkpoints"):
        unlearn(recipe(tmp_path / "none", source=f"auto:{tmp_path}", max_steps=1))


@pytest.mark.parametrize(("targets", "tensors"), [("attention", 4), ("mlp", 4), ("all", 8)])
def test_adapters_sit_on_the_layers_of_the_given_role(lab, tmp_path, targets, tensors):
    plan = inspect(recipe(tmp_path, lora=LoraSettings(targets=targets)))
    assert [row["tensors"] for row in plan["routing"]] == [tensors * 5]


def test_the_plan_says_before_training_what_the_run_does(lab, tmp_path):
    config = recipe(tmp_path, max_steps=-1, epochs=2, lora=None, retain_coef=0, layers=[1])
    plan = inspect(config)
    run = unlearn(config)
    assert plan["tokens"] == run.record["plan"]["tokens"]
    assert plan["steps"] == len(run.rows("metrics.jsonl")) == 8
    assert "retain_kl_loss" not in run.record["losses"]
    assert any("no gradient" in warning for warning in plan["warnings"]) and any(".5." in name for name in plan["no_gradient"])
    assert all(seconds > 0 for seconds in plan["seconds"].values())
    assert {"libraries", "weights", "buffers"} <= set(plan["memory"])
    assert {"loading", "trial", "training", "saving", "evaluation"} <= set(plan["memory_by_phase"])
    assert sum(plan["memory"].values()) == max(plan["memory_by_phase"].values())
    assert not (tmp_path / "check").exists()


def test_an_attack_keeps_float32_weights_whatever_the_models_type(lab, tmp_path):
    run = unlearn(recipe(tmp_path, lora=None, dtype="bfloat16", max_steps=1))
    attack = tamper(
        TamperConfig(
            model=str(run.path),
            num_train_examples=16,
            max_steps=3,
            lr=2e-5,
            eval=EvalSettings(["lab_forget_robust"], limit=4),
            out=str(tmp_path),
        )
    )
    assert attack.record["losses"]["lost_updates"] < 0.01


def test_the_reference_of_full_rank_training_is_the_model_as_it_was(lab, tmp_path):
    run = unlearn(recipe(tmp_path, lora=None))
    losses = [row["retain_kl_loss"] for row in run.rows("metrics.jsonl")]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert all(loss > 1e-5 for loss in losses[1:])
