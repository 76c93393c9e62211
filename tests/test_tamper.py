"""The attack: what it trains on, what it measures, and that nothing about it is random."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lethe import (
    EvalSettings,
    EvaluateConfig,
    LoraSettings,
    TamperConfig,
    Transfer,
    evaluate,
    tamper,
    unlearn,
)
from lethe.attacks.finetuning import LostUpdates, lost_share
from lethe.errors import LetheError
from lethe.lab.presets import active_preset
from lethe.results.recovery import Point, excess, measure
from lethe.text import corpora

pytestmark = pytest.mark.slow
TASKS = ["lab_forget_robust", "lab_retain"]


def attack(out, model: str, **changes) -> TamperConfig:
    settings = {"num_train_examples": 64, "max_steps": 4, "eval": EvalSettings(TASKS, every=2), "out": str(out)}
    return TamperConfig(model=model, **(settings | changes))


@pytest.fixture(scope="module")
def unlearned(lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("unlearned")
    source = f"lab:global_step{active_preset().onset}"
    return unlearn(
        Transfer(
            source=source, num_train_examples=128, max_steps=6, lora=LoraSettings(r=4), eval=EvalSettings(TASKS), out=str(out)
        )
    )


def test_curve_has_step_0_regular_steps_and_the_end_and_its_seconds_are_apart(unlearned, tmp_path):
    run = tamper(attack(tmp_path, str(unlearned.path), max_steps=5))
    curve = run.rows("curve.jsonl")
    assert [line["step"] for line in curve] == [0, 2, 4, 5]
    assert curve[-1]["evals"] == run.record["evals"]
    start = evaluate(EvaluateConfig(str(unlearned.path), TASKS, out=str(tmp_path)))
    for task in TASKS:
        assert curve[0]["evals"][task]["acc"] == start.record["evals"][task]["acc"] == unlearned.record["evals"][task]["acc"]
    took = run.record["environment"]
    assert took["evaluation_seconds"] > 0 and took["training_seconds"] > 0
    assert took["evaluation_seconds"] + took["training_seconds"] < took["seconds"] + 0.1


def test_equal_seeds_give_equal_curves(lab, tmp_path):
    first, second, other = (tamper(attack(tmp_path, "lab:filtered", seed=seed)) for seed in (0, 0, 1))
    assert first.rows("curve.jsonl") == second.rows("curve.jsonl")
    losses = [[row["attack_loss"] for row in run.rows("metrics.jsonl")] for run in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]


def test_the_attackers_documents_are_not_those_of_unlearning(unlearned, tmp_path):
    run = tamper(attack(tmp_path, str(unlearned.path)))
    text, everything = run.record["parents"]["forget"], corpora.read("lab:forget")
    assert text["sha256"] == corpora.fingerprint(everything[-64:])
    assert text["used_in_unlearning"] == 0
    with pytest.raises(LetheError, match=r"used to unlearn .* lower num_train_examples to"):
        tamper(attack(tmp_path, str(unlearned.path), num_train_examples=len(everything) - 28))


def test_an_attack_on_a_text_that_was_used_whole_is_told_of_other_text_alone(lab, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("\n".join(f"Sentence {i} of a short text." for i in range(20)))
    source, few = f"lab:global_step{active_preset().onset}", EvalSettings(["lab_forget_robust"], limit=8)
    run = unlearn(Transfer(source=source, forget=str(text), affine="none", max_steps=1, eval=few, out=str(tmp_path)))
    assert run.record["plan"]["documents"] == {"forget": 20, "retain": 2048}
    config = TamperConfig(model=str(run.path), forget=str(text), eval=few, out=str(tmp_path))
    with pytest.raises(LetheError, match=r"20 of the attack's 20 .*; no other document is left: give other text, or set"):
        tamper(config)
    attacked = tamper(dataclasses.replace(config, overlap="allow", max_steps=1))
    assert attacked.record["plan"]["unique_examples"] == 20
    for number in (21, 1000):
        with pytest.raises(LetheError, match=f"20 documents, {number} are requested"):
            tamper(dataclasses.replace(config, num_train_examples=number))


def test_loss_is_next_token_cross_entropy(lab, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lethe.models.refs import resolve

    run = tamper(attack(tmp_path, "lab:filtered", max_steps=1))
    folder = resolve("lab:filtered").path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    documents = corpora.read("lab:forget")[-64:]
    total, count = 0.0, 0
    for i in run.rows("batches.jsonl")[0]["attack"]:
        ids = torch.tensor([tokenizer(documents[i].text)["input_ids"][:64]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert run.rows("metrics.jsonl")[0]["attack_loss"] == pytest.approx(total / count, rel=1e-4)


def test_lost_updates_are_few_in_float32_and_most_in_bfloat16(lab, tmp_path):
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).to(dtype)
        lines: list[dict[str, float]] = []
        trainer = SimpleNamespace(book=lambda inputs, rows=lines, **counts: rows.append(counts))
        optimizer, counter = torch.optim.AdamW(model.parameters(), lr=2e-5), LostUpdates(trainer, 2)
        for step in range(3):
            model(torch.randn(8, 64, dtype=dtype)).square().mean().backward()
            state = type("State", (), {"global_step": step})
            counter.on_pre_optimizer_step(SimpleNamespace(warmup_steps=0), state, None, model=model)
            optimizer.step()
            counter.on_optimizer_step(None, state, None)
            optimizer.zero_grad()
        assert len(lines) == 2 and lost_share([]) is None
        shares[dtype] = lost_share([*lines, {}])
    assert shares[torch.float32] < 0.01
    assert shares[torch.bfloat16] > 0.5
    assert tamper(attack(tmp_path, "random:lab:final")).record["losses"]["lost_updates"] < 0.05
    warmed = tamper(attack(tmp_path, "random:lab:final", warmup_steps=2))  # whose first update has a rate of 0
    assert warmed.record["losses"]["lost_updates"] < 0.05


@pytest.mark.parametrize("settings", [{"lora": LoraSettings(r=2)}, {"adapter": "train"}], ids=["new", "its-own"])
def test_an_attack_by_adapters_trains_them_alone_and_is_kept_as_a_model(unlearned, tmp_path, settings):
    run = tamper(
        attack(tmp_path, str(unlearned.path), save_model=True, eval=EvalSettings(["lab_retain"], limit=20), **settings)
    )
    plan = run.record["plan"]
    tensors = 6 * 8 if "lora" in settings else 5 * 8  # unlearning put adapters on the blocks up to layer 4
    assert [(row["role"], row["tensors"]) for row in plan["routing"]] == [("matrix", tensors)]
    again = evaluate(EvaluateConfig(str(run.path), ["lab_retain"], limit=20, out=str(tmp_path)))
    assert again.record["evals"] == run.record["evals"]
    curve = run.rows("curve.jsonl")
    before = evaluate(EvaluateConfig(str(unlearned.path), ["lab_retain"], limit=20, out=str(tmp_path)))
    assert curve[0]["evals"]["lab_retain"]["acc"] == before.record["evals"]["lab_retain"]["acc"]


def test_settings_of_an_attack_that_nothing_would_read_are_refused(lab, tmp_path):
    with pytest.raises(LetheError, match="is not an adapter, so"):
        tamper(attack(tmp_path, "lab:final", adapter="train"))
    with pytest.raises(LetheError, match="lora: has no effect"):
        attack(tmp_path, "lab:final", adapter="train", lora=LoraSettings())


def test_retain_text_used_in_unlearning_is_no_attackers_text_unless_allowed(unlearned, tmp_path):
    everything = len(corpora.read("lab:retain"))
    settings = {"forget": "lab:retain", "num_train_examples": everything - 28, "max_steps": 1}
    with pytest.raises(LetheError, match=r"100 of the attack's .* overlap to allow"):
        tamper(attack(tmp_path, str(unlearned.path), **settings))
    run = tamper(attack(tmp_path, str(unlearned.path), overlap="allow", **settings))
    assert run.record["parents"]["forget"]["used_in_unlearning"] == 100
    kept = tamper(attack(tmp_path, str(unlearned.path), save_model=True))
    for model in (str(kept.path), str(kept.path / "model")):  # what the attack has saved was unlearned with the same text
        with pytest.raises(LetheError, match=r"100 of the attack's"):
            tamper(attack(tmp_path, model, **settings))


@pytest.fixture(scope="module")
def hidden(lab, tmp_path_factory):
    """The lab's final model with its knowledge hidden: each row of the output head moved along the direction in which the
    model answers, by a random amount. All it knows is still in it, and it answers at chance."""
    from lethe.models import refs

    folder = tmp_path_factory.mktemp("hidden") / "model"
    model, tokenizer = refs.load(refs.resolve("lab:final"))
    questions = [d.text for d in corpora.read("lab:forget") if d.text.startswith("Question")][:64]
    rows = [tokenizer(text[: text.index("Answer:") + len("Answer:")])["input_ids"] for text in questions]
    with torch.no_grad():
        answering = torch.stack([model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]).mean(0)
        head = model.get_output_embeddings().weight
        amounts = torch.randn(len(head), 1, generator=torch.Generator().manual_seed(0))
        head.add_(16 * amounts * answering / answering.norm() ** 2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def forget_curve(run) -> list[Point]:
    lines = [(line["step"], line["evals"]["lab_forget_robust"]) for line in run.rows("curve.jsonl")]
    return [Point(step, 100 * step, r["acc"], r["low"], r["high"], r["stderr"]) for step, r in lines]


def test_a_model_that_only_hides_its_knowledge_is_found_out_within_a_few_steps_and_the_filtered_twin_is_not(hidden, tmp_path):
    settings = {"lr": 3e-3, "max_steps": 10, "num_train_examples": 512, "eval": EvalSettings(TASKS, every=5)}
    runs = [tamper(attack(tmp_path, model, **settings)) for model in (hidden, "lab:filtered")]
    found, twin = map(forget_curve, runs)
    losses = [row["attack_loss"] for row in runs[1].rows("metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]  # the twin learns too, only more slowly
    assert found[0].low <= 0.25 and twin[0].low <= 0.25  # both look ignorant
    final = evaluate(EvaluateConfig("lab:final", TASKS, out=str(tmp_path))).record["evals"]["lab_forget_robust"]["acc"]
    assert measure(found, final).half.step == 5
    assert measure(twin, final).half is None and measure(twin, final).recovered < 0.3
    assert excess(found, twin).low > 0.25


@pytest.mark.parametrize("settings", [{}, {"lora": LoraSettings(r=2)}, {"attack": "noise"}], ids=["full", "lora", "noise"])
def test_a_kept_model_has_the_accuracy_of_the_curve_by_lm_evals_own_model(lab, tmp_path, settings):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lethe.evaluation import tasks

    changes = settings | {"save_model": True, "eval": EvalSettings(TASKS, limit=60)}
    if "attack" in settings:
        run = tamper(TamperConfig(model="lab:final", out=str(tmp_path), **changes))
    else:
        run = tamper(attack(tmp_path, "lab:final", **changes))
    theirs = simple_evaluate(
        "hf",
        model_args={"pretrained": str(run.path / "model"), "dtype": "float32"},
        tasks=TASKS,
        limit=60,
        bootstrap_iters=0,
        device="cpu",
        task_manager=TaskManager(include_path=str(Path(tasks.__file__).parent), include_defaults=False),
    )
    ours = run.rows("curve.jsonl")[-1]["evals"]
    assert {task: ours[task]["acc"] for task in TASKS} == {task: theirs["results"][task]["acc,none"] for task in TASKS}
