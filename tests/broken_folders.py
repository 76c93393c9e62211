"""Broken and doubtful folders of a model: by name, how a good folder is changed and what the refusal says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa\nsize 610\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


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
        "config.json (3 blocks) does not describe: model.layers.3.input_layernorm.weight",
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
    **{
        f"weights pickled in {name}": (lambda d, name=name: (d / WEIGHTS).rename(d / name), f"only pickled weights ({name})")
        for name in ("pytorch_model.bin", "model.pt", "weights.pth")
    },
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

LOADED: dict[str, Change] = {
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
    "a pickle beside the weights": lambda d: (d / "pytorch_model.bin").write_bytes(b"not a pickle"),
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
"""Changes that alter no number: the folder still loads."""
