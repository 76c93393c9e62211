"""One way in: recipe, command line and Python make the same config object, and whatever is wrong is said in one line."""

from __future__ import annotations

import json
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


# --- the same object from everywhere ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "overrides",
    [
        {"lr": 1e-5, "layers": [1, 2], "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
        {"lora": None},
        {"name": "5"},
        {"name": "true"},
        {"name": "a: b"},
        {"name": "ü 文"},
        {"name": "a long name " * 19 + "x"},
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


@pytest.mark.parametrize("lora", [LoraSettings(r=3), None])
def test_a_runs_record_is_a_recipe_of_the_run(recipe, lora):
    """run.json's config, through JSON and YAML, makes the config again."""
    config = Transfer(source="x", forget=TextSource("a.jsonl"), lora=lora, lr=1e-5, layers=[1])
    assert made("--config", recipe(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))) == config


def test_settings_objects_are_not_shared_between_configs():
    first, second = made("--source", "x"), made("--source", "x")
    first.layers.append(99)
    first.eval.tasks.append("y")
    assert 99 not in second.layers
    assert "y" not in made("--source", "x").eval.tasks


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--retian_coef", "3"], "did you mean 'retain_coef'"),
        (["--retian_coef=3"], "did you mean 'retain_coef'"),
        (["--remove", "3"], "there is no setting '--remove'"),
        (["--lora.rank", "8"], "did you mean 'lora.r'"),
        (["--eval.evry", "8"], "did you mean 'eval.every'"),
        (["--every", "8"], "did you mean 'eval.every'"),
        (["--forget.colum", "x"], "did you mean 'forget.column'"),
        (["-lr", "3"], "there is no setting '-lr'"),
        (["stray"], "stray"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(words, expected):
    assert expected in refusal("--source", "x", *words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("retian_coef: 3", "did you mean 'retain_coef'"),
        ("lora: {rank: 3}", "did you mean 'lora.r'"),
        ("lora:\n  alhpa: 3", "did you mean 'lora.alpha'"),
        ("eval: {task: [a]}", "did you mean 'eval.tasks'"),
        ("forget: {source: a.jsonl, colum: t}", "did you mean 'forget.column'"),
        ("retain: [{source: a.jsonl, wieght: 2}]", "weight"),
        ("config: other.yaml", "unknown field 'config'"),
        ("1: 2", "unknown field '1'"),
    ],
)
def test_an_unknown_field_of_a_recipe_is_answered_with_the_nearest(recipe, text, expected):
    assert expected in refusal("--config", recipe(f"source: x\n{text}\n"))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lr: fast", "lr: expected a number"),
        ("lr: [1]", "lr: expected a number"),
        ("lr: null", "lr"),
        ("epochs: true", "epochs: expected a number"),
        ("epochs: null", "epochs"),
        ("seed: 1.5", "seed: expected a whole number"),
        ("seed: one", "seed: expected a whole number"),
        ("name: 5", "name: expected text"),
        ("name: [a]", "name: expected text"),
        ("out: null", "out"),
        ("layers: 3", "layers: expected a list"),
        ("layers: [0, a]", "layers: expected a list"),
        ("layers: [0.5]", "layers: expected a list"),
        ("layers: null", "layers"),
        ("schedule: ramps", "schedule: expected one of ramp, constant"),
        ("dtype: fp16", "dtype: expected one of float32, bfloat16"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: expected true or false"),
        ("lora: 8", "lora: expected settings r, alpha"),
        ("lora: true", "lora: expected settings r, alpha"),
        ("lora: {r: eight}", "lora.r: expected a whole number"),
        ("eval: 3", "eval"),
        ("eval: null", "eval"),
        ("eval: {tasks: lab_forget}", "eval.tasks: expected a list"),
        ("eval: {every: often}", "eval.every: expected a whole number"),
        ("forget: 5", "forget: expected text"),
        ("forget: {column: t}", "forget"),
        ("forget: {source: a.jsonl, column: 3}", "forget.column: expected text"),
        ("retain: []", "retain"),
    ],
)
def test_an_ill_typed_field_is_named_with_what_it_should_be(recipe, text, field):
    message = refusal("--config", recipe(f"source: x\n{text}\n"))
    assert message.startswith(field)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--lr", "fast"], "lr: expected a number, got fast"),
        (["--lr"], "lr"),
        (["--seed", "1.5"], "seed: expected a whole number, got 1.5"),
        (["--layers", "a"], "layers: expected a list"),
        (["--layers", "0", "1.5"], "layers: expected a list"),
        (["--schedule", "ramps"], "schedule: expected one of ramp, constant, got ramps"),
        (["--lora", "8"], "lora: expected settings"),
        (["--lora.r", "eight"], "lora.r: expected a whole number"),
        (["--eval.limit", "x"], "eval.limit: expected a whole number"),
    ],
)
def test_an_ill_typed_word_is_named_with_what_it_should_be(words, field):
    assert field in refusal("--source", "x", *words)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--lr", "0"], "lr: must be above 0"),
        (["--lr", "-1"], "lr: must be above 0"),
        (["--epochs", "0"], "epochs: must be above 0"),
        (["--max_steps", "0"], "max_steps: must be at least 1, or -1"),
        (["--max_steps", "-2"], "max_steps: must be at least 1, or -1"),
        (["--max_length", "1"], "max_length: must be at least 2"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: must be at least 1"),
        (["--weight_decay", "-1"], "weight_decay: must be at least 0"),
        (["--max_grad_norm", "-1"], "max_grad_norm: must be at least 0"),
        (["--seed", "-1"], "seed: must be at least 0"),
        (["--num_train_examples", "-1"], "num_train_examples: must be at least 0"),
        (["--remove_coef", "-1"], "remove_coef: must be at least 0"),
        (["--retain_coef", "-1"], "retain_coef: must be at least 0"),
        (["--remove_coef", "0", "--retain_coef", "0"], "both 0"),
        (["--layers", "-1"], "layers: -1 is negative"),
        (["--layers", "1", "1"], "names a layer twice"),
        (["--layers"], "layers: name at least one"),
        (["--lora.r", "0"], "lora.r: must be at least 1"),
        (["--lora.alpha", "0"], "lora.alpha: must be above 0"),
        (["--lora.dropout", "1"], "lora.dropout: must be at least 0 and below 1"),
        (["--eval.every", "-1"], "eval.every: must be at least 0"),
        (["--eval.limit", "-1"], "eval.limit: must be at least 0"),
        (["--source", ""], "source: name the ignorant checkpoint"),
    ],
)
def test_a_value_out_of_range_is_refused(recipe, words, field):
    message = refusal("--source", "x", *words)
    assert message.startswith(field) or field in message


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("forget_kl_coef: 2", "forget_kl_coef"),
        ("forget_loss: both\nforget_kl_coef: 0", "forget_kl_coef"),
        ("forget_loss: distill\naffine: maps", "affine"),
        ("affine_convention: hidden_states", "affine_convention"),
        ("forget_loss: distill\nlora: null\nlayers: [1]", "layers"),
        ("lora: null\nmerge: true", "merge"),
        ("retain_coef: 0\nretain_loss: ce", "retain_loss"),
        ("remove_coef: 0\nforget_loss: distill", "forget_loss"),
        ("max_steps: 3\nepochs: 2", "epochs"),
        ("newton_schulz_dtype: float32", "newton_schulz_dtype"),
        ("forget: {source: a.jsonl, column: a, template: '{b}'}", "column"),
        ("forget: {source: a.jsonl, split: test}", "split"),
        ("forget: {source: a.jsonl, weight: 2}", "forget.weight"),
        ("retain: {source: a.jsonl, weight: 2}", "retain.weight"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(recipe, text, setting):
    assert refusal("--config", recipe(f"source: x\n{text}\n")).startswith(f"{setting}: ")


@pytest.mark.parametrize("text", ["lora: {r: 0}", "forget: {source: a, weight: 0}", "retain: [{source: a, weight: -1}]"])
def test_a_nested_value_out_of_range_in_a_recipe_is_refused(recipe, text):
    assert "must be" in refusal("--config", recipe(f"source: x\n{text}\n"))


@pytest.mark.parametrize("field", ["lr", "retain_coef", "remove_coef", "epochs", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_a_number_that_is_not_finite_is_refused(recipe, field, value):
    assert field in refusal("--config", recipe(f"source: x\n{field}: {value}\n"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no settings"),
        ("- a\n- b\n", "holds no settings"),
        ("just words", "holds no settings"),
        ("lr: [", "not YAML"),
        ("\tlr: 3", "not YAML"),
        ("lr: 1\nlr: 2\nsource: x", "lr"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(recipe, content, expected):
    assert expected in refusal("--config", recipe(content))


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


@pytest.mark.parametrize(
    "words",
    [
        ["--forget", '{"source": "a", "source": "b"}'],
        ["--retain", '[{"source": "a", "weight": 1, "weight": 2}]'],
        ["--eval.task_data", "a=b", "a=c"],
        ["--eval.suites", '{"a": ["b"], "a": ["c"]}'],
        ["--lora={r: 1, r: 2}"],
    ],
)
def test_a_key_written_twice_on_the_command_line_is_refused(words):
    assert "is written twice" in refusal("--source", "x", *words)


def test_a_long_value_leaves_the_advice_readable():
    message = refusal("--source", "x", "--lr", "9" * 8000 + "x")
    assert message.startswith("lr: expected a number, got 999") and len(message) < 150


def test_loggers_are_those_that_transformers_has():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from lethe.training.check import REPORTERS

    assert REPORTERS.keys() == INTEGRATION_TO_CALLBACK.keys() - {"kubeflow"}  # which is a cluster's own


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    assert "nowhere.yaml" in refusal("--config", str(tmp_path / "nowhere.yaml"))
    assert "config" in refusal("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "latin.yaml" in refusal("--config", str(tmp_path / "latin.yaml"))
    assert "config" in refusal("--config")


def test_a_required_setting_is_named():
    assert "model" in refusal(kind=c.EvaluateConfig)
    assert "source" in refusal(kind=Transfer)
    assert "model" in refusal(kind=TamperConfig)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Transfer(source="x", lr="fast"),
        lambda: Transfer(source="x", layers="012"),
        lambda: Transfer(source="x", layers=["a"]),
        lambda: Transfer(source="x", epochs=None),
        lambda: Transfer(source="x", lora={"r": 8}),
    ],
    ids=["lr", "layers", "layer", "epochs", "lora"],
)
def test_python_refuses_ill_typed_settings_too(make):
    """Python builds the same object, so it makes the same promises."""
    with pytest.raises(LetheError):
        make()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_setting_and_an_example(capsys, name):
    command = COMMANDS[name]
    with pytest.raises(SystemExit):
        parse(name, command.config, ["--help"], command.example, command.positional)
    text = " ".join(capsys.readouterr().out.split())
    assert command.example in text
    for field in command.config.__dataclass_fields__:
        assert f"--{field}" in text
    if name == "unlearn":
        assert "retain_coef rises from 0" in text
        assert "scaled by alpha / r" in text or "--lora.r" in text


# --- the command line ------------------------------------------------------------------------------------------------


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
    "ill-typed": ["--lr", "fast"],
    "out of range": ["--lr", "0"],
    "nested out of range": ["--lora.r", "0"],
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


@pytest.mark.parametrize("command", ["unlearn", "check"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.replace(" ", "-"))
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(models, tmp_path, monkeypatch, capsys, command, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [
        command,
        "--model",
        f"{models}/target",
        "--source",
        f"{models}/source",
        "--layers",
        "0",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--forget.source", f"{models}/forget.jsonl", "--retain.source", f"{models}/retain.jsonl"]
    words += ["--num_train_examples", "8", "--affine", "none"]
    before = everything(models)
    code = main(words + [word.format(home=models) for word in WRONG[wrong]])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("lethe: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert everything(models) == before
    assert list(tmp_path.iterdir()) == []


def test_the_same_words_without_the_mistake_make_a_plan(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["check", "--json", "--model", f"{models}/target", "--source", f"{models}/source", "--layers", "0", "2"]
    words += ["--forget.source", f"{models}/forget.jsonl", "--retain.source", f"{models}/retain.jsonl"]
    words += [
        "--num_train_examples",
        "8",
        "--affine",
        "none",
        "--per_device_train_batch_size",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["forward_passes"], plan["effective_batch"]) == (4, 4, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["unlern"],
        ["affine", "fitt"],
        ["lab", "destroy"],
        ["evaluate"],
        ["evaluate", "a", "b"],
        ["evaluate", "nowhere"],
        ["evaluate", "{home}/target", "--tasks", "lab_forgot"],
        ["evaluate", "{home}/target", "--tasks"],
        ["evaluate", "{home}/pickled"],
        ["tamper"],
        ["tamper", "{home}/target", "--eval.tasks", "lab_forgot"],
        ["tamper", "{home}/target", "--forget", "{home}/empty.jsonl"],
        ["tamper", "{home}/target", "--forget.source", "{home}/forget.jsonl", "--num_train_examples", "99"],
        ["checkpoints", "{home}/target"],
        ["checkpoints", "nowhere"],
        ["affine", "fit", "--model", "{home}/target", "--source", "{home}/wide", "--text", "{home}/retain.jsonl"],
        ["affine", "fit", "--model", "{home}/target", "--source", "{home}/source", "--text", "{home}/empty.jsonl"],
        ["affine", "fit", "--model", "{home}/target"],
        ["affine", "score", "{home}", "--model", "{home}/target", "--source", "{home}/source"],
        ["report", "nowhere"],
    ],
    ids=" ".join,
)
def test_other_commands_refuse_in_the_same_way(models, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = everything(models)
    assert main([word.format(home=models) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lethe: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert everything(models) == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_written_to(models, tmp_path, capsys):
    from lethe.runs.run import Run

    run = Run.create("unlearn", "precious", {}, tmp_path)
    before = everything(tmp_path)
    words = ["--out", str(run.path)]
    text = ["--forget.source", f"{models}/forget.jsonl", "--num_train_examples", "8"]
    pair = ["--model", f"{models}/target", "--source", f"{models}/source"]
    for command in (
        ["unlearn", *pair, *text, "--retain.source", f"{models}/retain.jsonl", "--layers", "0", *words],
        ["evaluate", f"{models}/target", "--tasks", "lab_forget", *words],
        ["tamper", f"{models}/target", *text, *words],
        ["affine", "fit", *pair, "--text", f"{models}/retain.jsonl", "--layers", "0", *words],
    ):
        assert main(command) == 2
        assert "already holds a run" in capsys.readouterr().err
    assert everything(tmp_path) == before


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh process has imported at the end of `code`."""
    heavy = ["torch", "transformers", "lm_eval", "peft", "datasets", "accelerate", "scipy"]
    tail = f"\nimport sys, json; print('\\n' + json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


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
    assert (
        loaded_by("import lethe, lethe.config, lethe.runs.run, lethe.models.refs, lethe.text.corpora, lethe.unlearning.check")
        == set()
    )


def test_every_help_answers_without_heavy_imports():
    words = [["--help"], [], ["--version"], ["lab", "--help"], *[[*name.split(), "--help"] for name in COMMANDS]]
    assert loaded_by(RUN.format(words=words, codes="{0, None}")) == set()


@pytest.mark.parametrize("names", [[name for name in WRONG if name != "no maps"], ["no maps"]], ids=["all", "maps"])
def test_refusals_of_a_recipe_come_without_heavy_imports(models, monkeypatch, tmp_path, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["unlearn", "--model", f"{models}/target", "--source", f"{models}/source", "--layers", "0", "2"]
    words += ["--forget.source", f"{models}/forget.jsonl", "--retain.source", f"{models}/retain.jsonl"]
    words += ["--num_train_examples", "8", "--affine", "none"]
    lines = [words + [word.format(home=models) for word in WRONG[name]] for name in names]
    assert loaded_by(RUN.format(words=lines, codes="{2}")) == set()


def test_refusals_of_other_commands_come_without_heavy_imports(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [
        ["evaluate", "nowhere"],
        ["evaluate", f"{models}/target", "--tasks", "lab_forgot"],
        ["tamper", "nowhere"],
        ["tamper", f"{models}/target", "--forget", f"{models}/empty.jsonl"],
    ]
    assert loaded_by(RUN.format(words=words, codes="{2}")) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoints", "nowhere"],
        ["affine", "fit", "--model", "nowhere", "--source", "nowhere"],
        ["affine", "score", "nowhere", "--model", "nowhere", "--source", "nowhere"],
        ["report", "nowhere"],
    ],
    ids=lambda w: " ".join(w[:2]),
)
def test_refusals_of_each_command_come_without_heavy_imports(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert loaded_by(RUN.format(words=[words], codes="{2}")) == set()
