"""A model's weights as they are needed, from disk, without the whole model in memory.

`streamed` gives a model that runs with one block's weights in memory at a time, and `weight_of` one of its tensors. That is
accelerate's offloading to disk. It reads the model's own safetensors files; only weights that transformers converts when it
loads them (experts) are first written into a temporary folder.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lethe.models import folder as model_folder
from lethe.models import loading, refs
from lethe.models.activations import blocks


@contextlib.contextmanager
def streamed(ref: refs.ModelRef, dtype: str) -> Iterator[nn.Module]:
    """A model whose blocks are read from disk whenever they run.

    It is loaded whole where that is not possible: random weights, an adapter on a model, an architecture whose modules read the
    weights of other modules, or no room for weights that are written first.
    """
    with tempfile.TemporaryDirectory() as room:
        found = None if ref.random or ref.adapter else _on_disk(ref, dtype, room)
        model = refs.load(ref, dtype)[0] if found is None else found
        try:
            yield model
        finally:
            for parameter in model.parameters():  # hooks refer to the model, which would keep what it holds for a while
                if not parameter.is_meta:
                    parameter.data = parameter.new_empty(0)


@torch.no_grad()
def _on_disk(ref: refs.ModelRef, dtype: str, room: str) -> nn.Module | None:
    """The model with its blocks on disk; None if it cannot run so."""
    refs.verify(ref)
    config, _ = refs.configuration(ref)
    kind = getattr(torch, dtype)
    with model_folder.silent(), _quiet("accelerate.big_modeling"):
        try:
            model, _ = loading.pretrained(
                ref.folder, config, kind, device_map=_places(loading.on_meta(config, kind)), offload_folder=room
            )
            model(input_ids=torch.arange(4, device=loading.device())[None], use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, OSError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
    return model.requires_grad_(False)


def weight_of(model: Any, name: str) -> Tensor:
    """A parameter of a streamed model, read from disk if it is there."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    parameter = model.get_parameter(name)
    return load_offloaded_parameter(model, name) if parameter.is_meta else parameter


def same_weights(one: refs.ModelRef, other: refs.ModelRef, dtype: str) -> bool:
    """Whether the first model's weights in `dtype` are those of the second. Reads until the first tensor that differs."""
    if any(ref.random or ref.adapter for ref in (one, other)):
        return False
    refs.verify(one, other)
    kind = getattr(torch, dtype)
    with contextlib.ExitStack() as stack:
        ours, theirs = (_tensors(ref, stack) for ref in (one, other))
        names = [name for name in ours if not model_folder.LEFT_OVER.search(name)]
        return all(
            name in theirs and torch.equal(ours[name].get_tensor(name).to(kind), theirs[name].get_tensor(name).to(kind))
            for name in names
        )


def _tensors(ref: refs.ModelRef, stack: contextlib.ExitStack) -> dict[str, Any]:
    """By the name of each tensor, the open file that holds it."""
    from safetensors import safe_open

    files = [stack.enter_context(safe_open(file, "pt")) for file in model_folder.weight_files(ref.name, ref.folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a mapping


def _places(model: nn.Module) -> dict[str, Any]:
    """Where each part of a model goes: the blocks stay on disk, all else goes to the device."""
    inside = blocks(model)
    (path,) = (name for name, module in model.named_modules() if module is inside)
    where: Any = "cpu" if loading.device() == "cpu" else torch.cuda.current_device()
    places: dict[str, Any] = {f"{path}.{i}": "disk" for i in range(len(inside))}
    above = ["", *(path[:i] for i, letter in enumerate(path) if letter == ".")]
    for name in above:
        parent = model.get_submodule(name)
        children = [*(key for key, _ in parent.named_children()), *(key for key, _ in parent.named_parameters(recurse=False))]
        full = [f"{name}.{key}".removeprefix(".") for key in children]
        places |= {key: where for key in full if key not in above and key != path}
    return places


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Inside, a logger shows errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
