"""Layered unlearning: the forget text in parts, unlearned in stages (Qian et al., https://arxiv.org/abs/2505.09500).

    stage i of k     forget text: parts 1 to i         retain text: the retain text, then parts i + 1 to k

The retain text of a stage is the union of the two, so they are mixed in proportion to their numbers of documents. As without
stages, a pass is one over the longer text of the stage, and the shorter text repeats. The retain sequences are those of the
retain text followed by all those of the forget text, so that a number names the same document in every stage.
"""

from __future__ import annotations

import bisect
import itertools

from lethe.text.corpora import part_bounds
from lethe.training.trainer import Sequences


class Layered(Sequences):
    """Training data of all stages, one after the other. An item has a sequence of each text of its stage."""

    def __init__(self, parts: int, forget: list[list[int]], retain: list[list[int]]):
        super().__init__(forget=forget, retain=retain + forget)
        self.kept, self.bounds = len(retain), part_bounds(len(forget), parts)[1:]
        self.ends = list(itertools.accumulate(self.stages))

    @property
    def stages(self) -> list[int]:
        return [max(bound, len(self.texts["retain"]) - bound) for bound in self.bounds]

    def own(self, text: str) -> int:
        return self.kept if text == "retain" else len(self.texts[text])

    def __len__(self) -> int:
        return self.ends[-1]

    def numbers(self, i: int) -> dict[str, int]:
        """The numbers of the sequences of item i."""
        stage = bisect.bisect_right(self.ends, i)
        place, bound = i - self.ends[stage] + self.stages[stage], self.bounds[stage]
        retained = place % (len(self.texts["retain"]) - bound)
        return {"forget": place % bound, "retain": retained + (bound if retained >= self.kept else 0)}

    def described(self, updates: list[int]) -> dict[str, str]:
        """What each stage does, for the plan."""
        count, parts = len(self.texts["forget"]), len(self.bounds)
        return {
            f"{i} of {parts}": f"{bound} forget documents, {self.kept} + {count - bound} retain documents, {steps} updates"
            for i, (bound, steps) in enumerate(zip(self.bounds, updates, strict=True), 1)
        }
