"""A score for every weight, and the share of all weights that has the highest scores.

    texts -> fisher -> scores.safetensors -> Highest: of each parameter, which of its weights -> start.py rewinds these

Fisher scores say how much more a weight serves the forget text than the retain text:

    score = F_forget / F_retain,   F = Σ over batches of (∂ NLL / ∂θ)²

NLL is the mean over the predicted tokens of one batch, which has `BATCH` documents. So F is the diagonal of the empirical
Fisher information of batches, not of single documents. A weight that the forget text gives no gradient has score 0, also if the
retain text gives it none. A weight that only the forget text gives a gradient has score ∞.

The two sums of `GROUP` bytes of weights are in memory at a time. A larger model reads the text once for each group. Every
process computes its part of each batch, so that the gradient of a batch is that of one process.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lethe import distributed
from lethe.errors import LetheError
from lethe.models.activations import read
from lethe.objectives.losses import head_of, wide
from lethe.progress import Advance, bar
from lethe.text import corpora
from lethe.unlearning.view import View

FILE = "scores.safetensors"
DOCUMENTS, BATCH = 128, 16
"""Documents of each text that are read at most, and those of one batch, whose gradient is squared."""
TOKENS = 2048
"""Tokens of a forward pass at most, unless one document has more."""
GROUP = 8 * 2**30
"""Bytes of gradients and sums that are in memory at a time, unless those of one parameter take more."""
CHUNK = 2**24
"""Scores that are counted at a time."""

Parameters = dict[str, nn.Parameter]


def bytes_of(parameter: Tensor) -> int:
    """The gradient of a parameter and its two sums, in at least float32."""
    return parameter.numel() * (parameter.element_size() + 2 * max(4, parameter.element_size()))


def groups(parameters: Parameters) -> list[Parameters]:
    """Parameters in their order, in groups whose gradients and sums take `GROUP` bytes; at least one parameter each."""
    found, size = list[Parameters](), GROUP + 1
    for name, parameter in parameters.items():
        more = bytes_of(distributed.own(parameter))
        if size + more > GROUP:
            found, size = [*found, {}], 0
        found[-1][name] = parameter
        size += more
    return found


def fisher(model: Any, texts: dict[str, list[list[int]]], pad_id: int, file: Path) -> None:
    """Write F_forget / F_retain of every weight of a model into a file, in float32.

    `texts`: the sequences of `forget` and `retain`. The model computes without dropout and is left without gradients.

    Raises:
        LetheError: a gradient is not finite.
    """
    parameters, head = dict(model.named_parameters()), head_of(model)
    parts = groups(parameters)
    sharded = bool(distributed.sharded_modules(model))
    model.eval()
    with (
        bar("Scoring weights", len(parts) * sum(map(len, texts.values())), "documents") as advance,
        _written(file, parameters) as write,
    ):
        for part in parts:
            for name, parameter in parameters.items():
                parameter.requires_grad_(sharded or name in part)
            forget, retain = (_squares(model, part, head, texts[text], pad_id, advance) for text in ("forget", "retain"))
            for name in part:
                ours, theirs = distributed.own(forget[name]), distributed.own(retain[name])
                ours.copy_(torch.where(ours == 0, ours, ours / theirs))
                write(distributed.whole(forget.pop(name)).float())
    model.requires_grad_(True)


def _squares(
    model: Any, part: Parameters, head: nn.Linear | None, sequences: list[list[int]], pad_id: int, advance: Advance
) -> dict[str, Tensor]:
    """F of some parameters on a text: the sum over its batches of the squared gradient."""
    sums = {name: torch.zeros_like(p, dtype=wide(p.new_empty(0)).dtype, requires_grad=False) for name, p in part.items()}
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        _backward(model, head, batch, pad_id)
        for name, parameter in part.items():
            if distributed.world() > 1 and not distributed.is_sharded(parameter):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.add_up([parameter.grad])
            if parameter.grad is not None:
                gradient = distributed.own(parameter.grad).to(sums[name].dtype)
                distributed.own(sums[name]).addcmul_(gradient, gradient)
        model.zero_grad()
        distributed.gathered_away(model)
        advance(len(batch))
    for name, total in sums.items():
        if distributed.total([not distributed.own(total).isfinite().all()])[0]:
            raise LetheError(f"rewind_weights: the gradient of {name} is not finite, so the model is damaged; give another")
    return sums


def _backward(model: Any, head: nn.Linear | None, batch: list[list[int]], pad_id: int) -> None:
    """This process's part of the gradient of the batch's mean NLL. A process without a document computes one with weight 0."""
    tokens = sum(map(len, batch))
    if tokens == len(batch):  # no token has one before it
        return
    size = documents_in_pass(max(map(len, batch))) * distributed.world()
    times = distributed.world() if distributed.sharded_modules(model) else 1  # FSDP2 averages over processes
    for start in range(0, len(batch), size):
        mine = distributed.share(batch[start : start + size])
        ids, mask = (t.to(distributed.device()) for t in corpora.pad(list(mine) or batch[:1], pad_id))
        mask = mask if mine else torch.zeros_like(mask)
        (times * nll(model, head, ids, mask, tokens, len(batch))).backward()


def documents_in_pass(length: int) -> int:
    """Documents of this length in one forward pass."""
    return min(BATCH, max(1, TOKENS // length))


def nll(model: Any, head: nn.Linear | None, ids: Tensor, mask: Tensor, tokens: int, documents: int) -> Tensor:
    """The part of some documents of the mean NLL of a batch, which has so many tokens and documents."""
    return View(ids, mask, ids[:, 0], read(model, ids, [], output=True, head=head), tokens, documents, head).cross_entropy()


@contextlib.contextmanager
def _written(file: Path, parameters: Parameters) -> Iterator[Callable[[Tensor], None]]:
    """A function that writes the scores of the next parameter. The file is complete or absent.

    In the safetensors format: the header's length, the header, then the tensors, which are never in memory together.
    """
    facts, end = dict[str, Any](), 0
    for name, parameter in parameters.items():
        begin, end = end, end + 4 * parameter.numel()
        facts[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    header = json.dumps(facts).encode()
    header += b" " * (-len(header) % 8)
    temporary = file.with_name(f".{file.name}.tmp")
    with contextlib.ExitStack() as stack:
        opened: Any = stack.enter_context(temporary.open("wb")) if distributed.is_first() else None

        def to_disk(data: bytes) -> None:
            opened.write(data)
            opened.flush()

        distributed.from_first(lambda: to_disk(len(header).to_bytes(8, "little") + header))
        yield lambda scores: distributed.from_first(lambda: to_disk(scores.cpu().contiguous().numpy().tobytes()))
    distributed.from_first(lambda: temporary.replace(file))


class Highest:
    """The weights with the highest scores: `share` of all of them, rounded to a whole number.

    `threshold` is the lowest score among them. Of weights with just that score, the first in the order of the model's
    parameters are taken. It is found exactly in two passes over the file: a histogram of the upper half of the scores' bits,
    then one of the lower half among those at the threshold. Of the file, one tensor is in memory at a time.

    Raises:
        LetheError: the file has no score for a weight, or one that is not a number.
    """

    def __init__(self, file: Path, parameters: Parameters, share: float):
        self.file = file
        self._refuse_unfit(parameters)
        self.number = max(1, round(share * sum(p.numel() for p in parameters.values())))
        upper, left = _bin(sum(_counts((keys >> 16) + 2**15) for keys in self._keys()), self.number)
        at = (keys[(keys >> 16) + 2**15 == upper] & 0xFFFF for keys in self._keys())
        lower, self._ties = _bin(sum(map(_counts, at)), left)
        self.key = ((upper - 2**15) << 16) + lower
        self.threshold = float(_turned(torch.tensor([self.key], dtype=torch.int32)).view(torch.float32))

    def of(self, name: str) -> Tensor:
        """Which weights of a parameter are among them. Call it for every parameter once, in the model's order."""
        with safe_open(self.file, "pt") as scores:
            keys = _key(scores.get_tensor(name))
        taken = keys > self.key
        if self._ties and (same := keys == self.key).any():
            first = same.flatten().cumsum(0).view_as(same) <= self._ties
            self._ties -= min(self._ties, int(same.sum()))
            taken |= same & first
        return taken

    def _keys(self) -> Iterator[Tensor]:
        with safe_open(self.file, "pt") as scores:
            for name in scores.keys():  # noqa: SIM118  # not a mapping
                yield from _key(scores.get_tensor(name)).flatten().split(CHUNK)

    def _refuse_unfit(self, parameters: Parameters) -> None:
        with safe_open(self.file, "pt") as scores:
            names = set(scores.keys())
            for name, parameter in parameters.items():
                wrong, shape = None, list(parameter.shape)
                if name not in names:
                    wrong = "no scores"
                elif (found := scores.get_tensor(name)).shape != parameter.shape:
                    wrong = f"shape {list(found.shape)}"
                elif found.isnan().any():
                    wrong = "NaN"
                if wrong:
                    raise LetheError(f"rewind_weights: '{self.file}' has {wrong} for {name} {shape}; give each weight a number")
        if other := sorted(names - parameters.keys()):
            raise LetheError(f"rewind_weights: the model has no parameter {other[0]}, of '{self.file}'; leave it out")


def _key(scores: Tensor) -> Tensor:
    """Whole numbers in the order of the scores, as float32: their bits, turned for negative scores."""
    return _turned((scores.float() + 0.0).view(torch.int32))  # −0 becomes 0


def _turned(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _counts(numbers: Tensor) -> Any:
    return torch.bincount(numbers, minlength=2**16)


def _bin(counts: Any, number: int) -> tuple[int, int]:
    """The bin that holds the element of this rank from above, from 1, and its rank in the bin."""
    from_above = counts.flip(0).cumsum(0).flip(0)
    found = int((from_above >= number).nonzero().max())
    return found, number - int(from_above[found] - counts[found])
