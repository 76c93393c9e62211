"""The presets of the built-in lab: a tiny model family with a full pretraining history, built on this machine.

`corpus` makes a fictional world and `questions` its tasks. `pretrain` trains a GPT-NeoX on it and saves checkpoints before,
during and after the onset, the step at which the forget domain enters the text. It also trains a twin that never sees that
domain. The name of a lab's folder depends on the preset and on the source of this package, so a build is never outdated.
The environment variable LETHE_LAB chooses the preset: standard, or nano for tests.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from lethe.errors import LetheError
from lethe.home import lethe_home


@dataclass(frozen=True)
class LabPreset:
    """All that determines a lab. Sizes count entities per domain; steps are optimizer updates."""

    name: str
    seed: int = 0
    general_entities: int = 60
    neighbour_entities: int = 72
    forget_entities: int = 88
    spare_entities: int = 14
    """General entities without questions, for the text of the filtered twin."""
    syllables: int = 60
    """Number of first syllables of names, and of last syllables."""
    skew: float = 0.7
    """Entity number r of a general domain is mentioned in proportion to r^-skew."""
    question_share: float = 0.35
    """Share of pretraining documents that consist of questions with answers. The others consist of statements."""
    forget_documents: int = 2800
    retain_documents: int = 4000
    text_question_share: float = 0.5
    retain_coverage: float = 0.75
    neighbour_coverage: float = 0.6
    neighbour_weight: float = 1.0
    """Frequency of documents of the neighbouring domain, relative to each general domain."""
    hidden_size: int = 128
    heads: int = 4
    layers: int = 6
    initializer_range: float = 0.06
    sequence_length: int = 64
    batch_size: int = 16
    checkpoints: tuple[int, ...] = (100, 200, 300, 400, 500, 600, 630, 660, 690, 720, 760, 800, 900, 1000, 1100)
    onset: int = 600
    """Last step without a document of the forget domain."""
    forget_sequences: int = 6
    """Sequences of each batch with forget documents after the onset (with general documents for the filtered twin)."""
    lr: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.01
    decay: float = 1.0
    """Last share of the steps, in which the learning rate falls linearly to a twentieth."""
    threads: int = 2

    @property
    def steps(self) -> int:
        return self.checkpoints[-1]


PRESETS = {
    "standard": LabPreset("standard"),
    "nano": LabPreset(
        "nano",
        general_entities=6,
        neighbour_entities=10,
        forget_entities=20,
        spare_entities=3,
        syllables=16,
        forget_documents=2600,
        retain_documents=2600,
        hidden_size=64,
        heads=2,
        initializer_range=0.08,
        batch_size=12,
        forget_sequences=4,
        checkpoints=(20, 60, 120, 130, 140, 150, 160, 175, 190, 215, 240, 280),
        onset=120,
        lr=7e-3,
        decay=0.3,
        warmup=20,
    ),
}


def active_preset() -> LabPreset:
    """The preset that the environment variable LETHE_LAB names.

    Raises:
        LetheError: there is no such preset.
    """
    name = os.environ.get("LETHE_LAB", "standard")
    if name not in PRESETS:
        raise LetheError(f"LETHE_LAB: {name!r} is not a preset of the lab; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


@cache
def _key(preset: LabPreset) -> str:
    digest = hashlib.sha256(repr(sorted(asdict(preset).items())).encode())
    for source in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in {".py", ".yaml"}):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def lab_path(preset: LabPreset | None = None) -> Path:
    """The folder of a preset's lab, built or not; None: the active preset."""
    preset = preset or active_preset()
    return lethe_home() / "lab" / f"{preset.name}-{_key(preset)}"


def is_built(preset: LabPreset | None = None) -> bool:
    return (lab_path(preset) / "run.json").is_file()
