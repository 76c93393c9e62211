"""Where layer L is, for every architecture. Everything in Lethe that reads activations reads them here.

Layer L is the residual stream after block L, counted from 0: the output of the L-th module of the model's list of
blocks, read by a hook on that module. `hidden_states` is never used: its entry L is the *input* of block L, and in
many models its last entry has gone through the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.errors import LetheError

CONVENTION = "block_output"


class _Enough(Exception):
    """Ends a forward pass after the last layer that is needed."""


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of blocks: the outermost list of as many modules of one type as the configuration has layers.

    Works on bare and PEFT-wrapped transformers models (GPT-2, GPT-NeoX, Llama, Qwen, OLMo and others).

    Raises:
        LetheError: no list, or more than one, fits.
    """
    config: Any = model.config
    depth: int = config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(block) for block in module}) == 1
    ]
    outermost = min((level for level, _ in found), default=0)
    lists = [module for level, module in found if level == outermost]
    if len(lists) != 1:
        raise LetheError(
            f"{type(model).__name__}: {len(lists)} lists of {depth} blocks found, expected 1; architecture not supported"
        )
    return lists[0]


@contextlib.contextmanager
def capture(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass leaves the layers' activations, [batch, seq, hidden], in the yielded dict."""
    activations: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for layer, block in _needed(model, layers).items():
            handle = block.register_forward_hook(_keep(activations, layer))
            hooks.callback(handle.remove)
        yield activations


def residuals(
    model: nn.Module, input_ids: Int[Tensor, "batch seq"], layers: list[int]
) -> dict[int, Float[Tensor, "batch seq hidden"]]:
    """Activations of `layers` on `input_ids`. Blocks after the last of them, and the output head, do not run.

    Padding must be on the right: see `corpora.pad`.

    Raises:
        LetheError: the model has no such layer.
    """
    last = _needed(model, layers)[max(layers)]
    with capture(model, layers) as activations:
        handle = last.register_forward_hook(_stop)
        try:
            model(input_ids=input_ids, use_cache=False)
        except _Enough:
            pass
        finally:
            handle.remove()
    return activations


@contextlib.contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a forward pass ends where `module` would run, and leaves its first input in the yielded list."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Enough

    handle = module.register_forward_pre_hook(stop)
    try:
        yield found
    except _Enough:
        pass
    finally:
        handle.remove()


def final_hidden(model: nn.Module, head: nn.Module, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
    """The state, after the final norm, that the model's output `head` would be given; the head does not run.

    Padding must be on the right: see `corpora.pad`.
    """
    with input_of(head) as found:
        model(input_ids=input_ids, use_cache=False)
    return found[0]


def _needed(model: nn.Module, layers: list[int]) -> dict[int, nn.Module]:
    found = blocks(model)
    if not layers or min(layers) < 0 or max(layers) >= len(found):
        raise LetheError(f"layers: {layers} is out of range; the model has {len(found)} blocks, layers 0 to {len(found) - 1}")
    return {layer: found[layer] for layer in sorted(layers)}


def _keep(activations: dict[int, Tensor], layer: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        activations[layer] = output if isinstance(output, Tensor) else output[0]

    return hook


def _stop(module: nn.Module, args: object, output: object) -> None:
    raise _Enough
