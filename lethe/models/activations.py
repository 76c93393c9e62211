"""The activations of layer L, for every architecture. All code in Lethe that reads activations reads them here.

Layer L is the residual stream after block L, counted from 0. A hook on the L-th block of the model reads the block's output.
`hidden_states` of transformers is never used: its entry L is the *input* of block L, and in many models its last entry is the
output of the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.distributed import Enough, whole
from lethe.errors import LetheError

CONVENTION = "block_output"


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

    Later blocks than are needed, and `head`, do not run. Padding must be on the right
    (`corpora.pad`).

    Raises:
        LetheError: the model has no such layer.
    """
    found = blocks(model) if layers or not output else nn.ModuleList()
    if (not layers and not output) or any(not 0 <= layer < len(found) for layer in layers):
        raise LetheError(f"layers: {layers} is out of range; the model has {len(found)} blocks, layers 0 to {len(found) - 1}")
    states = States()
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            last = not output and layer == max(layers)
            hooks.callback(found[layer].register_forward_hook(_store(states, layer, last)).remove)
        with skipped(head if output else None), contextlib.suppress(Enough):
            found_output = model(input_ids=input_ids, use_cache=False)
            states.output = found_output.logits if output else None
    return states


def ending(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    layer: int | None,
    stream: Float[Tensor, "batch seq hidden"],
    head: nn.Module | None = None,
) -> Float[Tensor, "batch seq width"]:
    """What a model makes of `stream` in place of the output of block `layer` (None: the last): the input of `head`, or logits.

    The later blocks, the final norm and the head run as in any pass of the model, with its masks and positions. The blocks up
    to `layer` do not run. `model` is in evaluation mode. The gradient reaches `stream`.
    """
    found = blocks(model)
    layer = len(found) - 1 if layer is None else layer
    kind = type(found[layer])
    if kind not in _IN_TUPLES:  # a pass of one token through the first block shows how blocks return their output
        with torch.no_grad():
            read(model, input_ids[:1, :1], [0])
    given = (stream,) if _IN_TUPLES[kind] else stream
    with contextlib.ExitStack() as stack:
        for block in found[: layer + 1]:
            stack.enter_context(replaced(block, lambda *args, **kwargs: given))
        stack.enter_context(skipped(head))
        return model(input_ids=input_ids, use_cache=False).logits


_IN_TUPLES: dict[type, bool] = {}
"""By class of block, whether its output comes in a tuple."""


def skipped(module: nn.Module | None) -> contextlib.AbstractContextManager[None]:
    """Inside, a module returns its input, so that a model's logits are the inputs of its output head."""
    return contextlib.nullcontext() if module is None else replaced(module, lambda x: x)


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module computes `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@torch.no_grad()
def copied(head: nn.Linear) -> nn.Linear:
    """A copy of an output head that needs nothing of its model, frozen."""
    weight = whole(head.weight)
    new = nn.Linear(weight.shape[1], weight.shape[0], head.bias is not None, device=weight.device, dtype=weight.dtype)
    new.weight.copy_(weight)
    if head.bias is not None:
        new.bias.copy_(whole(head.bias))
    return new.requires_grad_(False)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    close = torch.finfo(a.dtype).eps ** 0.5  # matmuls of another batch differ in the last bits
    return a.shape == b.shape and bool((a - b).norm() <= close * b.norm())


def _store(states: States, layer: int, last: bool):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        _IN_TUPLES[type(module)] = not isinstance(output, Tensor)
        stream = output if isinstance(output, Tensor) else output[0]
        if stream.ndim != 3:
            wrong = f"layer {layer} returns {stream.ndim} dimensions ({type(module).__name__}), expected [batch, seq, hidden]"
            raise LetheError(f"{wrong}; without a single residual stream the architecture is not supported")
        states.activations[layer] = stream
        if last:
            raise Enough(stream)

    return hook
