"""One way in: recipe, command line and Python make the same config object, and whatever is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lethe import Transfer
from lethe import config as c
from lethe.cli import COMMANDS, main
from lethe.config import EvalSettings, LoraSettings, TamperConfig, TextSource, to_dict
from lethe.config.parse import from_recipe, parse
from lethe.errors import LetheError
from lethe.runs.run import Run

RECIPE = """
model: lab:final
source: lab:global_step900
forget: {source: forget.jsonl, template: "{title}\\n\\n{text}"}
layers: [0, 2, 5]
lr: 1e-4
lora: {r: 4, dropout: 0.0}
eval: {tasks: [lab_retain], every: 10}
name: from-recipe
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(text): the path of a recipe file."""

    def write(text: str = RECIPE) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def made(*words: str, kind: type = Transfer):
    return parse("command", kind, list(words), "example")


def refusal(*words: str, kind: type = Transfer) -> str:
    with pytest.raises(LetheError) as caught:
        made(*words, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    assert "Namespace" not in message
    assert "<class" not in message
    return message


def test_a_switch_needs_no_value():
    for words in (["--merge"], ["--merge", "true"], ["--merge=true"], ["--merge", "--remove_coef", "3"]):
        assert made("--source", "x", *words).merge is True
    assert made("--source", "x", "--merge", "false").merge is False
    assert "expected true or false, got 3" in refusal("--source", "x", "--merge", "3")


def test_recipe_command_line_and_python_make_equal_objects(recipe):
    by_python = Transfer(
        model="lab:final",
        source="lab:global_step900",
        forget=TextSource("forget.jsonl", template="{title}\n\n{text}"),
        layers=[0, 2, 5],
        lr=1e-4,
        lora=LoraSettings(r=4, dropout=0.0),
        eval=EvalSettings(tasks=["lab_retain"], every=10),
        name="from-recipe",
    )
    by_recipe = made("--config", recipe())
    by_words = made(
        *["--model", "lab:final", "--source", "lab:global_step900"],
        *["--forget.source", "forget.jsonl", "--forget.template", "{title}\n\n{text}"],
        *["--layers", "0", "2", "5", "--lr", "1e-4", "--lora.r", "4", "--lora.dropout", "0"],
        *["--eval.tasks", "lab_retain", "--eval.every", "10", "--name", "from-recipe"],
    )
    assert by_recipe == by_python
    assert by_words == by_python
    assert from_recipe(Transfer, recipe()) == by_python
    assert type(by_recipe.lora) is LoraSettings
    assert type(by_words.lr) is type(by_recipe.lr) is float


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(recipe):
    config = made(
        "--config", recipe(), "--lr", "3", "--layers", "1", "--lora.alpha", "2", "--eval.limit", "7", "--forget.template", "{c}"
    )
    assert (config.lr, config.layers, config.name) == (3.0, [1], "from-recipe")
    assert config.lora == LoraSettings(r=4, alpha=2, dropout=0.0)
    assert config.eval == EvalSettings(["lab_retain"], every=10, limit=7)
    assert config.forget == TextSource("forget.jsonl", template="{c}")
    assert config.remove_coef == Transfer(source="x").remove_coef
    assert made("--lr", "3", "--config", recipe()).lr == 3.0


def test_a_runs_record_is_a_recipe_of_the_run(recipe):
    """run.json's config, through JSON and YAML, makes the config again."""
    config = Transfer(source="x", forget=TextSource("a.jsonl"), lora=None, lr=1e-5, layers=[1])
    assert made("--config", recipe(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))) == config


def test_a_later_recipe_overrides_an_earlier_one(recipe, tmp_path):
    (tmp_path / "second.yaml").write_text("lr: 7\n")
    assert made("--config", recipe(), "--config", str(tmp_path / "second.yaml")).lr == 7
    assert made("--config", recipe(), "--config", str(tmp_path / "second.yaml")).layers == [0, 2, 5]


def test_adapters_are_switched_off_and_on(recipe):
    assert made("--config", recipe(), "--lora", "null").lora is None
    assert made("--config", recipe("source: x\nlora: null\n")).lora is None
    assert made("--config", recipe("source: x\nlora: null\n"), "--lora.r", "8").lora == LoraSettings(r=8)
    assert made("--source", "x").lora == LoraSettings()


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["0", "2"], [0, 2]), (["3"], [3]), (["[0, 2]"], [0, 2]), (["[0,2]"], [0, 2]), (["10"], [10])],
)
def test_lists_are_written_as_words(words, layers):
    assert made("--source", "x", "--layers", *words, "--lr", "2").layers == layers
    assert made("--source", "x", "--lr", "2", "--layers", *words).lr == 2


def test_lists_of_names(recipe):
    assert made("--source", "x", "--eval.tasks", "a", "b-c").eval.tasks == ["a", "b-c"]
    assert parse("evaluate", c.EvaluateConfig, ["m", "--tasks", "one", "2", "null"], "", "model").tasks == ["one", "2", "null"]
    assert parse("report", c.ReportConfig, ["a", "b/c"], "", "runs").runs == ["a", "b/c"]


@pytest.mark.parametrize("field", ["forget", "retain"])
def test_one_text_on_the_command_line_is_a_text(field):
    assert getattr(made("--source", "x", f"--{field}", "some/text.jsonl"), field) == "some/text.jsonl"
    assert getattr(made("--source", "x", f"--{field}.source", "a.jsonl", f"--{field}.column", "c"), field) == TextSource(
        "a.jsonl", "c"
    )


@pytest.mark.parametrize("value", ["5", "layers", "1e3", "true", "null", "a: b", "[x]", "{x}", "it's", "ü 文", "a b " * 40])
def test_text_is_taken_as_it_is_written(value):
    assert made("--source", "x", "--name", value).name == value


def test_what_a_recipe_has_in_quotes_is_text_and_1e_3_is_a_number(recipe):
    config = made("--config", recipe("source: x\nname: '1e-3'\nlr: 1e-3\n"))
    assert (config.name, config.lr) == ("1e-3", 0.001)
    assert made("--config", recipe("source: x\nname: 2024-01-31\n")).name == "2024-01-31"


@pytest.mark.parametrize(
    "overrides",
    [
        {"lr": 1e-5, "layers": [1, 2], "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
        {"lora": None},
        {"name": "5"},
        {"model": "run:abc", "retain": "text.jsonl"},
        {"forget": TextSource("a.jsonl", template="{t}\n\n{b}")},
        {"retain": [TextSource("a.jsonl"), TextSource("b.jsonl", weight=2.0)]},
        {"lora": LoraSettings(r=2)},
        {"eval": EvalSettings(["a"], every=2)},
    ],
    ids=lambda o: "-".join(o) + "=" + str(next(iter(o.values())))[:20],
)
def test_overrides_of_a_recipe_from_python_arrive_as_they_are(recipe, overrides):
    config = from_recipe(Transfer, recipe(), **overrides)
    assert {name: getattr(config, name) for name in overrides} == overrides
    assert config.source == "lab:global_step900"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--lora", "null", "--layers", "1"],
        ["--forget", "plain.jsonl", "--name", "5", "--eval.tasks", "a", "b"],
        ["--remove_coef", "2e1", "--name", "a: b"],
        ["--lr", "2e-5", "--name", "1e-3"],
        ["--name", "2024-01-31"],
    ],
)
def test_print_config_is_a_recipe_that_makes_the_same_object(recipe, tmp_path, capsys, words):
    first = made("--config", recipe(), *words)
    with pytest.raises(SystemExit) as done:
        made("--config", recipe(), *words, "--print_config")
    assert done.value.code in {0, None}
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert made("--config", str(tmp_path / "printed.yaml")) == first
    assert yaml.safe_load(printed)["source"] == "lab:global_step900"


def table() -> list[tuple[str, str]]:
    """Wrong words, or lines of a recipe, with how the message about them begins."""
    lines = (Path(__file__).parent / "data" / "wrong" / "settings.txt").read_text().splitlines()
    return [tuple(line.split(" => ")) for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize(("given", "expected"), table(), ids=[given for given, _ in table()])
def test_a_wrong_setting_is_named_with_what_was_given_and_what_is_expected(recipe, given, expected):
    if given.startswith("-"):
        assert refusal("--source", "x", *shlex.split(given)).startswith(expected)
    else:
        path = recipe("source: x\n" + given.encode().decode("unicode_escape") + "\n")
        assert refusal("--config", path).startswith(expected.replace("{recipe}", path))


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("\ufeffname: marked", "name", "marked"),
        ("name: Übergröße – 文", "name", "Übergröße – 文"),
        (f"name: {'n' * 234}", "name", "n" * 234),
        ("max_steps: 1000000000000000", "max_steps", 10**15),
        ("seed: 4294967295", "seed", 2**32 - 1),
        ("eval: &a {tasks: [x], limit: 3}\nlora: {<<: {r: 4}}", "lora", LoraSettings(r=4)),
        (
            'forget: {source: a.jsonl, template: "{title}\\n\\n{text}"}',
            "forget",
            TextSource("a.jsonl", template="{title}\n\n{text}"),
        ),
    ],
    ids=["byte-order mark", "letters", "longest name", "largest number", "largest seed", "merge key", "lines of a template"],
)
def test_what_looks_odd_and_is_right_is_taken(recipe, text, field, value):
    first, rest = (text, "") if text.startswith("\ufeff") else ("", text)
    assert getattr(made("--config", recipe(f"{first}\nsource: x\n{rest}\n")), field) == value


def test_free_text_of_a_sweep_may_have_lines(recipe):
    text = "goal: |\n  What is\n  lost?\nvary: {lr: [1]}\nlauncher: slurm\nslurm: {setup: ['a\n\n  b']}\n"
    config = made("--config", recipe(text + f"storage: postgresql://{'p' * 300}@host/db\n"), kind=c.SweepConfig)
    assert config.goal == "What is\nlost?\n" and config.slurm.setup == ["a\nb"] and len(config.storage) > 300


def test_many_tasks_may_be_named_in_one_text(recipe):
    many = [f"mmlu_some_subject_{i}" for i in range(60)]
    for words in (
        ["--tasks", ",".join(many)],
        [f"--tasks={','.join(many)}"],
        ["--config", recipe(f"tasks: ['{','.join(many)}']")],
    ):
        assert made("--model", "x", *words, kind=c.EvaluateConfig).tasks == many


def test_a_required_setting_is_named():
    assert "model" in refusal(kind=c.EvaluateConfig)
    assert "source" in refusal(kind=Transfer)
    assert "model" in refusal(kind=TamperConfig)


@pytest.mark.parametrize(
    "given", [{"lr": "fast"}, {"layers": "012"}, {"layers": ["a"]}, {"epochs": None}, {"lora": {"r": 8}}], ids=str
)
def test_python_refuses_ill_typed_settings_too(given):
    """Python builds the same object, so it makes the same promises."""
    with pytest.raises(LetheError, match=f"{next(iter(given))}: expected"):
        Transfer(source="x", **given)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_setting_and_an_example(capsys, name):
    command = COMMANDS[name]
    with pytest.raises(SystemExit):
        parse(name, command.config, ["--help"], command.example, command.positional)
    text = " ".join(capsys.readouterr().out.split())
    assert command.example in text
    for field in dataclasses.fields(command.config):
        assert f"--{field.name}" in text
    assert name != "unlearn" or "retain_coef rises from 0" in text


@pytest.fixture(scope="module")
def models(make_model, texts, tmp_path_factory):
    """A target, a source, another width, pickles alone, and two texts."""
    home = tmp_path_factory.mktemp("models")
    for name, seed in (("target", 1), ("source", 2)):
        make_model("llama", home / name, seed=seed)
    make_model("llama", home / "wide", hidden_size=48)
    make_model("llama", home / "pickled")
    (home / "pickled" / "model.safetensors").rename(home / "pickled" / "pytorch_model.bin")
    for name, part in (("forget", texts[:30]), ("retain", texts[30:])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    (home / "empty.jsonl").write_text("")
    (home / "maps").mkdir()
    (home / "maps" / "affine_transforms.safetensors").write_bytes(b"")
    (home / "maps" / "metadata.json").write_text(json.dumps({"layer_indices": [0, 2], "hidden_dim": 4096, "alpha": 0.01}))
    return home


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WRONG = {
    "unknown setting": ["--retian_coef", "3"],
    "model is nothing": ["--model", "nowhere"],
    "source is nothing": ["--source", "nowhere/at/all"],
    "pickles": ["--source", "{home}/pickled"],
    "width": ["--source", "{home}/wide"],
    "itself": ["--source", "{home}/target"],
    "layer": ["--layers", "0", "9"],
    "no such run": ["--model", "run:ffffffff"],
    "task": ["--eval.tasks", "lab_forgot"],
    "empty text": ["--forget", "{home}/empty.jsonl"],
    "no text": ["--forget", "{home}/nowhere.jsonl"],
    "no column": ["--forget.source", "{home}/forget.jsonl", "--forget.column", "title"],
    "no retain text": ["--retain.source", "{home}/nowhere.jsonl"],
    "too few": ["--num_train_examples", "1000"],
    "same text": ["--retain.source", "{home}/forget.jsonl"],
    "no maps": ["--affine", "{home}"],
    "width of maps": ["--affine", "{home}/maps"],
    "window": ["--max_length", "65"],
    "warm-up": ["--warmup_steps", "9"],
    "reporter": ["--report_to", "clearml"],
    "out is a file": ["--out", "{home}/empty.jsonl"],
    "recipe": ["--config", "{home}/nowhere.yaml"],
}


def right(home: Path) -> list[str]:
    """Settings of a small run with nothing wrong in them."""
    words = f"--model {home}/target --source {home}/source --layers 0 2 --num_train_examples 8 --affine none"
    return f"{words} --forget.source {home}/forget.jsonl --retain.source {home}/retain.jsonl".split()


@pytest.fixture
def refused(models, tmp_path, monkeypatch, capsys):
    """refused(words): the command line ends with exit code 2 and one line, and writes nothing. Returns the line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(words: list[str]) -> str:
        before = everything(models), everything(tmp_path)
        assert main([word.format(home=models) for word in words]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("lethe: ")
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert (everything(models), everything(tmp_path)) == before
        return printed.err

    return run


@pytest.mark.parametrize("command", ["unlearn", "check"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.replace(" ", "-"))
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(models, refused, tmp_path, command, wrong):
    refused([command, *right(models), "--out", str(tmp_path / "out"), *WRONG[wrong]])


def test_the_same_words_without_the_mistake_make_a_plan(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--json", *right(models), "--per_device_train_batch_size", "2", "--out", "out"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["forward_passes"], plan["effective_batch"]) == (4, 4, 2)
    assert list(tmp_path.iterdir()) == []


FIT = "affine fit --model {home}/target --source"
OTHERS = {
    "without heavy imports": [
        "evaluate nowhere",
        "evaluate {home}/target --tasks lab_forgot",
        "tamper nowhere",
        "tamper {home}/target --forget {home}/empty.jsonl",
        "checkpoints nowhere",
        "affine fit --model nowhere --source nowhere",
        "affine score nowhere --model nowhere --source nowhere",
        "report nowhere",
        "recipes nowhere",
    ],
    "otherwise": [
        "unlern",
        "affine fitt",
        "lab destroy",
        "evaluate",
        "evaluate a b",
        "evaluate {home}/target --tasks",
        "evaluate {home}/pickled",
        "tamper",
        "tamper {home}/target --eval.tasks lab_forgot",
        "tamper {home}/target --forget.source {home}/forget.jsonl --num_train_examples 99",
        "checkpoints {home}/target",
        f"{FIT} {{home}}/wide --text {{home}}/retain.jsonl",
        f"{FIT} {{home}}/source --text {{home}}/empty.jsonl",
        "affine fit --model {home}/target",
        "affine score {home} --model {home}/target --source {home}/source",
    ],
}


@pytest.mark.parametrize("words", [words for part in OTHERS.values() for words in part])
def test_other_commands_refuse_in_the_same_way(refused, words):
    refused(words.split())


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "tamper", "affine fit"])
def test_a_folder_that_holds_a_run_is_not_written_to(models, tmp_path, refused, command):
    words = {
        "unlearn": right(models),
        "evaluate": [f"{models}/target", "--tasks", "lab_forget"],
        "tamper": [f"{models}/target", "--forget.source", f"{models}/forget.jsonl", "--num_train_examples", "8"],
        "affine fit": [*right(models)[:4], "--text", f"{models}/retain.jsonl", "--layers", "0"],
    }
    run = Run.create("unlearn", "precious", {}, tmp_path)
    assert "already holds a run" in refused([*command.split(), *words[command], "--out", str(run.path)])


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh process has imported at the end of `code`."""
    heavy = ["torch", "transformers", "lm_eval", "peft", "datasets", "accelerate", "scipy"]
    tail = f"\nimport sys, json; print('\\n' + json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_command_collects_garbage_rarely_until_a_run_begins_and_not_at_its_end():
    code = """
import gc
from lethe import cli
from lethe.runs import garbage
full = []
gc.callbacks.append(lambda phase, info: full.append(info["generation"]) if phase == "start" else None)
def main():
    import torch
    rare = gc.get_threshold()
    garbage.as_usual()
    return rare > gc.get_threshold()
cli.main = main
code = cli.console()
print(code, len(full) < 10, gc.get_freeze_count() > 100_000)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True"] * 3


RUN = """
from lethe.cli import main
for words in {words!r}:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code in {codes}, (words, code)
"""


def test_importing_lethe_imports_nothing_heavy():
    modules = "lethe, lethe.config, lethe.runs.run, lethe.models.refs, lethe.text.corpora, lethe.unlearning.check"
    assert loaded_by(f"import {modules}") == set()


def test_every_help_answers_without_heavy_imports():
    words = [["--help"], [], ["--version"], ["lab", "--help"], *[[*name.split(), "--help"] for name in COMMANDS]]
    assert loaded_by(RUN.format(words=words, codes="{0, None}")) == set()


@pytest.mark.parametrize("part", ["a recipe", "maps", "other commands"])
def test_refusals_come_without_heavy_imports(models, monkeypatch, tmp_path, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [
        ["unlearn", *right(models), *WRONG[name]]
        for name in WRONG.keys() - {"reporter"}
        if (name == "no maps") == (part == "maps")
    ]
    lines = [words.split() for words in OTHERS["without heavy imports"]] if part == "other commands" else lines
    lines = [[word.format(home=models) for word in words] for words in lines]
    assert loaded_by(RUN.format(words=lines, codes="{2}")) == set()
