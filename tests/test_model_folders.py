"""Broken and doubtful model folders, through the commands: each is refused in one line with its cause, before a run begins."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lethe.cli import main
from lethe.errors import LetheError
from lethe.files import UnreadableError, text_of
from lethe.models import refs

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa\nsize 610\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


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


# --- the ways in which a folder is changed ---------------------------------------------------------------------------


def text(file: str, content: str) -> Change:
    return lambda d: (d / file).write_text(content)


def cut(file: str, size: int) -> Change:
    return lambda d: (d / file).write_bytes((d / file).read_bytes()[:size])


def gone(*files: str) -> Change:
    return lambda d: [(d / file).unlink() for file in files]


def as_folder(file: str) -> Change:
    return lambda d: ((d / file).unlink(), (d / file).mkdir())


def as_broken_link(file: str) -> Change:
    return lambda d: ((d / file).unlink(), (d / file).symlink_to("/nowhere/at/all"))


def settings(file: str = "config.json", **more: Any) -> Change:
    return lambda d: (d / file).write_text(json.dumps(json.loads((d / file).read_text()) | more))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(d: Path) -> None:
        found = load_file(d / WEIGHTS)
        change(found)
        save_file(found, d / WEIGHTS, metadata={"format": "pt"})

    return apply


def added(**more: torch.Tensor) -> Change:
    return tensors(lambda found: found.update({name.replace("__", "."): tensor for name, tensor in more.items()}))


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Change:
    """The weights as two shards with their index, and then `change(folder, weight_map)`."""

    def apply(d: Path) -> None:
        found = load_file(d / WEIGHTS)
        (d / WEIGHTS).unlink()
        names = sorted(found)
        parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
        for file, some in parts.items():
            save_file({name: found[name] for name in some}, d / file, metadata={"format": "pt"})
        where = {name: file for file, some in parts.items() for name in some}
        write_index(d, where)
        change(d, where)

    return apply


def write_index(d: Path, where: Any) -> None:
    (d / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def adapter(d: Path) -> None:
    (d / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    save_file({"x": torch.ones(1)}, d / "adapter_model.safetensors")


def both(*changes: Change) -> Change:
    return lambda d: [change(d) for change in changes]


def tokens(special: bool) -> Change:
    def apply(d: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(d)
        tokenizer.add_tokens(["<later>"], special_tokens=special)
        tokenizer.save_pretrained(d)

    return apply


def evil(file: str = "config.json", **more: Any) -> Change:
    """`auto_map`, and the code that it names, which leaves a file `ran`."""

    def apply(d: Path) -> None:
        (d / "evil.py").write_text(f"open({str(d / 'ran')!r}, 'w')\nclass C: pass\n")
        settings(file, **more)(d)

    return apply


NO_SIZE = {"null": None, "zero": 0, "negative": -8, "text": "32", "fraction": 32.5, "list": [32], "true": True}
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
REFUSED: dict[str, tuple[Change, str]] = {
    # configuration
    "config of a pointer": (text("config.json", POINTER), "git lfs pull"),
    "config empty": (text("config.json", ""), "config.json cannot be read (it is empty)"),
    "config cut": (cut("config.json", 99), "config.json cannot be read (not JSON"),
    "config a list": (text("config.json", "[1]"), "config.json cannot be read (a JSON list"),
    "config a folder": (as_folder("config.json"), "config.json cannot be read (it is a folder)"),
    "config a broken link": (as_broken_link("config.json"), "a broken link to '/nowhere/at/all'"),
    "config with a key twice": (text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "written twice"),
    "config gone": (gone("config.json"), "has no config.json; it is not the folder of a model"),
    "gptq": (settings(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq"),
    "awq": (settings(quantization_config={"quant_method": "awq"}), "quantised (awq"),
    "bitsandbytes": (settings(quantization_config={"load_in_4bit": True}), "quantised ({'load_in_4bit': True}"),
    "activation": (settings(hidden_act="nonsense"), "hidden_act: 'nonsense' is not known"),
    "activation null": (settings(hidden_act=None), "'hidden_act' expected str"),
    "heads": (settings(num_attention_heads=5), "not a multiple of the number of attention heads (5)"),
    "no heads": (settings(num_key_value_heads=0), "num_key_value_heads is 0"),
    "rope": (settings(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), "rope_type: 'nonsense' is not known"),
    "dropout": (settings(attention_dropout="much"), "attention_dropout"),
    "padding token": (settings(pad_token_id=10**6), "Padding_idx"),
    "unknown type": (settings(model_type="nonsense"), "has model type `nonsense` but Transformers does not recognize"),
    "type a number": (settings(model_type=7), "has model type `7` but Transformers does not recognize"),
    "no type": (text("config.json", '{"hidden_size": 32}'), "Should have a `model_type` key"),
    "an encoder": (
        settings(model_type="bert", architectures=["BertForMaskedLM"]),
        "no causal language model but BertForMaskedLM",
    ),
    "a classifier": (settings(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "encoder and decoder": (settings(is_encoder_decoder=True), "an encoder with a decoder"),
    "of images": (settings(model_type="vit"), "no causal language model (model_type vit)"),
    "code": (evil(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "code of its own (auto_map: evil.C)"),
    "code of the model": (evil(model_type="vit", auto_map={"AutoModelForCausalLM": "evil.C"}), "code of its own"),
    "code of the tokenizer": (
        evil("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", None]}, tokenizer_class="Evil"),
        "code of its own (auto_map: ['evil.C', None])",
    ),
    "other weights": (settings(transformers_weights="../x.safetensors"), "transformers_weights"),
    # configuration and weights
    "fewer blocks": (
        settings(num_hidden_layers=3),
        "config.json (3 blocks) has no place for: model.layers.3.input_layernorm.weight",
    ),
    "more blocks": (settings(num_hidden_layers=5), "lacks weights that config.json (5 blocks) describes: model.layers.4."),
    "very many blocks": (settings(num_hidden_layers=10**9), "1000000000 blocks"),
    "another width": (settings(hidden_size=64), "lm_head.weight is [400, 32] in the weights and [400, 64] by config.json"),
    "another vocabulary": (settings(vocab_size=99), "[99, 32] by config.json"),
    "another architecture": (settings(model_type="gpt2"), "lacks weights"),
    "biases not described": (added(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), "self_attn.q_proj.bias"),
    "biases not there": (settings(attention_bias=True), "lacks weights"),
    "a tensor gone": (tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "no tensors": (tensors(lambda t: t.clear()), "0 tensors"),
    "whole numbers": (added(model__norm__weight=torch.ones(32).long()), "model.norm.weight is of type I64"),
    "the head gone": (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    # weights
    "weights of a pointer": (text(WEIGHTS, POINTER), "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
    "weights empty": (text(WEIGHTS, ""), "model.safetensors cannot be read (it is empty)"),
    "weights cut": (cut(WEIGHTS, 5000), "cut short or damaged"),
    "weights cut in the header": (cut(WEIGHTS, 20), "cut short or damaged"),
    "weights a broken link": (as_broken_link(WEIGHTS), "model.safetensors cannot be read (a broken link"),
    "weights a folder": (as_folder(WEIGHTS), "model.safetensors cannot be read (it is a folder)"),
    "weights gone": (gone(WEIGHTS), "has no weights"),
    "weights pickled": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "only pickled weights (pytorch_model.bin)"),
    "weights of another name": (lambda d: (d / WEIGHTS).rename(d / "x.safetensors"), "only x.safetensors"),
    "whole and in shards": (lambda d: write_index(d, {"a": "a.safetensors"}), f"{WEIGHTS} and {INDEX}"),
    "whole and distributed": (
        lambda d: shutil.copy(d / WEIGHTS, d / "shard-00000-model-00001-of-00001.safetensors"),
        "holds its weights twice",
    ),
    "a shard gone": (
        sharded(lambda d, where: (d / "b.safetensors").unlink()),
        "b.safetensors cannot be read (there is no such",
    ),
    "a shard twice": (
        sharded(lambda d, where: shutil.copy(d / "a.safetensors", d / "b.safetensors")),
        "as a.safetensors does",
    ),
    "an index of half": (
        sharded(lambda d, where: write_index(d, {name: file for name, file in where.items() if file == "a.safetensors"})),
        "lacks weights",
    ),
    "an index a list": (sharded(lambda d, where: (d / INDEX).write_text("[]")), f"{INDEX} cannot be read"),
    "an index of nothing": (sharded(lambda d, where: write_index(d, {})), "weight_map"),
    "an index that leaves the folder": (sharded(lambda d, where: write_index(d, {"a": "../a.safetensors"})), "weight_map"),
    # adapters
    "an adapter beside": (adapter, "an adapter beside them (adapter_config.json, adapter_model.safetensors)"),
    "an adapter alone": (both(adapter, gone("config.json", WEIGHTS)), "is an adapter of 'org/base', without the model itself"),
    "an adapter with a configuration": (both(adapter, gone(WEIGHTS)), "is an adapter of 'org/base', without the model itself"),
    # tokenizer
    "tokenizer empty": (text("tokenizer.json", ""), "tokenizer.json cannot be read (it is empty)"),
    "tokenizer cut": (cut("tokenizer.json", 500), "tokenizer.json cannot be read (not JSON"),
    "tokenizer a list": (text("tokenizer.json", "[1]"), "tokenizer.json cannot be read (a JSON list"),
    "tokenizer a folder": (as_folder("tokenizer.json"), "tokenizer.json cannot be read (it is a folder)"),
    "tokenizer of a pointer": (text("tokenizer.json", POINTER), "git lfs pull"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "it describes no tokenizer"),
    "tokenizer of no model": (text("tokenizer.json", '{"model": {}}'), "its tokenizer cannot be loaded"),
    "tokenizer gone": (gone("tokenizer.json"), "has no tokenizer"),
    "tokenizer settings cut": (cut("tokenizer_config.json", 9), "tokenizer_config.json cannot be read"),
    "tokenizer of a strange token": (settings("tokenizer_config.json", pad_token=5), "pad_token has to be either str"),
    "a token beyond": (tokens(False), "1 ids that the model has no embedding for, such as 400 for '<later>' (vocab_size 400)"),
    "a special token beyond": (tokens(True), "such as 400 for '<later>'"),
    "generation settings a list": (text("generation_config.json", "[]"), "generation_config.json cannot be read"),
} | {f"{key} {how}": (settings(**{key: value}), key) for key in SIZES for how, value in NO_SIZE.items()}


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
    "compare": ("compare", "{plain}", "{}", "--tasks", "lab_forget_robust", "--limit", 4),
}
KINDS = ("an adapter beside", "fewer blocks", "tokenizer cut")


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_broken_folder_before_it_begins(folder, plain, lab, capsys, command, case):
    change, cause = REFUSED[case]
    change(folder)
    Path("suite.yaml").write_text('{"attacks": {"noise": {"attack": "noise"}}}')
    words = [str(word).replace("{}", str(folder)).replace("{plain}", str(plain)) for word in COMMANDS[command]]
    assert cause in said(capsys, *words)


@pytest.mark.parametrize("command", ["unlearn", "source", "tamper", "maps", "source of maps"])
def test_weights_that_are_no_numbers_are_not_blamed_on_the_architecture(folder, plain, lab, capsys, command):
    tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(torch.nan))(folder)
    words = [str(word).replace("{}", str(folder)).replace("{plain}", str(plain)) for word in COMMANDS[command]]
    assert f"model '{folder}': its weights, or the activations that they give, are not finite" in said(capsys, *words)


def test_whole_numbers_are_refused_under_names_that_transformers_changes(make_model, tmp_path, capsys, lab):
    made = make_model("gpt_neox", tmp_path / "model")
    tensors(lambda found: found.update({"embed_out.weight": found["embed_out.weight"].char()}))(made)
    assert "embed_out.weight is of type I8" in evaluated(capsys, made)


def test_a_sweep_over_a_broken_model_does_not_begin(folder, plain, lab, capsys, tmp_path):
    settings(num_hidden_layers=3)(folder)
    recipe = {"model": str(folder), "source": str(plain), "affine": "none", "layers": [0], "max_length": 64, "max_steps": 1}
    sweep = {"unlearn": recipe | {"num_train_examples": 8}, "vary": {"lr": [0.001, 0.002]}, "kind": "grid"}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert "config.json (3 blocks) has no place for" in said(capsys, "sweep", "--config", tmp_path / "sweep.yaml")


# --- what goes on loading --------------------------------------------------------------------------------------------

KEPT: dict[str, Change] = {
    "rotary tables": added(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "masks": added(h__0__attn__bias=torch.ones(1, 1, 8, 8).bool(), h__0__attn__masked_bias=torch.tensor(-1e4)),
    "a value head": added(v_head__summary__weight=torch.ones(1, 32)),
    "further tokens": added(mtp__layers__0__weight=torch.ones(3), model__mtp__norm__weight=torch.ones(3)),
    "a block for further tokens": added(
        model__layers__4__eh_proj__weight=torch.ones(3), model__layers__4__mlp__up_proj__weight=torch.ones(3)
    ),
    "images": added(vision_tower__x__weight=torch.ones(3), multi_modal_projector__weight=torch.ones(3)),
    "shards": sharded(lambda d, where: None),
    "an index of the whole": lambda d: write_index(d, {"a": WEIGHTS}),
    "stray weights": lambda d: (d / "consolidated.safetensors").write_bytes(b"no weights"),
    "a stray adapter without settings": lambda d: (d / "adapter_model.safetensors").write_bytes(b"no weights"),
    "code that is not needed": evil(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}),
    "code for generation": lambda d: (
        (d / "custom_generate").mkdir(),
        (d / "custom_generate" / "generate.py").write_text(f"open({str(d / 'ran')!r}, 'w')"),
    ),
    "no quantisation": settings(quantization_config=None),
    "a null beside a size": settings(n_embd=None, n_positions=None),
    "tuples in place of outputs": settings(return_dict=False),
    "no architectures": settings(architectures=None),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_changes_no_number_goes_on_loading(folder, plain, case):
    KEPT[case](folder)
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
import json, os, shutil, sys
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
        refs.load(refs.resolve(f"org/{name}@main"))
        print("loaded")
    except LetheError as error:
        print(error)
"""


@pytest.mark.slow
def test_repositories_of_the_hub_are_looked_at_as_folders_are(plain, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REPOSITORIES, str(plain), str(tmp_path / "home")], capture_output=True, text=True, check=False
    )
    good, fewer, adapter, pickled = done.stdout.splitlines()
    assert good == "loaded", done.stderr
    assert "model 'org/fewer': the weights hold what config.json (3 blocks) has no place for" in fewer
    assert "model 'org/adapter' holds whole weights and an adapter beside them" in adapter
    assert "model 'org/pickled': there is no model.safetensors" in pickled


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


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step600", "global_step600", "checkpoint-600"])
def test_checkpoints_by_the_names_that_pythia_and_trainer_use(plain, tmp_path, capsys, name):
    shutil.copytree(plain, tmp_path / "all" / name)
    shutil.copytree(plain, tmp_path / "all" / "step1000")
    for given in (name, "step600", "global_step600", "checkpoint-600"):
        assert refs.resolve(f"all@{given}").path == str(Path("all", name))
    assert refs.resolve(f"all/{name}").path == str(Path("all", name))
    assert list(refs.checkpoint_folders(Path("all"))) == [name, "step1000"]
    with pytest.raises(LetheError, match=r"no config\.json, but checkpoints; name one of them: 'all@step1000'"):
        refs.resolve("all")


def test_a_name_that_could_be_two_checkpoints_is_refused(plain, tmp_path):
    for name in ("step600", "checkpoint-600"):
        shutil.copytree(plain, tmp_path / "all" / name)
    assert refs.resolve("all@step600").path == str(Path("all", "step600"))
    with pytest.raises(LetheError, match="no such checkpoint"):
        refs.resolve("all@global_step600")


def test_the_checkpoints_of_a_trainer_are_swept(plain, lab, tmp_path, capsys):
    for step in (5, 20):
        shutil.copytree(plain, tmp_path / "all" / f"checkpoint-{step}")
    words = ["checkpoints", "all", "--tasks", "lab_forget_robust", "--limit", "4", "--search", "all", "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["name"], row["step"], bool(row["evals"])) for row in rows] == [
        ("checkpoint-5", 5, True),
        ("checkpoint-20", 20, True),
    ]


def test_a_folder_with_an_at_sign_in_its_name(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "me@home")
    shutil.copytree(plain, tmp_path / "a@b" / "step5")
    assert refs.resolve("me@home").path == "me@home"
    assert refs.resolve("a@b@step5").path == str(Path("a@b", "step5"))
    with pytest.raises(LetheError, match="no such checkpoint"):
        refs.resolve("me@home@step5")


def test_a_link_to_nowhere_is_refused(tmp_path, capsys, lab):
    (tmp_path / "link").symlink_to("gone")
    assert "broken link to 'gone'" in evaluated(capsys, "link")


def test_an_adapter_in_a_run_names_its_run(folder, capsys, lab):
    both(adapter, gone("config.json", WEIGHTS))(folder)
    (folder.parent / "run.json").write_text("{}")
    assert f"name its run: '{folder.parent}'" in evaluated(capsys, folder)


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    (tmp_path / "text.jsonl").write_text(POINTER)
    with pytest.raises(UnreadableError, match="git lfs pull"):
        text_of(tmp_path / "text.jsonl")
