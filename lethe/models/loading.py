"""Weights from disk to the device that they run on, without a second copy in host memory: of a whole model, or of its first
blocks alone.

`first_blocks` has transformers load a model whose configuration ends after those blocks, so that later ones are never read.
Layers have the same numbers. Where a shorter model would not be built like the first part of the whole one, it loads nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lethe.distributed import device, from_first, world
from lethe.errors import LetheError, printable
from lethe.models.activations import blocks
from lethe.models.folder import silent
from lethe.runs.machine import available_memory

logger = logging.getLogger(__name__)


def pretrained(folder: Path, config: Any, dtype: torch.dtype, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, and the loading report of transformers. `how`: further settings of `from_pretrained`.

    Raises:
        LetheError: the whole model is larger than the free memory of the GPU.
    """
    from transformers import AutoModelForCausalLM

    if not how and device().type != "cpu":
        needed = dtype.itemsize * sum(parameter.numel() for parameter in on_meta(config, dtype).parameters())
        if needed > (free := available_memory()):
            raise LetheError(
                f"memory: the weights of '{folder}' take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the GPU are "
                f"free; use more GPUs (devices, with parallel fsdp), or a smaller dtype"
            )
        how = {"device_map": {"": device()}}
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **how
    )
    return found


def on_meta(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration without memory for its weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False).eval()


def divided(outline: Callable[[], nn.Module], parallel: str, bytes_per_weight: float) -> bool:
    """Whether each of several processes loads a part of a model: as the setting `parallel` says, or if the whole does not fit.

    `outline` gives the model on the meta device. `bytes_per_weight`: what the work takes.
    """
    if world() == 1 or parallel != "auto":
        return world() > 1 and parallel == "fsdp"
    weights = sum(parameter.numel() for parameter in outline().parameters())
    return from_first(lambda: weights * bytes_per_weight > available_memory())


def block_list(model: nn.Module) -> str:
    """The name of the model's list of blocks."""
    found = blocks(model)
    return next(name for name, module in model.named_modules() if module is found)


def first_blocks(folder: Path, config: Any, dtype: torch.dtype, last: int, **how: Any) -> Any | None:
    """A model of blocks 0 to `last`; None if it cannot be built, or if its blocks would differ from the whole model's."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    depth, count = text.num_hidden_layers, last + 1
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:  # one entry per block, such as the kind of its attention
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    try:
        if not _same_blocks(on_meta(config, dtype), on_meta(shorter, dtype)):
            return None
        with silent():
            model, report = pretrained(folder, shorter, dtype, **how)
    except (LetheError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers refuses a configuration or its weights in many ways
        why = f"{type(error).__name__}: {printable(error, 200)}"
        logger.info("%s is loaded whole, not up to block %d (%s)", folder, last, why)
        return None
    return None if report["missing_keys"] or report["mismatched_keys"] else model


def place(model: Any, last: int | None) -> None:
    """Move a model to its device.

    With `last`, free the blocks after it, and the output head unless it is the embedding. A pass must end before them (`read`).
    """
    model.to(device())
    if last is None:
        return
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.to("meta")
    for block in blocks(model)[last + 1 :]:
        block.to("meta")


def _same_blocks(whole: nn.Module, part: nn.Module) -> bool:
    """Whether the blocks of `part` are built as the first ones of `whole`."""
    try:
        return all(_built(a) == _built(b) for a, b in zip(blocks(whole), blocks(part), strict=False))
    except LetheError:  # another list of `part`, such as AltUp's projections in gemma3n, is as long as its blocks
        return False


def _built(block: nn.Module) -> list[Any]:
    """The modules of a block, their numbers and texts, and the shapes of their parameters."""
    return [
        (
            name,
            type(module),
            {key: value for key, value in vars(module).items() if type(value) in {bool, int, float, str}},
            {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    ]
