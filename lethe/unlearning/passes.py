"""What the passes of a run allocate, found by running them on the meta device (`lethe.unlearning.simulation`).

recipe, model on the meta device -> Passes: bytes of an update, of the optimizer, of fitting, caching and agreement
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.config import AffineConfig
from lethe.maps.affine import AffineMap
from lethe.methods.method import HELD_OUT, Losses, Method, Need, Progress
from lethe.models.activations import States, ending, read
from lethe.training.merged_lora import fast_passes
from lethe.training.optimizers import STATE_BYTES, make_optimizer, needs_masters
from lethe.unlearning import scores
from lethe.unlearning.changes import AGREEMENT_BATCH
from lethe.unlearning.simulation import META, Record, recording
from lethe.unlearning.teacher_cache import TOKENS
from lethe.unlearning.trained import by_block, trainable
from lethe.unlearning.update import Loss, Update, step_gradient
from lethe.unlearning.view import View

UNCAPPED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of models whose logits are not their output head's output. Their losses read the logits of all tokens."""
END = Progress(10**6, 1, 10**6)
"""The end of a run, where a method that trains one block after the other goes back through most of them."""
HEAP = 32 * 2**20
"""A CPU's allocator returns larger tensors to the system when they are freed. It retains smaller ones for later use."""

Outline = Callable[[], PreTrainedModel]
"""Makes the model on the meta device; each call makes another one."""


class Passes:
    """A recipe's model as it is trained (`student`) and as it was before (`frozen`), without weights, and their passes.

    `width`: tokens of the longest sequence. `cached`: the texts whose teacher's outputs are cached. Sizes are in bytes.
    """

    def __init__(self, config: Method, outline: Outline, width: int, cached: frozenset[str]):
        self.config, self.width, self.cached = config, width, cached
        self.needs, self.compared = config.needs(), config.compared()
        self.frozen: Any = outline().eval().requires_grad_(False)
        self.student = student_of(config, outline)
        if config.gradient_checkpointing:
            self.student.activation_checkpointing_enable()
        self.text = self.frozen.config.get_text_config()
        layers, hidden = config.mapped_layers, self.text.hidden_size
        weight = {n: torch.empty(hidden, hidden, device=META) for n in layers}
        self.maps = AffineMap(weight, {n: torch.empty(hidden, device=META) for n in layers})
        self.heads: Any = (None, None)
        if not any(getattr(self.text, name, None) for name in UNCAPPED):
            ours, theirs = self.student.get_output_embeddings(), self.frozen.get_output_embeddings()
            self.heads = (ours, theirs) if type(ours) is nn.Linear else (None, None)

    @functools.cached_property
    def begun(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What `Method.begin` returns, and the bytes at its peak: `gradients`, tensors like a trained parameter; `activations`.

        Every pass over a text has two updates: in the second, there is a result of the first.
        """
        student = self.student
        if type(self.config).begin is Method.begin:
            return {}, {}
        shapes = {tuple(p.shape) for p in student.parameters() if p.requires_grad}

        def over(
            text: str, parameters: dict[str, nn.Parameter], description: str, need: Need | None = None
        ) -> Iterator[Update]:
            def passes(name: str, loss: Loss | None) -> Losses:
                parts: Losses = {}
                for _ in range(min(2, self.config.gradient_accumulation_steps)):
                    parts = self._pass(name, loss, need)
                return parts

            return (Update(parameters, passes, Progress(number, 2, 2)) for number in range(2))

        student.train()
        with recording() as record:
            found = self.config.begin(student, over)
        return found, record.peak(lambda number, size, shape: "gradients" if shape in shapes else "activations")

    @functools.cached_property
    def update(self) -> dict[str, int]:
        """Gradients, activations and logits at the peak of an update's passes; `heap`: those in tensors below `HEAP`."""
        return self._peak(min(2, self.config.gradient_accumulation_steps))

    @functools.cached_property
    def trial(self) -> dict[str, int]:
        """The same of the batch before training, if it compares two losses; `copies`: weights that are moved in between."""
        return self._peak(1, compares=True)

    def _peak(self, batches: int, compares: bool = False) -> dict[str, int]:
        student, vocabulary, given = self.student, self.text.vocab_size, self.begun[0]
        student.train()
        copies, gradients = set(), set()
        with recording() as record, fast_passes(student, self.config.fast):
            if compares:
                self._pass("forget")
                gradients |= record.of(*(p.grad for p in student.parameters()))
                before = [p.detach().clone() for p in student.parameters() if p.grad is not None]
                copies = record.of(*before)
                student.zero_grad()
                self._pass("retain")
                gradients |= record.of(*(p.grad for p in student.parameters()))
                del before
                student.zero_grad()
            gradients |= self._update(batches, record, given)
        gradients |= record.of(*(p.grad for p in student.parameters()))

        def kind(number: int, size: int, shape: tuple[int, ...]) -> str:
            name = "gradients" if number in gradients else "logits" if shape[-1:] == (vocabulary,) else "activations"
            name = "copies" if number in copies else name
            return name if size >= HEAP else f"small {name}"

        found = record.peak(kind)
        student.zero_grad()
        names = ("gradients", "activations", "logits", "copies")
        parts = {name: found.get(name, 0) + found.get(f"small {name}", 0) for name in names}
        return parts | {"heap": sum(size for name, size in found.items() if name.startswith("small"))}

    def _update(self, batches: int, record: Record, given: dict[str, Tensor]) -> set[int]:
        """The passes of an update of so many batches. Returns the numbers of the gradients between them."""
        if not self.config.by_update:
            for _ in range(batches):
                for name in self.needs:
                    self._pass(name)
            return set()
        gradients: set[int] = set()

        def passes(name: str, loss: Loss | None) -> Losses:
            for _ in range(batches):
                self._pass(name, loss)
            gradients.update(record.of(*(p.grad for p in parameters.values())))
            return {}

        parameters = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        update = Update(parameters, passes, END, given=given, blocks=by_block(self.student, parameters))
        for name, gradient in step_gradient(self.config, update).items():
            parameters[name].grad = gradient
        return gradients

    def _pass(self, name: str, loss: Loss | None = None, need: Need | None = None) -> Losses:
        """A loss of one text of a batch, by default the method's, and its gradient. With `need`, only a teacher of it runs."""
        ids = torch.zeros(self.config.per_device_train_batch_size, self.width, dtype=torch.long, device=META)
        loss = loss or (lambda view: self.config.loss(name, view, END))
        found = self._view(name, need or self.config.need_at(name, END), ids, need is None)
        value, parts = loss(found)
        del found  # before the backward pass
        if torch.is_grad_enabled():
            value.backward()
        return {part: value.detach() for part, value in parts.items()}

    @functools.cached_property
    def optimizer(self) -> tuple[int, int]:
        """The optimizer's state, and what its step allocates beside it."""
        config, student = self.config, self.student
        if config.optimizer != "muon" and not needs_masters(student, config.optimizer):
            return STATE_BYTES[config.optimizer] * sum(p.numel() for p in student.parameters() if p.requires_grad), 0
        optimizer: Any = make_optimizer(student, config)
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with recording() as record:
            optimizer.step()
        held = record.of(*(value for state in optimizer.state.values() for value in state.values()))
        peak = record.peak(lambda number, size, shape: "state" if number in held else "temporaries")
        student.zero_grad()
        return sum(size for number, size, _ in record.events if number in held and size > 0), peak.get("temporaries", 0)

    @functools.cached_property
    def scoring(self) -> dict[str, int]:
        """Activations and logits of one pass while weights are scored (`scores.py`)."""
        model, vocabulary = self.frozen.requires_grad_(True), self.text.vocab_size
        ids = torch.zeros(scores.documents_in_pass(self.width), self.width, dtype=torch.long, device=META)
        with recording() as record:
            scores.nll(model, self.heads[1], ids, torch.ones_like(ids), ids.numel(), len(ids)).backward()
        gradients = record.of(*(p.grad for p in model.parameters()))  # only a group's are there, and counted with its sums
        record.events = [event for event in record.events if event[0] not in gradients]
        model.zero_grad()
        model.requires_grad_(False)
        found = record.peak(lambda number, size, shape: "logits" if shape[-1:] == (vocabulary,) else "activations")
        return {name: found.get(name, 0) for name in ("activations", "logits")}

    @functools.cached_property
    def mapping(self) -> int:
        """One batch of activations of both models while maps of the loss's layers are fitted."""
        layers = list(self.config.mapped_layers)
        ids = torch.zeros(AffineConfig.batch_size, min(self.width, self.config.max_length), dtype=torch.long, device=META)
        with recording() as record, torch.no_grad():
            found = [read(self.frozen, ids, layers).activations for _ in range(2)]
            pairs = [{n: values.flatten(0, 1).clone() for n, values in each.items()} for each in found]
        del found, pairs
        return record.most

    @functools.cached_property
    def building(self) -> int:
        """One batch of a teacher while its outputs are cached."""
        ids = torch.zeros(max(1, TOKENS // self.width), self.width, dtype=torch.long, device=META)
        sizes = []
        for need in (self.compared[name] for name in self.cached):
            with recording() as record, torch.no_grad():
                _Teacher(self, need, cached=False).states(ids, ids[:, 0])
            sizes.append(record.most)
        return max(sizes, default=0)

    @functools.cached_property
    def checking(self) -> int:
        """One batch of held-out text, compared with the reference."""
        ids = torch.zeros(self.config.per_device_train_batch_size, self.width, dtype=torch.long, device=META)
        with recording() as record, torch.no_grad():
            self._view(HELD_OUT, self.compared[HELD_OUT], ids).kl()
        return record.most

    @functools.cached_property
    def agreement(self) -> int:
        """One batch of all logits, as the records at the end compare them."""
        ids = torch.zeros(AGREEMENT_BATCH, min(self.width, self.config.max_length), dtype=torch.long, device=META)
        with recording() as record, torch.no_grad():
            self.frozen(input_ids=ids, use_cache=False)
        return record.most

    def token_bytes(self, need: Need) -> int:
        """A cached teacher's outputs for one token."""
        hidden, size = self.text.hidden_size, getattr(torch, self.config.teacher_dtype or self.config.dtype).itemsize
        ending = self.text.vocab_size if self.heads[1] is None else hidden
        return (4 if need.mapped else size) * len(need.layers) * hidden + size * need.logits * ending

    def _view(self, name: str, need: Need, ids: Tensor, runs: bool = True) -> View:
        documents, tokens = ids.shape[0], ids.numel()
        teacher: Any = _Teacher(self, need, name in self.cached and runs) if need.teacher else None
        variance = dict.fromkeys(need.layers, 1.0) if need.variance else None
        states = read(self.student, ids, list(need.layers), need.logits, self.heads[0]) if runs else States()
        given = vars(self).get("begun", ({}, {}))[0]  # nothing while `begun` itself is computed
        return View(ids, torch.ones_like(ids), ids[:, 0], states, tokens, documents, self.heads[0], teacher, variance, given)


class _Teacher:
    """A teacher of a simulated update, in place of `view.Teacher`: its passes, or its cache."""

    def __init__(self, passes: Passes, need: Need, cached: bool):
        self.passes, self.need, self.cached, self.head = passes, need, cached, passes.heads[1]

    @torch.no_grad()
    def states(self, input_ids: Tensor, index: Tensor) -> States:
        """What a cache returns, or a pass without gradients, with the maps."""
        passes, need = self.passes, self.need
        hidden, kind = passes.text.hidden_size, passes.frozen.dtype
        if self.cached:
            width = passes.text.vocab_size if self.head is None else hidden
            states = States({n: _empty(input_ids, hidden, torch.float32 if need.mapped else kind) for n in need.layers})
            states.output = _empty(input_ids, width, kind) if need.logits else None
            return states
        states = read(passes.frozen, input_ids, list(need.layers), need.logits, self.head)
        if need.mapped:
            states.activations = passes.maps(states.activations)
        return states

    def ending(self, input_ids: Tensor, layer: int | None, stream: Tensor) -> Tensor:
        """What later blocks make of `stream`."""
        return ending(self.passes.frozen, input_ids, layer, stream, self.head)


def student_of(config: Method, outline: Outline) -> Any:
    """The model that is trained, on the meta device, with adapters where the recipe has them."""
    with META:
        return trainable(config, outline())


def _empty(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*like.shape, width, dtype=dtype, device=META)
