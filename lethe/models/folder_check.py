"""Whether config.json, weights and tokenizer of a model match. Checked before a run begins, without reading a weight.

transformers builds the model on the meta device and loads tensors that have only shapes, so its own renaming and conversion of
weights applies. Tensors that it would silently skip are refused here.
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
"""Tensors that a causal language model does not need: tables in old checkpoints, further heads, towers for other input."""
OTHER_INPUT = re.compile("image|audio|video|vision|pad|mask", re.IGNORECASE)
"""Special tokens that never occur in text."""
EXTRA_HEAD = re.compile(r"^(.*\.\d+\.)(eh_proj|enorm|hnorm)\.")
"""A tensor of a block for multi-token prediction. Such blocks follow the model's own blocks."""


@contextlib.contextmanager
def blamed(name: str, part: str, todo: str, settings: dict[str, Any]) -> Iterator[None]:
    """Inside, an error of transformers becomes a LetheError with the unusable part, the reason, and what to do.

    Args:
        settings: the settings that transformers reads.

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
            named = settings.get("auto_map")
            found = printable(", ".join(map(str, named.values())) if isinstance(named, dict) else named, 200)
            code = f"code of its own (auto_map: {found}), which Lethe does not run"
            raise LetheError(f"model '{name}' needs {code}; use an architecture that transformers has") from error
        raise LetheError(f"model '{name}': {part} ({cause(error, settings)}); {todo}") from error


def cause(error: Exception, settings: dict[str, Any] | None = None) -> str:
    """An error in one line: its message, with its type if the message is too short to understand.

    If a library does not know a name, the setting with that name is reported.
    """
    words = " ".join(str(error).split())
    if type(error).__name__.startswith("StrictDataclass"):  # the reason follows in its second line
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
    """Refuse a configuration that describes no causal language model, or does not match the weights.

    Args:
        settings: the content of config.json.
        tensors: type and shape of each tensor in the files; None: do not check the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    todo = "take the model's own config.json"
    if type(config) not in AutoModelForCausalLM._model_mapping and not settings.get("auto_map"):
        raise LetheError(f"model '{name}' is no causal language model (model_type {config.model_type}); give another")
    with blamed(name, "no model can be built from config.json", todo, settings), _silent():
        depth = depth_of(config)
        if tensors is not None and depth > len(tensors):
            wrong = f"config.json describes {depth} blocks, the weights have {len(tensors)} tensors in all"
            raise LetheError(f"model '{name}': {wrong}; {todo}")
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
def _silent() -> Iterator[None]:
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
    if size is None:
        return
    spared = {token for token in special if OTHER_INPUT.search(token)} - {tokenizer.bos_token, tokenizer.eos_token}
    spared |= {tokenizer.unk_token} if tokenizer.unk_token in special else set()  # some classes add one that is never used
    if beyond := sorted((i, token) for token, i in vocabulary.items() if i >= size and token not in spared):
        example = f"{beyond[0][0]} for {printable(beyond[0][1], 40)!r} (vocab_size {size})"
        raise LetheError(
            f"model '{name}': its tokenizer makes {len(beyond)} ids that the model has no embedding for, such as {example}; "
            f"take its own tokenizer, or resize its embedding: model.resize_token_embeddings(len(tokenizer))"
        )
