"""A teacher's outputs on a text, computed once and cached on disk: shared by epochs, resumed runs and all runs of a sweep.

    $LETHE_HOME/teachers/<key>/   layer_0.bin, …   mapped activations, token after token, without padding
                                  output.bin       final hidden states (logits, where the output head is not known)
                                  manifest.json    all that the values depend on; size and SHA-256 of each file

The key is a hash of weights, configuration, maps, layers, types and token ids, so that a cache is never stale. One process
builds it, under a file lock and in a folder of another name, while others wait. A cache is complete or absent. A
damaged cache is built again. The least recently used caches are evicted when all together use too much disk (`lethe.home`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from lethe import distributed
from lethe.distributed import device
from lethe.files import sha256
from lethe.home import lethe_home, use
from lethe.models.activations import States
from lethe.progress import bar
from lethe.runs.locks import build_once
from lethe.text import corpora
from lethe.unlearning.view import Teacher

logger = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
TOKENS = 2048
"""Tokens of a forward pass while a cache is built."""


class Cache:
    """A teacher's outputs on the sequences of a text, read from a complete cache."""

    def __init__(self, folder: Path, sequences: list[list[int]]):
        self.folder = folder
        use(folder, self)
        self.lengths = torch.tensor([len(row) for row in sequences])
        self.starts = self.lengths.cumsum(0) - self.lengths
        total = int(self.lengths.sum())
        self.values: dict[str, Tensor] = {}
        for name, facts in json.loads((folder / MANIFEST).read_text())["files"].items():
            dtype, width = getattr(torch, facts["dtype"]), facts["width"]
            flat = torch.from_file(str(folder / name), shared=False, size=total * width, dtype=dtype)
            self.values[name.removesuffix(".bin")] = flat.view(total, width)

    def states(self, index: Int[Tensor, " batch"], width: int, device: torch.device | str = "cpu") -> States:
        """The outputs of sequences `index`, padded to `width` with those of other tokens, which the mask leaves out."""
        index = index.cpu()
        offsets = torch.arange(width).minimum(self.lengths[index, None] - 1)
        tokens = (self.starts[index, None] + offsets).flatten()
        found = {
            name: values.index_select(0, tokens).view(len(index), width, -1).to(device) for name, values in self.values.items()
        }
        output = found.pop("output", None)
        return States({int(name.removeprefix("layer_")): values for name, values in found.items()}, output)


def key_of(teacher: Teacher, sequences: list[list[int]]) -> dict[str, Any]:
    """All that a teacher's outputs on `sequences` depend on."""
    model, need, maps = teacher.model, teacher.need, teacher.maps
    configuration = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return {
        "format": FORMAT,
        "weights": teacher.weights,
        "configuration": _hash(json.dumps(configuration, sort_keys=True, default=str).encode()),
        "dtype": str(model.dtype),
        "layers": list(need.layers),
        "output": ("hidden" if teacher.head is not None else "logits") if need.logits else None,
        "maps": _hash(*(_bytes(t) for n in need.layers for t in (maps.weight[n], maps.bias[n]))) if maps else None,
        "sequences": _hash(*(_bytes(torch.tensor([len(row), *row])) for row in sequences)),
        "versions": [torch.__version__, transformers.__version__],
    }


def folder_of(key: dict[str, Any]) -> Path:
    """The folder of this key's cache, which may not exist."""
    return lethe_home() / "teachers" / _hash(json.dumps(key, sort_keys=True).encode())[:24]


def size_of(teacher: Teacher, sequences: list[list[int]]) -> int:
    """Bytes of a cache."""
    model, need = teacher.model, teacher.need
    settings = model.config.get_text_config()
    mapped = 4 if teacher.maps else model.dtype.itemsize
    ending = settings.hidden_size if teacher.head is not None else settings.vocab_size
    widths = mapped * len(need.layers) * settings.hidden_size + model.dtype.itemsize * need.logits * ending
    return sum(map(len, sequences)) * widths


def is_whole(folder: Path, key: dict[str, Any], content: bool = True) -> bool:
    """Whether the cache of `key` is there with every byte. Without `content`, only the sizes of its files are compared."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["key"] == key and all(
            (folder / name).stat().st_size == facts["size"] and (not content or sha256(folder / name) == facts["sha256"])
            for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def choose(setting: str, teacher: Teacher, sequences: list[list[int]], seen: float, to_be_fitted: bool) -> str:
    """`cached: why` or `live: why`, by the setting `teacher_cache`.

    `seen`: how often the run reads each sequence, on average. `to_be_fitted`: the teacher's maps are not there yet.
    """
    if teacher.need.ending:
        return "live: it is applied to the model's activations"
    if setting != "auto":
        return f"{setting}: as set"
    key = key_of(teacher, sequences)
    if not to_be_fitted and is_whole(folder_of(key), key, content=False):
        return "cached: a complete cache exists"
    if seen <= 1:
        return "live: no document is seen twice"
    size, memory = size_of(teacher, sequences), psutil.virtual_memory().available
    disk = shutil.disk_usage(_existing(lethe_home())).free
    for what, free in (("disk", disk), ("memory", memory)):
        if size > free / 2:
            return f"live: a cache would take {size / 2**30:.2f} GiB, more than half of the {free / 2**30:.2f} GiB free {what}"
    return f"cached: documents are seen {seen:.3g} times, {size / 2**20:.0f} MiB"


def open_or_build(teacher: Teacher, text: str, sequences: list[list[int]]) -> Cache | None:
    """The cache of a teacher's outputs on `sequences`, built if need be. None, with a warning, where it cannot be written."""
    key = key_of(teacher, sequences)
    folder = folder_of(key)
    try:
        return build_once(
            folder,
            lambda: is_whole(folder, key),
            lambda partial: _build(teacher, text, sequences, partial, key),
            lambda: Cache(folder, sequences),
            size_of(teacher, sequences),
        )
    except OSError as error:
        logger.warning("no teacher cache for the %s text (%s); its teacher runs live", text, error.strerror or error)
        return None


def _build(teacher: Teacher, text: str, sequences: list[list[int]], folder: Path, key: dict[str, Any]) -> None:
    """Write the outputs on all sequences. The processes share the batches, and each writes where its tokens belong."""
    count = max(1, TOKENS // max(map(len, sequences)))
    starts = [0, *itertools.accumulate(map(len, sequences))]

    def outputs(some: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = (t.to(device()) for t in corpora.pad(some, 0))
        states = teacher.live(ids)
        found = {f"layer_{n}.bin": values for n, values in states.activations.items()}
        found |= {} if states.output is None else {"output.bin": states.output}
        return {name: values[mask.bool()] for name, values in found.items()}

    facts: dict[str, dict[str, Any]] = {}
    failed: OSError | None = None
    files: dict[str, BinaryIO] = {}
    distributed.from_first(folder.mkdir)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar(f"Computing the teacher's outputs on the {text} text", len(sequences), "documents"))
        model = stack.enter_context(teacher.model.running())
        stack.enter_context(distributed.uneven(model, lambda: outputs(sequences[:1])))
        for start in distributed.share(range(0, len(sequences), count)):
            found = outputs(sequences[start : start + count])
            try:
                for name, values in found.items() if failed is None else ():
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / name, "r+b", opener=_made))
                        facts[name] = {"dtype": str(values.dtype).removeprefix("torch."), "width": values.shape[-1]}
                    files[name].seek(starts[start] * values.shape[-1] * values.dtype.itemsize)
                    files[name].write(_bytes(values))
            except OSError as error:  # the others need this process's part of the model until they are done
                failed = error
            advance(len(sequences[start : start + count]) * distributed.world())
        try:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            failed = failed or error
    for one in filter(None, distributed.gather(failed)):
        raise one
    facts = {name: fact for part in distributed.gather(facts) for name, fact in part.items()}
    distributed.from_first(lambda: _write_manifest(folder, key, facts, starts[-1]))


def _made(path: str, flags: int) -> int:
    """Opens a file for writing somewhere in it, and makes it if no other process has."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def _write_manifest(folder: Path, key: dict[str, Any], facts: dict[str, dict[str, Any]], tokens: int) -> None:
    for name, fact in facts.items():
        fact |= {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        if fact["size"] != tokens * fact["width"] * getattr(torch, fact["dtype"]).itemsize:
            raise OSError(f"{lethe_home()} is not on a file system that all nodes share")
    with (folder / MANIFEST).open("w") as manifest:
        json.dump({"key": key, "files": facts}, manifest, indent=2)
        manifest.flush()
        os.fsync(manifest.fileno())


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
