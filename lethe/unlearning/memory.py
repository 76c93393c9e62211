"""The memory that a run will take, by part, estimated from the loaded models before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from lethe.errors import LetheError
from lethe.maps.ridge import sums_bytes
from lethe.objectives.losses import CHUNK
from lethe.training.optimizers import STATE_BYTES, needs_masters
from lethe.unlearning.changes import AGREEMENT_BATCH

if TYPE_CHECKING:
    from lethe.unlearning.prepare import Prepared

RECOMPUTED = 4
"""Times a block's activations that its second pass and its gradients take under gradient checkpointing; measured, at most."""
TOKEN = 40
"""Bytes of a token id in a list of Python."""
BUFFERS, LATER = 0.08, 96 * 2**20
"""What is set aside for all that the estimate does not list: a share of the rest, and what libraries take once they work."""


def estimate(made: Prepared, width: int, document: int, tokens: int, libraries: int) -> dict[str, int]:
    """Estimated peak memory in bytes by part; their sum is the process's on a CPU, the device's on a GPU.

    `document`: activations kept for the backward pass by the longest pair of documents, `width` tokens at most. `tokens`: of
    the text that maps are fitted on. `libraries`: what the process took before it loaded a model. Logits are kept four times:
    two models, and the float32 intermediates of the KL; of one chunk of tokens, where the output heads are known
    (`objectives.losses`). `other` is by how much fitting maps, a save or what is recorded at the end take more than an update;
    `buffers` is what is too small or too short to list.
    """
    config, trainer = made.config, made.trainer
    student: Any = trainer.model
    trained = [p for p in student.parameters() if p.requires_grad]
    numbers, moved = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    state = STATE_BYTES[config.optimizer] + 4 * needs_masters(student, config.optimizer)
    text = student.config.get_text_config()
    batch, hidden = config.per_device_train_batch_size, text.hidden_size
    kept = batch * document
    if config.gradient_checkpointing:  # the blocks' inputs of both texts, and what computing one block again takes
        inputs = 2 * text.num_hidden_layers * trained[0].element_size() * batch * width * hidden
        kept = RECOMPUTED * kept // text.num_hidden_layers + inputs
    logits = 4 * 4 * (min(batch * width, CHUNK) if trainer.head is not None else batch * width) * text.vocab_size
    mapped = len(config.mapped_layers)
    found = {
        "libraries": libraries,
        "weights": _bytes(student),
        "teachers": sum(_bytes(model) for model in (made.source, made.reference) if model),
        "maps": 4 * mapped * hidden * (hidden + 1),
        "gradients": moved,
        "optimizer": state * numbers,
        "activations": kept + logits,
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


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def refuse_too_much(parts: dict[str, int]) -> None:
    """Refuse what cannot fit into memory, the models being there already.

    Raises:
        LetheError: the estimate is more than there is.
    """
    free, needed = available_memory(), sum(parts.values())
    if needed - parts["libraries"] - parts["weights"] - parts["teachers"] > free:
        raise LetheError(
            f"memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free beside the models; "
            f"lower per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing"
        )
