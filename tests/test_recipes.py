"""Recipes are runnable as they stand; those of the 7B model are the log's runs, as its tables count them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lethe import TamperConfig, Transfer, unlearn
from lethe.config import ATTACKED, UNLEARNED, EvalSettings, SweepConfig
from lethe.config.parse import build, from_recipe
from lethe.lab.presets import PRESETS, active_preset
from lethe.results.recovery import GENERAL_BOUND
from lethe.sweeps.kinds import planner_of
from lethe.sweeps.suite import read
from lethe.training.check import plan

RECIPES = Path(__file__).parent.parent / "recipes"
SWEEPS = sorted((RECIPES / "sweeps").glob("*.yaml"))
LAB = [RECIPES / "lab.yaml", RECIPES / "lab-full.yaml", *sorted((RECIPES / "lab").glob("*.yaml"))]


@pytest.mark.parametrize(
    "recipe", sorted(set(RECIPES.rglob("*.yaml")) - set(SWEEPS)), ids=lambda path: str(path.relative_to(RECIPES))
)
def test_a_recipe_names_itself_and_is_valid(recipe):
    path = f"recipes/{recipe.relative_to(RECIPES)}"
    if recipe.parent.name == "tamper":
        config, command = from_recipe(TamperConfig, recipe, model="lab:final"), f"lethe tamper MODEL --config {path}"
    else:
        config, command = from_recipe(Transfer, recipe), f"lethe unlearn --config {path}"
    assert command in recipe.read_text()
    assert plan(config, config.num_train_examples or UNLEARNED)["steps"] > 0


@pytest.mark.parametrize("recipe", SWEEPS, ids=lambda path: path.stem)
def test_a_sweeps_recipe_names_itself_and_every_run_in_it_is_valid(recipe, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)  # it names its base recipe from there
    config = from_recipe(SweepConfig, recipe)
    assert f"# Run as it stands: lethe sweep --config recipes/sweeps/{recipe.name}\n" in recipe.read_text()
    assert config.goal
    planner = planner_of(config)
    assert len(set(planner.tasks)) == 2
    plans = [planner.plan(point, seed=0) for point in planner.samples()]
    assert len({made.name for made in plans}) == len({made.key for made in plans}) >= 2
    for kind, settings in (stage for made in plans for stage in made.stages):
        build({"unlearn": Transfer, "tamper": TamperConfig}[kind], settings)


def test_the_sweeps_of_the_study_are_its_tables():
    rows = {"coefficients": 7, "retain": 6, "epochs": 3, "ranks": 4, "tamper": 2}
    for name, count in rows.items():
        config = from_recipe(SweepConfig, RECIPES / "sweeps" / f"deep-ignorance-7b-{name}.yaml")
        (values,) = config.vary.values()
        assert (config.kind, len(values), config.launcher) == ("grid", count, "slurm")


@pytest.mark.parametrize(
    ("name", "steps"), [("short-adamw", 110), ("short-muon", 110), ("long-adamw", 3840), ("long-muon", 3840)]
)
def test_the_logs_attacks_have_its_batches_and_rates(name, steps):
    config = from_recipe(TamperConfig, RECIPES / "tamper" / f"{name}.yaml", model="lab:final")
    found = plan(config, config.num_train_examples)
    assert (found["steps"], found["effective_batch"], config.lr) == (steps, 4, 2e-5)
    assert config.optimizer == name.split("-")[1]


def test_the_suite_of_attacks_is_valid_and_covers_what_an_attacker_would_try():
    suite = read("standard")
    assert set(suite) == {"general_bound", "common", "controls", "attacks"} and suite["general_bound"] == GENERAL_BOUND
    configs, after = {}, {}
    for name, own in suite["attacks"].items():
        after[name] = own.pop("after", None)
        settings = suite["common"] | own | {"eval": suite["common"]["eval"] | own.get("eval", {})}
        configs[name] = build(TamperConfig, settings | {"model": "lab:final", "name": name})
    kinds = {(c.attack, c.optimizer, c.lora is None) for c in configs.values()}
    trained = {("finetune", optimizer, full) for optimizer in ("adamw", "muon") for full in (True, False)}
    assert kinds >= trained and {kind for kind, *_ in kinds} == {"finetune", "noise", "quantize", "prune", "prompt"}
    rates = [c.lr for c in configs.values() if (c.attack, c.optimizer, c.lora) == ("finetune", "adamw", None)]
    assert max(rates) / min(rates) == pytest.approx(100)
    examples = [ATTACKED if c.num_train_examples is None else c.num_train_examples for c in configs.values()]
    assert min(examples) < 512 < max(examples)
    (second,) = (name for name, first in after.items() if first)
    first = configs[after[second]]
    assert (first.forget, first.save_model, configs[second].forget) == ("lab:retain", True, "lab:forget")
    assert list(configs).index(after[second]) < list(configs).index(second)
    assert len({c.eval.tasks[0] for c in configs.values()}) == 1


ROWS = [
    ("coefficients", {}, 256, 32),
    ("coefficients", {"num_train_examples": 2048, "remove_coef": 100}, 512, 64),
    ("coefficients", {"num_train_examples": 8192, "remove_coef": 50}, 2048, 256),
    ("retain-sweep", {"retain_coef": 20}, 512, 64),
    ("retain-sweep", {"retain_coef": 1, "remove_coef": 12}, 512, 64),
    ("epoch-sweep", {"epochs": 1, "retain_coef": 1, "remove_coef": 3}, 256, 32),
    ("epoch-sweep", {}, 2560, 320),
    ("epoch-sweep", {"epochs": 100}, 25600, 3200),
    ("lora", {"retain_coef": 2, "remove_coef": 5000}, 512, 64),
    ("unconstrained", {"lora.r": 64}, 512, 64),
    ("unconstrained", {"optimizer": "muon"}, 512, 64),
    ("unconstrained-full", {}, 512, 64),
    ("unconstrained-muon", {}, 512, 64),
    ("step54832", {}, 512, 64),
]


@pytest.mark.parametrize(("name", "changes", "passes", "updates"), ROWS)
def test_rows_of_the_log_have_the_logs_steps(name, changes, passes, updates):
    nested = {key: value for key, value in changes.items() if "." not in key}
    if "lora.r" in changes:
        nested["lora"] = {"r": changes["lora.r"]}
    config = from_recipe(Transfer, RECIPES / "deep-ignorance-7b" / f"{name}.yaml", **nested)
    found = plan(config, config.num_train_examples)
    assert (found["forward_passes"], found["steps"], found["effective_batch"]) == (passes, updates, 32)
    assert config.layers == [4, 9, 14, 19, 24, 29]
    assert config.affine == "none" or config.affine.endswith("step54832") == config.source.endswith("step54832")
    if "lora.r" in changes:
        assert config.lora is not None and (config.lora.r, config.lora.alpha) == (64, 16)


def test_the_one_off_of_the_later_runs_can_be_repeated():
    overrides = {"layers": [5, 10, 15, 20, 25, 30], "affine_convention": "block_output"}
    assert from_recipe(Transfer, RECIPES / "deep-ignorance-7b" / "lora.yaml", **overrides).layers[0] == 5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LAB, ids=lambda path: path.stem)
def test_a_lab_recipe_runs(lab, tmp_path, recipe):
    """On the nano lab, cut to three updates; nothing else is changed."""
    onset = f"lab:global_step{active_preset().onset}"
    assert from_recipe(Transfer, recipe).source == f"lab:global_step{PRESETS['standard'].onset}"
    short = {"source": onset, "max_steps": 3, "epochs": 1, "warmup_steps": 0, "out": str(tmp_path)}
    run = unlearn(from_recipe(Transfer, recipe, **short, eval=EvalSettings(["lab_forget_robust"], limit=8)))
    assert run.status == "complete" and len(run.rows("metrics.jsonl")) == 3
