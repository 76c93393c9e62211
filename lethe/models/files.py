"""The files of a model's folder: what is missing, damaged or ambiguous there. Reads no weights and imports no torch.

`refuse_config` checks the settings in config.json, `refuse_weights` the safetensors files and the files beside them, and
`refuse_tokenizer` the tokenizer's files. `weight_files` are the files that transformers would load, `shapes` their tensors.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lethe.errors import LetheError, printable
from lethe.files import LFS_POINTER, UnreadableError, is_lfs_pointer, json_of, text_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
"""JSON files that transformers reads if they exist."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
WINDOW_KEYS = ("max_position_embeddings", "n_positions")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
PART_KEYS = ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_experts_per_tok", *EXPERT_KEYS)
"""Sizes that may be lists with one number for each block."""
SAVE = "save it as safetensors: model.save_pretrained(FOLDER)"
OTHER_HEADS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining")


def unreadable(name: str, file: str, why: object) -> LetheError:
    """The error for an unreadable file of the model `name`."""
    return LetheError(f"model '{name}': {file} cannot be read ({why}){advice(why)}")


def advice(why: object) -> str:
    """What to do about an unreadable file, unless the reason says it."""
    return "" if LFS_POINTER in str(why) else "; copy or download it again"


def require_content(file: Path) -> None:
    """Refuse a file that is missing, a broken link, a folder, empty, or a pointer of Git LFS."""
    if file.is_symlink() and not file.exists():
        raise UnreadableError(f"a broken link to '{file.readlink()}'")
    if not file.exists():
        raise UnreadableError("there is no such file")
    if not file.is_file():
        raise UnreadableError("it is a folder")
    try:
        if not file.stat().st_size:
            raise UnreadableError("it is empty")
        if is_lfs_pointer(file):
            raise UnreadableError(LFS_POINTER)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error


def part(name: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model `name`.

    Raises:
        LetheError: the file has none, or describes no tokenizer though it is tokenizer.json.
    """
    try:
        require_content(path)
        found = json_of(text_of(path))
        if not isinstance(found, dict):
            raise UnreadableError(f"a JSON {type(found).__name__} where an object was expected")
        if path.name == "tokenizer.json" and not isinstance(found.get("model"), dict):
            raise UnreadableError("it describes no tokenizer")
    except UnreadableError as error:
        raise unreadable(name, path.name, error) from error
    return found


def refuse_config(name: str, config: dict[str, Any]) -> None:
    """Refuse a model that Lethe does not support, by its config.json."""
    settings = text_settings(config)
    if quantised := settings.get("quantization_config") or config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        how = printable(method or quantised, 80)
        raise LetheError(f"model '{name}': its weights are quantised ({how}) and cannot be trained; use the original model")
    listed = config.get("architectures")
    heads = [str(head) for head in listed] if isinstance(listed, list) else []
    both = config.get("is_encoder_decoder") is True
    if both or (heads and all(head.endswith(OTHER_HEADS) for head in heads)):
        what = "an encoder with a decoder" if both else printable(heads[0], 80)
        raise LetheError(f"model '{name}' is no causal language model but {what} (config.json); give another")
    if config.get("transformers_weights") is not None:
        todo = f"rename the file of its weights to {WEIGHTS} and remove the setting"
        raise LetheError(f"model '{name}': config.json has transformers_weights, which Lethe does not follow; {todo}")
    for key in (*WIDTH_KEYS, *DEPTH_KEYS, "vocab_size", *WINDOW_KEYS, *PART_KEYS):
        if settings.get(key) is not None and not (key in PART_KEYS and isinstance(settings[key], list)):
            whole(name, settings, key)
    experts = next((settings[key] for key in EXPERT_KEYS if type(settings.get(key)) is int), None)
    used = settings.get("num_experts_per_tok")
    if experts is not None and type(used) is int and used > experts:
        wrong = f"num_experts_per_tok is {used} in config.json, of {experts} experts"
        raise LetheError(f"model '{name}': {wrong}; take the model's own config.json")


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model: `text_config` if the configuration has parts for other kinds of input."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def whole(name: str, settings: dict[str, Any], key: str) -> int:
    """A size in config.json.

    Raises:
        LetheError: it is not a whole number above 0.
    """
    value = settings[key]
    if type(value) is not int or value < 1:
        shown = printable("null" if value is None else repr(value), 60)
        wrong = f"{key} is {shown} in config.json, not a whole number above 0"
        raise LetheError(f"model '{name}': {wrong}; take the model's own config.json")
    return value


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files that transformers would load, in order of name: model.safetensors, or the shards that the index lists.

    Raises:
        LetheError: the index does not list files of this folder.
    """
    if os.path.lexists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    return [folder / shard for shard in sorted(shards(name, folder / INDEX))] if (folder / INDEX).exists() else []


def shards(name: str, index: Path) -> set[str]:
    """The names of the files that an index of weights lists.

    Raises:
        LetheError: the index cannot be read, or does not list files of its own folder.
    """
    found = part(name, index)
    listed = found.get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) and all(isinstance(x, str) for x in listed.values()) else set()
    if not isinstance(found.get("metadata"), dict):
        raise unreadable(name, INDEX, "it has no metadata, which transformers expects")
    if not names or any(Path(shard).name != shard for shard in names):
        raise unreadable(name, INDEX, "its weight_map does not give the file of the folder for each tensor")
    return names


def refuse_weights(name: str, folder: Path) -> None:
    """Refuse a folder whose weights cannot be loaded, or that has more than one set of weights."""
    files = weight_files(name, folder)
    if not files:
        _refuse_without_weights(name, folder)
    refuse_adapter(name, [file for file in ADAPTER if (folder / file).exists()])
    rivals = sorted(path.name for path in folder.glob("shard-*-model-*.safetensors"))  # transformers prefers these
    if files == [folder / WEIGHTS] and (folder / INDEX).exists():
        with contextlib.suppress(LetheError):  # nothing reads an index beside whole weights
            rivals += [INDEX] if shards(name, folder / INDEX) - {WEIGHTS} else []
    if rivals:
        both = f"{files[0].name} and {rivals[0]}"
        raise LetheError(f"model '{name}' holds its weights twice ({both}), so it is ambiguous; remove one of them")
    shapes(name, files)


def refuse_adapter(name: str, beside: list[str]) -> None:
    """Refuse whole weights with an adapter beside them: transformers would apply the adapter without a word."""
    if ADAPTER[0] in beside:
        found = f"whole weights and an adapter beside them ({', '.join(beside)})"
        raise LetheError(f"model '{name}' holds {found}, so it is ambiguous; move one of the two to another folder")


def _refuse_without_weights(name: str, folder: Path) -> None:
    if (folder / ADAPTER[0]).exists():
        _refuse_adapter_alone(name, folder)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted((p.name for p in folder.iterdir() if p.suffix in PICKLES), key=lambda n: (not n.startswith("pytorch"), n))
    if others:
        found = ", ".join(map(printable, others[:3]))
        raise LetheError(f"model '{name}' has no {WEIGHTS} and no {INDEX}, only {found}; {SAVE}")
    if pickles:
        raise LetheError(f"model '{name}' has only pickled weights ({pickles[0]}), which can run code when read; {SAVE}")
    raise LetheError(f"model '{name}' has no weights: there is no .safetensors file in its folder; {SAVE}")


def shapes(name: str, files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    """The type and shape of every tensor by name, from the headers of the files.

    Raises:
        LetheError: a file is missing, truncated or damaged, or two files hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, list[int]]] = {}
    where: dict[str, str] = {}
    for file in files:
        try:
            require_content(file)
            with safe_open(file, framework="np") as opened:
                for key in opened.keys():  # noqa: SIM118  # not a mapping
                    if key in where:
                        raise UnreadableError(f"it holds {printable(key, 80)}, as {where[key]} does")
                    tensor = opened.get_slice(key)
                    found[key], where[key] = (tensor.get_dtype(), tensor.get_shape()), file.name
        except UnreadableError as error:
            raise unreadable(name, file.name, error) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(name, file.name, f"cut short or damaged: {' '.join(str(error).split())}") from error
    return found


def refuse_tokenizer(name: str, folder: Path) -> None:
    """Refuse a folder without a tokenizer, or with an unreadable file of settings beside it."""
    files = [folder / file for file in TOKENIZERS if os.path.lexists(folder / file)]
    if not files:
        raise LetheError(f"model '{name}' has no tokenizer in its folder; save it there: tokenizer.save_pretrained(FOLDER)")
    for file in files:
        try:
            require_content(file)
        except UnreadableError as error:
            raise unreadable(name, file.name, error) from error
    for settings in (folder / file for file in SETTINGS):
        if os.path.lexists(settings):
            part(name, settings)


def refuse_no_config(name: str, folder: Path, checkpoints: list[str]) -> None:
    """Refuse a folder without config.json, with what it has instead."""
    if (folder / ADAPTER[0]).exists():
        _refuse_adapter_alone(name, folder)
    if checkpoints:
        raise LetheError(f"model '{name}' has no config.json, but checkpoints; name one of them: '{name}@{checkpoints[-1]}'")
    raise LetheError(f"model '{name}' has no config.json; it is not the folder of a model")


def _refuse_adapter_alone(name: str, folder: Path) -> None:
    base = part(name, folder / ADAPTER[0]).get("base_model_name_or_path")
    of = f"an adapter of '{printable(base, 200)}'" if base else "an adapter that does not say of which model"
    run = (folder.parent / "run.json").exists()
    todo = f"name its run: '{folder.parent}'" if run else "merge it into that model (PEFT: merge_and_unload) and save that"
    raise LetheError(f"model '{name}' is {of}, without the model itself ({ADAPTER[0]}); {todo}")
