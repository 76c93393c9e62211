"""The models that a run compares with: the reference is never the trained model, and nothing stays in memory without need."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lethe import NPO, LoraSettings, Transfer, unlearn
from lethe.config import EvalSettings, ResumeConfig, to_dict
from lethe.errors import LetheError
from lethe.models import refs, streaming
from lethe.models.activations import States
from lethe.models.adapters import add_adapters
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.unlearning.check import check
from lethe.unlearning.frozen import Frozen, WithoutAdapters
from lethe.unlearning.prepare import prepare
from lethe.unlearning.trainer import UnlearnTrainer
from lethe.unlearning.view import Teacher

STEPS = 4
LAYERS = [0, 1]


@pytest.fixture(scope="module")
def folder(make_model, texts, tmp_path_factory) -> Path:
    """Models and their sources, `FAMILY-0` and `FAMILY-1`, and text. Llama's output head is its embedding here."""
    home = tmp_path_factory.mktemp("frozen")
    for family, more in (("gpt2", {}), ("gpt_neox", {}), ("llama", {"tie_word_embeddings": True})):
        for seed in (0, 1):
            make_model(family, home / f"{family}-{seed}", seed=seed, **more)
    for name, part in (("forget", texts[:30]), ("retain", texts[30:])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return home


def settings(folder: Path, out: Path, family: str = "gpt_neox", **changes: Any) -> dict[str, Any]:
    found = {
        "model": str(folder / f"{family}-0"), "forget": str(folder / "forget.jsonl"), "retain": str(folder / "retain.jsonl"),
        "layers": LAYERS, "max_length": 16, "max_steps": STEPS, "per_device_train_batch_size": 4, "lr": 1e-2,
        "teacher_cache": "live", "eval": EvalSettings(["lab_forget_robust"], limit=2), "out": str(out),
    }  # fmt: skip
    return found | changes


def recipe(folder: Path, out: Path, family: str = "gpt_neox", **changes: Any) -> Transfer:
    own = {"source": str(folder / f"{family}-1"), "affine": "none", "schedule": "constant"}
    return Transfer(**settings(folder, out, family, **own | changes))


def tensors(states: States) -> list[Tensor]:
    return [*states.activations.values(), *([] if states.output is None else [states.output])]


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """One entry for each pass of a reference, which is compared with a separately loaded one to the bit."""
    plain, found, loaded = Teacher.live, list[str](), dict[str, Frozen]()

    def compared(self: Teacher, ids: Tensor) -> States:
        if self.need.teacher != "reference":
            return plain(self, ids)
        assert isinstance(self.model, WithoutAdapters)
        student = self.model.student
        before = torch.get_rng_state(), [(m.training, getattr(m, "disable_adapters", None)) for m in student.modules()]
        trained = [p.requires_grad for p in student.parameters()]
        states = plain(self, ids)
        assert torch.equal(before[0], torch.get_rng_state()) and trained == [p.requires_grad for p in student.parameters()]
        assert before[1] == [(m.training, getattr(m, "disable_adapters", None)) for m in student.modules()]
        other = loaded.setdefault(self.model.ref.path, Frozen(self.model.ref, "float32"))
        separate = dataclasses.replace(self, model=other, head=other.head() if self.head is not None else None)
        expected = plain(separate, ids)
        assert all(torch.equal(a, b) for a, b in zip(tensors(states), tensors(expected), strict=True)) and tensors(states)
        if self.head is not None and states.output is not None:
            assert torch.equal(self.head(states.output), separate.head(states.output))  # type: ignore[misc]
        found.append("training" if student.training else "before")
        return states

    monkeypatch.setattr(Teacher, "live", compared)
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neox", {}),
        ("gpt_neox", {"fast": False, "gradient_accumulation_steps": 2}),
        ("gpt_neox", {"lora": LoraSettings(r=4, dropout=0.3)}),
        ("gpt_neox", {"gradient_checkpointing": True, "retain_loss": "mse"}),
        ("gpt2", {}),
        ("gpt2", {"fast": False, "gradient_checkpointing": True}),
        ("llama", {"optimizer": "muon"}),
        ("llama", {"merge": True}),
    ],
)
def test_a_model_with_its_adapters_off_is_the_separately_loaded_reference_at_every_update(
    family, changes, folder, tmp_path, passes
):
    run = unlearn(recipe(folder, tmp_path, family, **{"lora": LoraSettings(r=4, dropout=0.0)} | changes))
    rows = run.rows("metrics.jsonl")
    assert passes.count("training") >= STEPS * changes.get("gradient_accumulation_steps", 1)
    name = f"retain_{changes.get('retain_loss', 'kl')}_loss"
    assert rows[0][name] < 1e-6 and rows[-1][name] > 1e-4  # the adapters have an effect, and only on the trained model
    assert "missing" not in run.record and 0 < run.record["agreement"]["retain_with_reference"] <= 1


def test_npo_has_the_same_reference_on_both_texts(folder, tmp_path, passes):
    unlearn(NPO(**settings(folder, tmp_path, lora=LoraSettings(r=4, dropout=0.0))))
    assert passes.count("training") >= 2 * STEPS


def test_a_full_rank_run_is_compared_with_weights_that_are_not_trained(folder, tmp_path):
    run = unlearn(recipe(folder, tmp_path, lora=None, lr=1e-3))
    rows = run.rows("metrics.jsonl")
    assert rows[0]["retain_kl_loss"] < 1e-6 and rows[-1]["retain_kl_loss"] > 1e-4
    student = refs.load(refs.resolve(str(folder / "gpt2-0")))[0]
    with pytest.raises(ValueError, match="is trained, so the model without adapters would not be the reference"):
        WithoutAdapters(refs.resolve(str(folder / "gpt2-0")), "float32", student)
    adapted = add_adapters(student, LoraSettings(r=2), LAYERS, 0)
    WithoutAdapters(refs.resolve(str(folder / "gpt2-0")), "float32", adapted)
    adapted.get_submodule("base_model.model.transformer.wte").requires_grad_(True)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight is trained"):
        WithoutAdapters(refs.resolve(str(folder / "gpt2-0")), "float32", adapted)


# --- what is in memory -----------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, int | None]]:
    """The models that are loaded, by their folder, each with its last block."""
    load, found = refs.load, list[tuple[str, int | None]]()

    def noted(ref: refs.ModelRef, dtype: str = "float32", last: int | None = None, **how: Any) -> Any:
        found.append((Path(ref.path).name, last))
        return load(ref, dtype, last, **how)

    monkeypatch.setattr(refs, "load", noted)
    return found


TARGET, PART, ALL = ("gpt_neox-0", None), ("gpt_neox-1", 1), ("gpt_neox-1", None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [TARGET, PART]),
        ({"affine": "fit"}, [TARGET, PART]),
        ({"lora": None, "affine": "fit", "retain_loss": "ce"}, [TARGET, PART]),
        ({"lora": None}, [TARGET, PART, TARGET]),
        ({"lora": None, "retain_loss": "mse"}, [TARGET, PART, ("gpt_neox-0", 1)]),
        ({"forget_kl_coef": 1.0}, [TARGET, ALL]),
        ({"rewind": 0.5}, [TARGET, PART, TARGET]),
        ({"teacher_dtype": "bfloat16"}, [TARGET, PART, TARGET]),
    ],
    ids=["lora", "lora and maps", "full, ce", "full, kl", "full, mse", "logits", "rewound", "other type"],
)
def test_each_model_is_loaded_once_and_a_source_in_part(changes, expected, folder, tmp_path, loaded):
    config = recipe(folder, tmp_path, **{"lora": LoraSettings(r=4, dropout=0.0)} | changes)
    run = Run.create("unlearn", "loaded", to_dict(config), config.out)
    prepare(run, config, check(config))
    assert loaded == expected


def parameters() -> dict[int, nn.Parameter]:
    gc.collect()
    return {id(p): p for p in gc.get_objects() if isinstance(p, nn.Parameter) and not p.is_meta}


@pytest.mark.parametrize("changes", [{}, {"retain_loss": "ce"}, {"retain_loss": "mse"}, {"forget_kl_coef": 1.0}])
@pytest.mark.parametrize("lora", [LoraSettings(r=4, dropout=0.0), None], ids=["lora", "full"])
def test_with_cached_teachers_training_holds_the_model_and_output_heads_alone(lora, changes, folder, tmp_path, monkeypatch):
    already, train, held = parameters(), UnlearnTrainer.train, list[set[str]]()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {id(p) for p in self.model.parameters()}
        heads = {id(p) for teacher in self.teachers.values() if teacher.head is not None for p in teacher.head.parameters()}
        held.append(
            {"head" if key in heads else str(p.shape) for key, p in parameters().items() if key not in own | already.keys()}
        )
        return train(self, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "train", counted)
    config = recipe(folder, tmp_path, teacher_cache="cached", lora=lora, affine="fit", **changes)
    run = unlearn(config)
    separate = "forget_kl_coef" in changes or (lora is None and "retain_loss" not in changes)
    assert held == [{"head"} if separate else set()]
    assert set(run.record["agreement"]) == {"forget_with_source", "retain_with_reference"}
    live = unlearn(dataclasses.replace(config, teacher_cache="live"))
    for part in ("losses", "agreement", "update_by_layer"):
        assert run.record[part] == live.record[part]


def test_a_resumed_run_with_maps_and_caches_loads_no_source(folder, tmp_path, monkeypatch, loaded):
    config = recipe(folder, tmp_path, lora=LoraSettings(r=4), affine="fit", teacher_cache="cached")
    whole = unlearn(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnlearnTrainer, "train_with_bar", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        unlearn(config)
    (run,) = find_runs(tmp_path)
    loaded.clear()
    again = resume(ResumeConfig(str(run.path)))
    assert loaded == [TARGET] and again.status == "complete"
    for part in ("losses", "agreement", "update_by_layer", "evals"):
        assert again.record[part] == whole.record[part]


# --- weights from disk -----------------------------------------------------------------------------------------------


def test_a_copy_of_the_model_is_no_source_in_whatever_files(folder, tmp_path):
    for name, size in (("copy", "5GB"), ("shards", "20KB")):
        AutoModelForCausalLM.from_pretrained(folder / "gpt_neox-0").save_pretrained(tmp_path / name, max_shard_size=size)
        for file in folder.joinpath("gpt_neox-0").glob("tokenizer*"):
            shutil.copy(file, tmp_path / name)
        with pytest.raises(LetheError, match="has the weights of"):
            unlearn(recipe(folder, tmp_path / "runs", source=str(tmp_path / name)))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one = {name: refs.resolve(str(tmp_path / name)) for name in ("copy", "shards")}
    assert streaming.same_weights(one["copy"], one["shards"], "float32")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    last = max(weights)
    weights[last].view(-1)[-1] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert not streaming.same_weights(one["copy"], one["shards"], "float32")


def test_a_damaged_source_is_refused_when_the_model_is_rewound_to_it(folder, tmp_path):
    shutil.copytree(folder / "gpt_neox-1", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["gpt_neox.layers.3.mlp.dense_h_to_4h.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LetheError, match=r"source: gpt_neox\.layers\.3\.mlp\.dense_h_to_4h\.weight is not finite"):
        unlearn(recipe(folder, tmp_path / "runs", source=str(tmp_path / "broken"), rewind=0.5))
