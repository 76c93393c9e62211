"""The peak memory of a run, by part and by phase, from the shapes of its model.

    recipe, model on the meta device, Load -> estimate -> Estimate: bytes of one device by phase and part

Weights, optimizer state and caches are counted. Activations, logits, gradients and what an optimizer needs beside its state
are those of a simulated update (`lethe.unlearning.simulation`), so that the recipe's own loss decides.

What is in memory at a time: the model, once. Under LoRA the reference is the model with its adapters off. If all weights are
trained, the reference is a second model, and is there only if a loss reads it. The source has the blocks up to the last layer
that is read. Teachers whose outputs are cached leave the memory before training.

With N processes, `ddp` holds everything N times, and a copy of the gradients for the all-reduce. `fsdp` shards weights,
gradients and optimizer state: each device has 1/N of them, and the whole of two blocks and of what is outside the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.config import AffineConfig
from lethe.errors import LetheError, printable
from lethe.maps.affine import AffineMap
from lethe.maps.ridge import sums_bytes
from lethe.methods.method import Method, Need, Progress
from lethe.models.activations import States, blocks, read
from lethe.models.adapters import add_adapters
from lethe.training.merged_lora import fast_passes
from lethe.training.optimizers import STATE_BYTES, make_optimizer, needs_masters
from lethe.unlearning.changes import AGREEMENT_BATCH
from lethe.unlearning.simulation import META, recording
from lethe.unlearning.teacher_cache import TOKENS
from lethe.unlearning.view import View

if TYPE_CHECKING:
    from lethe.unlearning.prepare import Prepared

TOKEN = 40
"""Bytes of a token id in a Python list."""
CONTEXT = 600 * 2**20
"""Bytes that CUDA, cuBLAS and NCCL take on a GPU before a tensor is made."""
LATER = 96 * 2**20
"""Bytes that libraries take on a CPU after the run has begun."""
BUFFERS = 0.05
"""Reserve for what an allocator cannot use again: a share of all that is allocated and freed in the phase."""
DISTANCES = 6
"""Tensors as large as the largest trained one, in float32, that measuring the update's norm and stable rank takes."""
MOVING = {"activations", "logits", "gradients"}
UNCAPPED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of models whose logits are not their output head's output. Their losses read the logits of all tokens."""

Outline = Callable[[], PreTrainedModel]
"""Makes the model on the meta device; each call makes another one."""
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
            trained=_bytes(trained),
            trained_block=learnt,
            trained_outside=_bytes(trained) - sum(_bytes(_trained(part)) for part in parts),
            numbers=sum(p.numel() for p in trained),
            largest=max(p.numel() for p in trained),
        )


def estimate(config: Method, outline: Outline, load: Load) -> Estimate:
    """The peak memory of one device. The sum of a phase's parts is that of the process on a CPU."""
    return Phases(config, outline, load).estimate(load.processes, load.parallel)


class Phases:
    """The parts of each phase of one run on one device. What is simulated does not depend on the number of processes."""

    def __init__(self, config: Method, outline: Outline, load: Load):
        self.config, self.load = config, load
        self.frozen: Any = outline().eval().requires_grad_(False)
        self.student = student_of(config, outline)
        self.shapes = Shapes.of(self.student, self.frozen)
        self.text = self.frozen.config.get_text_config()
        needs = self.needs = config.needs()
        self.heads: Any = (None, None)
        if not any(getattr(self.text, name, None) for name in UNCAPPED):
            ours, theirs = self.student.get_output_embeddings(), self.frozen.get_output_embeddings()
            self.heads = (ours, theirs) if type(ours) is nn.Linear else (None, None)
        self.live = {name: need for name, need in needs.items() if need.teacher and name not in load.cached}
        self.mapped = next((need.layers for need in needs.values() if need.mapped), ())

    def estimate(self, processes: int, parallel: Literal["ddp", "fsdp"]) -> Estimate:
        """All phases of the recipe, on one of so many devices.

        Raises:
            LetheError: the computation depends on values, so that it cannot be simulated.
        """
        self.load = dataclasses.replace(self.load, processes=processes, parallel=parallel)
        self.shards = processes if parallel == "fsdp" else 1
        try:
            return self._estimate()
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, IndexError) as error:
            why = printable(error, 200)
            raise LetheError(f"memory: a pass of this model cannot be simulated without weights ({why})") from error

    def _estimate(self) -> Estimate:
        phases = {"loading": {"teachers": self._teachers(self.needs)}, "trial": self._trial()}
        if self.config.fits_maps and self.mapped:
            phases["maps"] = self._maps()
        built = {name: need for name, need in self.needs.items() if name in self.load.cached}
        if built:
            phases["teachers"] = {
                "teachers": self._teachers(self.needs),
                "maps": self._map_bytes() if any(need.mapped for need in built.values()) else 0,
                "activations": self._building,
            }
        phases["training"] = self._training()
        state = self._optimizer[0] // self.shards
        phases["saving"] = {"optimizer": state, "gathered": 4 * self.shapes.largest if self.shards > 1 else 0}
        phases["evaluation"] = {"optimizer": state} | self._evaluation()
        count = sum(p.numel() for p in self.frozen.parameters())
        facts = {"model": self.shapes.whole, "parameters": count, "trained": self.shapes.numbers}
        return Estimate({name: self._with_rest(name, parts) for name, parts in phases.items()}, facts)

    def _with_rest(self, phase: str, parts: Parts) -> Parts:
        """A phase with what every phase has. Parts of zero bytes are left out."""
        gathered = self.shards > 1 and phase != "loading"
        caches = 0 if self.load.gpu or phase not in {"training", "saving", "evaluation"} else self._cache_bytes()
        found = {
            "libraries": CONTEXT if self.load.gpu else self.load.libraries + LATER,
            "weights": self.shapes.weights // self.shards,
            **parts,
            "caches": caches,
        }
        if gathered:
            whole = 2 * self.shapes.block + self.shapes.outside
            found["gathered"] = found.get("gathered", 0) + whole
        changing = sum(size for part, size in found.items() if part not in {"libraries", "caches"})
        found["buffers"] = round(BUFFERS * changing)
        return {part: size for part, size in found.items() if size}

    def _teachers(self, needs: dict[str, Need]) -> int:
        """Bytes of the teachers of these texts that are models of their own."""
        config, shapes = self.config, self.shapes
        kinds: dict[Any, tuple[int, bool]] = {}
        for need in needs.values():
            if need.teacher:
                last, whole = kinds.get(need.teacher, (-1, False))
                kinds[need.teacher] = max([last, *need.layers]), whole or need.logits
        if self._one_model:
            kinds.pop("reference", None)
        size = 0
        scale = getattr(torch, config.teacher_dtype or config.dtype).itemsize / getattr(torch, config.dtype).itemsize
        for last, whole in kinds.values():
            head: Any = self.frozen.get_output_embeddings()
            tied = self.text.tie_word_embeddings
            after = 0 if tied else _bytes(head.parameters())
            unread = (len(blocks(self.frozen)) - 1 - last) * shapes.plain_block + after
            size += round(scale * (shapes.whole - (0 if whole else unread)))
        return size // self.shards

    def _cached_heads(self) -> int:
        """Bytes of the output heads that turn cached hidden states into logits, those that are not the model's own."""
        kinds = {need.teacher for name, need in self.needs.items() if name in self.load.cached and need.logits}
        kinds -= {need.teacher for need in self.live.values()} | ({"reference"} if self._one_model else set())
        return len(kinds) * _bytes(self.heads[1].parameters()) if self.heads[1] is not None else 0

    @property
    def _one_model(self) -> bool:
        """Whether the reference is the model with its adapters off."""
        config = self.config
        return config.lora is not None and not config.rewind and config.teacher_dtype in {None, config.dtype}

    def _map_bytes(self) -> int:
        hidden = self.text.hidden_size
        return 4 * len(self.mapped) * hidden * (hidden + 1)

    def _cache_bytes(self) -> int:
        return sum(self.load.tokens[name] * self.token_bytes(self.needs[name]) for name in self.load.cached)

    def token_bytes(self, need: Need) -> int:
        """Bytes of a cached teacher's outputs for one token."""
        size = getattr(torch, self.config.teacher_dtype or self.config.dtype).itemsize
        ending = self.text.vocab_size if self.heads[1] is None else self.text.hidden_size
        return (4 if need.mapped else size) * len(need.layers) * self.text.hidden_size + size * need.logits * ending

    def _maps(self) -> Parts:
        """Fitting: sums of all layers, and one batch of activations of both models."""
        return {
            "teachers": self._teachers({"forget": Need("source", self.mapped)}),
            "maps": sums_bytes(self.text.hidden_size, len(self.mapped))
            + (0 if self.load.gpu else TOKEN * self.load.mapped_tokens),
            "activations": self._mapping,
        }

    @functools.cached_property
    def _mapping(self) -> int:
        layers = list(self.mapped)
        ids = torch.zeros(AffineConfig.batch_size, min(self.load.width, self.config.max_length), dtype=torch.long, device=META)
        with recording() as record, torch.no_grad():
            found = [read(self.frozen, ids, layers).activations for _ in range(2)]
            pairs = [{n: values.flatten(0, 1).clone() for n, values in each.items()} for each in found]
        del found, pairs
        return record.most

    @functools.cached_property
    def _building(self) -> int:
        """Bytes of a batch while caches are built."""
        needs = (need for name, need in self.needs.items() if name in self.load.cached)
        return max(self._pass(need, max(1, TOKENS // self.load.width), self.load.width) for need in needs)

    def _pass(self, need: Need, documents: int, width: int) -> int:
        """Bytes of a teacher's pass over documents without gradients."""
        ids = torch.zeros(documents, width, dtype=torch.long, device=META)
        with recording() as record, torch.no_grad():
            _Teacher(self, need).states(ids, ids[:, 0])
        return record.most

    def _trial(self) -> Parts:
        """The batch before training, with live teachers and a copy of the trained weights, which it moves and restores."""
        return self._update | {
            "teachers": self._teachers(self.needs),
            "maps": self._map_bytes(),
            "gradients": self.shapes.trained // self.shards,
            "copies": self.shapes.trained // self.shards,
        }

    def _training(self) -> Parts:
        """Gradients, activations and logits of an update, or the optimizer's step, if that takes more."""
        shapes, live = self.shapes, self.live.values()
        state, temporaries = self._optimizer
        update = self._update | {"gradients": self._update["gradients"] // self.shards}
        step = {"gradients": shapes.trained // self.shards, "activations": 0, "logits": 0}
        peak = update if sum(update.values()) >= step["gradients"] + temporaries else step
        buckets = 0
        if self.load.processes > 1:
            buckets = 2 * (shapes.trained_block + shapes.trained_outside) if self.shards > 1 else shapes.trained
        return {
            "teachers": self._teachers(self.live) + self._cached_heads(),
            "maps": self._map_bytes() if any(need.mapped for need in live) else 0,
            **peak,
            "optimizer": state // self.shards + (temporaries if peak is step else 0),
            "buckets": buckets,
        }

    @functools.cached_property
    def _optimizer(self) -> tuple[int, int]:
        """Bytes of the optimizer's whole state, and of what its step allocates beside it."""
        config, student = self.config, self.student
        if config.optimizer != "muon" and not needs_masters(student, config.optimizer):
            return STATE_BYTES[config.optimizer] * self.shapes.numbers, 0
        optimizer: Any = make_optimizer(student, config)
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with recording() as record:
            optimizer.step()
        held = record.of(*(value for state in optimizer.state.values() for value in state.values()))
        peak = record.peak(lambda number, last: "state" if number in held else "temporaries")
        student.zero_grad()
        return sum(size for number, size, _ in record.events if number in held and size > 0), peak.get("temporaries", 0)

    @functools.cached_property
    def _update(self) -> Parts:
        """Bytes at the peak of the forward and backward passes of an update."""
        config, student = self.config, self.student
        shape = config.per_device_train_batch_size, self.load.width
        if config.gradient_checkpointing:
            student.activation_checkpointing_enable()
        head = self.heads[0]
        student.train()
        with recording() as record, fast_passes(student, config.fast):
            for _ in range(min(2, config.gradient_accumulation_steps)):
                ids = torch.zeros(shape, dtype=torch.long, device=META)
                views = {name: self._view(name, need, ids, head) for name, need in self.needs.items()}
                loss, losses = config.loss(views.get("forget"), views.get("retain"), Progress(0, 1, 1))  # type: ignore[arg-type]
                loss.backward()
                del views, loss, losses, ids
        gradients = record.of(*(p.grad for p in student.parameters()))
        vocabulary = self.text.vocab_size
        found = record.peak(
            lambda number, last: "gradients" if number in gradients else "logits" if last == vocabulary else "activations"
        )
        student.zero_grad()
        return {"gradients": 0, "activations": 0, "logits": 0} | found

    def _view(self, name: str, need: Need, ids: Tensor, head: Any) -> View:
        documents, tokens = ids.shape[0], ids.numel()
        teacher: Any = _Teacher(self, need, name in self.load.cached) if need.teacher else None
        variance = dict.fromkeys(need.layers, 1.0) if need.variance else None
        states = read(self.student, ids, list(need.layers), need.logits, head)
        return View(ids, torch.ones_like(ids), ids[:, 0], states, tokens, documents, head, teacher, variance)

    def _evaluation(self) -> Parts:
        """The records at the end: agreement on a batch of documents, and the norm of the update by block."""
        distances = 4 * DISTANCES * self.shapes.largest
        return {
            "teachers": 0 if self.config.lora else self.shapes.block,
            "activations": max(self._agreement, distances),
        }

    @functools.cached_property
    def _agreement(self) -> int:
        width = min(self.load.width, self.config.max_length)
        with recording() as record, torch.no_grad():
            self.frozen(input_ids=torch.zeros(AGREEMENT_BATCH, width, dtype=torch.long, device=META), use_cache=False)
        return record.most


class _Teacher:
    """A teacher of a simulated update, in place of `view.Teacher`: its passes, or its cache."""

    def __init__(self, phases: Phases, need: Need, cached: bool = False):
        self.phases, self.need, self.cached, self.head = phases, need, cached, phases.heads[1]

    @torch.no_grad()
    def states(self, input_ids: Tensor, index: Tensor) -> States:
        """What a cache returns, or a pass without gradients, with the maps."""
        phases, need = self.phases, self.need
        hidden, kind = phases.text.hidden_size, phases.frozen.dtype
        if self.cached:
            ending = phases.text.vocab_size if self.head is None else hidden
            states = States({n: _empty(input_ids, hidden, torch.float32 if need.mapped else kind) for n in need.layers})
            states.output = _empty(input_ids, ending, kind) if need.logits else None
            return states
        states = read(phases.frozen, input_ids, list(need.layers), need.logits, self.head)
        if need.mapped:
            weight = {n: torch.empty(hidden, hidden, device=META) for n in need.layers}
            states.activations = AffineMap(weight, {n: torch.empty(hidden, device=META) for n in need.layers})(
                states.activations
            )
        return states


def student_of(config: Method, outline: Outline) -> Any:
    """The model that is trained, on the meta device, with adapters where the recipe has them."""
    with META:
        model = outline()
        if config.lora is None:
            return model.requires_grad_(True)
        layers = [len(blocks(model)) - 1] if config.layers is None else config.layers
        return add_adapters(model, config.lora, layers, config.seed)


def _empty(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*like.shape, width, dtype=dtype, device=META)


def _trained(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def available_memory() -> int:
    """Free memory in bytes: of the GPU if there is one, else of the machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def taken() -> int:
    """Bytes that this process uses now for libraries and text; 0 on a GPU, whose memory these do not use."""
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def loaded(made: Prepared) -> int:
    """Bytes of the teachers' models that are in memory now."""
    return sum(model.bytes for model in (made.source, made.reference) if model)


def refuse_too_much(parts: Parts, teachers: int) -> None:
    """Refuse a run that does not fit into memory. The model is already loaded, with `teachers` bytes of teachers."""
    free, needed = available_memory(), sum(parts.values())
    if needed - parts["libraries"] - parts["weights"] - teachers > free:
        raise LetheError(
            f"memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free beside the models; "
            f"lower per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing; "
            f"lethe check --memory {max(free, 2**28) / 2**30:.1f}GiB tries other settings"
        )
