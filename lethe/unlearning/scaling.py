"""What a run costs on many devices: computation (`lethe.models.flops`), traffic between devices, disk for caches, hours.

    hours = max(FLOPs / (devices · peak · utilisation), bytes sent by one device / bandwidth)

The maximum assumes that devices compute while they send. Bytes that one device sends in an update, with N devices:

    ddp           (2 G + A T) (N − 1) / N             all-reduce of the gradients; passes of teachers gather their weights
    fsdp          A (K (2 W + G) + T) (N − 1) / N     weights are gathered forward and backward, gradients are reduced
    fsdp, LoRA    (2 G + A (2 K W + T)) (N − 1) / N   frozen weights are gathered; adapters are averaged as in ddp

G: bytes of gradients. W: bytes of the sharded weights. T: bytes of the teachers that run live and are models of their own;
under fsdp with LoRA also the reference. A: batches of one device in an update. K: texts in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lethe.methods.method import Method
from lethe.models.flops import Flops
from lethe.training.check import plan
from lethe.unlearning.memory import Phases


@dataclass(frozen=True)
class Device:
    """A device and its links. `flops`: peak per second. `inside`, `between`: bytes per second and direction that a device
    sends to another one in its node, and in another node. `utilisation`: share of the peak that matmuls of a run reach.
    """

    name: str
    memory: int
    flops: float
    inside: float
    between: float
    node: int
    utilisation: float


H100 = Device("H100 SXM", 80 * 2**30, 989e12, 450e9, 50e9, 8, 0.4)
"""bfloat16 without sparsity, NVLink 4, one 400 Gbit/s link for each device."""


@dataclass
class Cost:
    """Of a whole run, except `traffic`: bytes that one device sends in an update. `disk`: bytes of caches. `bound`: what
    decides the hours.
    """

    flops: float
    updates: int
    traffic: int
    disk: int
    hours: float
    bound: Literal["computation", "link"]


def cost(config: Method, phases: Phases, processes: int, parallel: str, documents: int, device: Device = H100) -> Cost:
    """The cost of a run on `processes` devices, with so many documents of each text, all of `max_length` tokens.

    `phases` are those of the same recipe. Fitting maps and evaluation are not counted.
    """
    per_device = -(-documents // processes)
    planned = plan(config, per_device)
    student, frozen = Flops(phases.passes.student), Flops(phases.frozen)
    flops = 0.0
    for name, need in config.needs().items():
        one = [config.max_length], need.depth, need.logits
        seen = documents * planned["epochs"]
        flops += seen * (student.forward(*one) + student.backward(*one, config.gradient_checkpointing))
        if need.ending:  # forward and back
            each = [frozen.ending(one[0], n if need.ending == "blocks" else None) for n in need.layers]
            flops += 2 * seen * (sum(each) / len(each) if need.ending == "blocks" else sum(each))
            continue
        flops += (documents if name in phases.load.cached else seen if need.teacher else 0) * frozen.forward(*one)
    batches = config.gradient_accumulation_steps
    traffic = _traffic(config, phases, processes, parallel, batches)
    link = device.inside if processes <= device.node else device.between
    computing = flops / (processes * device.flops * device.utilisation)
    sending = planned["steps"] * traffic / link
    bound: Any = "computation" if computing >= sending else "link"
    cached = [need for need in config.needs().values() if need.teacher and not need.ending]
    disk = sum(documents * config.max_length * phases.passes.token_bytes(need) for need in cached)
    return Cost(flops, planned["steps"], traffic, disk, max(computing, sending) / 3600, bound)


def _traffic(config: Method, phases: Phases, processes: int, parallel: str, batches: int) -> int:
    """Bytes that one device sends in an update of so many batches."""
    shapes, texts = phases.shapes, len(config.needs())
    share = (processes - 1) / processes
    gathered = phases.gathered_by_teachers(parallel)
    if parallel == "fsdp" and config.lora:
        gathered += 2 * texts * (shapes.weights - shapes.trained)
    elif parallel == "fsdp":
        return round(batches * share * (texts * (2 * shapes.weights + shapes.trained) + gathered))
    return round(share * (2 * shapes.trained + batches * gathered))
