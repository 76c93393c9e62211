"""The peak memory of a run, by part and by phase, from the shapes of its model.

    recipe, model on the meta device, Load -> estimate -> Estimate: bytes of one device by phase and part

Weights, optimizer state and caches are counted. Activations, logits, gradients and what an optimizer needs beside its state
are those of a simulated update (`lethe.unlearning.simulation`), so that the recipe's own loss decides.

What is in memory at a time: the model, once. Under LoRA the reference is the model with its adapters off. If all weights are
trained, the reference is a second model, and is there only if a loss reads it. The source has the blocks up to the last layer
that is read. Teachers whose outputs are cached leave the memory before training.

With N processes, `ddp` holds the model N times, and a copy of the gradients for the all-reduce. `fsdp` shards weights,
gradients and optimizer state: each device has 1/N of them, and the whole of two blocks and of what is outside the blocks.
Adapters are whole in both, with their gradients and optimizer state. Teachers with weights of their own are sharded in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import nn

from lethe import distributed
from lethe.errors import LetheError, printable
from lethe.maps.ridge import sums_bytes
from lethe.methods.method import HELD_OUT, Method, Need
from lethe.models.activations import blocks
from lethe.runs.machine import available_memory
from lethe.unlearning import scores
from lethe.unlearning.passes import Outline, Passes

if TYPE_CHECKING:
    from lethe.unlearning.prepare import Prepared

TOKEN = 40
"""Bytes of a token id in a Python list."""
CONTEXT = 600 * 2**20
"""Bytes that CUDA, cuBLAS and NCCL take on a GPU before a tensor is made."""
LATER = 64 * 2**20
"""Bytes that libraries take on a CPU after the run has begun."""
BUFFERS = 0.05
"""Reserve for what an allocator cannot use again: a share of all that is not there from beginning to end."""
DISTANCES = {"lora": 2, "full": 4}
"""Tensors as large as the largest one, in float32, that measuring the update's norm and stable rank takes."""

Parts = dict[str, int]


@dataclass(frozen=True)
class Load:
    """What the shapes of a model do not tell: text and machine.

    `width`: tokens of the longest sequence. `tokens`: by text, those of all sequences. `mapped_tokens`: those that maps are
    fitted on. `cached`: the texts whose teacher's outputs are cached. `libraries`: bytes that the process had before it loaded
    a model, on a CPU; on a GPU they are not in its memory.
    """

    width: int
    tokens: dict[str, int]
    mapped_tokens: int = 0
    cached: frozenset[str] = frozenset()
    processes: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gpu: bool = False
    libraries: int = 0


@dataclass
class Estimate:
    """Bytes of one device, by phase and part."""

    phases: dict[str, Parts]
    facts: dict[str, int] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> Parts:
        """The parts of the phase that takes most."""
        return self.phases[self.peak_phase]

    @property
    def by_phase(self) -> dict[str, int]:
        """The sum of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def choose_parallel(ddp: Estimate, memory: int) -> Literal["ddp", "fsdp"]:
    """How `parallel: auto` distributes a run: `ddp` if its estimate fits into the memory of one device, else `fsdp`."""
    return "ddp" if ddp.total <= memory else "fsdp"


@dataclass
class Shapes:
    """Bytes of a recipe's models: `weights` of the model with its adapters, `block` and `outside` of its largest block and
    outside its blocks, `whole` of a plain model, `trained` of the trained parameters, `largest` elements of one tensor.
    """

    weights: int
    block: int
    outside: int
    whole: int
    plain_block: int
    plain_outside: int
    trained: int
    trained_block: int
    trained_outside: int
    numbers: int
    largest: int

    @classmethod
    def of(cls, student: Any, frozen: nn.Module) -> Shapes:
        trained = [p for p in student.parameters() if p.requires_grad]
        parts = [list(block.parameters()) for block in blocks(student)]
        block, learnt = max(map(_bytes, parts)), max(_bytes(_trained(part)) for part in parts)
        return cls(
            weights=_bytes(student.parameters()),
            block=block,
            outside=_bytes(student.parameters()) - sum(map(_bytes, parts)),
            whole=_bytes(frozen.parameters()),
            plain_block=max(_bytes(one.parameters()) for one in blocks(frozen)),
            plain_outside=_bytes(frozen.parameters()) - sum(_bytes(one.parameters()) for one in blocks(frozen)),
            trained=_bytes(trained),
            trained_block=learnt,
            trained_outside=_bytes(trained) - sum(_bytes(_trained(part)) for part in parts),
            numbers=sum(p.numel() for p in trained),
            largest=max(p.numel() for p in frozen.parameters()),
        )


def estimate(config: Method, outline: Outline, load: Load) -> Estimate:
    """The peak memory of one device. The sum of a phase's parts is that of the process on a CPU."""
    with torch.random.fork_rng(devices=[]):
        return Phases(config, outline, load).estimate(load.processes, load.parallel)


class Phases:
    """The parts of each phase of one run on one device. What is simulated does not depend on the number of processes."""

    def __init__(self, config: Method, outline: Outline, load: Load):
        self.config, self.load = config, load
        with _simulated():
            self.passes = Passes(config, outline, load.width, load.cached)
        self.frozen, self.text = self.passes.frozen, self.passes.text
        self.shapes = Shapes.of(self.passes.student, self.frozen)
        self.needs, self.compared = config.needs(), config.compared()
        self.live = {name: need for name, need in self.compared.items() if name not in load.cached}

    def estimate(self, processes: int, parallel: Literal["ddp", "fsdp"]) -> Estimate:
        """All phases of the recipe, on one of so many devices.

        Raises:
            LetheError: the computation depends on values, so that it cannot be simulated.
        """
        self.load = dataclasses.replace(self.load, processes=processes, parallel=parallel)
        self.shards = processes if parallel == "fsdp" else 1
        self.trained_shards = self.shards if self.config.lora is None else 1
        with _simulated():
            phases = self._phases()
        count = sum(p.numel() for p in self.frozen.parameters())
        facts = {"model": self.shapes.whole, "parameters": count, "trained": self.shapes.numbers}
        return Estimate({name: self._with_rest(name, parts) for name, parts in phases.items()}, facts)

    def _phases(self) -> dict[str, Parts]:
        phases = {"loading": {"teachers": self._teachers(self.compared)}, "trial": self._trial()}
        if self.config.rewind_weights == "fisher":
            phases["scores"] = self._scores()
        if self.config.fits_maps and self.config.mapped_layers:
            tokens = 0 if self.load.gpu else TOKEN * self.load.mapped_tokens
            phases["maps"] = {
                "teachers": self._teachers({"forget": Need("source", self.config.mapped_layers)}),
                "maps": sums_bytes(self.text.hidden_size, len(self.config.mapped_layers)) + tokens,
                "activations": self.passes.mapping,
            }
        if self.load.cached:
            phases["teachers"] = {
                "teachers": self._teachers(self.compared),
                "maps": self._map_bytes(),
                "activations": self.passes.building,
            }
        if computed := self.passes.begun[1]:
            divided = {"gradients": computed.get("gradients", 0) // self.trained_shards}
            phases["method"] = computed | divided | {"teachers": self._teachers(self.needs)}
        phases["training"] = self._training()
        state = self.passes.optimizer[0] // self.trained_shards
        gathered = 4 * self.shapes.largest if self.trained_shards > 1 else 0
        if self.trained_shards > 1 and not self.load.gpu:  # in host memory, which rank 0 gathers a save in
            gathered += self.shapes.trained + self.passes.optimizer[0]
        phases["saving"] = {"optimizer": state, "gathered": gathered, "teachers": self._teachers(self.live)}
        if HELD_OUT in self.compared:
            checking = {"teachers": self._teachers(self.live) + self._cached_heads(), "activations": self.passes.checking}
            phases["budget"] = {"optimizer": state} | checking
        phases["evaluation"] = {"optimizer": state} | self._evaluation()
        return phases

    def _with_rest(self, phase: str, parts: Parts) -> Parts:
        """A phase with what every phase has. Parts of zero bytes are left out."""
        shapes, after = self.shapes, phase in {"training", "saving", "budget", "evaluation"}
        adapters = shapes.trained if self.config.lora else 0
        found = {
            "libraries": CONTEXT if self.load.gpu else self.load.libraries + LATER,
            "weights": (shapes.weights - adapters) // self.shards + adapters,
            **{part: size for part, size in parts.items() if part != "heap"},
            "method": _bytes(self.passes.begun[0].values()) if after else 0,
        }
        if after and not self.load.gpu:
            found["caches"] = self._cache_bytes()
        if self.shards > 1 and phase != "loading":
            found["gathered"] = found.get("gathered", 0) + 2 * shapes.block + shapes.outside
        found["buffers"] = round(BUFFERS * sum(size for part, size in found.items() if part not in {"libraries", "caches"}))
        return {part: size for part, size in found.items() if size}

    def _scores(self) -> Parts:
        """A batch while weights are scored: gradients and sums of a group of parameters. The source may be there already."""
        sizes = [scores.bytes_of(p) // self.shards for p in self.frozen.parameters()]
        group = max(*sizes, min(sum(sizes), scores.GROUP))
        read = {name: need for name, need in self.needs.items() if need.teacher == "source"}
        gradients = self.shapes.whole // self.shards if self.shards > 1 else 0  # FSDP2 computes those of all groups
        return self.passes.scoring | {"scores": group, "gradients": gradients, "teachers": self._teachers(read)}

    def _trial(self) -> Parts:
        """The batch before training, with live teachers. It moves float32 weights if there are two losses to compare."""
        shapes, shards = self.shapes, self.trained_shards
        compared = self.config.compares_gradients and shapes.trained == 4 * shapes.numbers
        passes = self.passes.trial if compared else self.passes.update
        divided = {part: passes[part] // shards for part in ("gradients", "copies")}
        return passes | divided | {"teachers": self._teachers(self.compared), "maps": self._map_bytes()}

    def _training(self) -> Parts:
        """The passes of an update, or the optimizer's step, if that takes more."""
        shapes = self.shapes
        state, temporaries = self.passes.optimizer
        passes = self.passes.update | {"gradients": self.passes.update["gradients"] // self.trained_shards}
        step = {"gradients": shapes.trained // self.trained_shards}
        peak = sum(size for part, size in passes.items() if part != "heap")
        stepping = step["gradients"] + temporaries > peak
        buckets = 0
        if self.load.processes > 1:
            buckets = 2 * (shapes.trained_block + shapes.trained_outside) if self.trained_shards > 1 else shapes.trained
        return {
            "teachers": self._teachers(self.live) + self._cached_heads(),
            "maps": self._map_bytes() if any(need.mapped for need in self.live.values()) else 0,
            **(step if stepping else passes),
            "optimizer": state // self.trained_shards + (temporaries if stepping else 0),
            "buckets": buckets,
        }

    def _evaluation(self) -> Parts:
        """The records at the end: agreement on a batch of documents, and the norm of the update by block.

        A teacher that is not in memory is streamed: all but its blocks, and one block at a time.
        """
        shapes, lora = self.shapes, self.config.lora is not None
        distances = 4 * DISTANCES["lora" if lora else "full"] * shapes.largest
        streamed = shapes.plain_block + shapes.plain_outside if self.config.needs_source or not lora else 0
        return {
            "teachers": self._teachers(self.live) + streamed,
            "activations": max(self.passes.agreement, distances),
            "retained": 0 if self.load.gpu else self.passes.update["heap"],
        }

    def _teachers(self, needs: dict[str, Need]) -> int:
        """Bytes of the teachers of these texts that are models of their own."""
        config, shapes = self.config, self.shapes
        kinds: dict[Any, tuple[int, bool]] = {}
        for need in needs.values():
            if need.teacher:
                last, whole = kinds.get(need.teacher, (-1, False))
                kinds[need.teacher] = max([last, *need.layers]), whole or need.logits or need.ending is not None
        if self._one_model:
            kinds.pop("reference", None)
        size = 0
        scale = getattr(torch, config.teacher_dtype or config.dtype).itemsize / getattr(torch, config.dtype).itemsize
        for last, whole in kinds.values():
            head = 0 if self.text.tie_word_embeddings else _bytes(self.frozen.get_output_embeddings().parameters())
            unread = (len(blocks(self.frozen)) - 1 - last) * shapes.plain_block + head
            size += round(scale * (shapes.whole - (0 if whole else unread)))
        count = self.load.processes
        gathered = 2 * shapes.plain_block + shapes.plain_outside if size and count > self.shards else 0
        return size // count + round(scale * gathered)

    def gathered_by_teachers(self, parallel: str) -> int:
        """Bytes of weights that the live teachers' passes of one batch gather from all shards."""
        shards, self.shards = self.shards, 1
        load, self.load = self.load, dataclasses.replace(self.load, processes=1)
        size, self.shards, self.load = self._teachers(self.live), shards, load
        own = self._one_model and any(need.teacher == "reference" for need in self.live.values())
        return size + (self.shapes.whole if own and parallel == "fsdp" else 0)

    def _cached_heads(self) -> int:
        """Bytes of the output heads that turn cached hidden states into logits, those that are not the model's own."""
        kinds = {need.teacher for name, need in self.compared.items() if name in self.load.cached and need.logits}
        kinds -= {need.teacher for need in self.live.values()} | ({"reference"} if self._one_model else set())
        head = self.passes.heads[1]
        return len(kinds) * _bytes(head.parameters()) if head is not None else 0

    @property
    def _one_model(self) -> bool:
        """Whether the reference is the model with its adapters off."""
        config = self.config
        return config.lora is not None and not config.moves_start and config.teacher_dtype in {None, config.dtype}

    def _map_bytes(self) -> int:
        return 4 * len(self.config.mapped_layers) * self.text.hidden_size * (self.text.hidden_size + 1)

    def _cache_bytes(self) -> int:
        return sum(self.load.tokens[name] * self.passes.token_bytes(self.compared[name]) for name in self.load.cached)


@contextlib.contextmanager
def _simulated() -> Iterator[None]:
    """Inside, what a pass without values cannot do is an error that says so."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, IndexError) as error:
        why = printable(error, 200)
        raise LetheError(f"memory: a pass of this model cannot be simulated without weights ({why})") from error


def _trained(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def taken() -> int:
    """Bytes that this process uses now for libraries and text; 0 on a GPU, whose memory these do not use."""
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def loaded(made: Prepared) -> int:
    """Bytes of the teachers' models that are in memory now."""
    return sum(model.bytes for model in (made.source, made.reference) if model)


def refuse_too_much(parts: Parts, teachers: int) -> None:
    """Refuse a run that does not fit into memory. The model is already loaded, with `teachers` bytes of teachers.

    `parts` may be empty: there is no estimate then.
    """
    free, needed = available_memory(), sum(parts.values())
    short = bool(parts) and needed - parts["libraries"] - parts["weights"] - teachers > free
    if distributed.total([short])[0]:
        raise LetheError(
            f"memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free beside the models; "
            f"lower per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing; "
            f"lethe check --memory {max(free, 2**28) / 2**30:.1f}GiB tries other settings"
        )
