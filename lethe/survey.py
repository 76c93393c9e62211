"""What training would do to a model, read off the loaded model itself: before it starts, and what it did afterwards.

Before: trainable parameters by layer and role, the optimizer's routing, parameters that no term of the loss reaches
(found by one probe batch), memory by part. After: agreement of the most likely token with the teachers', distance
from the target's weights and stable rank of the update per layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lethe import corpora
from lethe.adapters import merged_bytes
from lethe.affine import sums_bytes
from lethe.blocked import ROWS
from lethe.optimizers import Route, needs_masters, routes, routing_table
from lethe.residual import blocks
from lethe.teacher import Teacher

AGREEMENT_ROWS, AGREEMENT_BATCH = 128, 8
TOKEN = 40
"""Bytes of a token id in a list of Python."""
BUFFERS, LATER = 0.08, 96 * 2**20
"""What is set aside for all that the estimate does not list: a share of the rest, and what libraries take once they work."""


def layer_of(model: nn.Module) -> dict[str, str]:
    """By parameter name, the block that it is in (`"0"`, `"1"`, …), or `"outside"`."""
    owner = {id(p): str(i) for i, block in enumerate(blocks(model)) for p in block.parameters()}
    return {name: owner.get(id(p), "outside") for name, p in model.named_parameters()}


def trainable_by_layer(model: nn.Module, found: list[Route]) -> dict[str, dict[str, int]]:
    """Trainable parameters by layer and role."""
    layers = layer_of(model)
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for route in found:
        table[layers[route.name]][route.role] += math.prod(route.shape)
    return {layer: dict(roles) for layer, roles in table.items()}


def memory(
    student: nn.Module, teacher: Teacher, config: Any, width: int, document: int, tokens: int, libraries: int
) -> dict[str, int]:
    """Estimated peak memory in bytes by part; their sum is the process's on a CPU, the device's on a GPU.

    `document`: activations kept for the backward pass by the longest pair of documents, `width` tokens at most. `tokens`: of
    the text that maps are fitted on. `libraries`: what the process took before it loaded a model. Logits are kept four times:
    two models, and the retain term's float32 intermediates; of one block of tokens, where the output heads are known
    (`blocked`). `other` is by how much fitting maps, a save or what is recorded at the end take more than an update;
    `buffers` is what is too small or too short to list.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    numbers, moved = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    state = {"adamw": 8, "muon": 4, "adamw_8bit": 2}[config.optimizer] + 4 * needs_masters(student, config.optimizer)
    text = student.config.get_text_config()  # type: ignore[union-attr,operator]
    batch, hidden = config.per_device_train_batch_size, text.hidden_size
    kept = batch * document
    if config.gradient_checkpointing:  # one block's, and the blocks' inputs of both texts
        kept = kept // text.num_hidden_layers + 2 * text.num_hidden_layers * trained[0].element_size() * batch * width * hidden
    logits = 4 * 4 * (min(batch * width, ROWS) if teacher.heads else batch * width) * text.vocab_size
    mapped = len(config.layers) if config.affine != "none" and config.forget_loss != "distill" else 0
    found = {
        "libraries": libraries,
        "weights": _bytes(student),
        "teachers": _bytes(teacher.source) + _bytes(teacher.reference),
        "maps": 4 * mapped * hidden * (hidden + 1),
        "gradients": moved,
        "optimizer": state * numbers,
        "activations": kept + logits + merged_bytes(student),
    }
    update = found["gradients"] + found["optimizer"] + found["activations"]
    fit = sums_bytes(hidden, mapped) + TOKEN * tokens
    end = found["optimizer"] + max(moved, 4 * AGREEMENT_BATCH * width * text.vocab_size)
    found["other"] = max(0, max(fit, end) - update)
    return found | {"buffers": LATER + round(BUFFERS * sum(found.values()))}


def available_memory() -> int:
    """Free memory in bytes: of the GPU if there is one, else of the machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def taken() -> int:
    """Memory in bytes that this process has now, on a CPU: libraries and text. On a GPU it is none of what is estimated."""
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def describe(student: nn.Module, config: Any) -> dict[str, Any]:
    """Trainable parameters by layer and role, and the optimizer's routing, for the plan."""
    found = routes(student, config.optimizer)
    return {
        "trainable_parameters": sum(math.prod(route.shape) for route in found),
        "trainable_by_layer": trainable_by_layer(student, found),
        "routing": routing_table(found),
    }


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold equal parameters."""
    theirs = dict(other.named_parameters())
    return all(name in theirs and torch.equal(p, theirs[name]) for name, p in one.named_parameters())


def without_gradient(model: nn.Module) -> list[str]:
    """Names of trainable parameters that a backward pass has left without a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@torch.no_grad()
def agreement(
    student: nn.Module, teacher: Teacher, forget: list[list[int]], retain: list[list[int]], pad_id: int
) -> dict[str, float]:
    """Share of tokens whose most likely next token is the teacher's: the source's on forget, the reference's on retain text."""
    was_training = student.training
    student.eval()
    shares = {}
    for name, rows, other in (
        ("forget_with_source", forget, teacher.source),
        ("retain_with_reference", retain, teacher.reference),
    ):
        same = count = 0
        ordered = sorted(rows[:AGREEMENT_ROWS], key=len)
        for start in range(0, len(ordered), AGREEMENT_BATCH):
            ids, mask = (
                t.to(next(student.parameters()).device) for t in corpora.pad(ordered[start : start + AGREEMENT_BATCH], pad_id)
            )
            equal = student(input_ids=ids, use_cache=False).logits.argmax(-1) == other(
                input_ids=ids, use_cache=False
            ).logits.argmax(-1)
            same += int((equal * mask).sum())
            count += int(mask.sum())
        shares[name] = same / count
    student.train(was_training)
    return shares


@torch.no_grad()
def update_by_layer(student: nn.Module, target: nn.Module) -> dict[str, dict[str, float]]:
    """Per block, `distance` ‖θ − θ₀‖ from the target's weights, and `stable_rank` of the update.

    The stable rank of a matrix is ‖ΔW‖_F² / ‖ΔW‖₂², between 1 and its rank; a block's is the mean over its matrices that
    have moved. Adapters count as the matrices that they add.
    """
    before = dict(target.named_parameters())
    squares: dict[str, float] = defaultdict(float)
    ranks: dict[str, list[float]] = defaultdict(list)
    layers = layer_of(target)
    for name, weight in effective_weights(student).items():
        change = (weight.float() - before[name].float()).detach()
        square = change.square().sum().item()
        squares[layers[name]] += square
        if change.ndim == 2 and square > 0 and layers[name] != "outside":
            ranks[layers[name]].append(square / torch.linalg.matrix_norm(change, 2).item() ** 2)
    return {
        layer: {"distance": math.sqrt(square)}
        | ({"stable_rank": sum(ranks[layer]) / len(ranks[layer])} if ranks[layer] else {})
        for layer, square in squares.items()
    }


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a model computes with, by the names of the bare model: adapters are added to what they adapt."""
    base: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    adapters: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    weights = {}
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        owner: Any = adapters.get(name.rsplit(".base_layer.", 1)[0]) if ".base_layer." in name else None
        adapted = owner is not None and name.endswith(".weight")
        weights[plain] = parameter + owner.get_delta_weight("default") if adapted else parameter
    return weights


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
