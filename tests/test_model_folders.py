"""Broken and doubtful model folders, through the commands: each is refused in one line with its cause, before a run begins."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import LOADED, REFUSED, WEIGHTS, adapter, both, gone, sharded, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lethe.cli import main
from lethe.errors import LetheError
from lethe.models import refs


@pytest.fixture(scope="module")
def plain(make_model, tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models") / "plain", seed=1)


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def said(capsys, *words: str | Path) -> str:
    """What a command that must be refused says, after making sure that it says it in one line and leaves nothing behind."""
    out = Path.cwd() / "runs"
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert not out.exists() or not list(out.iterdir())
    return captured.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()  # as the command line does
    yield
    logging.enable_progress_bar()


def evaluated(capsys, model: Any) -> str:
    return said(capsys, "evaluate", model, "--tasks", "lab_forget_robust", "--limit", "4")


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_folder_is_refused_with_its_cause(folder, lab, capsys, monkeypatch, case):
    change, cause = REFUSED[case]
    change(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # who answers yes to "run custom code?"
    message = evaluated(capsys, folder)
    assert cause in message
    assert str(folder) in message and "save it again" not in message.replace("save it again: tokenizer", "")
    assert not (folder / "ran").exists()


RUN = ("--max_length", 64, "--num_train_examples", 8, "--max_steps", 1)
COMMANDS = {
    "unlearn": ("unlearn", "--model", "{}", "--source", "{plain}", "--affine", "none", "--layers", "[0]", *RUN),
    "check": ("check", "--model", "{}", "--source", "{plain}", "--affine", "none", "--layers", "[0]", *RUN),
    "source": ("unlearn", "--model", "{plain}", "--source", "{}", "--affine", "none", "--layers", "[0]", *RUN),
    "tamper": ("tamper", "{}", *RUN),
    "tamper with noise": ("tamper", "{}", "--attack", "noise"),
    "suite": ("tamper", "{}", "--suite", "suite.yaml"),
    "maps": ("affine", "fit", "--model", "{}", "--source", "{plain}", "--layers", "[0]", "--max_length", 64),
    "source of maps": ("affine", "fit", "--model", "{plain}", "--source", "{}", "--layers", "[0]", "--max_length", 64),
    "sweep": ("sweep", "--config", "sweep.yaml"),
    "compare": ("compare", "{plain}", "{}", "--tasks", "lab_forget_robust", "--limit", 4),
}
KINDS = {"fewer blocks": REFUSED["fewer blocks"]} | {
    "not finite": (
        tensors(lambda found: found["model.layers.0.mlp.up_proj.weight"][3, 4].fill_(torch.nan)),
        "its weights or activations are not finite numbers",
    )
}
READING = ("unlearn", "source", "tamper", "maps", "source of maps")
"""Commands that read the weights before they begin."""


@pytest.mark.parametrize(
    ("command", "case"), [(command, "fewer blocks") for command in COMMANDS] + [(command, "not finite") for command in READING]
)
def test_every_command_refuses_a_broken_folder_before_it_begins(folder, plain, lab, capsys, command, case):
    change, cause = KINDS[case]
    change(folder)
    Path("suite.yaml").write_text('{"attacks": {"noise": {"attack": "noise"}}}')
    trial = {"model": str(folder), "source": str(plain), "affine": "none", "layers": [0], "max_length": 64, "max_steps": 1}
    sweep = {"unlearn": trial | {"num_train_examples": 8}, "vary": {"lr": [0.001, 0.002]}, "kind": "grid"}
    Path("sweep.yaml").write_text(json.dumps(sweep))
    words = [str(word).replace("{}", str(folder)).replace("{plain}", str(plain)) for word in COMMANDS[command]]
    assert cause in said(capsys, *words)


def test_whole_numbers_are_refused_under_names_that_transformers_changes(make_model, tmp_path, capsys, lab):
    made = make_model("gpt_neox", tmp_path / "model")
    tensors(lambda found: found.update({"embed_out.weight": found["embed_out.weight"].char()}))(made)
    assert "embed_out.weight is of type I8" in evaluated(capsys, made)


# --- what goes on loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOADED)
def test_what_changes_no_number_goes_on_loading(folder, plain, case):
    LOADED[case](folder)
    model, _ = refs.load(refs.resolve(str(folder)))
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(plain).eval()(ids).logits)
    assert not (folder / "ran").exists()


def test_a_padded_embedding_and_a_token_for_images_are_fine(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    for vocabulary in (448, len(tokenizer) - 1):
        made = make_model("llama", tmp_path / str(vocabulary), tokenizer=tokenizer, vocab_size=vocabulary)
        refs.load(refs.resolve(str(made)))


def test_a_padding_token_without_an_embedding_is_not_used(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    made = make_model("llama", tmp_path, tokenizer=tokenizer, vocab_size=size, pad_token_id=None)
    assert refs.tokenizer(refs.resolve(str(made))).pad_token == "</s>"


def test_the_hash_is_of_the_files_that_are_loaded(folder, plain):
    (folder / "consolidated.safetensors").write_bytes(b"no weights")
    assert refs.weight_hash(refs.resolve(str(folder))) == refs.weight_hash(refs.resolve(str(plain)))
    sharded(lambda d, where: (d / "c.safetensors").write_bytes(b"no weights"))(folder)
    before = refs.weight_hash(refs.resolve(str(folder)))
    (folder / "c.safetensors").unlink()
    assert refs.weight_hash(refs.resolve(str(folder))) == before


REPOSITORIES = """
import dataclasses, json, os, shutil, sys
from pathlib import Path

plain, home = map(Path, sys.argv[1:])
os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def repository(name, change):
    folder = home / "hub" / f"models--org--{name}"
    shutil.copytree(plain, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    change(folder / "snapshots" / ("a" * 40))


def fewer(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))


repository("good", lambda folder: None)
repository("fewer", fewer)
repository("adapter", lambda folder: (folder / "adapter_config.json").write_text("{}"))
repository("pickled", lambda folder: (folder / "model.safetensors").unlink())
from lethe.models import refs
from lethe.errors import LetheError

for name in ("good", "fewer", "adapter", "pickled"):
    try:
        refs.verify(refs.resolve(f"org/{name}"))
        model, tokenizer = refs.load(refs.resolve(f"org/{name}@main"))
        print(model.name_or_path, tokenizer.name_or_path, refs.weight_hash(refs.resolve(f"org/{name}"))[:11])
    except LetheError as error:
        print(error)
good = refs.resolve("org/good")
hashes = {refs.weight_hash(good)}
for name in ("one", "two"):
    (home / name).mkdir()
    (home / name / "adapter_model.safetensors").write_text(name)
    hashes.add(refs.weight_hash(dataclasses.replace(good, adapter=str(home / name))))
print(len(hashes))
"""


@pytest.mark.slow
def test_repositories_of_the_hub_are_looked_at_as_folders_are(plain, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REPOSITORIES, str(plain), str(tmp_path / "home")], capture_output=True, text=True, check=False
    )
    good, fewer, adapter, pickled, hashes = done.stdout.splitlines()
    assert good == "org/good org/good commit:aaaa", done.stderr
    assert "model 'org/fewer': the weights hold tensors that config.json (3 blocks) does not describe" in fewer
    assert "model 'org/adapter' holds model.safetensors and adapter_config.json" in adapter
    assert "model 'org/pickled' has no model.safetensors and no" in pickled
    assert hashes == "3"  # an adapter counts


# --- tokens that begin and end a text --------------------------------------------------------------------------------


@pytest.fixture
def endless(folder) -> Path:
    """A model whose tokenizer has no BOS, EOS or padding token."""
    (folder / "tokenizer_config.json").unlink()
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.bos_token, found.eos_token, found.pad_token) == (None, None, None)
    return folder


def test_a_model_without_bos_and_eos_is_evaluated_as_with_them(endless, plain, lab, capsys):
    results = []
    for model in (endless, plain):
        assert main(["evaluate", str(model), "--tasks", "lab_forget_robust", "--limit", "20", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["evals"]["lab_forget_robust"])
    assert results[0]["acc"] == results[1]["acc"] and results[0]["answers"] == results[1]["answers"]


def test_a_model_without_bos_and_eos_is_trained_and_refused_where_it_needs_one(endless, plain, lab, capsys, make_model):
    make_model("llama", Path("source"), seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("source", name).unlink()
    shutil.copy(endless / "tokenizer.json", "source")
    words = ["unlearn", "--model", str(endless), "--source", "source", *COMMANDS["unlearn"][5:], "--eval.limit", "4"]
    blocks = said(capsys, *words, "--packing", "packed")
    assert "end-of-text token; use packing none" in blocks
    assert main([str(word) for word in words]) == 0


def test_a_question_without_a_context_needs_a_first_token(endless):
    from lethe.evaluation.accuracy import Scorer

    scorer = Scorer(*refs.load(refs.resolve(str(endless))))
    with pytest.raises(LetheError, match="no BOS and no EOS token"):
        scorer.encode([("", "the river")])


@pytest.mark.parametrize("command", [("evaluate",), ("tamper", *RUN), ("tamper", "--attack", "noise")])
def test_answers_beyond_the_window_are_refused_before_a_run_begins(plain, lab, capsys, tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["river " * 99, "sea"]}) + "\n")
    task = {"task": "long", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": 1}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "long.yaml").write_text(
        json.dumps(task | {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]})
    )
    option = "--tasks" if command == ("evaluate",) else "--eval.tasks"
    assert "1 to 64 can be scored" in said(capsys, command[0], plain, *map(str, command[1:]), option, tmp_path / "tasks")


def test_a_link_to_nowhere_is_refused(tmp_path, capsys, lab):
    (tmp_path / "link").symlink_to("gone")
    assert "broken link to 'gone'" in evaluated(capsys, "link")


def test_an_adapter_in_a_run_names_its_run(folder, capsys, lab):
    both(adapter, gone("config.json", WEIGHTS))(folder)
    (folder.parent / "run.json").write_text("{}")
    assert f"name its run: '{folder.parent}'" in evaluated(capsys, folder)
