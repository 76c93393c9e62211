"""One process, two and four give the same run: DDP and FSDP2 over gloo, on the nano lab. A process that ends, ends all."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import recipe, wait_for
from safetensors.torch import load_file
from several import (
    LETHE,
    WORK,
    assert_same_data,
    ended,
    finished,
    losses_apart,
    only_run,
    rank_process,
    split,
    start,
    torchrun,
    weights_apart,
    work,
)

from lethe import MUDMAN, NPO, EvaluateConfig, LoraSettings, Sequential, TamperConfig, TunedLens
from lethe.config import EvalSettings, to_dict
from lethe.config.unlearning import SamSettings
from lethe.errors import LetheError
from lethe.models import refs
from lethe.runs.run import Run
from lethe.runs.together import is_for_several
from lethe.training.hf_trainer import Order

pytestmark = pytest.mark.slow
SEVERAL = [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]
DOCUMENTS = 50
"""Six updates of eight documents an epoch, and one of two, in which two of four processes have none."""


def recipes(out: Path) -> dict[str, Any]:
    """Runs of twenty updates in one process."""
    short = {"num_train_examples": DOCUMENTS, "max_steps": 20, "lr": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 2}
    full = short | {"lora": None, "num_train_examples": 64}
    without = {name: value for name, value in full.items() if name not in {"lr_scheduler_type", "warmup_steps"}}
    wrapped = {"sam": SamSettings(rho=0.05), "same_sign": True, "retain_loss": "ce", "optimizer": "sgd", "lr": 1e-2}
    lenses = full | {
        "per_device_train_batch_size": 8,
        "dtype": "float64",
        "eval": recipe(out).eval,
        "num_train_examples": DOCUMENTS,
    }
    return {
        "transfer": recipe(out, **short, teacher_cache="live"),
        "npo": NPO(**short, per_device_train_batch_size=8, lora=LoraSettings(dropout=0.0), eval=recipe(out).eval),
        "adamw": recipe(out, **full),
        "muon": recipe(out, **full, optimizer="muon", newton_schulz_dtype="float32"),
        "float64": recipe(out, **full, dtype="float64"),
        "wrapped": NPO(**full | wrapped, per_device_train_batch_size=8, dtype="float64", eval=recipe(out).eval),
        "mudman": MUDMAN(**without | {"lr": 0.1}, per_device_train_batch_size=8, dtype="float64", eval=recipe(out).eval),
        "adapters": NPO(
            **short | wrapped,
            per_device_train_batch_size=8,
            lora=LoraSettings(dropout=0.0),
            dtype="float64",
            eval=recipe(out).eval,
        ),
        "tuned_lens": TunedLens(**lenses, layers=[0, 1], lens_epochs=2),
        "sequential": Sequential(**lenses, layers=[0, 1, 2]),
        "turns of adapters": Sequential(**lenses | {"lora": LoraSettings(dropout=0.0)}, layers=[0, 1]),
        # the retain loss reads two blocks, so later weights get a gradient from the forget text alone
        "unread": NPO(**full, per_device_train_batch_size=8, retain_loss="mse", layers=[0, 1], eval=recipe(out).eval),
    }


LENSES = ("tuned_lens", "sequential", "turns of adapters")
CASES = [(name, *how) for name in ("transfer", "adamw", "muon") for how in SEVERAL]
CASES += [
    (name, *how) for name in ("npo", "float64", "wrapped", "adapters", "mudman", "unread", *LENSES) for how in SEVERAL[:2]
]
WHOLE = [(name, 1, "ddp") for name in dict.fromkeys(name for name, *_ in CASES)]


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory) -> dict[tuple[str, int, str], Run]:
    """Recipes by one process and by several. The first fits the maps of all."""
    out = tmp_path_factory.mktemp("same")
    jobs: dict[int, list[tuple[str, Any]]] = {1: [], 2: [], 4: []}
    for name, processes, parallel in WHOLE + CASES:
        accumulated = 2 if processes > 1 and name == "transfer" else 1
        where = str(out / f"{name}-{processes}-{parallel}")
        config = split(recipes(out)[name], processes, accumulated, parallel=parallel, out=where)
        jobs[processes].append(("unlearn", config))
    for processes, some in jobs.items():
        work(processes, some, out)
    return {case: only_run(out / "{}-{}-{}".format(*case)) for case in WHOLE + CASES}


@pytest.mark.parametrize(("name", "processes", "parallel"), CASES)
def test_losses_and_weights_are_those_of_one_process(runs, name, processes, parallel):
    run, whole = runs[name, processes, parallel], runs[name, 1, "ddp"]
    assert run.status == whole.status == "complete" and len(run.rows("metrics.jsonl")) == 20
    assert_same_data(run, whole)
    limit = 1e-9 if name in {"float64", "wrapped", "adapters", "mudman", *LENSES} else 1e-5
    assert losses_apart(run, whole) < limit
    assert weights_apart(run, whole) < limit
    assert run.record["plan"]["effective_batch"] == whole.record["plan"]["effective_batch"] == 8
    assert run.record["evals"].keys() == whole.record["evals"].keys() and not run.record.get("missing")


@pytest.mark.parametrize("case", [case for case in WHOLE + CASES if case[0] in {"transfer", "npo"}])
def test_every_document_of_an_epoch_is_used_once(runs, case):
    run = runs[case]
    updates = [row["forget"] for row in run.rows("batches.jsonl")]
    assert list(map(len, updates)) == ([8] * 6 + [2]) * 2 + [8] * 6
    for epoch in (updates[:7], updates[7:14]):
        assert Counter(number for update in epoch for number in update) == Counter(range(DOCUMENTS))


def test_records_of_several_processes(runs):
    run, whole = runs["transfer", 4, "fsdp"], runs["transfer", 1, "ddp"]
    assert run.record["environment"]["world_size"] == 4 and whole.record["environment"]["world_size"] == 1
    for key in ("losses", "agreement"):
        assert run.record[key] == pytest.approx(whole.record[key], rel=1e-4)
    for layer, facts in whole.record["update_by_layer"].items():
        assert run.record["update_by_layer"][layer] == pytest.approx(facts, rel=1e-3)
    assert not (run.path / "saves").exists() and not (run.path / "ranks").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_models_and_adapters_load_without_lethe(runs, lab, parallel):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(name: str, processes: int) -> torch.Tensor:
        run = runs[name, processes, parallel if processes > 1 else "ddp"]
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            if name == "adamw":
                return AutoModelForCausalLM.from_pretrained(run.path / "model")(tokens).logits
            base = AutoModelForCausalLM.from_pretrained(refs.resolve("lab:final").folder)
            return PeftModel.from_pretrained(base, run.path / "adapter")(tokens).logits

    for name in ("adamw", "transfer"):
        assert torch.allclose(logits(name, 2), logits(name, 1), atol=1e-3)


def test_weights_are_scored_and_rewound_as_by_one_process(lab, tmp_path):
    """Of 49 documents, the last batch has one: a process has none. Scores of key biases are rounding, so they are left out."""
    short: dict[str, Any] = {"num_train_examples": 49, "max_steps": 3, "lr": 1e-4, "dtype": "float64", "teacher_cache": "live"}
    short |= {"rewind": 0.9, "rewind_weights": "fisher", "affine": "none"}

    def made(name: str, processes: int, **changes: Any) -> tuple[str, Any]:
        config = recipe(tmp_path, **short | {"lora": None} | changes)
        return "unlearn", split(config, processes, out=str(tmp_path / name), name=name)

    work(1, [made("whole", 1)], tmp_path)
    whole = only_run(tmp_path / "whole")
    given = {"rewind_weights": str(whole.path / "scores.safetensors")}
    several = [
        made(f"{kind}-{way}", 2, parallel=way, **more)
        for way in ("ddp", "fsdp")
        for kind, more in (("fisher", {}), ("given", given))
    ]
    work(2, [*several, made("lora", 2, parallel="fsdp", lora=LoraSettings(dropout=0.0))], tmp_path)
    expected = load_file(whole.path / "scores.safetensors")
    for parallel in ("ddp", "fsdp"):
        found = load_file(only_run(tmp_path / f"fisher-{parallel}").path / "scores.safetensors")
        assert found.keys() == expected.keys()
        assert all(
            torch.allclose(found[n], expected[n], rtol=1e-6, atol=0) for n in expected if not n.endswith("query_key_value.bias")
        )
        run = only_run(tmp_path / f"given-{parallel}")
        shares = {key: run.record["rewound"][key] for key in ("threshold", "share", "by_layer", "by_role")}
        assert shares == {key: whole.record["rewound"][key] for key in shares}
        assert losses_apart(run, whole) < 1e-9 and weights_apart(run, whole) < 1e-9
    adapters = only_run(tmp_path / "lora")
    assert adapters.status == "complete" and "scores" in adapters.record["artifacts"] and "base" in adapters.record["artifacts"]


# --- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parallel"), [("transfer", "ddp"), ("muon", "fsdp")])
def test_a_request_to_stop_at_one_process_saves_and_any_number_of_processes_resume(runs, lab, tmp_path, name, parallel):
    config = split(recipes(tmp_path)[name], 2, parallel=parallel, out=str(tmp_path / "stopped"))
    process = start(*torchrun(2, WORK, "jobs", _pickled(tmp_path, config)), STOP_AT="9")
    code, errors = ended(process)
    run = only_run(tmp_path / "stopped")
    assert code and run.status == "cancelled" and "SIGTERM" in run.record["reason"], errors
    done = len(run.rows("metrics.jsonl"))
    assert [path.name for path in (run.path / "saves").glob("step-*")] == [f"step-{done}"] and 9 <= done <= 11
    for processes in (1, 4):
        copy = tmp_path / str(processes) / run.path.name
        shutil.copytree(run.path, copy)
        finished((*LETHE, "resume", str(copy), "--devices", str(processes)))
        resumed = Run.open(copy)
        assert resumed.status == "complete" and resumed.record["environment"]["world_size"] == processes
        assert losses_apart(resumed, runs[name, 1, "ddp"]) < 1e-5
        assert weights_apart(resumed, runs[name, 1, "ddp"]) < 1e-5
        assert_same_data(resumed, runs[name, 1, "ddp"])


def long_run(out: Path, **changes: Any) -> tuple[str, ...]:
    """The command of a run by two processes that takes far longer than the test."""
    config = split(recipe(out, max_steps=4000, save_every=10, lr=1e-5, **changes), 2, out=str(out / "runs"), devices=2)
    (out / "recipe.json").write_text(json.dumps(to_dict(config)))
    return (*LETHE, "unlearn", "--config", str(out / "recipe.json"))


@pytest.mark.parametrize(("rank", "parallel"), [(1, "ddp"), (0, "fsdp")])
def test_a_killed_process_ends_the_run(lab, tmp_path, rank, parallel):
    process = start(*long_run(tmp_path, parallel=parallel))
    run = wait_for(process, tmp_path / "runs", "metrics.jsonl", 12)
    others = [rank_process(run, n) for n in range(2)]
    os.kill(others[rank], signal.SIGKILL)
    killed = time.monotonic()
    code, errors = ended(process, 60)
    assert time.monotonic() - killed < 60 and code == 2
    run = Run.open(run.path)
    assert run.status == "failed" and run.record["reason"].startswith(f"rank {rank} (") and "died" in run.record["reason"]
    assert errors.strip().splitlines()[-1].startswith(f"lethe: rank {rank}")
    assert not any(_lives(pid) for pid in others)
    done = len(run.rows("metrics.jsonl"))
    process = start(*LETHE, "resume", str(run.path))
    wait_for(process, tmp_path / "runs", "metrics.jsonl", done + 3)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process, 60)
    assert code == 143 and Run.open(run.path).status == "cancelled", errors


def test_a_process_that_fails_alone_before_training_ends_the_run(lab, tmp_path):
    raises = "import os\nif os.environ.get('RANK') == '1':\n    from lethe.unlearning import probe\n    probe.probe = None\n"
    (tmp_path / "sitecustomize.py").write_text(raises)
    words = long_run(tmp_path, parallel="ddp")
    paths = os.pathsep.join(filter(None, [str(tmp_path), *map(str, Path(WORK).parents[:2]), os.environ.get("PYTHONPATH")]))
    code, errors = ended(start(*words, PYTHONPATH=paths), 90)
    assert code and errors.strip().splitlines()[-1].startswith("lethe: ")
    assert not any((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_a_hanging_process_ends_the_run(lab, tmp_path):
    config = split(recipe(tmp_path, max_steps=4000, lr=1e-5), 2, out=str(tmp_path / "runs"))
    process = start(*torchrun(2, WORK, "jobs", _pickled(tmp_path, config)), HUNG_AFTER="8")
    run = wait_for(process, tmp_path / "runs", "metrics.jsonl", 5)
    hung = rank_process(run, 1)
    os.kill(hung, signal.SIGSTOP)
    ended(process, 60)
    run = Run.open(run.path)
    assert run.status == "failed" and run.record["reason"].startswith("rank 1 (")
    assert "has not answered" in run.record["reason"] and not _lives(hung)


def test_the_error_of_any_process_is_the_runs(lab, tmp_path):
    config = split(recipe(tmp_path, max_steps=4000, lr=1e-5), 2, out=str(tmp_path / "runs"))
    code, _ = ended(start(*torchrun(2, WORK, "jobs", _pickled(tmp_path, config)), FAIL_AT="5"), 60)
    run = only_run(tmp_path / "runs")
    assert code and run.status == "failed" and "rank 1: ValueError: made up" in run.record["reason"]
    assert "made up" in (run.path / "log-rank1.txt").read_text()


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _pickled(folder: Path, config: Any) -> str:
    (folder / "job").write_bytes(pickle.dumps([("unlearn", config)]))
    return str(folder / "job")


# --- commands --------------------------------------------------------------------------------------------------------

COMMANDS = {
    "torchrun": torchrun(2, "-m", "lethe"),
    "accelerate": (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "lethe"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_launchers(runs, lab, tmp_path, command):
    config = split(recipes(tmp_path)["transfer"], 2, out=str(tmp_path / "runs"))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(config)))
    errors = finished((*COMMANDS[command], "unlearn", "--config", str(tmp_path / "recipe.json")))
    run, whole = only_run(tmp_path / "runs"), runs["transfer", 1, "ddp"]
    assert run.record["environment"]["world_size"] == 2, errors
    assert weights_apart(run, whole) < 1e-5 and losses_apart(run, whole) < 1e-5


def test_mixed_precision_of_accelerate_is_refused_in_one_line(lab, tmp_path):
    words = "unlearn", "--config", "lab", "--source", "lab:global_step120", "--out", str(tmp_path / "runs")
    for command, environment in (
        (torchrun(2, "-m", "lethe"), {"ACCELERATE_USE_FSDP": "true"}),
        (LETHE, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ):
        code, errors = ended(start(*command, *words, **environment), 60)
        said = [line for line in errors.splitlines() if line.startswith("lethe: ")]
        assert code and len(said) == 1 and next(iter(environment)).split("_")[1].lower() in said[0].lower(), errors
        assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_number_of_devices_that_was_not_started_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LetheError, match="devices: 4, but 2 processes were started"):
        is_for_several(4)


# --- evaluation and attacks ------------------------------------------------------------------------------------------


def assert_same_samples(run: Run, whole: Run) -> None:
    """Log-likelihoods are equal, and so is the choice wherever it does not hang on rounding."""
    samples, others = run.rows("samples.jsonl"), whole.rows("samples.jsonl")
    assert len(samples) == len(others) > 0
    for one, other in zip(samples, others, strict=True):
        assert one.keys() == other.keys()
        values, wanted = (torch.tensor(row["log_likelihoods"], dtype=torch.float64) for row in (one, other))
        assert (values - wanted).abs().max() < 1e-5
        best = wanted.sort(descending=True).values
        if best[0] - best[1] > 2e-5:
            assert values.argmax() == wanted.argmax()


def test_evaluations_and_attacks_are_those_of_one_process(lab, make_model, tmp_path):
    other = make_model("gpt_neo", tmp_path / "gpt_neo", max_position_embeddings=256)
    plain = {"samples": True, "limit": 30}
    adapters = LoraSettings(dropout=0.0)
    attack = {"num_train_examples": 30, "max_steps": 8, "eval": EvalSettings(["lab_forget_robust"], every=4, limit=16)}
    attack |= {"save_model": True, "lr": 1e-4, "warmup_steps": 1}
    size = "per_device_train_batch_size"
    jobs: dict[int, list[tuple[str, Any]]] = {1: [], 2: [], 3: []}
    for processes, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")):
        base = tmp_path / f"{processes}-{parallel}"
        made: dict[str, Any] = {
            "lab": EvaluateConfig("lab:final", ["lab_forget_robust", "lab_retain"], **plain, parallel=parallel),
            "shots": EvaluateConfig("lab:final", ["lab_forget_robust"], num_fewshot=2, **plain, parallel=parallel),
            "neo": EvaluateConfig(str(other), ["lab_forget_robust"], **plain, parallel=parallel),
        }
        if processes < 3:
            made["full"] = TamperConfig(model="lab:filtered", **attack, parallel=parallel, **{size: 8 // processes})
            made["lora"] = dataclasses.replace(made["full"], lora=adapters)
            few = EvalSettings(["lab_forget_robust"], limit=16)
            made["noise"] = TamperConfig(model="lab:final", attack="noise", strengths=[0.1, 0.4], eval=few)
        for name, config in made.items():
            function = "evaluate" if isinstance(config, EvaluateConfig) else "tamper"
            jobs[processes].append((function, dataclasses.replace(config, out=str(base / name))))
    for processes, some in jobs.items():
        work(processes, some, tmp_path)
    for several in ("2-ddp", "2-fsdp", "3-fsdp"):
        for folder in sorted((tmp_path / several).iterdir()):
            run, whole = only_run(folder), only_run(tmp_path / "1-ddp" / folder.name)
            assert run.status == whole.status == "complete", folder
            if folder.name in {"lab", "shots", "neo"}:
                assert_same_samples(run, whole)
                continue
            assert [row["step"] for row in run.rows("curve.jsonl")] == [row["step"] for row in whole.rows("curve.jsonl")]
            for row, wanted in zip(run.rows("curve.jsonl"), whole.rows("curve.jsonl"), strict=True):
                for task, result in wanted["evals"].items():
                    assert row["evals"][task]["acc"] == result["acc"], folder
            if folder.name != "noise":
                assert_same_data(run, whole)
                assert losses_apart(run, whole) < 1e-5 and weights_apart(run, whole) < 1e-5, folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_evaluate_by_two_devices(lab, tmp_path, parallel):
    words = *LETHE, "evaluate", "lab:final", "--tasks", "lab_forget_robust", "--limit", "20", "--samples", "true"
    finished((*words, "--out", str(tmp_path / "whole")))
    finished((*words, "--out", str(tmp_path / "two"), "--devices", "2", "--parallel", parallel))
    assert_same_samples(only_run(tmp_path / "two"), only_run(tmp_path / "whole"))


# --- maps and caches -------------------------------------------------------------------------------------------------


def test_maps_and_caches_are_those_of_one_process(lab, tmp_path):
    """Each number of processes has a home of its own, where it fits maps and builds caches."""
    runs = {}
    for processes in (1, 2):
        home = tmp_path / f"home-{processes}"
        home.mkdir()
        (home / "lab").symlink_to(lab.parent)
        jobs = []
        for teachers in ("cached", "live"):
            config = recipe(tmp_path, teacher_cache=teachers, parallel="fsdp" if processes > 1 else "ddp")
            jobs.append(("unlearn", split(config, processes, out=str(tmp_path / f"{teachers}-{processes}"))))
        work(processes, jobs, tmp_path, LETHE_HOME=str(home))
        runs |= {(how, processes): only_run(tmp_path / f"{how}-{processes}") for how in ("cached", "live")}
        for how in ("cached", "live"):
            assert all(said.startswith(how) for said in runs[how, processes].record["teachers"].values())
        assert losses_apart(runs["live", processes], runs["cached", processes]) < 1e-5
    one, two = runs["cached", 1], runs["cached", 2]
    whole, maps = (load_file(run.path / "affine" / "affine_transforms.safetensors") for run in (one, two))
    for name, value in whole.items():
        assert (maps[name] - value).norm() < 1e-5 * value.norm(), name
    scores, others = (json.loads((run.path / "affine" / "metadata.json").read_text())["scores"] for run in (one, two))
    for layer, score in scores.items():
        assert others[layer] == pytest.approx(score, rel=1e-6)
    caches = [_caches(tmp_path / f"home-{processes}") for processes in (1, 2)]
    assert caches[0].keys() == caches[1].keys() and len(caches[0]) > 3
    for name, value in caches[0].items():
        assert (caches[1][name] - value).norm() < 1e-5 * value.norm(), name


def _caches(home: Path) -> dict[str, torch.Tensor]:
    """Cached outputs by the name of the folder and file."""
    found = {}
    for manifest in (home / "teachers").glob("*/manifest.json"):
        facts = json.loads(manifest.read_text())
        for name, fact in facts["files"].items():
            kind = getattr(torch, fact["dtype"])
            key = facts["key"] | {"maps": facts["key"]["maps"] is not None}  # maps differ by rounding
            found[f"{key}{name}"] = torch.frombuffer(bytearray((manifest.parent / name).read_bytes()), dtype=kind)
    return found


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [1, 7, 8, 50, 64])
@pytest.mark.parametrize(("size", "accumulated", "world"), [(8, 1, 1), (2, 2, 2), (1, 2, 4), (3, 1, 3), (4, 2, 1)])
def test_order_splits_each_update_without_loss(monkeypatch, examples, size, accumulated, world):
    config = recipe(Path("runs"), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)

    def order(rank: int, number: int = world, effective: int | None = None) -> Order:
        monkeypatch.setenv("WORLD_SIZE", str(number))
        monkeypatch.setenv("RANK", str(rank))
        made = Order([examples], config, effective)
        made.set_epoch(3)
        return made

    batch = size * accumulated * world
    shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(config.seed + 3)).tolist()
    wanted = [sorted(shuffled[first : first + batch]) for first in range(0, examples, batch)]
    for number in (world, 1, 5):  # the last two: resumed with another number of processes
        orders = [(order(rank, number, batch), list(order(rank, number, batch))) for rank in range(number)]
        lists = [batches for _, batches in orders]
        per_update = orders[0][0].batches_in_update
        assert all(len(batches) == len(lists[0]) == len(made) for made, batches in orders)
        assert all(len(one) <= size for batches in lists for one in batches)
        updates = [
            sorted(index for batches in lists for one in batches[first : first + per_update] for index in one)
            for first in range(0, len(lists[0]), per_update)
        ]
        assert updates == wanted


def test_exchanges_of_three_processes(lab):
    finished(torchrun(3, WORK, "exchanges", "lab:final", "lab:global_step120"))


@pytest.mark.parametrize("processes", [2, 4])
def test_parameters_are_sharded(lab, processes):
    finished(torchrun(processes, WORK, "sharded", "lab:final"))
