"""Model references: how a model is named, and how it is loaded.

    org/name@revision       a repository of the hub, optionally at a branch, tag or commit
    FOLDER                  a folder of a model, or of a run
    FOLDER@global_step900   one checkpoint in a folder of checkpoints (also step900, checkpoint-900)
    run:ID                  what a run produced: a model, or an adapter on the model it was trained from
    lab:final               the lab's last checkpoint; also lab:global_step900, lab:filtered
    random:REF              the architecture and tokenizer of REF with fresh weights

    name -> resolve -> ModelRef -> verify -> load -> model, tokenizer

`resolve` looks a reference up and refuses what cannot be loaded, without importing torch. `verify` checks that configuration,
weights and tokenizer match, without reading the weights. `load` loads a verified model. A repository of the hub is a folder
too, its snapshot of one commit; `verify` downloads the weights. Weights are read from safetensors only, since a pickle can run
code, and no code of a repository runs.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe import distributed
from lethe.errors import LetheError, nearest, printable
from lethe.files import sha256
from lethe.lab import presets
from lethe.models import folder as model_folder
from lethe.models.checkpoint_folders import checkpoint_folders, checkpoint_of
from lethe.models.folder import ADAPTER, OWN_CONFIG, WEIGHTS, blamed
from lethe.models.hub import snapshot
from lethe.runs.finding import find_run
from lethe.runs.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANDOM_SEED = 0
TOKENIZER = "tokenizer.json"
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
WINDOW_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class ModelRef:
    """A reference after its look-up. `path` is a folder, or a repository of the hub if `revision` is given."""

    name: str
    path: str
    revision: str | None = None
    adapter: str | None = None
    random: bool = False
    saved: str | None = None
    """Hash of the weights when a run saved them."""

    @property
    def local(self) -> bool:
        return self.revision is None

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the model; of a repository of the hub, the snapshot with all its files but the weights."""
        return snapshot(self.path, self.revision, ["*.json", "*.model", "*.txt"]) if self.revision else Path(self.path)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return model_folder.part(self.name, self.folder / "config.json")

    def _size(self, *keys: str) -> int | None:
        """The first of these settings that config.json has; None if it has none."""
        settings = model_folder.text_settings(self.config)
        key = next((key for key in keys if settings.get(key) is not None), None)
        if key is not None and (type(settings[key]) is not int or settings[key] < 1):
            wrong = f"{key} is {printable(repr(settings[key]), 60)} in config.json, not a whole number above 0"
            raise LetheError(f"model '{self.name}': {wrong}; {OWN_CONFIG}")
        return None if key is None else settings[key]

    def _required(self, keys: tuple[str, ...]) -> int:
        if found := self._size(*keys):
            return found
        raise LetheError(f"model '{self.name}': config.json has none of {', '.join(keys)}; the architecture is not supported")

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self._required(WIDTH_KEYS)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self._required(DEPTH_KEYS)

    @property
    def window(self) -> int | None:
        """Longest sequence that the model was made for, in tokens; None if config.json does not say."""
        return self._size(*WINDOW_KEYS)

    @property
    def vocabulary(self) -> int | None:
        """Size of the embedding, in tokens; None if config.json does not say."""
        return self._size("vocab_size")


def resolve(name: str, out: str | Path = "runs", weights: bool = True) -> ModelRef:
    """Look a model reference up. `out`: a further folder to search for runs. `weights`: the model has to have weights.

    Raises:
        LetheError: it names nothing, or has no safetensors weights, configuration or tokenizer.
    """
    if name.startswith("random:"):
        inner = resolve(name.removeprefix("random:"), out, weights=False)
        return ModelRef(name, inner.path, inner.revision, None, random=True)
    if name.startswith("lab:"):
        return checked(ModelRef(name, str(_lab_folder(name))))
    if run := run_of(name, out):
        return _of_run(name, run)
    if os.path.isdir(name):
        return checked(ModelRef(name, str(Path(name))), weights)
    folder, _, step = name.rpartition("@")  # the folder's own name may have an @
    if os.path.isdir(folder):
        return checked(ModelRef(name, str(checkpoint_of(Path(folder), step))))
    path, _, revision = name.partition("@")
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not os.path.isdir(os.path.dirname(path)):
        return checked(ModelRef(name, path, revision or "main"))
    if os.path.islink(name):
        raise LetheError(f"model reference '{name}' is a broken link to '{os.readlink(name)}'; name the folder itself")
    forms = "org/name@revision, FOLDER, FOLDER@global_stepN, run:ID, lab:final, random:REF"
    raise LetheError(f"model reference '{name}' is not a folder; give one of the forms {forms}")


def run_of(name: str, out: str | Path = "runs") -> Run | None:
    """The run that a reference names by run:ID or by its folder; None for other references."""
    if name.startswith("run:"):
        return find_run(name.removeprefix("run:"), out)
    return Run.open(name) if os.path.isfile(os.path.join(name, "run.json")) else None


def load(
    ref: ModelRef, dtype: str = "float32", last: int | None = None, sharded: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, on the GPU if there is one, and its tokenizer, which pads on the right.

    A reference with an adapter gives a PEFT model. The weights of `random:` come from a fixed seed. The model's own dropouts
    (GPT-2 has some) are 0 in training too, since a loss that compares the model with a teacher would measure them. The saved
    configuration preserves them. `last`: only blocks 0 to `last` are in memory, for passes that end there. `sharded`: each of
    several processes loads a part of every weight.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lethe.models import loading

    verify(ref)
    with blamed(ref.name, "it cannot be loaded", "copy or download it again"):
        config, dropouts = configuration(ref)
        kind, sharded = getattr(torch, dtype), sharded and distributed.world() > 1
        how = distributed.sharded_loading(loading.block_list(loading.on_meta(config, kind))) if sharded else {}
        if ref.random:
            with torch.random.fork_rng():
                torch.manual_seed(RANDOM_SEED)
                model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
            if sharded:
                distributed.shard(model, loading.block_list(model))
        else:
            depth, model = model_folder.depth_of(config), None
            if last is not None and not ref.adapter and last + 1 < depth:
                model = loading.first_blocks(ref.folder, config, kind, last, **how)
            if model is None:
                model, report = loading.pretrained(ref.folder, config, kind, **how)
                model_folder.refuse_report(ref.name, report, depth)
            model.name_or_path = model.config.name_or_path = ref.path  # adapters name the repository, not its snapshot here
        for name, value in dropouts.items():
            setattr(model.config, name, value)
        if sharded:
            distributed.may_end_early(model)
        if ref.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, ref.adapter)
        if not sharded:
            loading.place(model, last)
        return model.eval(), tokenizer(ref)


def outline(ref: ModelRef, dtype: str = "float32") -> PreTrainedModel:
    """The model on the meta device, from its config.json alone: shapes without weights."""
    import torch

    from lethe.models import loading

    with blamed(ref.name, "no model can be built from config.json", OWN_CONFIG):
        return loading.on_meta(configuration(ref)[0], getattr(torch, dtype))


def configuration(ref: ModelRef) -> tuple[Any, dict[str, float]]:
    """The configuration with dropouts at 0, and their rates in config.json."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ref.folder, trust_remote_code=False)
    config.return_dict = True
    dropouts = {name: rate for name, rate in vars(config).items() if "drop" in name and type(rate) in {int, float}}
    vars(config).update(dict.fromkeys(dropouts, 0.0))
    return config, dropouts


def verify(*refs: ModelRef) -> None:
    """Refuse models whose configuration, weights and tokenizer do not match. Downloads a model of the hub; reads no weights.

    Raises:
        LetheError: the model cannot be loaded, or only without some of its weights.
    """
    for ref in refs:
        _download_weights(ref)
        states = ((path.name, path.stat()) for path in sorted(ref.folder.iterdir()) if path.exists())
        _verified(ref, tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


def _download_weights(ref: ModelRef) -> None:
    """Download the weights of a repository of the hub: the whole file, or else the shards that its index lists."""
    if ref.revision and not ref.random:
        commit = ref.folder.name
        snapshot(ref.path, commit, [WEIGHTS])
        if shards := [file.name for file in model_folder.weight_files(ref.name, ref.folder) if file.name != WEIGHTS]:
            snapshot(ref.path, commit, shards)


@functools.lru_cache(maxsize=64)
def _verified(ref: ModelRef, files: tuple[tuple[str, int, int], ...]) -> None:
    """`verify`, cached for the same names, sizes and times of files."""
    with blamed(ref.name, "config.json cannot be used", OWN_CONFIG):
        config, _ = configuration(ref)
    model_folder.refuse_misfit(ref.name, config, None if ref.random else model_folder.refuse_weights(ref.name, ref.folder))
    if (ref.folder / TOKENIZER).exists():
        model_folder.part(ref.name, ref.folder / TOKENIZER)  # if it is damaged, transformers would read other files instead
    with blamed(ref.name, "its tokenizer cannot be loaded", "save it again: tokenizer.save_pretrained(FOLDER)"):
        found = tokenizer(ref)
    model_folder.refuse_tokens(ref.name, found, ref.vocabulary)


def tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads on the right.

    Padding is masked, so any token can pad. If the padding token has no embedding, the first of end-of-text, beginning-of-text,
    unknown and token 0 that has one replaces it.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(ref.folder, trust_remote_code=False)
    found.padding_side, found.name_or_path = "right", ref.path
    size = ref.vocabulary or len(found)
    ids = (found.pad_token_id, found.eos_token_id, found.bos_token_id, found.unk_token_id, 0)
    usable = next(number for number in ids if number is not None and number < size)
    if usable != found.pad_token_id:
        found.pad_token = found.convert_ids_to_tokens(usable)
    return found


def weight_hash(ref: ModelRef) -> str:
    """An identifier of the weights: SHA-256 of the safetensors files, or the commit of a repository of the hub.

    An adapter counts: its file is hashed with those of the model, or after the commit.
    """
    if ref.random:
        return f"random:seed{RANDOM_SEED}:{sha256(ref.folder / 'config.json')}"
    adapter = [Path(ref.adapter) / ADAPTER[1]] if ref.adapter else []
    if ref.revision:
        return "+".join([f"commit:{ref.folder.name}", *map(sha256, adapter)])
    return sha256(*model_folder.weight_files(ref.name, ref.folder), *adapter)


def record(ref: ModelRef) -> dict[str, str]:
    """A reference for run.json: its name, and the identifier of its weights.

    Raises:
        LetheError: the weights are not those that its run saved.
    """
    found = distributed.from_first(lambda: weight_hash(ref))
    if ref.saved not in {None, found}:
        raise LetheError(f"model '{ref.name}': its weights in '{ref.path}' have changed since they were saved; run it again")
    return {"ref": ref.name, "sha256": found}


def refuse_mismatch(model: ModelRef, source: ModelRef) -> None:
    """Refuse a source whose activations cannot be compared with those of the model."""
    todo = "the source must be a checkpoint of the same model"
    if model.width != source.width:
        raise LetheError(f"source '{source.name}' has width {source.width}, model '{model.name}' has {model.width}; {todo}")
    if _vocabulary(model) != _vocabulary(source):
        raise LetheError(f"source '{source.name}' and model '{model.name}' have different tokenizers; {todo}")


def pair_of(model: str, source: str, layers: list[int], out: str) -> tuple[ModelRef, ModelRef]:
    """Model and source, by reference.

    Raises:
        LetheError: their activations cannot be compared at these layers.
    """
    pair = resolve(model, out), resolve(source, out)
    refuse_mismatch(*pair)
    for ref in pair:
        refuse_layers(ref, layers)
    return pair


def refuse_length(max_length: int, *models: ModelRef) -> None:
    """Refuse sequences longer than the window of one of the models."""
    for model in models:
        if model.window is not None and max_length > model.window:
            window = f"the window of '{model.name}', {model.window} tokens"
            raise LetheError(f"max_length: {max_length} is beyond {window}; lower it")


def refuse_layers(model: ModelRef, layers: list[int]) -> None:
    """Refuse a layer that the model does not have."""
    if max(layers) >= model.depth:
        known = f"{model.depth} blocks, layers 0 to {model.depth - 1}"
        raise LetheError(f"layers: {max(layers)} is out of range; '{model.name}' has {known}")


def lab_folder() -> Path:
    """The folder of the active lab."""
    if not presets.is_built():
        raise LetheError(f"the lab '{presets.active_preset().name}' is not built yet; build it: lethe lab build")
    return presets.lab_path()


def _lab_folder(name: str) -> Path:
    what = name.removeprefix("lab:")
    home = lab_folder()
    if what == "filtered":
        return home / "filtered"
    known = checkpoint_folders(home / "checkpoints")
    if what == "final":
        return list(known.values())[-1]
    if what not in known:
        raise LetheError(f"model reference '{name}': the lab has no such model{nearest(what, [*known, 'final', 'filtered'])}")
    return known[what]


def _of_run(name: str, run: Run) -> ModelRef:
    artifacts = run.record.get("artifacts") or {}
    if "model" in artifacts:
        return checked(ModelRef(name, str(run.artifact("model")), saved=artifacts["model"].get("sha256")))
    if "base" in artifacts:
        return checked(ModelRef(name, str(run.artifact("base")), None, _adapter(name, run)))
    if "adapter" in artifacts:
        parent = (run.record.get("parents") or {}).get("model") or {}
        if "ref" not in parent:
            raise LetheError(f"'{name}' is an adapter, and its record does not name its model (parents.model.ref)")
        base = resolve(parent["ref"], run.path.parent)
        if weight_hash(base) != parent["sha256"]:
            changed = f"'{parent['ref']}', whose weights have changed since"
            raise LetheError(f"'{name}' is an adapter on {changed}; restore them, or run it again")
        return ModelRef(name, base.path, base.revision, _adapter(name, run))
    unfinished = run.record["kind"] == "unlearn" and run.status in {"failed", "cancelled", "lost"}
    resumable = unfinished and "imported" not in run.record
    advice = f"finish it first: lethe resume {run.path}" if resumable else "name an unlearning run"
    raise LetheError(f"'{name}' is a run of kind {run.record['kind']}, status {run.status}, that holds no model; {advice}")


def _adapter(name: str, run: Run) -> str:
    folder = run.artifact("adapter")
    weights = folder / ADAPTER[1] if folder else None
    if weights is None or not weights.is_file() or sha256(weights) != run.record["artifacts"]["adapter"].get("sha256"):
        raise LetheError(f"'{name}': its adapter in '{folder}' is gone or has changed since it was saved; run it again")
    return str(folder)


def checked(ref: ModelRef, weights: bool = True) -> ModelRef:
    """`ref`, after a look at its files; not at the weights of a repository of the hub, which are not downloaded yet.

    Raises:
        LetheError: a file shows that the model cannot be loaded.
    """
    folder = ref.folder
    if not os.path.lexists(folder / "config.json"):
        if (folder / ADAPTER[0]).exists():
            raise model_folder.adapter_alone(ref.name, folder)
        found = "".join(
            f"; name one of its checkpoints, such as '{ref.name}@{step}'" for step in list(checkpoint_folders(folder))[-1:]
        )
        raise LetheError(f"model '{ref.name}' has no config.json, so it is not the folder of a model{found}")
    model_folder.refuse_config(ref.name, ref.config)
    for keys in (WIDTH_KEYS, DEPTH_KEYS, WINDOW_KEYS, ("vocab_size",)):
        ref._size(*keys)
    if ref.local and weights:
        model_folder.refuse_weights(ref.name, folder)
    return ref


def _vocabulary(ref: ModelRef) -> Any:
    """What determines the tokens of a text: vocabulary, merges and normalisation."""
    if not (ref.folder / TOKENIZER).exists():
        return tokenizer(ref).get_vocab()
    found = model_folder.part(ref.name, ref.folder / TOKENIZER)
    return found.get("model"), found.get("added_tokens"), found.get("pre_tokenizer"), found.get("normalizer")
