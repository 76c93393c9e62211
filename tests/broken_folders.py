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
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings") * 2
REFUSED: dict[str, tuple[Change, str]] = {
    # configuration
    "config of a pointer": (text("config.json", POINTER), "git lfs pull"),
    "config cut": (cut("config.json", 99), "config.json cannot be read (not JSON"),
    "config a list": (text("config.json", "[1]"), "config.json cannot be read (a JSON list"),
    "config a folder": (as_folder("config.json"), "config.json cannot be read (Is a directory)"),
    "config a broken link": (as_broken_link("config.json"), "a broken link to '/nowhere/at/all'"),
    "config with a key twice": (text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "written twice"),
    "config gone": (gone("config.json"), "has no config.json, so it is not the folder of a model"),
    "gptq": (settings(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq"),
    "bitsandbytes": (settings(quantization_config={"load_in_4bit": True}), "quantised ({'load_in_4bit': True}"),
    "more experts a token than there are": (
        settings(num_local_experts=2, num_experts_per_tok=9),
        "num_experts_per_tok is 9 in config.json, of 2 experts",
    ),
    "activation": (settings(hidden_act="nonsense"), "no model can be built from config.json (KeyError: 'nonsense')"),
    "heads": (settings(num_attention_heads=5), "not a multiple of the number of attention heads (5)"),
    "no heads": (settings(num_key_value_heads=0), "no model can be built from config.json (ZeroDivisionError"),
    "dropout": (settings(attention_dropout="much"), "attention_dropout"),
    "unknown type": (settings(model_type="nonsense"), "has model type `nonsense` but Transformers does not recognize"),
    "an encoder": (
        settings(model_type="bert", architectures=["BertForMaskedLM"]),
        "no causal language model but BertForMaskedLM",
    ),
    "encoder and decoder": (settings(is_encoder_decoder=True), "an encoder with a decoder"),
    "of images": (settings(model_type="vit"), "Unrecognized configuration class"),
    "code": (evil(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "code of its own (auto_map)"),
    "code of the model": (evil(model_type="vit", auto_map={"AutoModelForCausalLM": "evil.C"}), "code of its own"),
    "code of the tokenizer": (
        evil("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", None]}, tokenizer_class="Evil"),
        "code of its own (auto_map)",
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
    "another architecture": (settings(model_type="gpt2"), "lacks weights"),
    "biases not described": (added(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), "self_attn.q_proj.bias"),
    "no tensors": (tensors(lambda t: t.clear()), "0 tensors"),
    "whole numbers": (added(model__norm__weight=torch.ones(32).long()), "model.norm.weight is of type I64"),
    "the head gone": (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    # weights
    "weights of a pointer": (text(WEIGHTS, POINTER), "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
    "weights empty": (text(WEIGHTS, ""), "cut short or damaged"),
    "weights cut": (cut(WEIGHTS, 5000), "cut short or damaged"),
    "weights a broken link": (as_broken_link(WEIGHTS), "model.safetensors cannot be read (No such file"),
    "weights gone": (gone(WEIGHTS), f"has no {WEIGHTS} and no {INDEX}; Lethe reads no pickles"),
    "weights pickled": (lambda d: (d / WEIGHTS).rename(d / "model.pt"), "only model.pt; Lethe reads no pickles"),
    "weights of another name": (lambda d: (d / WEIGHTS).rename(d / "x.safetensors"), "only x.safetensors"),
    "whole and distributed": (
        lambda d: shutil.copy(d / WEIGHTS, d / "shard-00000-model-00001-of-00001.safetensors"),
        "so it is ambiguous",
    ),
    "a shard gone": (sharded(lambda d, where: (d / "b.safetensors").unlink()), "b.safetensors cannot be read (No such file"),
    "a shard twice": (
        sharded(lambda d, where: shutil.copy(d / "a.safetensors", d / "b.safetensors")),
        "is in another shard too",
    ),
    "an index of half": (
        sharded(lambda d, where: write_index(d, {name: file for name, file in where.items() if file == "a.safetensors"})),
        "lacks weights",
    ),
    "an index a list": (sharded(lambda d, where: (d / INDEX).write_text("[]")), f"{INDEX} cannot be read"),
    "an index of nothing": (sharded(lambda d, where: write_index(d, {})), "weight_map"),
    "an index that leaves the folder": (sharded(lambda d, where: write_index(d, {"a": "../a.safetensors"})), "weight_map"),
    # adapters
    "an adapter beside": (adapter, "holds model.safetensors and adapter_config.json, so it is ambiguous"),
    "an adapter alone": (both(adapter, gone("config.json", WEIGHTS)), "is an adapter of 'org/base', without the model itself"),
    "an adapter with a configuration": (both(adapter, gone(WEIGHTS)), "is an adapter of 'org/base', without the model itself"),
    # tokenizer
    "tokenizer cut": (cut("tokenizer.json", 500), "tokenizer.json cannot be read (not JSON"),
    "tokenizer of a pointer": (text("tokenizer.json", POINTER), "git lfs pull"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "tokenizer gone": (gone("tokenizer.json"), "its tokenizer cannot be loaded"),
    "tokenizer settings cut": (cut("tokenizer_config.json", 9), "its tokenizer cannot be loaded"),
    "a token beyond": (tokens(False), "1 ids that the model has no embedding for, such as 400 for '<later>' (vocab_size 400)"),
    "a special token beyond": (tokens(True), "such as 400 for '<later>'"),
    "generation settings a list": (text("generation_config.json", "[]"), "it cannot be loaded"),
} | {f"{key} {how}": (settings(**{key: value}), key) for (how, value), key in zip(NO_SIZE.items(), SIZES, strict=False)}

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
    "an index beside the whole": lambda d: write_index(d, {"a": "a.safetensors"}),
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
