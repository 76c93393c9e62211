"""The two models of a map, and the documents that it is fitted and scored on."""

from __future__ import annotations

from lethe.errors import LetheError
from lethe.models import refs
from lethe.text import corpora


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
