"""Checks before unlearning: a recipe that cannot work is refused before anything is computed or written.

`check` resolves the recipe's models, text, maps and tasks, and refuses what does not fit together. Most is refused without
importing torch, in less than a second. Whether a model's configuration, weights and tokenizer fit together is tried last.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from lethe.config import UNLEARNED, AffineConfig, BudgetSettings, as_text_source
from lethe.errors import LetheError, printable
from lethe.evaluation.check import check_tasks
from lethe.files import UnreadableError, refuse_run_folder, sha256
from lethe.maps.folder import check_maps, find_maps
from lethe.methods.method import Method
from lethe.models import refs
from lethe.models.folder import advice, shapes
from lethe.results.regimes import RETAIN_TASKS, retain_task
from lethe.runs.finding import find_run
from lethe.text import corpora
from lethe.training.check import plan, refuse_rank, refuse_unavailable


@dataclass
class Checked:
    """A recipe's resolved parts. `source` is None if none is used, or if it is still to be found."""

    model: refs.ModelRef
    source: refs.ModelRef | None
    forget: list[corpora.Document]
    retain: list[corpora.Document]
    affine: Path | None = None
    conventions: list[str] = field(default_factory=list)
    mapped: list[corpora.Document] = field(default_factory=list)
    """Documents to fit maps on; none if the recipe names maps or uses none."""
    scores: Path | None = None
    """The file of scores that decide which weights are rewound; None if the recipe names none."""
    held_out: list[corpora.Document] = field(default_factory=list)
    """Documents that checks of the budget read."""


def check(config: Method, effective_batch: int | None = None) -> Checked:
    """Resolve a recipe. `effective_batch`: that of the run which is resumed.

    Raises:
        LetheError: something in it cannot work; the message is one line and says what to do.
    """
    refuse_run_folder(config.out)
    check_tasks(config.eval)
    if config.budget and config.budget.retain is not None and retain_task(config.eval.tasks) is None:
        raise LetheError(
            f"budget.retain: eval.tasks has no retain task; add {' or '.join(RETAIN_TASKS)}, or limit budget.kl instead"
        )
    model = refs.resolve(config.model, config.out)
    refs.refuse_layers(model, config.layers if config.layers and config.reads_layers else [0])
    if model.adapter:
        raise LetheError(f"model: '{config.model}' is an adapter saved without its model; merge the two first")
    refs.refuse_length(config.max_length, model)
    config.refuse_model(model)
    checked = Checked(model, None, [], [])
    if config.needs_source and not config.finds_source:
        check_source(config, checked)
    checked.scores = find_scores(config)
    if config.fits_maps:
        sources = config.retain if isinstance(config.retain, list) else [as_text_source(config.retain)]
        if any(source.source == "lab:forget" for source in sources):
            raise LetheError("retain: this is forget text, and maps are fitted on the retain text; give retain text")
    checked.forget = corpora.select(config.forget, config.num_train_examples, "front", "forget text", UNLEARNED)
    checked.retain = corpora.select(config.retain, config.num_train_examples, "front", "retain text", UNLEARNED)
    if {d.id for d in checked.forget} & {d.id for d in checked.retain}:
        raise LetheError("forget and retain text share documents; remove these from one of the two")
    if config.budget and config.budget.reads_text:
        checked.held_out = held_out(config, config.budget, {d.id for d in [*checked.forget, *checked.retain]})
    refuse_types(config)
    refuse_rank(config, model)
    if config.packing == "none":
        plan(config, sizes(config, len(checked.forget), len(checked.retain)), effective_batch)
    if config.maps and config.fits_maps:
        most = config.maps.documents
        checked.mapped = corpora.select(config.retain, None if most else 0, "front", "retain", most)
        corpora.split(checked.mapped, AffineConfig.held_out)
    refuse_unavailable(config)
    refs.verify(model, *([checked.source] if checked.source else []))
    return checked


def check_source(config: Method, checked: Checked) -> None:
    """Resolve the recipe's source and, where they are given, its maps.

    Raises:
        LetheError: its activations cannot be compared with the model's, or the maps belong to another pair.
    """
    layers = config.layers if config.layers and config.reads_layers else [0]
    model, source = refs.pair_of(config.model, config.source, layers, config.out)
    if (model.path, model.revision, model.adapter, model.random) == (
        source.path,
        source.revision,
        source.adapter,
        source.random,
    ):
        raise LetheError(f"source: '{config.source}' is the model itself; name a checkpoint that has not learned the topic")
    refs.refuse_length(config.max_length, source)
    checked.source = source
    if config.maps and config.maps.given:
        checked.affine = find_maps(config.maps.given, config.out)
        checked.conventions = check_maps(checked.affine, model, source, list(config.mapped_layers), config.maps.convention)


def sizes(config: Method, forget: int, retain: int) -> int | list[int]:
    """The number of items of each stage, for so many documents of each text; without stages, of the training data.

    Raises:
        LetheError: there are fewer documents than parts.
    """
    if config.layered is None:
        return max(forget, retain)
    parts = config.layered.parts
    if forget < parts:
        raise LetheError(f"layered.parts: the forget text has {forget} documents, too few for {parts} parts; lower it")
    return [max(bound, retain + forget - bound) for bound in corpora.part_bounds(forget, parts)[1:]]


def find_scores(config: Method) -> Path | None:
    """The file of scores that `rewind_weights` names: a .safetensors file, or the scores of a run.

    Raises:
        LetheError: there is none, it cannot be read, or it was altered since its run wrote it.
    """
    name = config.rewind_weights
    if name in {"all", "fisher"}:
        return None
    if name.startswith("run:"):
        run = find_run(name.removeprefix("run:"), config.out)
        file = run.artifact("scores")
        if file is None:
            raise LetheError(f"rewind_weights: '{name}' has no scores; name a run that had rewind_weights: fisher")
    elif name.endswith(".safetensors"):
        run, file = None, Path(name)
    else:
        raise LetheError(f"rewind_weights: expected all, fisher, a .safetensors file or run:ID, got '{printable(name, 80)}'")
    try:
        shapes(file)
    except UnreadableError as error:
        raise LetheError(f"rewind_weights: '{file}' cannot be read ({printable(error, 80)}){advice(error)}") from error
    if run and sha256(file) != run.record["artifacts"]["scores"].get("sha256"):
        raise LetheError(f"rewind_weights: '{file}' was altered after its run wrote it; score the weights again")
    return file


def held_out(config: Method, budget: BudgetSettings, trained: set[str]) -> list[corpora.Document]:
    """The documents that checks of the budget read.

    Raises:
        LetheError: there are not enough that are not trained on.
    """
    if budget.text is not None and budget.text == config.forget:
        raise LetheError("budget.text: this is the forget text, on which the model should change; give neutral text")
    found = corpora.beside(config.retain if budget.text is None else budget.text, trained, budget.documents)
    if len(found) < budget.documents:
        name = "the retain text" if budget.text is None else "budget.text"
        lower = "lower budget.documents" if budget.text else "lower num_train_examples or budget.documents, or name budget.text"
        raise LetheError(
            f"budget.documents: {budget.documents} are needed that are not trained on, and {name} has {len(found)}; {lower}"
        )
    return found


def refuse_types(config: Method) -> None:
    """Refuse types of weights if a loss would measure rounding, or rounding would undo updates."""
    if config.dtype == "bfloat16" and config.teacher_dtype == "float32":
        raise LetheError("teacher_dtype: with float32 teachers, losses of a bfloat16 model measure rounding; set it to null")
    rounded = config.dtype == "bfloat16" and config.optimizer == "adamw_8bit" and config.lora is None
    if rounded and importlib.util.find_spec("torchao") is None:
        raise LetheError(
            "optimizer: adamw_8bit has no float32 weights, so full-rank updates in bfloat16 would be lost to rounding, except "
            "with torchao, which rounds at random; pip install torchao, or use adamw or muon, or dtype float32"
        )
