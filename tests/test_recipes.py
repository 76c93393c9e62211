"""Recipes run as they stand; those of the 7B model are the Deep Ignorance study's runs, as its tables count them."""

from __future__ import annotations

import json

import pytest

from lethe import LetheError, TamperConfig, Transfer, unlearn
from lethe.cli import main
from lethe.config import ATTACKED, UNLEARNED, EvalSettings, SuiteConfig, SweepConfig, recipes
from lethe.config.parse import build, from_recipe
from lethe.lab.presets import PRESETS, active_preset
from lethe.methods.method import Method
from lethe.results.recovery import GENERAL_BOUND
from lethe.sweeps.folder import planner_of
from lethe.sweeps.suite import spelled_out
from lethe.training.check import plan

NAMES = recipes.names()
KINDS = {"tamper": TamperConfig, "sweep": SweepConfig, "unlearn": Method}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run_and_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # sweeps name their recipes, which are found from everywhere
    recipe = recipes.named(name)
    command, *rest = recipe.command.removeprefix("lethe ").split()
    assert rest == [*(["MODEL"] if command == "tamper" else []), "--config", name]
    assert recipe.about.endswith(".") and len(recipe.about) < 128
    config = from_recipe(KINDS[command], name, **({"model": "lab:final"} if command == "tamper" else {}))
    if command != "sweep":
        assert plan(config, config.num_train_examples or UNLEARNED)["steps"] > 0
        return
    assert config.goal
    planner = planner_of(config)
    assert len(set(planner.tasks)) == 2
    plans = [planner.plan(point, [0]) for point in planner.samples()]
    assert len({made.name for made in plans}) == len({made.key for made in plans}) >= 2
    for kind, settings in (stage for made in plans for stage in made.stages):
        build(KINDS[kind], settings)


def test_recipes_are_listed_and_printed_by_name(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}\n    {recipes.named(name).about}\n" in listed for name in NAMES)
    assert main(["recipes", "--json"]) == 0
    assert [found["name"] for found in json.loads(capsys.readouterr().out)] == NAMES
    assert main(["recipes", "tamper/lab"]) == 0
    assert capsys.readouterr().out == (recipes.FOLDER / "tamper" / "lab.yaml").read_text()
    assert main(["recipes", "tamper/lap"]) == 2
    assert "there is no recipe 'tamper/lap'; did you mean 'tamper/lab'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("labb", "config: there is no file and no recipe 'labb'; did you mean 'lab'?"),
        ("mine.yaml", "config: 'mine.yaml' cannot be read (there is no such file)"),
    ],
)
def test_a_recipe_that_is_not_there_is_answered_with_the_nearest(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LetheError) as refused:
        from_recipe(Transfer, given)
    assert str(refused.value).startswith(expected)


def test_a_file_comes_before_a_recipe_of_its_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    assert from_recipe(Transfer, "lab").name == "demo-lora"
    (tmp_path / "lab").rmdir()
    (tmp_path / "lab").write_text("source: x\nname: mine\n")
    assert from_recipe(Transfer, "lab").name == "mine"


def test_the_sweeps_of_the_study_are_its_tables():
    rows = {"coefficients": 7, "retain": 6, "epochs": 3, "ranks": 4, "tamper": 2}
    for name, count in rows.items():
        config = from_recipe(SweepConfig, f"sweeps/deep-ignorance-7b-{name}")
        (values,) = config.vary.values()
        assert (config.kind, len(values), config.launcher) == ("grid", count, "slurm")


@pytest.mark.parametrize(
    ("name", "steps"), [("short-adamw", 110), ("short-muon", 110), ("long-adamw", 3840), ("long-muon", 3840)]
)
def test_the_studys_attacks_have_its_batches_and_rates(name, steps):
    config = from_recipe(TamperConfig, f"tamper/{name}", model="lab:final")
    found = plan(config, config.num_train_examples)
    assert (found["steps"], found["effective_batch"], config.lr) == (steps, 4, 2e-5)
    assert config.optimizer == name.split("-")[1]


def test_the_suite_of_attacks_is_valid_and_covers_what_an_attacker_would_try():
    suite = spelled_out(SuiteConfig(models=["lab:final"], suite="standard"))
    assert suite.general_bound == GENERAL_BOUND
    configs, after = {}, {}
    for name, own in suite.attacks.items():
        after[name] = own.pop("after", None)
        settings = suite.common | own | {"eval": suite.common["eval"] | own.get("eval", {})}
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


RUNS = [
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


@pytest.mark.parametrize(("name", "changes", "passes", "updates"), RUNS)
def test_runs_of_the_study_have_its_steps(name, changes, passes, updates):
    nested = {key: value for key, value in changes.items() if "." not in key}
    if "lora.r" in changes:
        nested["lora"] = {"r": changes["lora.r"]}
    config = from_recipe(Transfer, f"deep-ignorance-7b/{name}", **nested)
    found = plan(config, config.num_train_examples)
    assert (found["forward_passes"], found["steps"], found["effective_batch"]) == (passes, updates, 32)
    assert config.layers == [4, 9, 14, 19, 24, 29]
    assert config.affine == "none" or config.affine.endswith("step54832") == config.source.endswith("step54832")
    if "lora.r" in changes:
        assert config.lora is not None and (config.lora.r, config.lora.alpha) == (64, 16)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in NAMES if name.startswith("lab")])
def test_a_lab_recipe_runs(lab, tmp_path, recipe):
    """On the nano lab, cut to three updates; nothing else is changed."""
    onset = f"lab:global_step{active_preset().onset}"
    whole = from_recipe(Method, recipe)
    given = whole.source
    assert given == f"lab:global_step{PRESETS['standard'].onset}" or not given
    length = {"num_train_examples": 9} if whole.layered else {"max_steps": 3}  # an update in each of three stages
    short = length | {"epochs": 1, "warmup_steps": 0, "out": str(tmp_path)} | ({"source": onset} if given else {})
    run = unlearn(from_recipe(Method, recipe, **short, eval=EvalSettings(["lab_forget_robust"], limit=8)))
    assert run.status == "complete" and len(run.rows("metrics.jsonl")) == 3
