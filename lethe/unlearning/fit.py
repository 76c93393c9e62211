"""Whether a run fits into the memory of its devices, and what to change if not: `lethe check --devices 4 --memory 80GiB`.

    config.json -> the model on the meta device -> estimate (lethe.unlearning.memory) -> largest batch, changes that help

No weights and no text are read, so a laptop can plan for a model that it could not load. Every document is taken to have
`max_length` tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import psutil
import torch

from lethe import distributed
from lethe.config import MAPPED, UNLEARNED, LoraSettings, memory_bytes
from lethe.errors import LetheError
from lethe.methods.method import HELD_OUT
from lethe.models import refs
from lethe.runs.machine import available_memory
from lethe.training.check import plan as training_plan
from lethe.training.check import refuse_8bit, refuse_rank
from lethe.unlearning.check import refuse_types, sizes
from lethe.unlearning.memory import Estimate, Load, Phases, choose_parallel, taken

MOST_DEVICES = 64
LARGEST_BATCH, SECANTS = 4096, 4


def fit(config: Any) -> dict[str, Any]:
    """The memory that a run takes on each device, the largest batch that fits, and changes that make it fit.

    Raises:
        LetheError: the recipe cannot work on this model.
    """
    model = refs.resolve(config.model, config.out, weights=False)
    refs.refuse_layers(model, config.layers if config.layers and config.reads_layers else [0])
    refs.refuse_length(config.max_length, model)
    config.refuse_model(model)
    refuse_rank(config, model)
    refuse_types(config)
    refuse_8bit(config, config.devices or 1)
    documents = documents_of(config)
    planned = training_plan(config, sizes(config, documents, documents))
    on_gpu = torch.cuda.is_available() and config.device == "gpu"
    free = available_memory() if on_gpu else psutil.virtual_memory().available // (config.devices or 1)
    memory = memory_bytes(config.memory) if config.memory else free
    estimates = _Estimates(model, config.device == "gpu")
    devices = config.devices or 1
    parallel, found = estimates.best(config, devices, memory)
    fits = found.total <= memory
    return {
        "model": {"name": config.model, "parameters": found.facts["parameters"], "trained": found.facts["trained"]},
        "steps": planned["steps"],
        "effective_batch": planned["effective_batch"],
        "devices": devices,
        "parallel": parallel if devices > 1 else None,
        "memory": memory,
        "peak": found.total,
        "peak_phase": found.peak_phase,
        "fits": fits,
        "largest_batch": estimates.largest_batch(config, devices, parallel, memory),
        "phases": found.phases,
        "three_copies": three_copies(found),
        "changes": [] if fits else estimates.changes(config, devices, memory),
    }


def three_copies(found: Estimate) -> dict[str, int]:
    """The parts of training if the reference and the source were whole models beside the trained one the whole time."""
    parts = found.phases["training"]
    return parts | {"teachers": 2 * found.facts["model"]}


def documents_of(config: Any) -> int:
    """Documents of each text, as far as the recipe says."""
    return config.num_train_examples or UNLEARNED


def cached_texts(config: Any) -> frozenset[str]:
    """The texts whose teacher is cached. Under `auto` it is, if training reads documents more than once; held-out text is."""
    texts = frozenset(text for text, need in config.compared().items() if not need.ending)
    if config.teacher_cache != "auto":
        return texts if config.teacher_cache == "cached" else frozenset()
    again = config.layered is not None or training_plan(config, documents_of(config))["epochs"] > 1
    return texts if again else texts & {HELD_OUT}


def parallel_of(config: Any, model: refs.ModelRef) -> Literal["ddp", "fsdp"]:
    """How the processes of this run divide it: as set, or by the memory of this device."""
    if config.parallel != "auto" or distributed.world() == 1:
        return "fsdp" if config.parallel == "fsdp" else "ddp"

    def choose() -> Literal["ddp", "fsdp"]:
        try:
            found = _Estimates(model, torch.cuda.is_available()).of(config, distributed.world(), "ddp")
        except LetheError:  # a model that cannot be simulated
            return "ddp"
        return choose_parallel(found, available_memory())

    return distributed.from_first(choose)


class _Estimates:
    """Estimates of one model under several recipes, for GPUs or for CPUs."""

    def __init__(self, model: refs.ModelRef, gpu: bool):
        self.model, self.gpu = model, gpu
        self.libraries = taken()
        self.known: dict[str, Phases] = {}

    def of(self, config: Any, devices: int, parallel: Literal["ddp", "fsdp"]) -> Estimate:
        """The estimate of a recipe on so many devices."""
        phases = self.known.get(str(config)) or self._phases(config)
        self.known = {str(config): phases} | self.known
        return phases.estimate(devices, parallel)

    def _phases(self, config: Any) -> Phases:
        documents = documents_of(config) * config.max_length
        held_out = {HELD_OUT: config.budget.documents * config.max_length} if HELD_OUT in config.compared() else {}
        maps = (config.maps.documents if config.maps else 0) or MAPPED
        load = Load(
            width=config.max_length,
            tokens={text: documents * (1 + (text == "retain" and config.layered is not None)) for text in config.needs()}
            | held_out,
            mapped_tokens=maps * config.max_length if config.fits_maps else 0,
            cached=cached_texts(config),
            gpu=self.gpu,
            libraries=self.libraries,
        )
        return Phases(config, lambda: refs.outline(self.model, config.dtype), load)

    def best(self, config: Any, devices: int, memory: int) -> tuple[Literal["ddp", "fsdp"], Estimate]:
        """How the run is distributed, and its estimate."""
        if config.parallel == "fsdp" and devices > 1:
            return "fsdp", self.of(config, devices, "fsdp")
        ddp = self.of(config, devices, "ddp")
        if config.parallel == "ddp" or devices == 1 or choose_parallel(ddp, memory) == "ddp":
            return "ddp", ddp
        return "fsdp", self.of(config, devices, "fsdp")

    def largest_batch(self, config: Any, devices: int, parallel: Literal["ddp", "fsdp"], memory: int) -> int:
        """The largest per_device_train_batch_size that fits, found by secants; 0 if not even one document does."""

        def total(batch: int) -> int:
            return self.of(dataclasses.replace(config, per_device_train_batch_size=batch), devices, parallel).total

        low = config.per_device_train_batch_size
        known = {low: total(low), 2 * low: total(2 * low)}
        for _ in range(SECANTS):
            (left, below), (right, above) = sorted(known.items(), key=lambda each: abs(each[1] - memory))[:2]
            slope = max(1, (above - below) // (right - left))
            guess = min(LARGEST_BATCH, max(1, left + (memory - below) // slope))
            if guess in known:
                break
            known[guess] = total(guess)
        return max((batch for batch, needed in known.items() if needed <= memory), default=0)

    def changes(self, config: Any, devices: int, memory: int) -> list[dict[str, Any]]:
        """Changes of the recipe with the peak memory they lead to: one at a time, and then together.

        With more devices, only the smallest number that fits.
        """
        tried: list[dict[str, Any]] = []
        for change in _changes(config, devices):
            if "devices" in change and tried and tried[-1]["fits"] and tried[-1]["change"].keys() == change.keys():
                continue
            settings = {name: value for name, value in change.items() if name != "devices"}
            try:
                changed = dataclasses.replace(config, **settings)
                refuse_types(changed)
                refuse_8bit(changed, count := change.get("devices", devices))
            except LetheError:  # it has no effect on this recipe, or is refused with it
                continue
            parallel, found = self.best(changed, count, memory)
            said = {name: "r 16" if name == "lora" else value for name, value in change.items()}
            if tried and "devices" in change and tried[-1]["change"].keys() == change.keys():
                tried.pop()  # fewer devices, which do not fit
            tried.append({"change": said, "parallel": parallel, "peak": found.total, "fits": found.total <= memory})
        return tried


def _changes(config: Any, devices: int) -> list[dict[str, Any]]:
    single: list[dict[str, Any]] = []
    if config.per_device_train_batch_size > 1:
        single.append({"per_device_train_batch_size": 1})
    if not config.gradient_checkpointing:
        single.append({"gradient_checkpointing": True})
    if config.compared() and not cached_texts(config):
        single.append({"teacher_cache": "cached"})
    if config.optimizer in {"adamw", "muon"}:
        single.append({"optimizer": "adamw_8bit"})
    if config.lora is None:
        single.append({"lora": LoraSettings()})
    light = {
        name: value
        for change in single
        for name, value in change.items()
        if name in {"gradient_checkpointing", "teacher_cache"}
    }
    several = [light] if len(light) > 1 else []
    if light and config.lora is None:
        several.append(light | {"lora": LoraSettings()})
    more = [devices * 2**i for i in range(1, 7) if devices * 2**i <= MOST_DEVICES]
    return single + several + [{"devices": count} for count in more] + [light | {"devices": count} for count in more if light]
