"""Maps from settings to result: `fit_affine` and `score_affine`. What cannot work is refused before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lethe.config import MAPPED, AffineConfig, AffineScoreConfig, as_text_source, to_dict
from lethe.errors import LetheError
from lethe.files import refuse_run_folder, sha256
from lethe.maps.folder import WEIGHTS, check_maps, facts_of, find_maps, layers_of, refuse_altered
from lethe.models import refs
from lethe.runs.run import Run
from lethe.text import corpora

if TYPE_CHECKING:
    from lethe.maps.affine import MapScores


def fit_affine(config: AffineConfig, run: Run | None = None) -> Run:
    """Fit maps for a pair of models, as a run with the artifact `affine`. `run`: an interrupted run, which starts again.

    Raises:
        LetheError: the models do not fit together, or the text cannot be used; raised before anything is written.
    """
    refuse_run_folder(config.out)
    pair = refs.pair_of(config.model, config.source, config.layers, config.out)
    refs.refuse_length(config.max_length, *pair)
    if as_text_source(config.text).source == "lab:forget":
        raise LetheError("text: maps are never fitted on forget text, since they would restore the topic; give retain text")
    documents = corpora.select(config.text, config.num_examples, "front", "text", MAPPED)
    corpora.split(documents, config.held_out)
    refs.verify(*pair)
    from lethe.maps.affine import fit_on_text
    from lethe.models.architecture_check import refuse_unreadable

    last = max(config.layers)
    (model, tokenizer), (source, _) = (refs.load(ref, config.dtype, last) for ref in pair)
    for each, ref in ((model, pair[0]), (source, pair[1])):
        refuse_unreadable(each, ref.name, config.max_length, last)
    run = run or Run.create("affine", config.name, to_dict(config), config.out)
    with run.running():
        maps = fit_on_text(model, source, tokenizer, documents, config, config.text)
        maps.record |= {"model": refs.record(pair[0]), "source": refs.record(pair[1])}
        maps.save(run.path / "affine")
        run.update(
            scores=maps.record["scores"],
            parents={name: maps.record[name] for name in ("model", "source", "text")},
            artifacts={"affine": {"path": "affine", "sha256": sha256(run.path / "affine" / WEIGHTS)}},
        )
    return run


def score_affine(config: AffineScoreConfig) -> MapScores:
    """Score maps on text that they were not fitted on, for each layer, beside no map.

    Maps that do not record their convention are scored by both.

    Raises:
        LetheError: there are no maps, they belong to another pair, or the models or the text cannot be used.
    """
    folder = find_maps(config.affine)
    pair = refs.pair_of(config.model, config.source, [0], "runs")
    refs.refuse_length(config.max_length, *pair)
    conventions = check_maps(folder, *pair)
    for convention in conventions:
        refs.refuse_layers(pair[1], layers_of(refuse_altered(folder, None), convention, pair[0].depth))
    fitted = set(facts_of(folder).get("fitted_ids", []))
    unseen = [document for document in corpora.read(config.text) if document.id[:16] not in fitted]
    if not unseen:
        raise LetheError("text: the maps were fitted on all of these documents; give other text")
    documents = corpora.take(unseen, config.num_examples, "back", "text the maps were not fitted on")
    refs.verify(*pair)
    from lethe.maps.affine import score_maps

    (model, tokenizer), (source, _) = (refs.load(ref, config.dtype) for ref in pair)
    sequences = corpora.tokenise(documents, tokenizer, config.max_length)
    return score_maps(folder, conventions, model, source, sequences, tokenizer.pad_token_id, config.batch_size)
