"""A run where several GPUs are visible, and the losses at which a run diverges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lethe import Transfer
from lethe.config import EvalSettings, TamperConfig
from lethe.lab.presets import active_preset
from lethe.runs.run import Run
from lethe.training import hf_trainer, trainer
from lethe.unlearning.pipeline import unlearn


def test_a_run_keeps_to_one_device_where_several_are_in_sight(lab, tmp_path, monkeypatch):
    class Two(hf_trainer.TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2  # what it counts on a machine with two GPUs; Trainer would wrap the model in DataParallel

    monkeypatch.setattr(hf_trainer, "TrainingArguments", Two)
    few = EvalSettings(["lab_forget_robust"], limit=4)
    config = Transfer(
        source=f"lab:global_step{active_preset().onset}", num_train_examples=16, max_steps=2, per_device_train_batch_size=4,
        schedule="constant", eval=few, out=str(tmp_path),
    )  # fmt: skip
    run = unlearn(config)
    assert run.status == "complete"
    assert [len(row["forget"]) for row in run.rows("batches.jsonl")] == [4, 4]


@pytest.mark.parametrize(("loss", "diverged"), [(-3.0, False), (90.0, False), (150.0, True), (float("nan"), True)])
def test_a_loss_below_zero_diverges_only_when_it_is_far_above(tmp_path, loss, diverged):
    run = trainer.RunTrainer.__new__(trainer.RunTrainer)
    run.run, run.config = Run.create("unlearn", "below-zero", {}, tmp_path), TamperConfig(model="m")
    run._first_losses, run.control = [-1.0] * 20, SimpleNamespace(should_training_stop=False)
    run._look_for_divergence(21, loss)
    assert run.run.diverged == diverged == run.control.should_training_stop
