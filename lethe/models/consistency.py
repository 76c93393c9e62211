"""Whether config.json, weights and tokenizer fit together: tried without reading a weight, before a run begins.

transformers builds the model on the meta device and is given tensors that have only shapes, so that all of its own renaming
and converting takes place. What it would leave out in silence is refused here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lethe.errors import LetheError, full_disk, printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LEFT_OVER = re.compile(
    r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|causal_mask|position_ids)$"
    r"|(^|\.)(mtp|v_head|(embed_)?(vision|visual|image|audio|speech)|multi_modal|mm_projector|talker|token2wav|code2wav)\w*(\.|$)"
)
"""Tensors that a causal language model does without: tables that old checkpoints saved, heads and towers beside it."""
OTHER_INPUT = re.compile("image|audio|video|vision|pad|mask", re.IGNORECASE)
"""Special tokens that no text is made of."""
EXTRA_HEAD = re.compile(r"^(.*\.\d+\.)(eh_proj|enorm|hnorm)\.")
"""A tensor that only a block for predicting further tokens has, which follows the model's own blocks."""


@contextlib.contextmanager
def blamed(name: str, part: str, todo: str, settings: dict[str, Any]) -> Iterator[None]:
    """Inside, whatever transformers raises is a refusal: the part that it could not read, its reason, and what to do.

    Args:
        settings: those that transformers read.

    Raises:
        LetheError: instead of any error but a lack of memory or of room on the disk.
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
            named = settings.get("auto_map")
            found = printable(", ".join(map(str, named.values())) if isinstance(named, dict) else named, 200)
            raise LetheError(
                f"model '{name}' asks for code of its own (auto_map: {found}), and Lethe runs no code of a model's folder; "
                f"use a model that transformers has itself"
            ) from error
        raise LetheError(f"model '{name}': {part} ({cause(error, settings)}); {todo}") from error


def cause(error: Exception, settings: dict[str, Any] | None = None) -> str:
    """An error in one line: its message, with its type where the message alone says little.

    A name that a library does not know is reported with its setting.
    """
    words = " ".join(str(error).split())
    if type(error).__name__.startswith("StrictDataclass"):  # its first line says only that there is a second
        return printable(words.rpartition("Error: ")[2].partition(". Errors: ")[0], 300)
    if isinstance(error, KeyError) and error.args:
        parts = [settings or {}, *(value for value in (settings or {}).values() if isinstance(value, dict))]
        keys = [key for part in parts for key, value in part.items() if value == error.args[0]]
        if keys:
            return f"{printable(keys[0], 80)}: {printable(repr(error.args[0]), 80)} is not known"
    plain = isinstance(error, OSError | ValueError | RuntimeError) and len(words) > 20
    return printable(words if plain else f"{type(error).__name__}: {words}".removesuffix(": "), 300)


def refuse_misfit(
    name: str, config: PreTrainedConfig, settings: dict[str, Any], tensors: dict[str, tuple[str, list[int]]] | None
) -> None:
    """Refuse a configuration that describes no causal language model, or another than the weights are of.

    Args:
        settings: what config.json says.
        tensors: type and shape of those in the files; None if the weights do not matter.

    Raises:
        LetheError: the model cannot be built, or tensors are missing, left over or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    todo = "take the model's own config.json"
    if type(config) not in AutoModelForCausalLM._model_mapping and not settings.get("auto_map"):
        raise LetheError(f"model '{name}' is no causal language model (model_type {config.model_type}); give another")
    with blamed(name, "no model can be built from config.json", todo, settings), _silent():
        depth = depth_of(config)
        if tensors is not None and depth > len(tensors):
            raise LetheError(
                f"model '{name}': config.json describes {depth} blocks, the weights are {len(tensors)} tensors in all; {todo}"
            )
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
        raise LetheError(
            f"model '{name}': {printable(other[0], 120)} is of type {tensors[other[0]][0]} in the weights, not floating point; "
            f"use the model before it was quantised"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers without bars and without its table of what does not fit, which is refused here."""
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
    """Blocks of the language model; 0 if the configuration does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", 0)


def refuse_report(name: str, report: dict[str, Any], depth: int) -> None:
    """Refuse weights of which transformers reports that they are not those of a config.json with `depth` blocks.

    Raises:
        LetheError: naming the first tensors.
    """
    todo = "take the model's own config.json, or download both again"
    if other := sorted(report["mismatched_keys"], key=str):
        key, given, expected = other[0]
        raise LetheError(
            f"model '{name}': {printable(key, 120)} is {list(given)} in the weights and {list(expected)} by config.json "
            f"({len(other)} such tensors); {todo}"
        )
    if missing := sorted(report["missing_keys"]):
        raise LetheError(f"model '{name}' lacks weights that config.json ({depth} blocks) describes: {_some(missing)}; {todo}")
    unexpected = {key for key in report["unexpected_keys"] if not LEFT_OVER.search(key)}
    extra = tuple({found[1] for key in unexpected if (found := EXTRA_HEAD.match(key))})
    if unexpected := {key for key in unexpected if not key.startswith(extra)}:
        raise LetheError(
            f"model '{name}': the weights hold what config.json ({depth} blocks) has no place for: "
            f"{_some(sorted(unexpected))}; {todo}"
        )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(printable(key, 120) for key in keys[:2]) + more


def refuse_tokens(name: str, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuse a tokenizer that has no tokens, or makes ids that the model has no embedding for.

    Gemma 3's tokenizer has a token for images beyond the embedding of the models for text, and many add one for padding.
    These may stay: no text holds the former, and another token pads.

    Raises:
        LetheError: naming the first token beyond.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not vocabulary.keys() - special:
        raise LetheError(f"model '{name}': its tokenizer has no tokens; save it there: tokenizer.save_pretrained(FOLDER)")
    if rows is None:
        return
    spared = {token for token in special if OTHER_INPUT.search(token)} - {tokenizer.bos_token, tokenizer.eos_token}
    spared |= {tokenizer.unk_token} if tokenizer.unk_token in special else set()  # some classes add one, unused
    if beyond := sorted((i, token) for token, i in vocabulary.items() if i >= rows and token not in spared):
        raise LetheError(
            f"model '{name}': its tokenizer makes {len(beyond)} ids that the model has no embedding for, such as "
            f"{beyond[0][0]} for {printable(beyond[0][1], 40)!r} (vocab_size {rows}); give the tokenizer that the model was "
            f"trained with, or resize its embedding: model.resize_token_embeddings(len(tokenizer))"
        )
