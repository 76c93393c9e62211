"""Saves of a run in training: complete or absent.

    saves/begin.safetensors                 the trained parameters before the first update, until the first planned save
    saves/step-100/   weights.safetensors   those after it, under the names that they have in memory
                      optimizer.pt, scheduler.pt, random.pt, trainer_state.json; method.pt, if the method has state
                      manifest.json         size and SHA-256 of each, written last
    saves/kept-80.safetensors               the last trained parameters within the run's budget; their hash is in run.json

A save is written into a folder of another name, synced and renamed. It counts only if every file is as its manifest says. So a
kill or a full disk leaves earlier saves intact. Every parameter is saved and loaded under its name in memory, because formats
that rename weights can lose some of them, such as an output head. Of sharded parameters the whole values are saved, by the
first process. So a run can be resumed with another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe import distributed
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.runs.run import Run

logger = logging.getLogger(__name__)
KEPT = 2
BEGIN = "begin.safetensors"
MANIFEST = "manifest.json"
METHOD = "method.pt"
"""What the method remembers from one update to the next; only of methods that do."""
FILES = ("weights.safetensors", "optimizer.pt", "scheduler.pt", "random.pt", "trainer_state.json")


def begin(folder: Path, model: nn.Module) -> None:
    """Save the trained parameters before the first update, for a run that diverges before its first planned save."""
    weights = _whole(trained(model))
    distributed.from_first(lambda: _write_weights(folder / BEGIN, weights))


def keep(folder: Path, step: int, model: nn.Module) -> str:
    """Save the trained parameters of `step`, which are within the run's budget. Returns the hash of the file.

    Those kept before stay until `keep_only`.
    """
    weights = _whole(trained(model))
    return distributed.from_first(lambda: _write_weights(kept(folder, step), weights))


def kept(folder: Path, step: int) -> Path:
    """The file of the parameters that were kept at `step`."""
    return folder / f"kept-{step}.safetensors"


def keep_only(folder: Path, step: int) -> None:
    """Remove the kept parameters of other steps."""
    if distributed.is_first():
        for other in set(folder.glob("kept-*.safetensors")) - {kept(folder, step)}:
            other.unlink(missing_ok=True)


def _write_weights(file: Path, weights: dict[str, torch.Tensor]) -> str:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, temporary)
        _sync(temporary)
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise LetheError(
            f"the weights could not be written to '{file}' ({str(error).splitlines()[0]}); make room and resume the run"
        ) from error
    return sha256(file)


def write(
    folder: Path, step: int, model: nn.Module, optimizer: Any, scheduler: Any, state: Any, method: Any = None, every: int = 0
) -> Path:
    """Save a training at `step` under `folder`. `method`: what the method remembers, by name and parameter.

    All but the newest two saves, and the newest planned one (at a multiple of `every` updates), are removed afterwards.

    Raises:
        LetheError: it cannot be written; earlier saves are intact.
    """
    draws = distributed.gather(random_state())
    tensors = {
        "optimizer.pt": _whole(optimizer.state_dict()),
        "scheduler.pt": scheduler.state_dict(),
        "random.pt": draws[0] | ({"others": draws[1:]} if draws[1:] else {}),
    } | ({METHOD: _whole(method)} if method else {})
    weights = _whole(trained(model))
    return distributed.from_first(lambda: _write(folder, step, weights, tensors, state, every))


def _write(folder: Path, step: int, weights: Any, tensors: dict[str, Any], state: Any, every: int) -> Path:
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_file(weights, temporary / "weights.safetensors")
        for name, value in tensors.items():
            torch.save(value, temporary / name)
        state.save_to_json(str(temporary / "trainer_state.json"))
        names = dict.fromkeys((*FILES, *tensors))
        facts = {name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in names}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": facts}, indent=2))
        for name in (*names, MANIFEST):
            _sync(temporary / name)
        shutil.rmtree(final, ignore_errors=True)  # left over from before a resume
        temporary.rename(final)
        _sync(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise LetheError(
            f"the save at step {step} could not be written ({str(error).splitlines()[0]}); earlier saves are intact: "
            f"make room and resume with lethe resume"
        ) from error
    planned = [step for step in steps(folder) if every and step % every == 0]
    for old in set(steps(folder)[KEPT:]) - set(planned[:1]):
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    if planned:
        (folder / BEGIN).unlink(missing_ok=True)
    return final


def newest(folder: Path) -> Path | None:
    """The newest complete save; None if there is none. Leftovers of interrupted saves are removed."""
    for rest in folder.glob(".*.tmp"):
        shutil.rmtree(rest, ignore_errors=True)
        rest.unlink(missing_ok=True)
    return next((folder / f"step-{step}" for step in steps(folder) if is_whole(folder / f"step-{step}")), None)


def before_divergence(folder: Path, every: int) -> tuple[Path, int]:
    """The weights that a diverged run ends with, and their step: the newest complete save at a multiple of `every` updates,
    or else the weights before the first update. Saves that were made because the run was stopped do not count.
    """
    planned = [step for step in steps(folder) if every and step % every == 0]
    return next(((folder / f"step-{n}", n) for n in planned if is_whole(folder / f"step-{n}")), (folder / BEGIN, 0))


def steps(folder: Path) -> list[int]:
    """Steps of the saves in `folder`, complete or not, newest first."""
    found = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted((int(step) for step in found if step.isdigit()), reverse=True)


def is_whole(save: Path) -> bool:
    """Whether a save has every file, each as its manifest says."""
    try:
        facts = json.loads((save / MANIFEST).read_text())["files"]
        return set(facts) >= set(FILES) and all(
            (save / name).stat().st_size == fact["size"] and sha256(save / name) == fact["sha256"]
            for name, fact in facts.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def clear(folder: Path) -> None:
    """Remove all saves: the run that they were for is complete."""
    shutil.rmtree(folder, ignore_errors=True)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name; a tied parameter is named once."""
    distributed.gathered_away(model)
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_weights(save: Path, model: nn.Module) -> None:
    """Load the parameters of a save, or of a single file, into the model. All names must match.

    Raises:
        LetheError: the save has other parameters than the model trains.
    """
    saved = safe_open(save / "weights.safetensors" if save.is_dir() else save, "pt")
    names = set(saved.keys())
    distributed.gathered_away(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names != parameters.keys():
        other = sorted(names ^ parameters.keys())
        raise LetheError(f"'{save}' does not fit the model: {len(other)} parameters differ, such as {other[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(distributed.put(saved.get_tensor(name), parameter))


def load_optimizer(save: Path, optimizer: Any, scheduler: Any) -> None:
    """Load a save's optimizer and scheduler state."""
    saved = torch.load(save / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                state[name] = distributed.put(value, parameters[number])
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict(torch.load(save / "scheduler.pt", weights_only=True))


def load_state(save: Path, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """What the method remembered at a save: tensors in the form of the parameters that they belong to."""
    if not (save / METHOD).exists():
        return {}
    saved = torch.load(save / METHOD, weights_only=True)
    parameters = dict(model.named_parameters())
    return {
        kind: {name: distributed.put(value.to(parameters[name].device), parameters[name]) for name, value in values.items()}
        for kind, values in saved.items()
    }


def _whole(state: Any) -> Any:
    """Nested dicts and lists with whole tensors in place of sharded ones. Only the first process keeps these, on the CPU."""
    if isinstance(state, dict):
        return {name: _whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_whole(value) for value in state]
    if not distributed.is_sharded(state):
        return state
    full = distributed.whole(state)
    return full.cpu() if distributed.is_first() else None


def random_state() -> dict[str, Any]:
    """The random state of Python, NumPy and torch, as plain data and tensors."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_random(save: Path) -> None:
    """Set the random state of this process to a save's. One that a smaller number of processes wrote has no state for some."""
    state = torch.load(save / "random.pt", weights_only=True)
    states = [state, *state.get("others", [])]
    if len(states) != distributed.world():
        logger.warning("the save is of %d processes: dropout is drawn anew in %d", len(states), distributed.world())
    if distributed.rank() >= len(states):
        return
    state = states[distributed.rank()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def save_artifact(run: Run, kind: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a model or an adapter as the run's artifact `kind`."""
    folder = run.path / kind
    distributed.gathered_away(model)
    if kind == "adapter":  # PEFT would gather the frozen weights too
        own = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        if distributed.is_first():
            model.save_pretrained(folder, state_dict=own)
    elif distributed.is_first() or distributed.sharded_modules(model):
        model.save_pretrained(folder)  # all processes gather a sharded model, and transformers lets the first write it

    def describe() -> str:
        tokenizer.save_pretrained(folder)
        return sha256(*folder.glob("*.safetensors"))

    run.update(artifacts={kind: {"path": kind, "sha256": distributed.from_first(describe)}})
