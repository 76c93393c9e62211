"""Runs that end at their budget: what is measured, which weights are kept, and what survives a kill."""

from __future__ import annotations

import signal

import pytest
import sweeping
import torch
from lab_runs import assert_same, interruptible, recipe, settings, start, wait_for, written
from safetensors.torch import load_file

from lethe import BudgetSettings, Distill, LayeredSettings, LoraSettings, TextSource, sweep, unlearn
from lethe.config import EvalSettings, ResumeConfig
from lethe.errors import LetheError
from lethe.models import refs
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.text import corpora
from lethe.unlearning.pipeline import inspect

TASKS = EvalSettings(["lab_forget_robust", "lab_retain"], limit=8)
FAST = {"lr": 3e-3, "num_train_examples": 32, "per_device_train_batch_size": 4, "max_steps": 12}


def limited(out, **changes):
    return recipe(out, **(FAST | {"budget": BudgetSettings(kl=0.004, every=2, documents=12)} | changes))


def plain_kl(run: Run, model: str, documents: list[str], max_length: int) -> float:
    """KL(reference ‖ model), one document after the other, in float64."""
    ours, tokenizer = refs.load(refs.resolve(f"run:{run.id}", run.path.parent), "float64")
    theirs, _ = refs.load(refs.resolve(model), "float64")
    total, tokens = 0.0, 0
    for text in documents:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]])
        with torch.no_grad():
            p, q = theirs(input_ids=ids).logits.log_softmax(-1), ours(input_ids=ids).logits.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        tokens += ids.numel()
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(dropout=0.0), None])
@pytest.mark.parametrize("cache", ["auto", "live"])
def test_the_kl_is_that_of_a_plain_loop_over_text_that_was_not_trained_on(lab, tmp_path, lora, cache):
    budget = BudgetSettings(kl=100.0, documents=12)
    run = unlearn(limited(tmp_path, budget=budget, lora=lora, dtype="float64", teacher_cache=cache))
    used = {d.id for text in ("lab:forget", "lab:retain") for d in corpora.read(text)[:32]}
    held = [d for d in corpora.read("lab:retain") if d.id not in used][:12]
    assert run.record["parents"]["held_out"]["sha256"] == corpora.fingerprint(held)
    values = run.record["budget"]["values"]
    assert values["12"]["kl"] == pytest.approx(plain_kl(run, "lab:final", [d.text for d in held], 1024), rel=1e-9)
    assert run.record["budget"]["kept_step"] == 12 and run.record["budget"]["stopped_at"] is None


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(dropout=0.0), None])
def test_a_run_ends_with_the_weights_of_the_last_check_within_its_budget(lab, tmp_path, lora):
    rate = {} if lora else {"lr": 3e-4}
    run = unlearn(limited(tmp_path / "limited", lora=lora, **rate))
    budget, rows = run.record["budget"], run.rows("metrics.jsonl")
    kept, stopped = budget["kept_step"], budget["stopped_at"]
    assert run.status == "complete" and 0 < kept < stopped == kept + 2 == rows[-1]["step"] < 12
    within = {step: values["kl"] <= 0.004 for step, values in budget["values"].items()}
    assert within == {str(step): step <= kept for step in range(2, stopped + 1, 2)}
    assert f"at update {stopped} KL" in budget["reason"] and f"weights of update {kept}" in budget["reason"]
    whole = unlearn(limited(tmp_path / "whole", lora=lora, budget=None, max_steps=kept, **rate))
    file = "adapter/adapter_model.safetensors" if lora else "model/model.safetensors"
    ours, theirs = load_file(run.path / file), load_file(whole.path / file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.record["evals"] == whole.record["evals"] and run.record["losses"] == whole.record["losses"]
    assert run.record["update_by_layer"] == whole.record["update_by_layer"]
    assert not (run.path / "saves").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 9])
def test_a_killed_run_with_a_budget_ends_in_the_same_bits(lab, tmp_path, at):
    changes = {"budget": BudgetSettings(kl=0.004, every=2, documents=12), "lr": 3e-3, "save_every": 3}
    whole = unlearn(interruptible(tmp_path / "whole", **changes))
    assert whole.record["budget"]["stopped_at"] is not None
    process = start("unlearn", interruptible(tmp_path / "killed", **changes), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", min(at, len(whole.rows("metrics.jsonl"))))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if Run.open(run.path).status == "lost":
        run = resume(ResumeConfig(str(run.path)))
    assert_same(Run.open(run.path), whole)
    ours, theirs = Run.open(run.path).record, whole.record
    assert ours["budget"] == theirs["budget"]
    for fact in ("tokens", "flops", "flops_by_work", "before"):
        assert ours["cost"][fact] == theirs["cost"][fact]


@pytest.mark.slow
def test_a_run_that_had_stopped_at_a_save_does_not_train_on(lab, tmp_path, monkeypatch):
    whole = unlearn(limited(tmp_path / "whole"))
    stopped = whole.record["budget"]["stopped_at"]
    made = []

    def stop_at_once(run: Run, status: str) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("lethe.training.saves.save_artifact", lambda run, *args: made.append(run) or stop_at_once(run, ""))
    with pytest.raises(OSError, match="the disk is gone"):
        unlearn(limited(tmp_path / "cut", save_every=stopped))
    monkeypatch.undo()
    assert (made[0].path / "saves" / f"step-{stopped}").is_dir()
    run = resume(ResumeConfig(str(made[0].path)))
    assert written(run) == written(whole) and run.record["budget"] == whole.record["budget"]


@pytest.mark.slow
def test_lost_retain_accuracy_ends_a_run_and_the_first_check_outside_gives_the_weights_before(lab, tmp_path):
    budget = BudgetSettings(retain=0.05, every=3, questions=40)
    run = unlearn(limited(tmp_path, budget=budget, eval=TASKS, retain_coef=0.0, lr=0.3))
    facts = run.record["budget"]
    assert facts["stopped_at"] == 3 and facts["kept_step"] == 0 and "from before the first update" in facts["reason"]
    assert facts["values"]["3"]["retain"] > 0.05
    assert "before the first update" in run.record["missing"]["losses"]
    assert all(layer["distance"] == 0 for layer in run.record["update_by_layer"].values())
    assert run.record["agreement"]["retain_with_reference"] == 1
    from lethe import EvaluateConfig, evaluate

    before = evaluate(EvaluateConfig("lab:final", ["lab_retain"], limit=40, out=str(tmp_path / "before")))
    assert facts["retain_before"] == before.record["evals"]["lab_retain"]["acc"]


def mean_cross_entropy(model: torch.nn.Module, tokenizer, documents: list[str]) -> float:
    """−log p of the next token, a mean over the documents' tokens, one document after the other."""
    total, tokens = 0.0, 0
    for text in documents:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(logs.gather(-1, ids[0, 1:, None]).sum())
        tokens += ids.numel() - 1
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "live"])
def test_a_run_ends_once_its_cross_entropy_is_restored(lab, tmp_path, cache):
    def rewound(out, **changes) -> Run:
        rate = {"lr": 3e-3, "lora": None, "rewind": 0.6, "teacher_cache": cache, "dtype": "float64"}
        given = settings(out, **(FAST | rate | changes))
        return unlearn(Distill(**{name: value for name, value in given.items() if name != "layers"}))

    run = rewound(tmp_path / "ended", budget=BudgetSettings(restored=0.62, every=1, documents=12))
    facts = run.record["budget"]
    stopped, reached = facts["stopped_at"], {int(step): values["restored"] for step, values in facts["values"].items()}
    assert 1 < stopped < 12 and facts["kept_step"] == stopped == max(reached) and "within budget.restored" in facts["reason"]
    assert [step for step, value in reached.items() if value <= 0.62] == [stopped]
    used = {d.id for text in ("lab:forget", "lab:retain") for d in corpora.read(text)[:32]}
    texts = [d.text for d in corpora.read("lab:retain") if d.id not in used][:12]
    ours, theirs = (
        mean_cross_entropy(*refs.load(refs.resolve(each, run.path.parent), "float64"), texts)
        for each in (f"run:{run.id}", "lab:final")
    )
    assert reached[stopped] == pytest.approx(ours / theirs - 1, rel=1e-6)
    whole = rewound(tmp_path / "whole", max_steps=stopped)
    weights = [load_file(each.path / "model" / "model.safetensors") for each in (run, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_the_weights_within_its_budget(lab, tmp_path):
    budget = BudgetSettings(kl=1e9, every=5, documents=4)
    run = unlearn(limited(tmp_path, budget=budget, lr=1e12, max_grad_norm=0, lora=None))
    facts = run.record
    assert run.status == "diverged" and facts["divergence"]["weights_of_step"] == facts["budget"]["kept_step"] == 0


@pytest.mark.slow
def test_the_plan_chooses_how_often_so_that_checks_are_cheap(lab, tmp_path):
    plan = inspect(limited(tmp_path, budget=BudgetSettings(kl=0.01), max_steps=400))["budget"]
    assert plan["share_of_flops"] <= 0.05 and plan["checks"] == -(-400 // plan["every"]) and plan["kl"] == 0.01
    few = inspect(limited(tmp_path, budget=BudgetSettings(kl=0.01), max_steps=20))
    assert any(warning.startswith("budget: the run is checked") for warning in few["warnings"])
    assert "budget" in few["memory_by_phase"]


@pytest.mark.slow
def test_a_sweep_varies_a_budget(lab, tmp_path):
    base = sweeping.recipe(budget={"kl": 1.0, "every": 2, "documents": 12})
    limited = sweeping.config(tmp_path, unlearn=base, vary={"budget.kl": [1e-9, 1.0]})
    made = sweep(limited)
    runs = sorted((run for run in find_runs(tmp_path) if run.record["kind"] == "unlearn"), key=lambda run: run.record["name"])
    assert made.status == "complete" and sorted(
        run.record["budget"]["kept_step"] for run in runs if run.record["config"]["budget"]
    ) == [0, 6]
    again = sweep(limited)
    assert [trial["reused"] for trial in again.record["trials"] if not trial["reference"]] == [True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": {}}, "budget: it has no limit"),
        ({"budget": {"kl": 0.0}}, "kl: must be above 0"),
        ({"budget": {"kl": 0.01, "questions": 9}}, "questions: 9 has no effect without budget.retain"),
        ({"budget": {"retain": 0.01, "documents": 9}}, "documents: 9 has no effect without budget.kl"),
        ({"budget": {"kl": 0.01}, "rewind": 0.5}, "budget: a run with rewind or corrupt starts outside its budget"),
        ({"budget": {"restored": 0.05}}, "budget.restored: a run without rewind and corrupt has nothing to restore"),
        ({"budget": {"restored": 0.05}, "rewind": 0.5, "layered": LayeredSettings()}, "before its last stage"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, said):
    with pytest.raises(LetheError, match=said):
        Distill(source="lab:global_step1", **{**changes, "budget": BudgetSettings(**changes["budget"])})


def test_a_budget_without_what_it_measures_is_refused_before_a_run_exists(lab, tmp_path):
    def refused(budget: BudgetSettings, said: str, **changes) -> None:
        with pytest.raises(LetheError, match=said):
            unlearn(limited(tmp_path / "runs", budget=budget, **changes))
        assert not (tmp_path / "runs").exists()

    refused(BudgetSettings(retain=0.02), "budget.retain: eval.tasks has no retain task; add mmlu or lab_retain")
    every = len(corpora.read("lab:retain"))
    left = "budget.documents: 32 are needed that are not trained on, and the retain text has 0; lower num_train_examples"
    refused(BudgetSettings(kl=0.01), left, num_train_examples=0, retain=TextSource("lab:retain"))
    refused(BudgetSettings(kl=0.01, documents=every), f"the retain text has {every - 32}; lower")
    refused(BudgetSettings(kl=0.01, text="lab:forget"), "budget.text: this is the forget text")
    few = tmp_path / "few.txt"
    few.write_text("one line\nanother line\n")
    refused(BudgetSettings(kl=0.01, text=str(few)), "budget.text has 2; lower budget.documents")


def test_held_out_documents_of_a_mixture_are_in_proportion_to_its_weights(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(30)))
    mixture = [TextSource(str(tmp_path / "one.txt"), weight=3), TextSource(str(tmp_path / "two.txt"))]
    used = {d.id for d in corpora.read(mixture[0])[:10]}
    found = corpora.beside(mixture, used, 8)
    assert [d.text[:3] for d in found] == ["one"] * 6 + ["two"] * 2 and not used & {d.id for d in found}
