"""Model references: how a model is named, and how it is loaded.

    org/name@revision       a hub repository, optionally at a branch, tag or commit
    FOLDER                  a local folder of a model, or of a run
    FOLDER@global_step900   a folder of checkpoints, and one of them
    run:ID                  what a run produced: a model, or an adapter on the model it was trained from
    lab:final               the lab's last checkpoint; lab:global_step900, lab:filtered likewise
    random:REF              the architecture and tokenizer of REF with fresh weights

`resolve` finds out what a reference means and refuses what cannot be loaded, without importing torch; `load` loads
it. Weights are read from safetensors only (a pickle can run code), and no code comes from a repository.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe import lab
from lethe.errors import LetheError, nearest
from lethe.ledger import Run, find_run, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
WINDOW_KEYS = ("max_position_embeddings", "n_positions")
RANDOM_SEED = 0


@dataclass(frozen=True)
class ModelRef:
    """A reference that has been looked up. `path` is a local folder, or a hub repository if `revision` is not None."""

    name: str
    path: str
    revision: str | None = None
    adapter: str | None = None
    random: bool = False
    saved: str | None = None
    """Hash of the weights as a run has saved them."""

    @property
    def local(self) -> bool:
        return self.revision is None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        try:
            found = json.loads(_file(self, "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise LetheError(f"model '{self.name}': config.json is damaged ({error}); save the model again") from error
        if not isinstance(found, dict):
            raise LetheError(f"model '{self.name}': config.json is damaged (no settings in it); save the model again")
        return found

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return _config_value(self, WIDTH_KEYS)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return _config_value(self, DEPTH_KEYS)

    @property
    def window(self) -> int | None:
        """Longest text in tokens that the model was made for; None if its configuration does not say."""
        settings = self.config.get("text_config", self.config)
        return next((int(settings[key]) for key in WINDOW_KEYS if key in settings), None)


def resolve(name: str, out: str | Path = "runs") -> ModelRef:
    """What a model reference means. Runs are looked for in `out` too.

    Raises:
        LetheError: it names nothing, or something without safetensors weights, configuration or tokenizer.
    """
    if name.startswith("random:"):
        inner = resolve(name.removeprefix("random:"), out)
        return ModelRef(name, inner.path, inner.revision, None, random=True)
    if name.startswith("lab:"):
        return _checked(ModelRef(name, str(_lab_folder(name))))
    if run := run_of(name, out):
        return _of_run(name, run)
    path, _, revision = name.partition("@")
    folder = Path(path)
    if folder.is_dir():
        if revision:
            return _checked(ModelRef(name, str(_checkpoint(folder, revision))))
        return _checked(ModelRef(name, str(folder)))
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.parent.is_dir():
        return _checked(ModelRef(name, path, revision or "main"))
    raise LetheError(
        f"model reference '{name}' is not a folder and has none of the forms org/name@revision, FOLDER, "
        f"FOLDER@global_stepN, run:ID, lab:final, random:REF"
    )


def run_of(name: str, out: str | Path = "runs") -> Run | None:
    """The run that a reference names, by run:ID or by its folder; None for any other reference."""
    if name.startswith("run:"):
        return find_run(name.removeprefix("run:"), out)
    return Run.open(name) if (Path(name) / "run.json").exists() else None


def load(ref: ModelRef, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on the GPU if there is one, and its tokenizer (which pads on the right).

    An adapter is put on its base model (a PEFT model is returned). `random:` weights are drawn from a fixed seed. The
    model's own dropouts (GPT-2 has some) are off in training too: a loss that compares it with a teacher would measure
    them. Its saved configuration keeps them.
    """
    import torch
    from safetensors import SafetensorError

    from_hub = contextlib.nullcontext() if ref.local else hub(f"model '{ref.name}' cannot be read from the hub")
    try:
        with from_hub:
            return _load(ref, getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"model '{ref.name}' cannot be loaded ({why}); its folder is damaged, save it again") from error


def _load(ref: ModelRef, kind: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"revision": ref.revision} if ref.revision else {}
    config = AutoConfig.from_pretrained(ref.path, **where)
    dropouts = {name: rate for name, rate in vars(config).items() if "drop" in name and type(rate) in {int, float}}
    for name in dropouts:
        setattr(config, name, 0.0)
    if ref.random:
        with torch.random.fork_rng():
            torch.manual_seed(RANDOM_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            ref.path, config=config, dtype=kind, use_safetensors=True, output_loading_info=True, **where
        )
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:
            raise LetheError(
                f"model '{ref.name}' lacks weights ({', '.join(missing[:3])}…); its folder is damaged, save it again"
            )
    for name, value in dropouts.items():
        setattr(model.config, name, value)
    if ref.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, ref.adapter)
    model.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer(ref)


def tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right; end-of-text stands in where there is no padding token."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(ref.path, **({"revision": ref.revision} if ref.revision else {}))
    found.padding_side = "right"
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def weight_hash(ref: ModelRef) -> str:
    """What tells these weights from others: SHA-256 of the safetensors files, or a hub repository's commit."""
    if ref.random:
        return f"random:seed{RANDOM_SEED}:{sha256(_file(ref, 'config.json'))}"
    if ref.revision:
        return f"commit:{_file(ref, 'config.json').parent.name}"
    files = list(Path(ref.path).glob("*.safetensors"))
    if ref.adapter:
        files += Path(ref.adapter).glob("*.safetensors")
    return sha256(*files)


def record(ref: ModelRef) -> dict[str, str]:
    """A reference for run.json: as it was given, and the weights that it meant.

    Raises:
        LetheError: the weights are not those that its run saved.
    """
    found = weight_hash(ref)
    if ref.saved not in {None, found}:
        raise LetheError(f"model '{ref.name}': its weights in '{ref.path}' have changed since they were saved; make them again")
    return {"ref": ref.name, "sha256": found}


def refuse_mismatch(model: ModelRef, source: ModelRef) -> None:
    """Refuse a source whose activations cannot be compared with the model's.

    Raises:
        LetheError: widths or tokenizers differ.
    """
    if model.width != source.width:
        raise LetheError(
            f"source '{source.name}' has width {source.width}, model '{model.name}' has {model.width}; "
            f"the source must be a checkpoint of the same model"
        )
    if _vocabulary(model) != _vocabulary(source):
        raise LetheError(
            f"source '{source.name}' and model '{model.name}' have different tokenizers; "
            f"the source must be a checkpoint of the same model"
        )


def refuse_layers(model: ModelRef, layers: list[int]) -> None:
    """Refuse a layer that the model does not have."""
    if max(layers) >= model.depth:
        raise LetheError(
            f"layers: {max(layers)} is out of range; '{model.name}' has {model.depth} blocks, layers 0 to {model.depth - 1}"
        )


def checkpoint_folders(folder: Path) -> dict[str, Path]:
    """`global_step…` folders by name, in order of step."""
    steps = {p.name: p for p in folder.glob("global_step*") if p.is_dir() and step_of(p.name) is not None}
    return dict(sorted(steps.items(), key=lambda item: step_of(item[0]) or 0))


def step_of(name: str) -> int | None:
    """The number in `global_step900` or `step900`; None for another name."""
    digits = name.removeprefix("global_").removeprefix("step")
    return int(digits) if digits.isdigit() and name != digits else None


def lab_folder() -> Path:
    """The folder of the active lab.

    Raises:
        LetheError: it has not been built.
    """
    if not lab.is_built():
        raise LetheError(f"the lab '{lab.active_preset().name}' is not built yet; build it: lethe lab build")
    return lab.lab_path()


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


def _checkpoint(folder: Path, step: str) -> Path:
    known = checkpoint_folders(folder)
    if step not in known:
        raise LetheError(f"model reference '{folder}@{step}': there is no such checkpoint{nearest(step, known)}")
    return known[step]


def _of_run(name: str, run: Run) -> ModelRef:
    artifacts = run.record.get("artifacts") or {}
    if "model" in artifacts:
        return _checked(ModelRef(name, str(run.artifact("model")), saved=artifacts["model"].get("sha256")))
    if "base" in artifacts:
        return _checked(ModelRef(name, str(run.artifact("base")), None, _adapter(name, run)))
    if "adapter" in artifacts:
        parent = (run.record.get("parents") or {}).get("model") or {}
        if "ref" not in parent:
            raise LetheError(f"'{name}' is an adapter, and its record does not name its model (parents.model.ref)")
        base = resolve(parent["ref"], run.path.parent)
        if weight_hash(base) != parent["sha256"]:
            raise LetheError(
                f"'{name}' is an adapter on '{parent['ref']}', which holds other weights now than when it was trained"
            )
        return ModelRef(name, base.path, base.revision, _adapter(name, run))
    unfinished = (
        run.record["kind"] == "unlearn" and run.status in {"failed", "cancelled", "lost"} and "imported" not in run.record
    )
    advice = f"finish it first: lethe resume {run.path}" if unfinished else "name an unlearning run"
    raise LetheError(f"'{name}' is a run of kind {run.record['kind']}, status {run.status}, that holds no model; {advice}")


def _adapter(name: str, run: Run) -> str:
    folder = run.artifact("adapter")
    if folder is None:
        raise LetheError(f"'{name}' has a base and no adapter on it (artifacts.adapter); run it again")
    if not (folder / "adapter_model.safetensors").is_file():
        raise LetheError(f"'{name}': its adapter is gone, there is no adapter_model.safetensors in '{folder}'; run it again")
    if sha256(*folder.glob("*.safetensors")) != run.record["artifacts"]["adapter"].get("sha256"):
        raise LetheError(f"'{name}': its adapter in '{folder}' has changed since it was saved; run it again")
    return str(folder)


def _checked(ref: ModelRef) -> ModelRef:
    """`ref`, if it can be loaded: configuration, safetensors weights and a tokenizer are there."""
    config = _file(ref, "config.json")
    if not ref.local:
        return ref
    folder = config.parent
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        if pickles:
            raise LetheError(
                f"model '{ref.name}' has only pickled weights ({pickles[0]}), which can run code when read; "
                f"save it with safetensors: model.save_pretrained(FOLDER)"
            )
        raise LetheError(f"model '{ref.name}' has no weights: no .safetensors file in its folder")
    if not any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    ):
        raise LetheError(f"model '{ref.name}' has no tokenizer in its folder; save it there: tokenizer.save_pretrained(FOLDER)")
    return ref


def _file(ref: ModelRef, name: str) -> Path:
    """A file of the model, fetched from the hub if it is not local."""
    if ref.local:
        path = Path(ref.path) / name
        if not path.exists():
            raise LetheError(f"model '{ref.name}' has no {name}; it is not the folder of a model")
        return path
    from huggingface_hub import hf_hub_download

    with hub(f"model reference '{ref.name}': no such folder here, and the hub's cannot be read"):
        return Path(hf_hub_download(ref.path, name, revision=ref.revision))


@contextlib.contextmanager
def hub(problem: str) -> Iterator[None]:
    """Inside, what keeps the hub from answering is a refusal: the problem, and why.

    Raises:
        LetheError: there is no connection or it breaks, the hub does not have it, or does not let it be read.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # of a connection that breaks, no OSError
    )

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(f"{problem} ({why})") from error


def _config_value(ref: ModelRef, keys: tuple[str, ...]) -> int:
    config = ref.config.get("text_config", ref.config)
    for key in keys:
        if key in config:
            return int(config[key])
    raise LetheError(f"model '{ref.name}': config.json has none of {', '.join(keys)}; the architecture is not supported")


def _vocabulary(ref: ModelRef) -> Any:
    """What decides how text becomes tokens: the tokenizer's vocabulary and merges."""
    try:
        found = json.loads(_file(ref, "tokenizer.json").read_text())
    except LetheError:
        return tokenizer(ref).get_vocab()
    return found.get("model"), found.get("added_tokens"), found.get("pre_tokenizer"), found.get("normalizer")
