"""What spares an update its walks over the whole model changes nothing that the walks would have done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lethe import Transfer
from lethe.config import EvalSettings
from lethe.lab.presets import active_preset
from lethe.models.activations import blocks
from lethe.training import trainer
from lethe.training.trainer import without_walks
from lethe.unlearning.pipeline import unlearn

IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture
def model(make_model, tmp_path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "model")).eval()
    model.lm_head.requires_grad_(False)
    return model


def modes(model: Any) -> set[bool]:
    return {module.training for module in model.modules()}


def test_modes_and_gradients_are_those_of_the_models_own_methods(model):
    with without_walks(model):
        assert modes(model) == {True}
        model.train()
        assert modes(model) == {True}
        model.eval()
        assert modes(model) == {False}
        model.train()
        assert modes(model) == {True}
        model(IDS).logits.sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        model.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert "train" not in vars(model) and "zero_grad" not in vars(model)
    model.eval()
    assert modes(model) == {False}


def test_a_list_of_blocks_that_was_replaced_is_found_again(model):
    first = blocks(model)
    assert blocks(model) is first
    model.model.layers = torch.nn.ModuleList(reversed(first))
    assert blocks(model) is model.model.layers
    model.model.stack = model.model.layers
    del model.model.layers
    assert blocks(model) is model.model.stack


def test_a_run_keeps_to_one_device_where_several_are_in_sight(lab, tmp_path, monkeypatch):
    class Two(trainer.TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2  # what it counts on a machine with two GPUs; Trainer would wrap the model in DataParallel

    monkeypatch.setattr(trainer, "TrainingArguments", Two)
    few = EvalSettings(["lab_forget_robust"], limit=4)
    config = Transfer(
        source=f"lab:global_step{active_preset().onset}", num_train_examples=16, max_steps=2, per_device_train_batch_size=4,
        schedule="constant", eval=few, out=str(tmp_path),
    )  # fmt: skip
    run = unlearn(config)
    assert run.status == "complete"
    assert [len(row["forget"]) for row in run.rows("batches.jsonl")] == [4, 4]
