"""What training would do to a model, read off the loaded model itself: before it starts, and what it did afterwards.

Before: trainable parameters by layer and role, the optimizer's routing, parameters that no term of the loss reaches
(found by one probe batch), memory by part. After: agreement of the most likely token with the teachers', distance
from the target's weights and stable rank of the update per layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lethe.maps.affine import sums_bytes
from lethe.models.activations import blocks
from lethe.models.adapters import left_out
from lethe.objectives.blocked import ROWS
from lethe.text import corpora
from lethe.training.merged_lora import merged_bytes
from lethe.training.optimizers import Route, left_to_adamw, needs_masters, routes, routing_table
from lethe.unlearning.teacher import Teacher

AGREEMENT_ROWS, AGREEMENT_BATCH = 128, 8
LANCZOS_STEPS = 32
"""Products with a matrix and its transpose for its largest singular value; as many as it takes where the largest lie close."""
SHARE = 0.01
"""The share of the blocks' weights from which on it is worth a warning that they are treated otherwise than the rest."""
RECOMPUTED = 4
"""Times a block's activations that its second pass and its gradients take under gradient checkpointing; measured, at most."""
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
    if config.gradient_checkpointing:  # the blocks' inputs of both texts, and what computing one block again takes
        inputs = 2 * text.num_hidden_layers * trained[0].element_size() * batch * width * hidden
        kept = RECOMPUTED * kept // text.num_hidden_layers + inputs
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


def untouched(student: nn.Module, config: Any, layers: list[int]) -> list[str]:
    """Warnings for the plan: the share of the blocks' weights that adapters leave as they are, or Muon leaves to AdamW."""
    found = []
    if config.lora and (share := left_out(student, config.lora, layers)) > SHARE and config.lora.targets != "attention":
        found.append(
            f"lora: {share:.0%} of the weights in the adapted blocks get no adapter (targets: {config.lora.targets}): "
            f"LoRA adapts linear layers, not routers, nor experts that are stored as three-dimensional tensors; "
            f"lora null trains all weights"
        )
    if config.optimizer == "muon" and (share := left_to_adamw(routes(student, "muon"))) > SHARE:
        found.append(
            f"muon: experts, stored as three-dimensional tensors, are trained by AdamW: {share:.0%} of the blocks' matrices"
        )
    return found


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
    have moved, each expert's by itself. Adapters count as the matrices that they add.
    """
    squares: dict[str, float] = defaultdict(float)
    ranks: dict[str, list[float]] = defaultdict(list)
    layers = layer_of(target)
    for name, square, stable in _updates(student, dict(target.named_parameters())):
        squares[layers[name]] += square
        ranks[layers[name]] += stable if layers[name] != "outside" else []
    return {
        layer: {"distance": math.sqrt(square)}
        | ({"stable_rank": sum(ranks[layer]) / len(ranks[layer])} if ranks[layer] else {})
        for layer, square in squares.items()
    }


def stable_ranks(matrices: Float[Tensor, "*matrices rows columns"]) -> list[float]:
    """‖W‖_F² / ‖W‖₂² of each matrix that is not 0."""
    each = matrices.reshape(-1, *matrices.shape[-2:])
    squares = each.square().sum((-2, -1))
    moved = squares > 0
    return (squares[moved] / spectral_norm(each[moved]).square()).tolist() if moved.any() else []


def spectral_norm(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, " matrices"]:
    """‖W‖₂, the largest singular value of each matrix, to a thousandth; a full decomposition takes many times as long.

    By the Lanczos method: power iteration on WᵀW that keeps all of its directions, and takes the best combination of them.
    The start is drawn from a fixed seed. (Golub and Van Loan, Matrix Computations, chapter 10.)
    """
    w = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    w = w / w.abs().amax((-2, -1), keepdim=True)  # squares of small numbers stay numbers
    count, size = len(w), w.shape[-1]
    steps = min(size, LANCZOS_STEPS)
    v = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(w).expand(count, size)
    basis = w.new_zeros(count, steps, size)
    tridiagonal = torch.zeros(count, steps, steps, dtype=torch.float64)
    for step in range(steps):
        norm = v.norm(dim=-1, keepdim=True)
        if step:
            tridiagonal[:, step, step - 1] = tridiagonal[:, step - 1, step] = norm[:, 0].cpu()
        basis[:, step] = v = torch.where(norm > 1e-6, v / norm, 0)
        v = (w.mT @ (w @ v[..., None]))[..., 0]
        tridiagonal[:, step, step] = (v * basis[:, step]).sum(-1).cpu()
        for _ in range(2):  # once leaves what rounding adds
            known = basis[:, : step + 1]
            v = v - (known.mT @ (known @ v[..., None]))[..., 0]
    scale = matrices.abs().amax((-2, -1))
    return torch.linalg.eigvalsh(tridiagonal)[:, -1].sqrt().to(scale) * scale


def _updates(student: nn.Module, before: dict[str, nn.Parameter]) -> Iterator[tuple[str, float, list[float]]]:
    """Of each parameter, by its name in the bare model: ‖ΔW‖_F² and the stable ranks of its matrices.

    An adapter's update s · B A is never formed where the weights below are those from before: with B = Q R and Aᵀ = Q' R' it
    has the singular values of s · R R'ᵀ, a matrix of rank by rank.
    """
    base: nn.Module = student.get_base_model() if hasattr(student, "peft_config") else student  # type: ignore[operator]
    adapters: dict[str, Any] = {f"{name}.base_layer.weight": m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        plain, adapter = name.replace(".base_layer.", "."), adapters.get(name)
        change = parameter.detach().float() - before[plain].detach().float()
        if adapter is not None and not change.any():
            a, b = (part["default"].weight.float() for part in (adapter.lora_A, adapter.lora_B))
            change = adapter.scaling["default"] * torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        elif adapter is not None:
            change += adapter.get_delta_weight("default")
        matrices = change.ndim in {2, 3} and min(change.shape[-2:]) > 1
        yield plain, change.square().sum().item(), stable_ranks(change) if matrices else []


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
