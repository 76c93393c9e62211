"""The folder of a model: what is missing, damaged or ambiguous there, or does not fit together. Reads no weights.

`refuse_config` and `refuse_weights` look at the files and import no torch. `refuse_misfit` has transformers build the model on
the meta device and load tensors that have only shapes, so its own renaming and conversion of weights applies. Tensors that it
would silently skip are refused. What transformers refuses itself becomes one line, with the model's name (`blamed`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe.errors import LetheError, full_disk, printable
from lethe.files import LFS_POINTER, UnreadableError, is_lfs_pointer, json_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
OTHER_HEADS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
OWN_CONFIG = "take the model's own config.json"
Shapes = dict[str, tuple[str, list[int]]]
"""The type and shape of each tensor by name."""
LEFT_OVER = re.compile(
    r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|causal_mask|position_ids)$"
    r"|(^|\.)(mtp|v_head|(embed_)?(vision|visual|image|audio|speech)|multi_modal|mm_projector|talker|token2wav|code2wav)\w*(\.|$)"
)
"""Tensors that a causal language model does not need: tables in old checkpoints, further heads, towers for other input."""
EXTRA_HEAD = re.compile(r"^(.*\.\d+\.)(eh_proj|enorm|hnorm)\.")
"""A tensor of a block for multi-token prediction. Such blocks follow the model's own blocks."""
OTHER_INPUT = re.compile("image|audio|video|vision|pad|mask", re.IGNORECASE)
"""Special tokens that never occur in text."""


def unreadable(name: str, file: str, why: object) -> LetheError:
    """The error for an unreadable file of the model `name`."""
    return LetheError(f"model '{name}': {file} cannot be read ({why}){advice(why)}")


def advice(why: object) -> str:
    """What to do about an unreadable file, unless the reason says it."""
    return "" if LFS_POINTER in str(why) else "; copy or download it again"


def shapes(file: Path) -> Shapes:
    """The tensors of a safetensors file, from its header.

    Raises:
        UnreadableError: it is missing, truncated or damaged, or a pointer of Git LFS.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if is_lfs_pointer(file):
            raise UnreadableError(LFS_POINTER)
        with safe_open(file, framework="np") as opened:
            tensors = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # not a mapping
            return {key: (tensor.get_dtype(), tensor.get_shape()) for key, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"cut short or damaged: {' '.join(str(error).split())}"
        raise UnreadableError(why) from error


def part(name: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model `name`."""
    try:
        found = json_of(text_of(path))
        if not isinstance(found, dict):
            raise UnreadableError(f"a JSON {type(found).__name__} where an object was expected")
    except UnreadableError as error:
        raise unreadable(name, path.name, error) from error
    return found


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model: `text_config` if the configuration has parts for other kinds of input."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def refuse_config(name: str, config: dict[str, Any]) -> None:
    """Refuse a model that Lethe does not support, by its config.json, though transformers might load it."""
    if quantised := text_settings(config).get("quantization_config") or config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        how = printable(method or quantised, 80)
        raise LetheError(f"model '{name}': its weights are quantised ({how}) and cannot be trained; use the original model")
    settings = text_settings(config)
    experts = [settings[key] for key in EXPERTS if type(settings.get(key)) is int]
    used = settings.get("num_experts_per_tok")
    if experts and type(used) is int and used > experts[0]:
        raise LetheError(f"model '{name}': num_experts_per_tok is {used} in config.json, of {experts[0]} experts; {OWN_CONFIG}")
    listed = config.get("architectures")
    heads = [str(head) for head in listed] if isinstance(listed, list) else []
    both = config.get("is_encoder_decoder") is True
    if both or (heads and all(head.endswith(OTHER_HEADS) for head in heads)):
        what = "an encoder with a decoder" if both else printable(heads[0], 80)
        raise LetheError(f"model '{name}' is no causal language model but {what} (config.json); give another")
    if config.get("transformers_weights") is not None:
        todo = f"rename the file of its weights to {WEIGHTS} and remove the setting"
        raise LetheError(f"model '{name}': config.json has transformers_weights, which Lethe does not follow; {todo}")


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files that transformers would load, in order of name: model.safetensors, or the shards that the index lists.

    Raises:
        LetheError: the index cannot be read, or does not list files of this folder.
    """
    if os.path.lexists(folder / WEIGHTS) or not (folder / INDEX).exists():
        return [folder / WEIGHTS] if os.path.lexists(folder / WEIGHTS) else []
    listed = part(name, folder / INDEX).get("weight_map")
    shards = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise unreadable(name, INDEX, "its weight_map does not give the file of the folder for each tensor")
    return [folder / shard for shard in sorted(shards)]


def refuse_weights(name: str, folder: Path) -> Shapes:
    """The tensors of a model. Refuses a folder whose weights cannot be loaded, or that has more than one set of weights."""
    files, with_adapter = weight_files(name, folder), (folder / ADAPTER[0]).exists()
    if not files and with_adapter:
        raise adapter_alone(name, folder)
    if not files:
        others = ", ".join(sorted(printable(path.name) for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)[:3])
        found = f", only {others}" if others else ""
        todo = "Lethe reads no pickles: save it by model.save_pretrained(FOLDER)"
        raise LetheError(f"model '{name}' has no {WEIGHTS} and no {INDEX}{found}; {todo}")
    rivals = sorted(path.name for path in folder.glob("shard-*-model-*.safetensors"))  # transformers prefers these
    if with_adapter or rivals:
        beside = ADAPTER[0] if with_adapter else rivals[0]
        raise LetheError(f"model '{name}' holds {files[0].name} and {beside}, so it is ambiguous; move one to another folder")
    tensors: Shapes = {}
    for file in files:
        try:
            shard = shapes(file)
        except UnreadableError as error:
            raise unreadable(name, file.name, error) from error
        if twice := sorted(tensors.keys() & shard.keys()):
            raise unreadable(name, file.name, f"{printable(twice[0], 120)} is in another shard too")
        tensors |= shard
    return tensors


def adapter_alone(name: str, folder: Path) -> LetheError:
    """The error for a folder that holds an adapter without its model."""
    base = part(name, folder / ADAPTER[0]).get("base_model_name_or_path")
    run = (folder.parent / "run.json").exists()
    todo = f"name its run: '{folder.parent}'" if run else "merge it into that model (PEFT: merge_and_unload) and save that"
    return LetheError(f"model '{name}' is an adapter of '{printable(base, 200)}', without the model itself; {todo}")


@contextlib.contextmanager
def blamed(name: str, part: str, todo: str) -> Iterator[None]:
    """Inside, an error of transformers becomes a LetheError with the unusable part, the reason, and what to do.

    Raises:
        LetheError: in place of any error, unless memory or disk is full.
    """
    import torch

    try:
        yield
    except (LetheError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if full_disk(error):
            raise
        if "trust_remote_code" in str(error):
            code = "code of its own (auto_map), which Lethe does not run"
            raise LetheError(f"model '{name}' needs {code}; use an architecture that transformers has") from error
        raise LetheError(f"model '{name}': {part} ({cause(error)}); {todo}") from error


def cause(error: Exception) -> str:
    """An error in one line: its message, with its type if the message is too short to understand."""
    words = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError | RuntimeError) and len(words) > 20
    return printable(words if plain else f"{type(error).__name__}: {words}".removesuffix(": "), 300)


def refuse_misfit(name: str, config: PreTrainedConfig, tensors: Shapes | None) -> None:
    """Refuse a configuration that describes no causal language model, or does not match the weights.

    Args:
        tensors: those in the files; None: do not check the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with blamed(name, "no model can be built from config.json", OWN_CONFIG), silent():
        depth = depth_of(config)
        if tensors is not None and depth > len(tensors):
            wrong = f"config.json describes {depth} blocks, the weights have {len(tensors)} tensors in all"
            raise LetheError(f"model '{name}': {wrong}; {OWN_CONFIG}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if tensors is None:
            return
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict={key: torch.empty(shape, device="meta") for key, (_, shape) in tensors.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_report(name, report, depth)
    if other := sorted(key for key, (kind, _) in tensors.items() if "F" not in kind and key.endswith(".weight")):
        wrong = f"{printable(other[0], 120)} is of type {tensors[other[0]][0]} in the weights, not floating point"
        raise LetheError(f"model '{name}': {wrong}; use the original model")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside, transformers shows no progress bar and no table of mismatched weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def depth_of(config: PreTrainedConfig) -> int:
    """Number of blocks of the language model; 0 if the configuration does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", 0)


def refuse_report(name: str, report: dict[str, Any], depth: int) -> None:
    """Refuse weights that do not match config.json, by the loading report of transformers. `depth`: number of blocks."""
    todo = "take the model's own config.json, or download both again"
    if other := sorted(report["mismatched_keys"], key=str):
        key, given, expected = other[0]
        wrong = f"{printable(key, 120)} is {list(given)} in the weights and {list(expected)} by config.json"
        raise LetheError(f"model '{name}': {wrong} ({len(other)} such tensors); {todo}")
    if missing := sorted(report["missing_keys"]):
        raise LetheError(f"model '{name}' lacks weights that config.json ({depth} blocks) describes: {_some(missing)}; {todo}")
    unexpected = {key for key in report["unexpected_keys"] if not LEFT_OVER.search(key)}
    extra = tuple({found[1] for key in unexpected if (found := EXTRA_HEAD.match(key))})
    if unexpected := {key for key in unexpected if not key.startswith(extra)}:
        wrong = f"the weights hold tensors that config.json ({depth} blocks) does not describe"
        raise LetheError(f"model '{name}': {wrong}: {_some(sorted(unexpected))}; {todo}")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(printable(key, 120) for key in keys[:2]) + more


def refuse_tokens(name: str, tokenizer: PreTrainedTokenizerBase, size: int | None) -> None:
    """Refuse a tokenizer that has no tokens, or tokens without an embedding. `size`: number of embeddings.

    Two kinds of special tokens need no embedding. Tokens for images (as in Gemma 3) do not occur in text. A padding token is
    replaced by another token.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not vocabulary.keys() - special:
        raise LetheError(f"model '{name}': its tokenizer has no tokens; save it there: tokenizer.save_pretrained(FOLDER)")
    spared = {token for token in special if OTHER_INPUT.search(token)} - {tokenizer.bos_token, tokenizer.eos_token}
    spared |= {tokenizer.unk_token} & special  # some classes add one that is never used
    if size is not None and (beyond := sorted((i, t) for t, i in vocabulary.items() if i >= size and t not in spared)):
        example = f"{beyond[0][0]} for {printable(beyond[0][1], 40)!r} (vocab_size {size})"
        raise LetheError(
            f"model '{name}': its tokenizer makes {len(beyond)} ids that the model has no embedding for, such as {example}; "
            f"take its own tokenizer, or resize its embedding: model.resize_token_embeddings(len(tokenizer))"
        )
