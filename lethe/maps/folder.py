"""Folders of maps: where they are and which weights they belong to. Nothing here loads a map or imports torch.

A folder has `affine_transforms.safetensors` and `metadata.json`. For maps that Lethe fitted, the metadata has the weights, the
convention of numbering layers, the text, the scores and the SHA-256 of the maps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lethe.errors import LetheError, printable
from lethe.files import UnreadableError, json_of, sha256, text_of
from lethe.models import refs
from lethe.models.folder import Shapes, advice, shapes
from lethe.models.hub import snapshot
from lethe.runs.finding import find_run

WEIGHTS = "affine_transforms.safetensors"
METADATA = "metadata.json"
HASH = "weights_sha256"
"""Key of the metadata: SHA-256 of the maps."""
WEIGHT_NAME = re.compile(r"layer_([0-9]+)\.weight")
CONVENTIONS = {"block_output": 0, "hidden_states": 1}
"""By convention, what to subtract from the N of `layer_N` to get the block whose output is mapped. Lethe's: `block_output`."""


def find_maps(name: str, out: str | Path = "runs") -> Path:
    """The folder of maps that `name` refers to: a folder, a run (its folder or run:ID) or a repository of the hub."""
    if name.startswith("run:") or (Path(name) / "run.json").exists():
        run = find_run(name.removeprefix("run:"), out)
        folder = run.artifact("affine")
        if folder is None:
            raise LetheError(f"affine: '{name}' is a run of kind {run.record['kind']}, status {run.status}, that holds no maps")
        refuse_altered(folder, run.record["artifacts"]["affine"].get("sha256"))
        return folder
    if Path(name).is_dir():
        if not (Path(name) / WEIGHTS).exists():
            raise LetheError(f"affine: '{name}' has no {WEIGHTS}; give a folder that `lethe affine fit` wrote")
        return Path(name)
    if name.count("/") != 1:
        raise LetheError(f"affine: '{name}' is not a folder of maps; give one, run:ID, a repository of the hub, fit or none")
    return snapshot(name, "main", [WEIGHTS, METADATA], "affine: maps")


def check_maps(
    folder: Path, model: refs.ModelRef, source: refs.ModelRef, layers: list[int] | None = None, convention: str = "auto"
) -> list[str]:
    """The possible conventions of the maps: the recorded one. Without a record, every one under which the maps have the layers.

    Raises:
        LetheError: the maps were altered, belong to another pair of weights, have another width, or lack a layer by every
            convention, or by the one that is named.
    """
    facts = facts_of(folder)
    tensors = refuse_altered(folder, facts.get(HASH))
    for name, (_, shape) in tensors.items():
        if name.startswith("layer_") and shape != [model.width] * (2 if name.endswith(".weight") else 1):
            wrong = f"{name} in '{folder}' is {shape}, '{model.name}' has width {model.width}"
            raise LetheError(f"affine: {wrong}; fit maps for it")
    if recorded := recorded_convention(facts):
        if convention not in {"auto", recorded}:
            raise LetheError(f"affine_convention: the maps in '{folder}' record that they are {recorded}; leave it at auto")
        for role, ref in (("model", model), ("source", source)):
            if facts[role]["sha256"] != refs.weight_hash(ref):
                raise LetheError(
                    f"affine: the maps in '{folder}' were fitted for {role} '{facts[role]['ref']}', "
                    f"whose weights are not those of '{ref.name}'; fit maps for this pair: lethe affine fit"
                )
    have = {name: layers_of(tensors, name, model.depth) for name in ([recorded] if recorded else CONVENTIONS)}
    possible = [name for name, layers_there in have.items() if layers_there and set(layers or []) <= set(layers_there)]
    if not possible or convention not in {"auto", *possible}:
        found = " or ".join(f"{layers_there} as {name}" for name, layers_there in have.items())
        raise LetheError(f"affine: the maps in '{folder}' lack some of the layers {sorted(layers or [])}; they have {found}")
    return possible


def refuse_altered(folder: Path, recorded: str | None) -> Shapes:
    """The type and shape of each tensor. Refuses maps that cannot be read, or with another hash than `recorded` (None: any)."""
    try:
        found = shapes(folder / WEIGHTS)
    except UnreadableError as error:
        raise LetheError(f"affine: '{folder / WEIGHTS}' cannot be read ({printable(error, 80)}){advice(error)}") from error
    if recorded is not None and sha256(folder / WEIGHTS) != recorded:
        raise LetheError(f"affine: '{folder / WEIGHTS}' was altered after it was written; fit the maps again")
    return found


def recorded_convention(facts: dict[str, Any]) -> str | None:
    """The convention in the metadata; None for maps that do not record their convention and weights.

    Raises:
        LetheError: the convention is unknown, or the weights are not recorded in full.
    """
    if not {"model", "source", "convention"} <= facts.keys():
        return None
    if not all(isinstance(facts[role], dict) and {"ref", "sha256"} <= facts[role].keys() for role in ("model", "source")):
        raise LetheError("affine: the maps do not say which weights they belong to (model, source); fit the maps again")
    if facts["convention"] not in list(CONVENTIONS):
        raise LetheError(f"affine: convention '{facts['convention']}' of the maps is not one of {', '.join(CONVENTIONS)}")
    return facts["convention"]


def layers_of(tensors: Collection[str], convention: str, depth: float = math.inf) -> list[int]:
    """The layers (blocks, from 0) that have a weight and a bias among these names, if their numbers follow this convention."""
    numbers = {
        int(found[1]) for name in tensors if (found := WEIGHT_NAME.fullmatch(name)) and f"layer_{found[1]}.bias" in tensors
    }
    return sorted(block for number in numbers if 0 <= (block := number - CONVENTIONS[convention]) < depth)


def facts_of(folder: Path) -> dict[str, Any]:
    """The metadata of the maps in `folder`.

    Raises:
        LetheError: it cannot be read, or its list of fitted documents is malformed.
    """
    try:
        facts = json_of(text_of(folder / METADATA))
    except UnreadableError as error:
        raise LetheError(f"affine: '{folder}' has no readable {METADATA} ({error})") from error
    fitted = facts.get("fitted_ids", []) if isinstance(facts, dict) else None
    if not isinstance(fitted, list) or not all(isinstance(name, str) for name in fitted):
        raise LetheError(f"affine: {METADATA} in '{folder}' does not say which documents the maps were fitted on (fitted_ids)")
    return facts
