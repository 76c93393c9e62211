"""Checks before maps are fitted or scored. No model is loaded: what is refused here is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lethe.config import MAPPED, AffineConfig, AffineScoreConfig, as_text_source
from lethe.errors import LetheError
from lethe.files import refuse_run_folder
from lethe.maps.folder import check_maps, facts_of, find_maps, layers_of
from lethe.models import refs
from lethe.text import corpora


def check_affine(config: AffineConfig) -> tuple[refs.ModelRef, refs.ModelRef, list[corpora.Document]]:
    """Model, source, and the documents to fit and score on.

    Raises:
        LetheError: the models do not fit together, or the text cannot be used.
    """
    refuse_run_folder(config.out)
    model, source = pair_of(config.model, config.source, config.layers, config.out)
    refs.refuse_length(config.max_length, model, source)
    if as_text_source(config.text).source == "lab:forget":
        raise LetheError("text: maps are never fitted on forget text, since they would restore the topic; give retain text")
    documents = corpora.select(config.text, config.num_examples, "front", "text", MAPPED)
    split(documents, config.held_out)
    refs.verify(model, source)
    return model, source, documents


@dataclass
class CheckedScore:
    """What is needed to score maps: their folder, the possible conventions, both models, and documents not used in the fit."""

    folder: Path
    conventions: list[str]
    model: refs.ModelRef
    source: refs.ModelRef
    documents: list[corpora.Document]


def check_affine_score(config: AffineScoreConfig) -> CheckedScore:
    """What is needed to score maps.

    Raises:
        LetheError: there are no maps, they belong to another pair, or the models or the text cannot be used.
    """
    folder = find_maps(config.affine)
    facts = facts_of(folder)
    model, source = pair_of(config.model, config.source, [0], "runs")
    refs.refuse_length(config.max_length, model, source)
    conventions = check_maps(folder, model, source)
    for convention in conventions:
        refs.refuse_layers(source, layers_of(facts, convention, model.depth))
    fitted = set(facts.get("fitted_ids", []))
    unseen = [document for document in corpora.read(config.text) if document.id[:16] not in fitted]
    if not unseen:
        raise LetheError("text: the maps were fitted on all of these documents; give other text")
    documents = corpora.take(unseen, config.num_examples, "back", "text the maps were not fitted on")
    refs.verify(model, source)
    return CheckedScore(folder, conventions, model, source, documents)


def pair_of(model: str, source: str, layers: list[int], out: str) -> tuple[refs.ModelRef, refs.ModelRef]:
    """Model and source, by reference.

    Raises:
        LetheError: their activations cannot be compared at these layers.
    """
    pair = refs.resolve(model, out), refs.resolve(source, out)
    refs.refuse_mismatch(*pair)
    for ref in pair:
        refs.refuse_layers(ref, layers)
    return pair


def split(documents: list[corpora.Document], held_out: float) -> tuple[list[corpora.Document], list[corpora.Document]]:
    """The documents to fit on, and the last ones, a share of `held_out`, to score on."""
    count = max(1, round(held_out * len(documents)))
    if count >= len(documents):
        raise LetheError(f"affine: {len(documents)} documents are too few to hold {held_out:.0%} out; give more text")
    return documents[:-count], documents[-count:]
