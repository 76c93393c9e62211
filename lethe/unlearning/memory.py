"""The peak memory of a run by part, estimated from the loaded models before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from lethe.errors import LetheError
from lethe.maps.ridge import sums_bytes
from lethe.models.activations import blocks
from lethe.objectives.losses import CHUNK
from lethe.training.optimizers import STATE_BYTES, needs_masters
from lethe.unlearning.changes import AGREEMENT_BATCH

if TYPE_CHECKING:
    from lethe.unlearning.prepare import Prepared
    from lethe.unlearning.view import Teacher

RECOMPUTED = 4
"""Memory of one block's recomputation and gradients under gradient checkpointing, as a multiple of its activations.

An upper bound of what was measured."""
TOKEN = 40
"""Bytes of a token id in a Python list."""
BUFFERS, LATER = 0.08, 96 * 2**20
"""Reserve for memory that the estimate does not list: a share of the sum, and the bytes that libraries allocate later."""


def estimate(
    made: Prepared, width: int, document: int, tokens: int, libraries: int, teachers: dict[str, str]
) -> dict[str, int]:
    """Estimated peak memory in bytes by part. The sum is that of the process on a CPU, and that of the device on a GPU.

    Args:
        width: tokens of the longest document.
        document: bytes of activations that the longest pair of documents saves for the backward pass.
        tokens: number of tokens in the text that maps are fitted on.
        libraries: bytes that the process used before it loaded a model.
        teachers: by text, whether its teacher is cached or live. A cached one is in memory until its cache is built.

    Logits are counted four times: those of two models, and the float32 intermediates of the KL. If the output heads are
    known, these are the logits of one chunk of tokens (`objectives.losses`). `other` is what fitting maps, a save or the
    records at the end need beyond an update. `buffers` is a reserve for everything that is not listed.
    """
    config, trainer = made.config, made.trainer
    student: Any = trainer.model
    trained = [p for p in student.parameters() if p.requires_grad]
    numbers, moved = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    state = STATE_BYTES[config.optimizer] + 4 * needs_masters(student, config.optimizer)
    text = student.config.get_text_config()
    batch, hidden = config.per_device_train_batch_size, text.hidden_size
    saved = batch * document
    if config.gradient_checkpointing:  # the blocks' inputs of both texts, and what computing one block again takes
        inputs = 2 * text.num_hidden_layers * trained[0].element_size() * batch * width * hidden
        saved = RECOMPUTED * saved // text.num_hidden_layers + inputs
    logits = 4 * 4 * (min(batch * width, CHUNK) if trainer.head is not None else batch * width) * text.vocab_size
    mapped = len(config.mapped_layers)
    before = loaded(made)
    held = sum(_held(trainer.teachers, teachers).values())
    found = {
        "libraries": libraries,
        "weights": _bytes(student),
        "teachers": held,
        "maps": 4 * mapped * hidden * (hidden + 1),
        "gradients": moved,
        "optimizer": state * numbers,
        "activations": saved + logits,
    }
    update = found["gradients"] + found["optimizer"] + found["activations"]
    end = found["optimizer"] + max(moved, _streamed(student) + 4 * AGREEMENT_BATCH * width * text.vocab_size)
    fit = before - held + sums_bytes(hidden, mapped) + (0 if torch.cuda.is_available() else TOKEN * tokens)
    found["other"] = max(0, max(fit, end) - update)
    return found | {"buffers": LATER + round(BUFFERS * sum(found.values()))}


def available_memory() -> int:
    """Free memory in bytes: of the GPU if there is one, else of the machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def taken() -> int:
    """Bytes that this process uses now for libraries and text; 0 on a GPU, whose memory these do not use."""
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _held(found: dict[str, Teacher], how: dict[str, str]) -> dict[int, int]:
    """Bytes of each teacher's model that training holds: all of a live one, the output head of a cached one."""
    heads = {id(t.model): _bytes(t.head) for t in found.values() if t.head is not None and t.model.bytes}
    return heads | {id(t.model): t.model.bytes for text, t in found.items() if not how[text].startswith("cached")}


def loaded(made: Prepared) -> int:
    """Bytes of the teachers' models that are in memory now."""
    return sum(model.bytes for model in (made.source, made.reference) if model)


def _streamed(student: nn.Module) -> int:
    """Bytes of a model whose blocks are read from disk: all but the blocks, and one block."""
    each = [_bytes(block) for block in blocks(student)]
    return _bytes(student) - sum(each) + max(each)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def refuse_too_much(parts: dict[str, int], teachers: int) -> None:
    """Refuse a run that does not fit into memory. The models are already loaded, with `teachers` bytes of teachers."""
    free, needed = available_memory(), sum(parts.values())
    if needed - parts["libraries"] - parts["weights"] - teachers > free:
        raise LetheError(
            f"memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free beside the models; "
            f"lower per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing"
        )
