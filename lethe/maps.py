"""Where fitted maps lie and what they belong to, without loading them: nothing here imports torch.

A folder of maps holds `affine_transforms.safetensors` and `metadata.json`; the latter names the layers, and for maps
that Lethe fitted the weights, the convention of layers, the text and the scores. `affine.py` fits, loads and applies them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lethe import refs
from lethe.errors import LetheError
from lethe.ledger import find_run

WEIGHTS = "affine_transforms.safetensors"
METADATA = "metadata.json"


def find_maps(name: str, out: str | Path = "runs") -> Path:
    """The folder of maps that `name` means: a folder, a run (folder or run:ID) or a hub repository.

    Raises:
        LetheError: there are no maps.
    """
    if name.startswith("run:") or (Path(name) / "run.json").exists():
        run = find_run(name.removeprefix("run:"), out)
        artifact = (run.record.get("artifacts") or {}).get("affine")
        if artifact is None:
            raise LetheError(f"affine: '{name}' is a run of kind {run.record['kind']}, status {run.status}, that holds no maps")
        return run.path / artifact["path"]
    if Path(name).is_dir():
        if not (Path(name) / WEIGHTS).exists():
            raise LetheError(f"affine: '{name}' has no {WEIGHTS}; give a folder that `lethe affine fit` wrote")
        return Path(name)
    if name.count("/") != 1:
        raise LetheError(f"affine: '{name}' is neither fit, none, a folder of maps, run:ID nor a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, METADATA]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LetheError(f"affine: no folder '{name}' here, and the hub's cannot be read ({why})") from error


def check_maps(folder: Path, model: refs.ModelRef, source: refs.ModelRef, layers: list[int]) -> dict[str, Any]:
    """The maps' record, if they were fitted for these weights and layers.

    Raises:
        LetheError: they belong to another pair of weights, lack a layer, or keep no record of what they belong to.
    """
    facts = facts_of(folder)
    missing = sorted(set(layers) - set(facts["layer_indices"]))
    if missing:
        raise LetheError(f"affine: the maps in '{folder}' lack layers {missing}; they have {facts['layer_indices']}")
    if "model" not in facts or "source" not in facts:
        raise LetheError(f"affine: the maps in '{folder}' do not record their weights; score them first: lethe affine score")
    for role, ref in (("model", model), ("source", source)):
        if facts[role]["sha256"] != refs.weight_hash(ref):
            raise LetheError(
                f"affine: the maps in '{folder}' were fitted for {role} '{facts[role]['ref']}', "
                f"whose weights are not those of '{ref.name}'; fit maps for this pair: lethe affine fit"
            )
    return facts


def facts_of(folder: Path) -> dict[str, Any]:
    """The metadata of the maps in `folder`.

    Raises:
        LetheError: it cannot be read, or does not say which layers the maps are for.
    """
    try:
        facts = json.loads((folder / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise LetheError(f"affine: '{folder}' has no readable {METADATA} ({error})") from error
    if not isinstance(facts, dict) or "layer_indices" not in facts:
        raise LetheError(f"affine: {METADATA} in '{folder}' does not say which layers the maps are for (layer_indices)")
    return facts
