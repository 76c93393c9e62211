"""The activations of layer L, for every architecture. All code in Lethe that reads activations reads them here.

Layer L is the residual stream after block L, counted from 0. A hook on the L-th block of the model reads the block's output.
`hidden_states` of transformers is never used: its entry L is the *input* of block L, and in many models its last entry is the
output of the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.errors import LetheError

CONVENTION = "block_output"


class _Enough(Exception):
    """Ends a forward pass after the last layer that is needed."""


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: the outermost list of modules of one type that is as long as the configuration has layers.

    Works for transformers models and for PEFT models around them.

    Raises:
        LetheError: there is no such list, or more than one.
    """
    config: Any = model.config
    depth: int = config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(block) for block in module}) == 1
    ]
    outermost = [module for level, module in found if level == min(level for level, _ in found)]
    if len(outermost) != 1:
        wrong = f"{len(outermost)} lists of {depth} blocks found, expected 1"
        raise LetheError(f"{type(model).__name__}: {wrong}; its architecture is not supported")
    return outermost[0]


@contextlib.contextmanager
def capture(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass puts the activations of `layers`, [batch, seq, hidden], into the yielded dict."""
    activations: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for layer, block in _needed(model, layers).items():
            handle = block.register_forward_hook(_store(activations, layer))
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
    """Inside, a forward pass ends before `module` runs, and puts its first input into the yielded list."""
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
    """The input of the output `head`: the hidden states after the final norm. The head does not run.

    Padding must be on the right: see `corpora.pad`.
    """
    with input_of(head) as found:
        model(input_ids=input_ids, use_cache=False)
    return found[0]


@dataclass
class States:
    """Results of a forward pass: activations by layer, and the final hidden states or the logits, if requested."""

    activations: dict[int, Float[Tensor, "batch seq hidden"]] = field(default_factory=dict)
    output: Float[Tensor, "batch seq width"] | None = None


def read(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    layers: list[int],
    output: bool = False,
    head: nn.Module | None = None,
) -> States:
    """One forward pass for the activations of `layers` and, with `output`, the input of `head` (None: the logits).

    It ends as soon as all of these are computed.
    """
    if not output:
        return States(residuals(model, input_ids, layers))
    with contextlib.ExitStack() as stack:
        activations = stack.enter_context(capture(model, layers)) if layers else {}
        if head is None:
            return States(activations, model(input_ids=input_ids, use_cache=False).logits)
        return States(activations, final_hidden(model, head, input_ids))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    close = torch.finfo(a.dtype).eps ** 0.5  # matmuls of another batch differ in the last bits
    return a.shape == b.shape and bool((a - b).norm() <= close * b.norm())


def _needed(model: nn.Module, layers: list[int]) -> dict[int, nn.Module]:
    found = blocks(model)
    if not layers or min(layers) < 0 or max(layers) >= len(found):
        raise LetheError(f"layers: {layers} is out of range; the model has {len(found)} blocks, layers 0 to {len(found) - 1}")
    return {layer: found[layer] for layer in sorted(layers)}


def _store(activations: dict[int, Tensor], layer: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        if stream.ndim != 3:
            wrong = f"layer {layer} returns {stream.ndim} dimensions ({type(module).__name__}), expected [batch, seq, hidden]"
            raise LetheError(f"{wrong}; without a single residual stream the architecture is not supported")
        activations[layer] = stream

    return hook


def _stop(module: nn.Module, args: object, output: object) -> None:
    raise _Enough
