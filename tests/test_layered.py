"""Layered unlearning: each stage unlearns one part more, and the later parts count as retain text."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import assert_same, settings, start, wait_for
from several import ended, torchrun
from several import start as started
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe import NPO, Distill, LayeredSettings, TamperConfig, TextSource, unlearn
from lethe.attacks.tampering import check_tamper
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig, SuiteConfig, to_dict
from lethe.config.parse import build
from lethe.errors import LetheError
from lethe.report.attacks import worst_table
from lethe.results.study import Study
from lethe.runs.finding import find_runs
from lethe.runs.run import Run
from lethe.sweeps.controller import sweep
from lethe.sweeps.resuming import resume
from lethe.sweeps.suite import Suite, spelled_out
from lethe.text import corpora
from lethe.training.check import plan as training_plan
from lethe.training.hf_trainer import Order
from lethe.unlearning.check import sizes
from lethe.unlearning.layered import Layered
from lethe.unlearning.pipeline import inspect


def config(**changes: Any) -> NPO:
    return NPO(**({"layered": LayeredSettings(3), "per_device_train_batch_size": 4} | changes))


def slow_stages(forget: list[str], retain: list[str], parts: int) -> list[tuple[list[str], list[str]]]:
    """The documents that each stage unlearns and retains."""
    share = len(forget) / parts
    part = [[d for i, d in enumerate(forget) if math.floor(n * share) <= i < math.floor((n + 1) * share)] for n in range(parts)]
    return [([d for p in part[: i + 1] for d in p], [*retain, *(d for p in part[i + 1 :] for d in p)]) for i in range(parts)]


def slow_updates(forget: list[str], retain: list[str], parts: int, epochs: float, batch: int, seed: int) -> list[list[Any]]:
    """For each update its stage and its pairs of a forget and a retain document."""
    found: list[list[Any]] = []
    draws = 0
    for stage, (unlearned, kept) in enumerate(slow_stages(forget, retain, parts), 1):
        longer = max(len(unlearned), len(kept))
        pairs = [(unlearned[i % len(unlearned)], kept[i % len(kept)]) for i in range(longer)]
        left = math.ceil(epochs * math.ceil(longer / batch))
        while left:
            order = torch.randperm(longer, generator=torch.Generator().manual_seed(seed + draws)).tolist()
            draws += 1
            while order and left:
                update, order, left = order[:batch], order[batch:], left - 1
                found.append([stage, [pairs[i] for i in update]])
    return found


@pytest.mark.parametrize(("forget", "retain", "parts"), [(9, 5, 3), (10, 30, 4), (5, 1, 2), (3, 3, 3)])
@pytest.mark.parametrize("epochs", [1, 2, 0.5])
@pytest.mark.parametrize(("size", "accumulated", "world"), [(4, 1, 1), (2, 3, 1), (1, 2, 2), (2, 1, 3)])
def test_each_update_has_the_documents_of_its_stage(monkeypatch, forget, retain, parts, epochs, size, accumulated, world):
    """Against a plain listing, by the documents' names; also when a run is resumed with another number of processes."""
    made = config(
        layered=LayeredSettings(parts), epochs=epochs, seed=5, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    names = {"forget": [f"f{i}" for i in range(forget)], "retain": [f"r{i}" for i in range(retain)]}
    data: Any = Layered(parts, **{text: [[name] for name in rows] for text, rows in names.items()})  # type: ignore[misc]
    batch = size * accumulated * world
    wanted = slow_updates(**names, parts=parts, epochs=epochs, batch=batch, seed=5)
    for text, rows in names.items():  # what a method reads before training
        assert [data.side_by_side(i)[text] for i in range(data.own(text))] == [(i, [n]) for i, n in enumerate(rows)]
    assert sizes(made, forget, retain) == data.stages and len(data) == sum(data.stages)
    for number in (world, 1, 4):
        monkeypatch.setenv("WORLD_SIZE", str(number))
        lists = []
        for rank in range(number):
            monkeypatch.setenv("RANK", str(rank))
            order = Order(data.stages, made, batch)
            lists.append(list(order))
            assert len(lists[-1]) == len(order) == len(wanted) * order.batches_in_update
            assert all(len(one) <= size for one in lists[-1])
        found = []
        for first in range(0, len(lists[0]), order.batches_in_update):
            items = [data[i] for batches in lists for one in batches[first : first + order.batches_in_update] for i in one]
            stage = order.stage_of(first // order.batches_in_update)
            found.append([stage, sorted((item["forget"][1][0], item["retain"][1][0]) for item in items)])
        assert found == [[stage, sorted(pairs)] for stage, pairs in wanted]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    plan = training_plan(made, data.stages, batch)
    assert plan["steps"] == len(wanted) == sum(plan["stage_steps"])
    assert plan["first_epoch_steps"] == math.ceil(data.stages[0] / batch)


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory) -> dict[str, Any]:
    """A model, a source and text."""
    home = tmp_path_factory.mktemp("pair")
    for name, seed in (("model", 1), ("source", 2)):
        make_model("gpt_neox", home / name, seed=seed)
    for name, count in (("forget", 7), ("retain", 5)):
        (home / f"{name}.txt").write_text("\n".join(f"{name} number {i} speaks of {name} things {i * i}" for i in range(count)))
    return {name: str(home / name) for name in ("model", "source")} | {
        name: str(home / f"{name}.txt") for name in ("forget", "retain")
    }


def documents(file: str) -> list[str]:
    return sorted(Path(file).read_text().split("\n"), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def log_p(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def kl(model: Any, teacher: Any, texts: list[list[int]]) -> Tensor:
    """The mean over tokens, one by one."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids in texts:
        p, q = log_p(teacher, ids).detach(), log_p(model, ids)
        for t in range(len(ids)):
            total, count = total + (p[t].exp() * (p[t] - q[t])).sum(), count + 1
    return total / count


def cross_entropy(model: Any, texts: list[list[int]]) -> Tensor:
    values = [-log_p(model, ids)[t - 1, ids[t]] for ids in texts for t in range(1, len(ids))]
    return torch.stack(values).mean()


def npo(model: Any, reference: Any, texts: list[list[int]], beta: float) -> Tensor:
    values = []
    for ids in texts:
        ratio = sum(
            log_p(model, ids)[t - 1, ids[t]] - log_p(reference, ids)[t - 1, ids[t]].detach() for t in range(1, len(ids))
        )
        values.append(2 / beta * torch.log(1 + torch.exp(beta * ratio)))
    return torch.stack(values).mean()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["npo", "distill", "npo same_sign"])
def test_training_is_that_of_a_plain_loop_over_the_stages(lab, pair, tmp_path, method):
    """In float64, with AdamW written out; the last updates of passes are smaller, and have a batch without documents."""
    common = {name: pair[name] for name in ("model", "forget", "retain")} | {
        "layered": LayeredSettings(3), "epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "dtype": "float64", "lora": None, "lr": 1e-3, "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "seed": 3,
        "out": str(tmp_path), "eval": EvalSettings(["lab_forget_robust"], limit=1),
        "schedule": "constant", "remove_coef": 0.7, "retain_coef": 1.3,
    }  # fmt: skip
    masked = method.endswith("same_sign")  # at the start, the gradient of the KL is rounding, and has no sign
    own: dict[str, Any] = {"same_sign": True, "retain_loss": "ce"} if masked else {}
    made = Distill(**common, source=pair["source"]) if method == "distill" else NPO(**common, beta=0.3, **own)
    run = unlearn(made)
    tokenizer = AutoTokenizer.from_pretrained(pair["model"])
    model, reference, source = (
        AutoModelForCausalLM.from_pretrained(pair[name], dtype=torch.float64) for name in ("model", "model", "source")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    forget, retain = documents(pair["forget"]), documents(pair["retain"])
    updates = slow_updates(forget, retain, 3, epochs=2, batch=4, seed=3)
    lines, batches = run.rows("metrics.jsonl"), run.rows("batches.jsonl")
    assert [line["stage"] for line in lines] == [stage for stage, _ in updates]
    for step, (_, texts) in enumerate(updates, 1):
        one, other = ([tokenizer(text)["input_ids"] for text in part] for part in zip(*texts, strict=True))
        unlearned = kl(model, source, one) if method == "distill" else npo(model, reference, one, 0.3)
        kept = cross_entropy(model, other) if masked else kl(model, reference, other)
        assert lines[step - 1]["retain_ce_loss" if masked else "retain_kl_loss"] == pytest.approx(kept.item(), abs=1e-9)
        assert lines[step - 1]["forget_kl_loss" if method == "distill" else "npo_loss"] == pytest.approx(
            unlearned.item(), abs=1e-9
        )
        numbers = zip(batches[step - 1]["forget"], batches[step - 1]["retain"], strict=True)
        numbered = [(forget[a], [*retain, *forget][b]) for a, b in numbers]
        assert sorted(numbered) == sorted(texts)
        removing, keeping = (torch.autograd.grad(loss, parameters) for loss in (0.7 * unlearned, 1.3 * kept))
        agreed = [g * (g.sign() == k.sign()) if masked else g for g, k in zip(removing, keeping, strict=True)]
        gradients = [g + k for g, k in zip(agreed, keeping, strict=True)]
        lr = 1e-3 * (1 - (step - 1) / len(updates))
        with torch.no_grad():
            for p, m, v, g in zip(parameters, first, second, gradients, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    saved = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=torch.float64)
    for (name, ours), theirs in zip(saved.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9), name


REFUSED = [
    (
        {"max_steps": 5},
        "layered: every stage has a number of epochs; set epochs, and leave max_steps out",
    ),
    ({"packing": "packed"}, "packing: a packed sequence can have documents of two parts; with layered, set it to none"),
    (
        {"retain_coef": 0},
        "layered: has no effect on a recipe whose losses do not read both forget and retain text; leave it out",
    ),
    ({"remove_coef": 0}, "layered: has no effect on a recipe whose losses do not read both"),
    ({"layered": {"parts": 1}}, "parts: must be at least 2, got 1"),
    ({"forget": {"source": "lab:forget", "part": "1/2"}}, "forget.part: layered splits the text itself; leave part out"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda each: str(each)[:30])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, changes, said):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"method": "npo", "layered": {"parts": 3}} | changes))
    assert main(["unlearn", "--config", str(file), "--out", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "runs").exists()


def test_more_parts_than_documents_are_refused(lab, tmp_path):
    with pytest.raises(LetheError, match=r"layered\.parts: the forget text has 4 documents, too few for 5 parts; lower it"):
        unlearn(config(layered=LayeredSettings(5), num_train_examples=4, out=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_plan_shows_the_stages(lab, tmp_path, capsys):
    plan = inspect(config(num_train_examples=12, epochs=2, out=str(tmp_path)))
    assert plan["stages"] == {
        "1 of 3": "4 forget documents, 12 + 8 retain documents, 10 updates",
        "2 of 3": "8 forget documents, 12 + 4 retain documents, 8 updates",
        "3 of 3": "12 forget documents, 12 + 0 retain documents, 6 updates",
    }
    assert plan["steps"] == 24 and plan["first_epoch_steps"] == 5 and plan["documents"] == {"forget": 12, "retain": 12}
    assert main(["check", "--method", "npo", "--layered.parts", "2", "--memory", "80GiB", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"] == math.ceil(3072 / 16) + math.ceil(2048 / 16)


def short(out: Path, **changes: Any) -> Distill:
    own = {"layered": LayeredSettings(3), "max_steps": -1, "num_train_examples": 30, "per_device_train_batch_size": 4}
    own |= {"gradient_accumulation_steps": 2, "save_every": 2} | changes
    return Distill(**settings(out, **own))


@pytest.fixture(scope="module")
def layered(lab, tmp_path_factory) -> Run:
    return unlearn(short(tmp_path_factory.mktemp("layered") / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize("lines", [3, 8])
def test_a_run_killed_in_any_stage_ends_in_the_same_bits(lab, layered, tmp_path, lines):
    process = start("unlearn", short(tmp_path / "killed"), tmp_path)
    run = wait_for(process, tmp_path / "killed", "metrics.jsonl", lines)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert_same(resume(ResumeConfig(str(run.path))), layered)


@pytest.mark.slow
def test_several_processes_train_on_the_same_documents(lab, layered, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(short(tmp_path / "two", gradient_accumulation_steps=1))))
    words = torchrun(2, "-m", "lethe", "unlearn", "--config", str(tmp_path / "recipe.json"))
    code, errors = ended(started(*words))
    assert code == 0, errors
    (two,) = find_runs(tmp_path / "two")

    def by_update(run: Run) -> list[Any]:
        return [[row["step"], *(sorted(row[text]) for text in ("forget", "retain"))] for row in run.rows("batches.jsonl")]

    assert by_update(two) == by_update(layered)
    assert [row["stage"] for row in two.rows("metrics.jsonl")] == [row["stage"] for row in layered.rows("metrics.jsonl")]
    for name, value in layered.record["losses"].items():
        assert two.record["losses"][name] == pytest.approx(value, rel=1e-3)


# --- attacks by part -------------------------------------------------------------------------------------------------


def test_a_text_source_reads_a_part_of_its_first_documents(lab):
    whole = corpora.read("lab:forget")
    parts = [corpora.read(TextSource("lab:forget", first=10, part=f"{i}/3")) for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 4] and [d for part in parts for d in part] == whole[:10]
    assert corpora.read(TextSource("lab:forget", first=10)) == whole[:10]
    assert corpora.record(TextSource("lab:forget", first=10, part="2/3"), parts[1])["ref"] == "lab:forget (first 10) (part 2/3)"
    for given, said in (
        ({"part": "4/3"}, "part: expected a part such as 2/3"),
        ({"part": "0/3"}, "part: expected a part such as 2/3"),
        ({"part": "half"}, "part: expected a part such as 2/3"),
        ({"first": 0}, "first: must be at least 1"),
        ({"first": 10**6}, f"first: text 'lab:forget' has {len(whole)} documents, 1000000 are requested; lower it"),
        ({"first": 2, "part": "1/3"}, "part: text 'lab:forget' has 2 documents, too few for 3 parts"),
    ):
        with pytest.raises(LetheError, match=said.replace("(", r"\(")):
            corpora.read(TextSource("lab:forget", **given))


@pytest.mark.slow
def test_an_attack_with_a_part_knows_that_unlearning_used_its_documents(lab, layered, tmp_path):
    forget = TextSource("lab:forget", first=30, part="2/3")
    attack = {"model": str(layered.path), "forget": forget, "num_train_examples": 0, "out": str(tmp_path)}
    with pytest.raises(LetheError, match="10 of the attack's 10 documents were used to unlearn"):
        check_tamper(TamperConfig(**attack))
    checked = check_tamper(TamperConfig(**attack, overlap="allow"))
    assert checked.documents == corpora.read("lab:forget")[10:20] and checked.used_in_unlearning == 10


@pytest.mark.slow
def test_a_suite_on_a_layered_run_attacks_with_every_part_and_with_all(lab, layered, tmp_path):
    out = str(layered.path.parent)
    suite = Suite(spelled_out(SuiteConfig(models=[f"run:{layered.id}"], suite="standard", out=out)))
    names = list(suite.config.attacks)
    alone = spelled_out(SuiteConfig(models=["lab:final"], suite="standard", out=out)).attacks
    repeated = [n for n, a in alone.items() if a.get("attack") is None and "forget" not in a and "after" not in a]
    added = [f"{name}-{piece}" for name in repeated for piece in ("part1of3", "part2of3", "part3of3", "all")]
    assert names == [*alone, *added] and len(repeated) == 9
    whole = corpora.read("lab:forget")
    for i, piece in enumerate(("part1of3", "part2of3", "part3of3", "all")):
        attack = suite.attacks[f"full-adamw-{piece}"]
        assert attack.overlap == "allow" and attack.lr == suite.attacks["full-adamw"].lr
        assert corpora.read(attack.forget) == (whole[:30] if piece == "all" else whole[10 * i : 10 * i + 10])
        assert suite.attacks[f"many-{piece}"].num_train_examples == (30 if piece == "all" else 10)
    for plan in suite.plans:
        assert check_tamper(build(TamperConfig, plan.stages[0][1])).plan


@pytest.mark.slow
def test_the_report_of_a_suite_names_the_part(lab, layered, tmp_path):
    suite = tmp_path / "few.yaml"
    tasks = "{tasks: [lab_forget_robust, lab_retain], every: 2, limit: 40}"
    suite.write_text(
        f"common: {{eval: {tasks}, per_device_train_batch_size: 4}}\nattacks:\n  full: {{max_steps: 2, lr: 1.0e-3}}\n"
    )
    run = sweep(SuiteConfig(models=[f"run:{layered.id}"], suite=str(suite), jobs=2, out=str(layered.path.parent)))
    made = [each for each in find_runs(layered.path.parent) if each.record["kind"] == "tamper"]
    assert sorted(each.record["suite"]["attack"] for each in made) == [
        "full", "full-all", "full-part1of3", "full-part2of3", "full-part3of3",
    ]  # fmt: skip
    refs = {each.record["suite"]["attack"]: each.record["parents"]["forget"]["ref"] for each in made}
    assert refs["full-part2of3"] == "lab:forget (first 30) (part 2/3)" and run.status == "complete"
    study = Study([layered, *made])
    assert len(study.series) == 5 and worst_table(study).rows
    assert main(["report", str(layered.path.parent), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "tables.md").read_text()
    assert all(f"full-part{i}of3" in text for i in (1, 2, 3)) and "full-all" in text
