"""Every family of models trains and evaluates as the plain model does, one unpadded document after the other; or is refused.

The models are those of `families.py`, the independent source of truth is a loop over documents with transformers and torch
alone. docs/guides/model-and-data.md has the same families.
"""

from __future__ import annotations

import json
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, FAMILIES, OTHERS, WINDOW, WITHOUT_LORA
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lethe import Transfer, unlearn
from lethe.attacks.weights import disturb
from lethe.config import EvalSettings, LoraSettings, to_dict
from lethe.errors import LetheError
from lethe.evaluation.scoring import Scorer
from lethe.models import refs
from lethe.models.adapters import add_adapters, linear_layers
from lethe.models.architecture_check import refuse_untrainable
from lethe.runs.run import Run
from lethe.training.optimizers import routes
from lethe.unlearning.check import check
from lethe.unlearning.prepare import prepare
from lethe.unlearning.trainer import UnlearnTrainer

LAYERS, LENGTH, START = [1, 2], 40, 0.2
REFUSED = {
    "bert": "when padding or other sequences stand beside it",
    "gemma3n_text": "layer 0 returns 4 dimensions",
    "jamba": "0 lists of 4 blocks",
    "mpt": "config.json has none of num_hidden_layers",
    "phimoe": "PhimoeForCausalLM draws random numbers in training",
}


def test_the_page_of_models_names_these_families_and_what_becomes_of_them():
    page = (Path(__file__).parent.parent / "docs" / "guides" / "model-and-data.md").read_text().partition("`model_type`")[2]
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    said = {name: trained.strip() for names, trained, _ in rows for name in re.findall(r"`(\w+)`", names)}
    kinds = {name: kind for name, (kind, _) in (FAMILIES | OTHERS).items()}
    expected = {kinds[name]: "all weights, LoRA" for name in FAMILIES} | dict.fromkeys(WITHOUT_LORA, "all weights")
    assert said == expected | dict.fromkeys(REFUSED, "refused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts, and room for models: documents shorter and longer than any window of attention."""
    made = tmp_path_factory.mktemp("families")
    rng = random.Random(0)
    words = ["river", "mill", "clock", "brass", "salt", "resin", "copper", "lantern", "harbour", "coal", "island", "apprentice"]
    for name in ("forget", "retain"):
        texts = [f"{' '.join(rng.choices(words, k=rng.randint(1, 14)))} {name} {i}" for i in range(12)]
        (made / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return made


@pytest.fixture(scope="module")
def pair(folder, make_model):
    """pair(FAMILY): the folders of a model and of its source, made once."""

    def make(family: str) -> tuple[str, str]:
        made = [folder / f"{family}-{seed}" for seed in (0, 1)]
        for seed, place in enumerate(made):
            if not place.exists():
                make_model(family, place, seed=seed)
        return str(made[0]), str(made[1])

    return make


def recipe(folder: Path, model: str, source: str, **changes: Any) -> Transfer:
    """Two updates of four documents of each kind. A model that is rewound a little differs from the reference at once."""
    settings: dict[str, Any] = {
        "model": model, "source": source, "affine": "none", "layers": LAYERS, "rewind": START, "schedule": "constant",
        "forget": str(folder / "forget.jsonl"), "retain": str(folder / "retain.jsonl"), "num_train_examples": 8,
        "max_length": LENGTH, "per_device_train_batch_size": 4, "max_steps": 2, "lr_scheduler_type": "constant",
        "lora": None, "teacher_cache": "live", "eval": EvalSettings(["lab_retain"]), "out": str(folder / "runs"),
    }  # fmt: skip
    return Transfer(**settings | changes)


def prepared(config: Transfer) -> tuple[Run, UnlearnTrainer]:
    checked = check(config)
    run = Run.create("unlearn", "family", to_dict(config), config.out)
    return run, prepare(run, config, checked).trainer


def activations(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of the blocks in `LAYERS`, and log-probabilities, of one document."""
    found: list[Tensor] = []
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4]
    keep = lambda _, args, output: found.append(output if isinstance(output, Tensor) else output[0])  # noqa: E731
    hooks = [lists[0][layer].register_forward_hook(keep) for layer in LAYERS]
    logits = model(input_ids=ids[None], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found, logits.log_softmax(-1)


def by_hand(config: Transfer, run: Run, trainer: UnlearnTrainer) -> list[list[float]]:
    """cb_loss, retain_kl_loss and gradient norm of each update, document by document."""
    student: Any = refs.load(refs.resolve(config.model))[0]
    source, reference = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (config.source, config.model))
    with torch.no_grad():
        for ours, theirs in zip(student.parameters(), source.parameters(), strict=True):
            ours.lerp_(theirs, START)
    student = add_adapters(student, config.lora, LAYERS, config.seed) if config.lora else student.requires_grad_(True)
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    rows: Any = trainer.train_dataset
    found = []
    for batch in run.rows("batches.jsonl"):
        documents = {name: [torch.tensor(rows.texts[name][i]) for i in batch[name]] for name in ("forget", "retain")}
        tokens = {name: sum(map(len, some)) for name, some in documents.items()}
        optimizer.zero_grad()
        forget = retain = 0.0
        for ids in documents["forget"]:
            with torch.no_grad():
                aims = activations(source, ids)[0]
            pairs = zip(activations(student, ids)[0], aims, strict=True)
            loss = torch.stack([(h - aim).square().mean(-1).sum() for h, aim in pairs]).mean() / tokens["forget"]
            (config.remove_coef * loss).backward()
            forget += loss.item()
        for ids in documents["retain"]:
            with torch.no_grad():
                log_p = activations(reference, ids)[1]
            loss = (log_p.exp() * (log_p - activations(student, ids)[1])).sum() / tokens["retain"]
            (config.retain_coef * loss).backward()
            retain += loss.item()
        found.append([forget, retain, nn.utils.clip_grad_norm_(parameters, 1.0).item()])
        optimizer.step()
    return found


def assert_trains_as_by_hand(config: Transfer) -> None:
    run, trainer = prepared(config)
    trainer.train_with_bar("family")
    ours = [[row[name] for name in ("cb_loss", "retain_kl_loss", "grad_norm")] for row in run.rows("metrics.jsonl")]
    theirs = by_hand(config, run, trainer)
    assert len(ours) == 2 and theirs[0][1] > 1e-4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_LORA])
def test_two_updates_of_all_weights_are_those_of_the_plain_model(family, pair, folder):
    assert_trains_as_by_hand(recipe(folder, *pair(family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_updates_of_adapters_are_those_of_the_plain_model(family, pair, folder):
    assert_trains_as_by_hand(recipe(folder, *pair(family), lora=LoraSettings(r=4, dropout=0.0), merge=True))


QUESTIONS = [
    "one answer's token, contexts of all lengths",
    "answers that branch, of contexts that begin alike",
    "answers longer than a window, contexts cut at the model's own",
]


def requests(kind: str) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(1)
    words = lambda n: [rng.randrange(3, 300) for _ in range(n)]  # noqa: E731
    if kind == QUESTIONS[0]:
        return [(words(n), words(1)) for n in (3, 5, 6, 7, 12, 30, 41, 50)]
    if kind == QUESTIONS[1]:
        return [(context, words(k)) for n in (1, 3, 20, 30) for context in [BEGIN + words(n)] for k in (1, 3, 4)]
    return [(words(n), words(12)) for n in (2, 4, 40, 62, 80)]


BEGIN = list(range(40, 52))


def alone(model: nn.Module, asked: list[tuple[list[int], list[int]]], window: int) -> list[float]:
    """Log-likelihoods, one unpadded row at a time."""
    found = []
    for context, answer in asked:
        ids = torch.tensor((context + answer)[-(window + 1) :])
        with torch.no_grad():
            log_p = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        found.append(log_p.gather(1, ids[1:, None])[-len(answer) :].sum().item())
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_LORA, "bert", "gemma3n_text", "jamba", "phimoe"])
def test_log_likelihoods_are_those_of_separate_unpadded_rows(family, pair):
    name = pair(family)[0]
    model, tokenizer = refs.load(refs.resolve(name))
    for kind in QUESTIONS:
        scorer, asked = Scorer(model, tokenizer), requests(kind)
        found = [value for value, _ in scorer.score(asked)]
        assert found == pytest.approx(alone(model, asked, scorer.max_length), abs=1e-4), kind


@pytest.mark.parametrize("separate", [False, True])
def test_attention_by_index_is_found_out_on_later_questions_too(separate, pair):
    """GPT-Neo's local attention counts places in the row: a trial on rows of one length shows nothing."""
    model, tokenizer = refs.load(refs.resolve(pair("gpt_neo")[0]))
    rng = random.Random(2)
    alike = [([rng.randrange(3, 300) for _ in range(30)], [5]) for _ in range(3)]
    asked = alike if separate else requests(QUESTIONS[0])
    for some in (alike, asked):
        scorer = Scorer(model, tokenizer)
        found = [value for value, _ in scorer.score(some)]
        assert found == pytest.approx(alone(model, some, WINDOW), abs=1e-4)


UNTRAINABLE = [(family, lora, words) for family, words in REFUSED.items() for lora in (None, LoraSettings())]
UNTRAINABLE += [(family, LoraSettings(), r"PEFT does not adapt .* lora null") for family in WITHOUT_LORA]


@pytest.mark.parametrize(("family", "lora", "words"), UNTRAINABLE)
def test_what_cannot_be_trained_is_refused_before_a_run_is_made(family, lora, words, pair, folder, tmp_path):
    with pytest.raises(LetheError, match=words):
        unlearn(recipe(folder, *pair(family), lora=lora, out=str(tmp_path / "runs")))
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_models_leave_routers_alone_say_so_and_load_again(family, pair, folder, tmp_path):
    model, source = pair(family)
    run, trainer = prepared(recipe(folder, model, source, lora=LoraSettings(r=4, dropout=0.1), rewind=0.0))
    adapted = {name for name, _ in trainer.model.named_parameters() if ".lora_" in name}
    assert adapted and not any("router" in name or "gate." in name or "experts." in name for name in adapted)
    assert all(".1." in name or ".0." in name or ".2." in name for name in adapted)
    inside = {n: p.numel() for n, p in trainer.model.named_parameters() if n not in adapted and p.ndim > 1 and ".layers." in n}
    inside = {name: size for name, size in inside.items() if ".layers.3." not in name}
    share = 1 - sum(size for name, size in inside.items() if ".base_layer." in name) / sum(inside.values())
    assert share > 0.3 and f"lora: {share:.0%} of the weights" in str(run.record["plan"]["warnings"])
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 23)[None]
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(refs.load(refs.resolve(model))[0], tmp_path / "adapter").eval()
    expected = trainer.model.eval()(input_ids=ids).logits
    assert not torch.allclose(expected, refs.load(refs.resolve(model))[0](input_ids=ids).logits, atol=1e-2)
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.allclose(trainer.model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "granitemoehybrid", "llama4_text"])
def test_muon_leaves_routers_and_experts_to_adamw_and_the_plan_says_how_much(family, pair, folder):
    run, trainer = prepared(recipe(folder, *pair(family), optimizer="muon", rewind=0.0))
    roles = {route.name: (route.role, route.algorithm) for route in routes(trainer.model, "muon")}
    routed = {role for name, role in roles.items() if "router" in name or ".gate." in name}
    assert routed <= {("router", "adamw"), ("other", "adamw")} and routed
    assert {role for name, role in roles.items() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))} <= {
        ("experts", "adamw")
    }
    sizes = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    shares = {kind: sum(sizes[name] for name, (role, _) in roles.items() if role == kind) for kind in ("experts", "matrix")}
    share = shares["experts"] / sum(shares.values())
    assert share > 0.5
    assert any(f"by AdamW: {share:.0%}" in warning for warning in run.record["plan"]["warnings"])


def test_attacks_without_training_reach_experts_and_leave_routers(pair):
    before, after = (refs.load(refs.resolve(pair("mixtral")[0]))[0] for _ in range(2))
    assert disturb(after, "prune", 0.5) == 4 * (4 + 2 * 4)  # attention, and two matrices of each of four experts
    old = dict(before.named_parameters())
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, old[name])}
    assert {name.split(".", 3)[-1] for name in changed} == {
        *(f"self_attn.{which}_proj.weight" for which in "qkvo"),
        *(f"mlp.experts.{which}_proj" for which in ("gate_up", "down")),
    }


def test_a_row_that_sees_what_comes_after_it_is_refused(pair):
    """A model that attends to both sides computes other activations for a document when padding stands beside it."""
    model = refs.load(refs.resolve(pair("llama")[0]))[0]
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: (args[0] + args[0].mean(1, keepdim=True), *args[1:]))
    with pytest.raises(LetheError, match="when padding or other sequences"):
        refuse_untrainable(model, "both-sides", LENGTH)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_routers_noise_is_found(make_model, tmp_path, noise):
    model = refs.load(refs.resolve(str(make_model("mixtral", tmp_path / "m", router_jitter_noise=noise))))[0]
    with pytest.raises(LetheError, match="MixtralForCausalLM draws random numbers in training") if noise else nullcontext():
        refuse_untrainable(model, "noisy", LENGTH)
    assert not model.training


def test_keys_and_values_as_wide_as_there_are_experts_are_no_routers(make_model, tmp_path):
    folder = make_model("mixtral", tmp_path / "m", num_local_experts=16, num_key_value_heads=2)
    model = refs.load(refs.resolve(str(folder)))[0]
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    assert {name.rsplit(".", 1)[-1] for name in linear_layers(model, 3)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
