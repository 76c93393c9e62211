"""Methods: each loss is its formula, its settings are its own, and what it needs is what a run loads."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import settings
from torch import Tensor

from lethe import NPO, RMU, CircuitBreaker, Distill, GradDiff, LoraSettings, MaxEntropy, SimNPO, Transfer, tamper, unlearn
from lethe.cli import main
from lethe.config import EvalSettings, ResumeConfig, TamperConfig
from lethe.config.parse import from_recipe
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.lab.presets import active_preset
from lethe.maps.affine import AffineMap
from lethe.methods.method import Method, Need, Progress, named, names
from lethe.models import refs
from lethe.models.activations import read
from lethe.objectives import losses
from lethe.objectives.losses import head_of
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume
from lethe.text import corpora
from lethe.unlearning.frozen import Frozen
from lethe.unlearning.pipeline import inspect
from lethe.unlearning.view import Teacher, View

DOCUMENTS = {"forget": [[5, 9, 3, 7, 11], [4, 8], [6, 3, 9]], "retain": [[12, 4, 4, 9], [3, 10, 5, 8, 6, 7]]}
BEFORE = Path(__file__).parent / "data" / "run-0.1.0"
METHODS = {
    "transfer": lambda **more: Transfer(source="s", layers=[0, 2], forget_kl_coef=0.3, **more),
    "transfer without maps": lambda **more: Transfer(source="s", layers=[1], affine="none", **more),
    "distill": lambda **more: Distill(source="s", layers=[0, 1], **more),
    "npo": lambda **more: NPO(beta=0.7, layers=[0, 1], **more),
    "rmu": lambda **more: RMU(layers=[2], steering=3.0, seed=5, **more),
    "grad_diff": lambda **more: GradDiff(layers=[0, 1], **more),
    "simnpo": lambda **more: SimNPO(beta=1.3, delta=2.0, layers=[0, 1], **more),
    "max_entropy": lambda **more: MaxEntropy(layers=[0, 1], **more),
    "max_entropy of some": lambda **more: MaxEntropy(top_k=5, layers=[0, 1], **more),
}


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory) -> dict[str, Any]:
    """A model, its reference and a source, in float64, and affine maps. (Llama's norms round to float32.)"""
    folder = tmp_path_factory.mktemp("models")
    names = ("model", "reference", "source")
    made = {name: refs.resolve(str(make_model("gpt_neox", folder / name, seed=seed))) for seed, name in enumerate(names)}
    found = {name: refs.load(ref, "float64")[0] for name, ref in made.items()}
    found["frozen"] = {name: Frozen(ref, "float64") for name, ref in made.items()}  # type: ignore[assignment]
    rng = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(32, 32, generator=rng, dtype=torch.float64) for n in (0, 2)}
    return found | {"maps": AffineMap(weights, {n: w[0] for n, w in weights.items()})}


def by_formula(method: Any, models: dict[str, Any], progress: Progress) -> Tensor:
    """The loss, document by document and token by token."""

    def passed(name: str, ids: list[int]) -> tuple[list[Tensor], Tensor]:
        output = models[name](torch.tensor([ids]), output_hidden_states=True)
        return [h[0] for h in output.hidden_states[1:]], output.logits[0].log_softmax(-1)

    def kl(name: str, text: str) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids in DOCUMENTS[text]:
            p, q = passed(name, ids)[1].detach(), passed("model", ids)[1]
            for t in range(len(ids)):
                total = total + (p[t].exp() * (p[t] - q[t])).sum()
                count += 1
        return total / count

    def distance(name: str, text: str, layers: list[int], maps: AffineMap | None) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids in DOCUMENTS[text]:
            theirs, ours = [h.detach() for h in passed(name, ids)[0]], passed("model", ids)[0]
            for t in range(len(ids)):
                for n in layers:
                    aim = theirs[n][t] if maps is None else maps.weight[n] @ theirs[n][t] + maps.bias[n]
                    total = total + (ours[n][t] - aim).square().mean() / len(layers)
                count += 1
        return total / count

    def likelihood(name: str, ids: list[int]) -> Tensor:
        log_p = passed(name, ids)[1]
        return sum((log_p[t - 1, ids[t]] for t in range(1, len(ids))), torch.zeros((), dtype=torch.float64))

    if isinstance(method, NPO):
        ratios = [likelihood("model", ids) - likelihood("reference", ids).detach() for ids in DOCUMENTS["forget"]]
        forget = sum(2 / method.beta * torch.log(1 + torch.exp(method.beta * ratio)) for ratio in ratios) / len(ratios)
    elif isinstance(method, RMU):
        torch.manual_seed(5)
        drawn = torch.rand(32, dtype=torch.float64)
        rows = torch.cat([passed("model", ids)[0][2] for ids in DOCUMENTS["forget"]])
        forget = sum(((row - 3 * drawn / drawn.square().sum().sqrt()) ** 2).sum() / 32 for row in rows) / len(rows)
    elif isinstance(method, GradDiff):
        forget = sum(likelihood("model", ids) for ids in DOCUMENTS["forget"]) / sum(len(ids) - 1 for ids in DOCUMENTS["forget"])
    elif isinstance(method, SimNPO):
        means = (-likelihood("model", ids) / (len(ids) - 1) for ids in DOCUMENTS["forget"])
        each = [2 / method.beta * torch.log(1 + torch.exp(-method.beta * (mean - method.delta))) for mean in means]
        forget = sum(each) / len(each)
    elif isinstance(method, MaxEntropy):
        rows = torch.cat([passed("model", ids)[1] for ids in DOCUMENTS["forget"]])
        some = (row.sort(descending=True).values[: method.top_k or len(row)] for row in rows)
        each = [-(z - z.exp().sum().log()).mean() / math.log(len(z)) for z in some]
        forget = sum(each) / len(each)
    elif isinstance(method, Distill):
        forget = kl("source", "forget")
    else:
        maps = None if method.affine == "none" else models["maps"]
        forget = distance("source", "forget", method.layers, maps)
        if method.forget_kl_coef:
            forget = forget + method.forget_kl_coef * kl("source", "forget")
    if method.retain_loss == "kl":
        retain = kl("reference", "retain")
    elif method.retain_loss == "mse":
        retain = distance("reference", "retain", method.layers, None)
    else:
        tokens = sum(len(ids) - 1 for ids in DOCUMENTS["retain"])
        retain = -sum(likelihood("model", ids) for ids in DOCUMENTS["retain"]) / tokens
    s = min(1, progress.done / progress.first_epoch) if method.schedule == "ramp" else 0
    return method.remove_coef * (1 - 0.25 * s) * forget + method.retain_coef * (s if method.schedule == "ramp" else 1) * retain


def by_views(method: Any, models: dict[str, Any], progress: Progress, heads: bool) -> Tensor:
    """The method's own loss. Without `heads`, from logits; with them, in chunks of three tokens."""
    total: Any = 0.0
    head = head_of(models["model"]) if heads else None
    for text, need in method.needs().items():
        ids, mask = corpora.pad(DOCUMENTS[text], 0)
        teacher = None
        if need.teacher:
            model = models["frozen"][need.teacher]
            teacher = Teacher(need, model, "", model.head() if heads else None, models["maps"] if need.mapped else None)
        states = read(models["model"], ids, list(need.layers), need.logits, head)
        index = torch.arange(len(ids))
        view = View(ids, mask, index, states, int(mask.sum()), len(ids), head, teacher)
        total = total + method.loss(text, view, progress)[0]
    return total


@pytest.mark.parametrize("retain_loss", ["kl", "ce", "mse"])
@pytest.mark.parametrize("heads", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_and_its_gradient_are_the_formula(models, monkeypatch, name, heads, retain_loss):
    monkeypatch.setattr(losses, "LEAST", 1)
    monkeypatch.setattr(losses, "CHUNK", 3)
    monkeypatch.setattr(losses, "PLAIN", 1)
    method = METHODS[name](remove_coef=2.0, retain_coef=3.0, retain_loss=retain_loss, schedule="ramp")
    progress = Progress(3, 10, 20)
    models["model"].requires_grad_(True)
    assert_equal(models["model"], by_formula(method, models, progress), by_views(method, models, progress, heads))


def assert_equal(model: Any, expected: Tensor, found: Tensor) -> None:
    """The same value and the same gradient of each parameter."""
    results = []
    for loss in (expected, found):
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([loss.detach(), *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1])
    largest = max(float(g.abs().max()) for g in results[0][1:])
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-9)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert (other - one).abs().max() <= 1e-9 * largest


def circuit_breaker_by_formula(method: CircuitBreaker, models: dict[str, Any], progress: Progress) -> Tensor:
    """The loss of circuit breakers, token by token."""
    cosines, norms = [], []
    for text, into in (("forget", cosines), ("retain", norms)):
        for ids in DOCUMENTS[text]:
            ours, theirs = (
                models[name](torch.tensor([ids]), output_hidden_states=True).hidden_states for name in ("model", "reference")
            )
            for layer in method.layers or []:
                for h, a in zip(ours[layer + 1][0], theirs[layer + 1][0].detach(), strict=True):
                    cosine = (h * a).sum() / ((h * h).sum().sqrt() * (a * a).sum().sqrt())
                    into.append(torch.clamp(cosine, min=0) if text == "forget" else ((h - a) ** 2).sum().sqrt())
    p = progress.done / (2 * progress.steps)
    forget, retain = (sum(values) / len(values) for values in (cosines, norms))
    assert 0 < sum(value == 0 for value in cosines) < len(cosines)  # some are negative, some not
    return method.remove_coef * (1 - p) * forget + method.retain_coef * p * retain


def test_circuit_breakers_have_their_formula_and_its_gradient(models):
    method, progress = CircuitBreaker(layers=[0, 2], remove_coef=2, retain_coef=3), Progress(3, 10, 20)
    models["model"].requires_grad_(True)
    assert_equal(
        models["model"], circuit_breaker_by_formula(method, models, progress), by_views(method, models, progress, heads=False)
    )


def test_circuit_breakers_start_without_a_gradient(models):
    """Before the first update the model is the reference: cosines are 1, norms 0, and neither gradient is NaN."""
    method = CircuitBreaker(layers=[0, 2], remove_coef=2, retain_coef=3)
    same = models | {"model": models["reference"].requires_grad_(True)}
    loss = by_views(method, same, Progress(19, 10, 20), heads=False)
    assert loss.item() == pytest.approx(2 * (1 - 19 / 40), rel=1e-9)
    gradients = torch.autograd.grad(loss, list(same["model"].parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-12
    models["reference"].requires_grad_(False)


def test_coefficients_of_circuit_breakers_meet_in_the_middle():
    """The paper's α (1 − t / 2T) and α t / 2T."""
    method = CircuitBreaker(remove_coef=10, retain_coef=6)
    found = [method.coefficients(Progress(done, 5, 20)) for done in (0, 10, 20)]
    assert [tuple(each.values()) for each in found] == [(10, 0), (7.5, 1.5), (5, 3)]


@pytest.mark.parametrize(
    ("need", "loss", "what"),
    [
        (Need(logits=True), View.kl, "teacher"),
        (Need("reference", layers=(0,)), View.cross_entropy, "logits"),
        (Need("reference", layers=(0,)), View.log_likelihood, "logits"),
        (Need(layers=(0,)), View.distance, "teacher"),
    ],
)
def test_a_loss_that_reads_what_its_method_does_not_declare_is_refused(models, need, loss, what):
    ids, mask = corpora.pad(DOCUMENTS["retain"], 0)
    states = read(models["model"], ids, list(need.layers), need.logits)
    teacher = Teacher(need, models["frozen"][need.teacher], "") if need.teacher else None
    view = View(ids, mask, torch.arange(len(ids)), states, int(mask.sum()), len(ids), None, teacher)
    with pytest.raises(LetheError, match=rf"reads {what} of a text for which needs\(\) declares none"):
        loss(view)


@pytest.mark.parametrize(
    ("done", "remove", "retain"), [(0, 20.0, 0.0), (1, 19.5, 0.2), (5, 17.5, 1.0), (10, 15.0, 2.0), (1000, 15.0, 2.0)]
)
def test_the_ramp_rises_over_the_first_epoch(done, remove, retain):
    """s = min(1, done / 10); 20 (1 - 0.25 s) and 2 s."""
    method = Transfer(source="s", remove_coef=20, retain_coef=2)
    assert method.coefficients(Progress(done, 10, 2000)) == pytest.approx({"remove_coef": remove, "retain_coef": retain})
    constant = dataclasses.replace(method, schedule="constant")
    assert constant.coefficients(Progress(done, 10, 2000)) == {"remove_coef": 20, "retain_coef": 2}


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_help_shows_the_settings_of_one_method(name, capsys):
    own = {field.name for field in dataclasses.fields(named(name))}
    with pytest.raises(SystemExit):
        main(["unlearn", "--method", name, "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field}" in shown for field in own)
    formulas = [line.strip() for line in (named(name).__doc__ or "").splitlines() if " = " in line]
    assert formulas and all(formula in shown for formula in formulas)
    others = {field.name for other in names() for field in dataclasses.fields(named(other))} - own
    assert others and not any(f"--{field} " in shown for field in others)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method npo --betta 1", "betta'; did you mean 'beta'?"),
        ("--method npo --affine none", "there is no setting '--affine'; it is a setting of method transfer"),
        ("--method distill --source lab:final --beta 1", "there is no setting '--beta'; it is a setting of method npo"),
        ("--forget_loss both", "there is no setting '--forget_loss'; write method: transfer or method: distill now"),
        ("--method npoo", "there is no method 'npoo'; did you mean 'npo'?"),
        ("--method method", "there is no method 'method'"),
        ("--method npo --source lab:final", "source: lab:final has no effect with method npo"),
        ("--method npo --remove_coef 0 --retain_coef 0", "remove_coef and retain_coef are both 0"),
        ("--method npo --beta 0", "beta: must be above 0"),
        ("--method max_entropy --top_k 1", "top_k: one logit alone is always uniform; set it to 2 or more"),
        ("--method max_entropy --top_k 5000", "top_k: 5000 is above the vocabulary of 'lab:final'"),
        ("--method max_entropy --top_k 5000 --memory 1GiB", "there is no setting '--memory'"),
        ("--method max_entropy --top_k 5 --remove_coef 0", "top_k: 5 has no effect while remove_coef is 0"),
        ("--method max_entropy --retain_loss mse", "layers: retain_loss mse compares activations"),
        ("--method simnpo --delta -1", "delta: must be at least 0"),
        ("--method circuit_breaker --layers null", "layers: name at least one layer"),
        ("--method circuit_breaker --layers []", "layers: name at least one layer"),
        ("--method circuit_breaker --layers 77", "layers: 77 is out of range; 'lab:final' has"),
        ("--method circuit_breaker --remove_coef 0", "remove_coef: must be above 0"),
        ("--method circuit_breaker --source lab:global_step900", "source: lab:global_step900 has no effect"),
        ("--source s --cb_scale relative --remove_coef 0", "cb_scale: relative has no effect"),
        ("--method npo --retain_loss mse", "layers: retain_loss mse compares activations"),
        ("--method npo --retain_loss ce --remove_coef 0 --teacher_cache live", "teacher_cache: live has no effect"),
        ("--method npo --lora null --layers 1", "layers: [1] has no effect without adapters"),
        ("--method transfer", "source: name the ignorant checkpoint"),
        ("--method distill --rewind 0.5", "source: name the ignorant checkpoint"),
    ],
)
def test_what_a_method_does_not_take_is_refused_with_the_right_name(lab, capsys, words, said):
    assert main(["unlearn", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_recipe_and_python_build_the_same_method(tmp_path):
    (tmp_path / "npo.yaml").write_text("method: npo\nbeta: 0.5\nlora: {r: 4}\n")
    made = from_recipe(Method, tmp_path / "npo.yaml", retain_coef=2)
    assert made == NPO(beta=0.5, lora=LoraSettings(r=4), retain_coef=2) and made.method == "npo"
    assert isinstance(from_recipe(Method, None, source="s"), Transfer)


def test_settings_of_no_method_are_refused_by_unlearn():
    with pytest.raises(LetheError, match="expected the settings of a method"):
        unlearn({"model": "lab:final"})  # type: ignore[arg-type]


# --- runs ------------------------------------------------------------------------------------------------------------


def short(out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of twenty updates that every method has."""
    own = {
        "max_steps": 20,
        "lr_scheduler_type": "linear",
        "eval": EvalSettings(["lab_forget_robust"], limit=20),
        "layers": None,
    }
    return {name: value for name, value in settings(out, **(own | changes)).items() if name != "source"}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(dropout=0.0), None], ids=["lora", "full"])
def test_npo_loads_no_source_and_makes_forget_documents_less_likely(lab, tmp_path, lora, monkeypatch):
    loaded: list[str] = []
    load = refs.load
    monkeypatch.setattr(refs, "load", lambda ref, *args, **how: loaded.append(ref.name) or load(ref, *args, **how))
    run = unlearn(NPO(**short(tmp_path, lora=lora, lr=2e-3, teacher_cache="cached")))
    assert loaded == ["lab:final"] * (1 if lora else 2) and "source" not in run.record["parents"]
    rows = run.rows("metrics.jsonl")
    assert rows[0]["npo_loss"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)  # the model is its own reference
    assert rows[-1]["npo_loss"] < 0.7 * rows[0]["npo_loss"]
    assert set(run.record["losses"]) == {"npo_loss", "retain_kl_loss"}
    assert list(run.record["agreement"]) == ["retain_with_reference"]
    saved = "model" if lora is None else "adapter"
    assert run.record["status"] == "complete" and list(run.record["artifacts"]) == [saved]


def test_the_plan_of_a_method_without_a_source_names_none(lab, tmp_path):
    plan = inspect(NPO(**short(tmp_path)))
    assert plan["maps"] == "none" and set(plan["dtypes"]) == {"model", "reference"} and "coefficients" in plan
    assert set(plan["teachers"]) == {"forget", "retain"}
    assert "proposed_remove_coef" in plan["scale"] and not list(tmp_path.iterdir())
    free = inspect(NPO(**short(tmp_path, retain_coef=0)))
    assert set(free["teachers"]) == {"forget"}


@pytest.mark.parametrize("method", [GradDiff, CircuitBreaker])
def test_the_plan_proposes_nothing_where_a_forget_loss_is_below_0_or_has_no_gradient(lab, tmp_path, method):
    """Circuit breakers would be moved by rounding errors to anywhere, and the values there say nothing."""
    own = {"layers": [0, 2, 4], "retain_coef": 3} if method is CircuitBreaker else {"retain_loss": "kl"}
    plan = inspect(method(**short(tmp_path, **own)))
    assert not {"ratio", "dominates", "proposed_remove_coef"} & set(plan["scale"]) and plan["no_gradient"] == []
    assert not any("dominates" in warning for warning in plan["warnings"])
    if method is CircuitBreaker:
        assert plan["scale"]["cos_loss"] == pytest.approx(1) and plan["scale"]["forget_gradient"] < 1e-6
        assert plan["coefficients"] == {"start": [10, 0], "middle": [7.5, 0.75], "end": pytest.approx([5.25, 1.425])}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(dropout=0.0), None], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("method", "own"),
    [
        (GradDiff, {"retain_loss": "kl", "remove_coef": 0.3}),
        (SimNPO, {"beta": 1.0, "delta": 4.0, "remove_coef": 1.0}),
        (MaxEntropy, {"remove_coef": 5.0}),
        (MaxEntropy, {"remove_coef": 5.0, "top_k": 20}),
        (CircuitBreaker, {"layers": [0, 2, 4], "remove_coef": 1000.0, "retain_coef": 1.0}),
    ],
)
def test_methods_without_a_source_lower_their_forget_loss(lab, tmp_path, method, own, lora):
    run = unlearn(method(**short(tmp_path, **own, lora=lora, lr=2e-3)))
    name = next(name for name in run.record["losses"] if not name.startswith("retain_"))
    first, *_, last = run.rows("metrics.jsonl")
    assert run.status == "complete" and "source" not in run.record["parents"] and len(run.record["losses"]) == 2
    assert last[name] < first[name] - 0.02 * abs(first[name])


def before(tmp_path: Path) -> Run:
    """An interrupted run of version 0.1.0, with adapters and `forget_loss: both`, on the lab of today."""
    folder = tmp_path / "runs" / "unlearn-before-917d3a3d"
    shutil.copytree(BEFORE, folder)
    record = json.loads((folder / "run.json").read_text())
    for role in ("model", "source"):  # the lab's weights are those of the machine that has built it
        path = Path(refs.resolve(record["parents"][role]["ref"]).path)
        record["parents"][role]["sha256"] = sha256(path / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(record))
    return Run.open(folder)


@pytest.mark.slow
def test_a_run_of_the_version_before_is_listed_resumed_attacked_and_reported(lab, tmp_path, capsys):
    assert active_preset().onset == 120
    run = before(tmp_path)
    assert main(["runs", "--folder", str(run.path.parent)]) == 0 and "cancelled" in capsys.readouterr().out
    resumed = resume(ResumeConfig(str(run.path)))
    rows = resumed.rows("metrics.jsonl")
    assert resumed.status == "complete" and [row["step"] for row in rows] == list(range(1, 13))
    assert set(resumed.record["losses"]) == {"cb_loss", "forget_kl_loss", "retain_kl_loss"}
    total = rows[-1]["remove_coef_t"] * (rows[-1]["cb_loss"] + rows[-1]["forget_kl_loss"])
    assert rows[-1]["loss"] == pytest.approx(total + rows[-1]["retain_coef_t"] * rows[-1]["retain_kl_loss"], rel=1e-5)
    few = EvalSettings(["lab_forget_robust"], every=2, limit=8)
    attack = tamper(TamperConfig(model=str(run.path), max_steps=2, eval=few, out=str(tmp_path / "runs")))
    assert attack.status == "complete"
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert "before" in (tmp_path / "report" / "tables.md").read_text()
