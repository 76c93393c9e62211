"""No fault at any moment loses or changes a result: killed runs are resumed with a bit-identical result."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import assert_same, interruptible, start, wait_for, written
from safetensors.torch import load_file
from transformers import TrainerState

from lethe import (
    AffineConfig,
    CheckpointsConfig,
    EvaluateConfig,
    LoraSettings,
    TamperConfig,
    Transfer,
    checkpoints,
    evaluate,
    fit_affine,
    tamper,
    unlearn,
)
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig, to_dict
from lethe.errors import LetheError
from lethe.evaluation.accuracy import NotNumbersError
from lethe.lab.presets import active_preset
from lethe.models import refs
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.training import saves, trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(make_model, tmp_path_factory) -> dict[str, Any]:
    """A Llama, an older self, and text: settings of a recipe."""
    home = tmp_path_factory.mktemp("llama")
    for name, seed in (("target", 1), ("source", 2)):
        make_model("llama", home / name, seed=seed)
    for name in ("forget", "retain"):
        (home / f"{name}.txt").write_text("\n".join(f"{name} document number {i} speaks of {name} things." for i in range(64)))
    return {"model": str(home / "target"), "source": str(home / "source"), "layers": [0, 2]} | {
        name: str(home / f"{name}.txt") for name in ("forget", "retain")
    }


REWOUND = {"rewind": 0.5, "rewind_weights": "fisher", "forget_kl_coef": 1.0, "packing": "packed", "affine": "none"}


@pytest.mark.parametrize(
    ("kind", "at"),
    [("neox-lora", 8), ("neox-full", 2), ("llama-lora", 2), ("llama-full", 19), ("llama-muon", 8), ("neox-rewound", 7)],
)
def test_a_run_killed_at_any_step_ends_in_the_same_bits(lab, llama, tmp_path, kind, at):
    architecture, training = kind.split("-")
    settings = llama if architecture == "llama" else {}
    settings = settings | {"lora": LoraSettings() if training == "lora" else None}
    settings = settings | ({"optimizer": "muon"} if training == "muon" else REWOUND if training == "rewound" else {})
    whole = unlearn(interruptible(tmp_path / "whole", **settings))
    process = start("unlearn", interruptible(tmp_path / "killed", **settings), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", at)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Run.open(run.path).status in {"lost", "complete"}
    if Run.open(run.path).status == "lost":
        assert_same(resume(ResumeConfig(str(run.path))), whole)


def test_a_run_keeps_to_the_threads_that_it_began_with_and_says_so(stopped):
    began = torch.get_num_threads()
    stopped.update(environment={"threads": began + 1})
    try:
        resumed = resume(ResumeConfig(str(stopped.path)))
        assert torch.get_num_threads() == began + 1
    finally:
        torch.set_num_threads(began)
    said = f"using {began + 1} threads, as the run did before, not {began}"
    assert resumed.status == "complete" and said in (resumed.path / "log.txt").read_text()


def finetuning(out: Path) -> TamperConfig:
    return TamperConfig(
        model="lab:filtered", num_train_examples=64, max_steps=20, save_every=2, out=str(out),
        per_device_train_batch_size=4, eval=EvalSettings(["lab_forget_robust"], every=4, limit=8),
    )  # fmt: skip


def noise(out: Path) -> TamperConfig:
    tasks = EvalSettings(["lab_forget_robust", "lab_retain"], limit=200)
    return TamperConfig(model="lab:final", attack="noise", eval=tasks, save_model=True, out=str(out))


@pytest.mark.parametrize(("attack", "lines"), [(finetuning, 1), (finetuning, 3), (noise, 2)])
def test_an_attack_killed_at_any_step_or_strength_has_the_same_curve(lab, tmp_path, attack, lines):
    whole = tamper(attack(tmp_path / "whole"))
    process = start("tamper", attack(tmp_path / "killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "curve.jsonl", lines)
    process.kill()
    process.communicate()
    if Run.open(run.path).status == "lost":
        run = resume(ResumeConfig(str(run.path)))
    assert_same(Run.open(run.path), whole)
    if attack is finetuning:
        assert [line["step"] for line in whole.rows("curve.jsonl")] == [0, 4, 8, 12, 16, 20]


def test_sigterm_saves_and_exits_and_the_run_goes_on_from_there(lab, tmp_path):
    settings = {"save_every": 0, "max_steps": 60, "lora": None}
    whole = unlearn(interruptible(tmp_path / "whole", **settings))
    process = start("unlearn", interruptible(tmp_path / "stopped", **settings), tmp_path)
    run = wait_for(process, tmp_path / "stopped", "metrics.jsonl", 5)
    process.terminate()
    _, printed = process.communicate()
    assert process.returncode == 143
    assert printed.splitlines()[-1].startswith("lethe: SIGTERM; resume with: lethe resume")
    run = Run.open(run.path)
    assert run.status == "cancelled" and "SIGTERM" in run.record["reason"]
    done = len(run.rows("metrics.jsonl"))
    assert saves.newest(run.path / "saves").name == f"step-{done}" and done < 60
    assert_same(resume(ResumeConfig(str(run.path))), whole)


# --- saves -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(lab, tmp_path_factory) -> Path:
    """A run that failed after its last update, with saves at 6 and 8."""
    out = tmp_path_factory.mktemp("failed")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lethe.unlearning.pipeline"], "_finish", fail)
        with pytest.raises(LetheError, match="a disk is full"):
            unlearn(interruptible(out, max_steps=8, lora=None))
    assert saves.steps(find_runs(out)[0].path / "saves") == [8, 6]
    return find_runs(out)[0].path


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> Run:
    """What `failed` would have been."""
    return unlearn(interruptible(tmp_path_factory.mktemp("undisturbed"), max_steps=8, lora=None))


@pytest.fixture
def stopped(failed, tmp_path) -> Run:
    return Run.open(shutil.copytree(failed, tmp_path / "runs" / failed.name))


@pytest.mark.parametrize("file", [*saves.FILES, saves.MANIFEST])
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_save_that_is_not_whole_is_never_used(stopped, file, damage):
    path = stopped.path / "saves" / "step-8" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "short" else bytes([content[0] ^ 1]) + content[1:])
    assert saves.newest(stopped.path / "saves").name == "step-6"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("step-8/optimizer.pt", "the newest complete save; 2 updates are repeated"),
        (".", "there is no complete save of the 8 updates"),
    ],
)
def test_a_run_without_its_newest_save_resumes_from_the_one_before_or_begins_anew(stopped, undisturbed, lost, said):
    path = stopped.path / "saves" / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        (stopped.path / "saves" / ".step-9.1.tmp").mkdir()
    assert_same(resume(ResumeConfig(str(stopped.path))), undisturbed)
    assert said in (stopped.path / "log.txt").read_text()


def test_a_divergence_falls_back_on_planned_saves_wherever_the_run_was_stopped_on_the_way(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = (model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), TrainerState())
    saves.begin(tmp_path, model)
    for step in (3, 4):  # stopped there
        saves.write(tmp_path, step, *parts, every=5)
    assert saves.before_divergence(tmp_path, 5) == (tmp_path / saves.BEGIN, 0)
    for step in (5, 7, 8):
        saves.write(tmp_path, step, *parts, every=5)
    assert saves.before_divergence(tmp_path, 5) == (tmp_path / "step-5", 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-5", "step-7", "step-8"]
    saves.write(tmp_path, 10, *parts, every=5)
    assert saves.before_divergence(tmp_path, 5) == (tmp_path / "step-10", 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-8"]


def full(config: Transfer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[list[Run], str]:
    """The runs that a command leaves that meets a full disk, and its one line."""
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(config)))
    assert main(["unlearn", "--config", str(tmp_path / "recipe.json")]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and "make room" in said
    return find_runs(config.out), said


@pytest.mark.parametrize("kib", [1000, 8200, 11700])
def test_a_full_disk_is_an_error_in_one_line_that_leaves_earlier_saves_whole(undisturbed, small, tmp_path, kib, capfd):
    """Weights take 1.8 MB here, AdamW's state 3.7: full in the first weights, in the second state, in the third weights."""
    (run,), said = full(interruptible(small(kib) / "runs", max_steps=8, lora=None, save_every=2), tmp_path, capfd)
    assert "could not be written" in said
    assert run.status == "failed" and "could not be written" in run.record["reason"]
    assert (saves.newest(run.path / "saves") is None) == (kib == 1000)
    assert not list((run.path / "saves").glob(".*"))
    home = shutil.copytree(run.path, tmp_path / "roomy" / run.path.name)
    assert_same(resume(ResumeConfig(str(home))), undisturbed)


def test_a_disk_that_is_full_at_the_end_leaves_a_run_to_resume_and_at_the_start_nothing(lab, small, tmp_path, capfd):
    out = small(8000) / "runs"
    (run,), said = full(interruptible(out, lora=None, affine="none", save_every=0), tmp_path, capfd)
    assert "make room and resume: lethe resume" in said
    assert run.status == "failed" and "a disk is full" in run.record["reason"]
    shutil.rmtree(out)
    (out.parent / "ballast").write_bytes(bytes(7_000 * 1024))
    assert full(interruptible(out, rewind=0.5), tmp_path, capfd)[0] == [] and not out.exists()


# --- what cannot be resumed ------------------------------------------------------------------------------------------


def test_a_run_whose_text_has_changed_is_not_resumed(stopped):
    stopped.update(status="failed", parents={"forget": stopped.record["parents"]["forget"] | {"sha256": "other"}})
    before = sorted(stopped.path.rglob("*"))
    with pytest.raises(LetheError, match="has changed since the run began"):
        resume(ResumeConfig(str(stopped.path)))
    assert sorted(stopped.path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["evaluate", "affine", "checkpoints"])
def test_runs_without_saves_are_done_again_in_their_own_folder(lab, tmp_path, kind):
    source, out = f"lab:global_step{active_preset().onset}", str(tmp_path)
    function, config = {
        "evaluate": (evaluate, EvaluateConfig("lab:final", ["lab_retain"], limit=8, samples=True, out=out)),
        "affine": (fit_affine, AffineConfig("lab:final", source, layers=[1], num_examples=60, out=out)),
        "checkpoints": (checkpoints, CheckpointsConfig("lab:final", tasks=["lab_forget"], limit=8, out=out)),
    }[kind]
    run = function(config)
    before = {key: run.record.get(key) for key in ("evals", "scores", "latest_ignorant", "artifacts", "parents")}
    files = sorted(p.name for p in run.path.iterdir())
    samples = run.rows("samples.jsonl")
    run.update(status="running", heartbeat="2020-01-01T00:00:00+00:00", evals=None, scores=None, latest_ignorant=None)
    again = resume(ResumeConfig(run.id, out))
    assert again.path == run.path and again.status == "complete"
    assert {key: again.record.get(key) for key in before} == before
    assert sorted(p.name for p in again.path.iterdir()) == files and again.rows("samples.jsonl") == samples


# --- divergence ------------------------------------------------------------------------------------------------------


def test_a_loss_far_above_the_first_ones_is_a_divergence_with_the_weights_of_the_last_save(lab, tmp_path):
    settings = {"lora": None, "lr": 0.5, "warmup_steps": 25, "max_grad_norm": 0, "max_steps": 60, "divergence_factor": 1.5}
    run = unlearn(interruptible(tmp_path / "stopped", **settings, affine="none", schedule="constant"))
    facts = run.record["divergence"]
    assert run.status == "diverged"
    assert 20 < facts["step"] < 60 and len(run.rows("metrics.jsonl")) == facts["step"]
    first = [row["loss"] for row in run.rows("metrics.jsonl")[:20]]
    assert facts["loss"] > 1.5 * sum(first) / 20 and facts["first_loss"] == first[0]
    assert facts["weights_of_step"] == 3 * ((facts["step"] - 1) // 3)
    saved = load_file(run.path / "saves" / f"step-{facts['weights_of_step']}" / "weights.safetensors")
    kept = load_file(run.path / "model" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in kept.values())
    assert any(torch.equal(t, saved["gpt_neox.layers.0.attention.dense.weight"]) for t in kept.values())
    assert set(run.record["evals"]) == {"lab_forget_robust"}
    on = interruptible(tmp_path / "on", **settings, affine="none", schedule="constant", on_divergence="finish")
    finished = unlearn(on)
    assert finished.status == "diverged" and len(finished.rows("metrics.jsonl")) == 60

    def fail(*args: Any, **kwargs: Any) -> None:
        raise LetheError("before the model was written")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lethe.unlearning.pipeline"], "_finish", fail)
        with pytest.raises(LetheError, match="before the model"):
            unlearn(interruptible(tmp_path / "failed", **settings, affine="none", schedule="constant"))
    process = start("unlearn", dataclasses.replace(on, out=str(tmp_path / "killed")), tmp_path)
    wait_for(process, tmp_path / "killed", "metrics.jsonl", facts["step"] + 4)
    process.kill()
    process.communicate()
    for folder, whole in (("failed", run), ("killed", finished)):
        left = find_runs(tmp_path / folder)[0]
        assert left.status in {"failed", "lost"} and left.diverged
        resumed = resume(ResumeConfig(str(left.path)))
        assert resumed.status == "diverged" and resumed.record["divergence"] == whole.record["divergence"]
        assert written(resumed) == written(whole) and resumed.record["reason"] == whole.record["reason"]
        assert resumed.record["artifacts"] == whole.record["artifacts"] and resumed.record["evals"] == whole.record["evals"]
    with pytest.raises(LetheError, match="is diverged"):
        resume(ResumeConfig(str(run.path)))


def test_a_loss_that_is_no_number_before_the_first_save_leaves_the_weights_before_the_first_update(lab, tmp_path):
    settings = {"lora": None, "lr": 1e18, "max_grad_norm": 0, "max_steps": 20, "save_every": 0, "affine": "none"}
    run = unlearn(interruptible(tmp_path, **settings, schedule="constant"))
    facts = run.record["divergence"]
    assert run.status == "diverged" and math.isnan(facts["loss"]) and facts["weights_of_step"] == 0
    assert "the loss was nan" in run.record["reason"] and math.isnan(run.rows("metrics.jsonl")[-1]["loss"])
    kept, before = (refs.load(refs.resolve(name))[0].state_dict() for name in (str(run.path), "lab:final"))
    assert kept.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    found = evaluate(EvaluateConfig(str(run.path), tasks=["lab_forget_robust"], limit=4, out=str(tmp_path)))
    assert found.status == "complete" and Run.open(run.path).status == "diverged"
    finished = unlearn(interruptible(tmp_path, **settings, schedule="constant", on_divergence="finish"))
    assert finished.status == "diverged" and finished.record["evals"] == {}
    assert {key: str(finished.record["divergence"][key]) for key in ("step", "first_loss", "loss")} == {
        key: str(facts[key]) for key in ("step", "first_loss", "loss")
    }
    assert (
        finished.record["reason"].startswith("at step ") and "not numbers" in finished.rows("curve.jsonl")[-1]["evals_missing"]
    )


def test_a_divergence_that_an_evaluation_finds_has_its_losses_too(lab, tmp_path):
    settings = {"lora": None, "lr": 1e18, "max_grad_norm": 0, "save_every": 0, "affine": "none", "schedule": "constant"}
    run = unlearn(interruptible(tmp_path, **settings, eval=EvalSettings(["lab_forget_robust"], every=1, limit=4)))
    facts, rows = run.record["divergence"], run.rows("metrics.jsonl")
    assert run.status == "diverged" and "not numbers" in run.record["reason"]
    assert (facts["step"], facts["first_loss"], facts["loss"]) == (len(rows), rows[0]["loss"], rows[-1]["loss"])
    assert facts["weights_of_step"] == 0


def test_a_divergence_that_the_last_evaluation_finds_leaves_the_trained_weights(lab, tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise NotNumbersError("the model's log-likelihoods are not numbers")

    monkeypatch.setattr(trainer, "evaluate_model", broken)
    run = unlearn(interruptible(tmp_path, max_steps=8, lora=None, eval=EvalSettings(["lab_forget_robust"], limit=4)))
    assert run.status == "diverged" and run.record["divergence"]["step"] == 8
    before = {key: run.record[key] for key in ("divergence", "artifacts", "evals", "reason")}, written(run)
    run.update(status="failed")  # as if it had been stopped just after
    resumed = resume(ResumeConfig(str(run.path)))
    assert ({key: resumed.record[key] for key in before[0]}, written(resumed)) == before and resumed.status == "diverged"


def test_a_run_past_its_time_limit_saves_and_is_failed_with_the_reason(lab, tmp_path):
    process = start("unlearn", interruptible(tmp_path / "late", max_steps=100000, time_limit=8 / 3600), tmp_path)
    process.communicate(timeout=120)
    run = find_runs(tmp_path / "late")[0]
    assert run.status == "failed" and run.record["reason"].startswith("time limit reached")
    assert saves.newest(run.path / "saves").name == f"step-{len(run.rows('metrics.jsonl'))}"
