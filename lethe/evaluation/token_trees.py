"""The rows of tokens that an evaluation runs, in which questions share what they have in common.

The choices of a question are one row: the context once, then the answers as branches of a tree. Questions whose contexts
begin alike are branches of one row too, as long as what each of them does not see stays short: a token's attention to some
hundred others is little beside its products with the weights. What all questions of a task begin with is not in this count;
it is run once for all rows (`begins`). Rows are only told here what they hold; `scoring.py` runs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Encoded = tuple[list[int], list[int]]
LEAST_BEGINNING = 8
LEAST_SHARED = 0.25
UNSEEN = 96
"""Tokens of a row that one of its questions does not see."""
_last: dict[bool, tuple[tuple[list[Encoded], int, list[int]], list[Row]]] = {}


@dataclass
class Row:
    """One row of tokens: contexts, then those that answers are read at, if it is `split`; otherwise one plain input."""

    tokens: list[int]
    parents: list[int] = field(default_factory=list)
    """Of each token from `straight` on, the one that it comes after."""
    reads: list[tuple[int, list[int]]] = field(default_factory=list)
    """For each request that the row answers: its number, and where the logits of each of its answer's tokens are."""
    split: bool = False
    """Whether what comes before the answers is run first and kept; otherwise the row is run whole, as any model takes it."""
    context: int = 0
    """How many of its tokens come before the first that an answer is read at, if it is split."""
    straight: int = 0
    """How many of those come one after the other, from the first on."""
    branches: bool = False
    """Whether an answer's token comes after another than the one before it in the row."""
    begins: int = 0
    """How many of its first tokens it has in common with the other rows of its task, and takes from their kept run."""
    group: int = 0
    """The task that it belongs to."""

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What of the row an architecture may not take: branches of answers, of contexts, a beginning that is kept."""
        return self.branches, self.straight < self.context, self.begins > 0

    def sight(self) -> tuple[list[int], np.ndarray]:
        """Of the tokens from `straight` on: positions along their branches, and seen[i, j]: whether token i sees token j."""
        start = self.straight
        depths = list(range(start))
        seen = np.zeros((len(self.tokens) - start, len(self.tokens)), dtype=bool)
        for i, parent in enumerate(self.parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if parent >= start:
                seen[i] = seen[parent - start]
            else:
                seen[i, : parent + 1] = True
            seen[i, start + i] = True
        return depths[start:], seen


def longest_first(row: Row) -> tuple[Any, ...]:
    """The order of rows in batches: those of a task with a beginning together."""
    return row.begins and row.group, row.begins, -len(row.tokens), row.tokens


def unlike(rows: list[Row]) -> list[tuple[list[Row], int, int]]:
    """Batches of a few rows to try a model on: the widest, and the one with most padding. With each its width and padding.

    A batch has the longest row, those with most tokens before and in answers, and the shortest, of rows that may stand in one.
    """
    together: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        together[row.begins, row.begins and row.group].append(row)
    batches = []
    for some in together.values():
        shortest, longest = (choose(some, key=lambda row: len(row.tokens)) for choose in (min, max))
        context = max(some, key=lambda row: row.context)
        answers = max(some, key=lambda row: len(row.tokens) - row.context)
        width = context.context + len(answers.tokens) - answers.context
        batch = list({id(row): row for row in (longest, context, answers, shortest)}.values())
        batches.append((batch, width, width - len(shortest.tokens)))
    return [max(batches, key=lambda batch: batch[1]), max(batches, key=lambda batch: batch[2])]


def rows_of(requests: list[Encoded], window: int, groups: list[int], join: bool = True) -> list[Row]:
    """`tree_rows`, longest first; the last ones are kept: while a model is trained it is asked the same again and again."""
    asked = list(requests), window, list(groups)
    if join not in _last or _last[join][0] != asked:
        _last[join] = asked, sorted(tree_rows(*asked, join), key=longest_first)
    return _last[join][1]


def tree_rows(requests: list[Encoded], window: int, groups: list[int], join: bool = True) -> list[Row]:
    """Rows in which requests share contexts, or (`join`) what these begin with, and answers what they begin with alike.

    A context that does not fit into the window together with its answer is cut from the left, as lm-eval does.
    """
    rows: dict[tuple[int, tuple[int, ...]], list[Row]] = defaultdict(list)
    branches: dict[tuple[int, tuple[int, ...]], dict[tuple[int, ...], int]] = {}
    cut = set()
    for number, (text, continuation) in enumerate(requests):
        context = text[-(window + 1 - len(continuation)) :]
        key = groups[number], tuple(context)
        if not rows[key] or len(rows[key][-1].tokens) - len(context) >= max(UNSEEN, len(context)):
            before = len(context) - 1
            rows[key].append(Row(list(context), [before - 1], [], True, before, before, group=groups[number]))
            branches[key] = {}
        if len(context) < len(text):
            cut.add(key)
        row, known = rows[key][-1], branches[key]
        place, read = len(context) - 1, [len(context) - 1]
        for end in range(1, len(continuation)):
            begin = tuple(continuation[:end])
            if begin not in known:
                known[begin] = len(row.tokens)
                row.branches |= place != len(row.tokens) - 1
                row.tokens.append(continuation[end - 1])
                row.parents.append(place)
            place = known[begin]
            read.append(place)
        row.reads.append((number, read))
    whole = [row for key, some in rows.items() if key not in cut for row in some]
    _share_beginnings(whole)
    shared = [_joined(some) for some in _alike(whole)] if join else whole
    return [row for key in rows if key in cut for row in rows[key]] + shared


def _share_beginnings(rows: list[Row]) -> None:
    """Set how many first tokens the rows of each task have in common, where that is worth keeping."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    for some in groups.values():
        contexts = [row.tokens[: row.context] for row in some]
        common = _common(min(contexts), max(contexts))
        if common >= LEAST_BEGINNING and len(some) > 1:
            for row in some:
                row.begins = common


def _common(one: list[int], other: list[int]) -> int:
    """How many first tokens two lists have in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _alike(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows whose contexts begin alike, together, as long as none has much more beside it than it would have to run alone."""
    some: list[Row] = []
    size = 0
    for row in sorted(rows, key=lambda row: (row.begins and row.group, row.begins, row.tokens[: row.context])):
        own = len(row.tokens) - row.begins
        last = some[-1] if some else row
        same = (row.begins and row.group, row.begins) == (last.begins and last.group, last.begins)
        shared = _common(last.tokens[: last.context], row.tokens[: row.context]) - row.begins if some and same else 0
        if shared >= max(1, LEAST_SHARED * (row.context - row.begins)) and size - shared <= UNSEEN >= own - 2 * shared:
            some.append(row)
            size += own - shared
            continue
        if some:
            yield some
        some, size = [row], own
    if some:
        yield some


def _joined(rows: list[Row]) -> Row:
    """One row: a tree of the rows' contexts, each of which shares with the one before it what they begin with, and after it
    the answers of all."""
    first = rows[0]
    if len(rows) == 1:
        return first
    tokens = first.tokens[: first.context]
    parents, paths = list(range(-1, first.context - 1)), [list(range(first.context))]
    for last, row in pairwise(rows):
        common = _common(last.tokens[: last.context], row.tokens[: row.context])
        path = paths[-1][:common]
        for token in row.tokens[common : row.context]:
            parents.append(path[-1])
            path.append(len(tokens))
            tokens.append(token)
        paths.append(path)
    straight = next((i for i, parent in enumerate(parents) if parent != i - 1), len(parents))
    joined = Row(tokens, parents, [], True, len(tokens), straight, True, first.begins, first.group)
    for row, path in zip(rows, paths, strict=True):
        moved = len(tokens) - row.context
        tokens += row.tokens[row.context :]
        parents += [path[parent] if parent < row.context else parent + moved for parent in row.parents]
        joined.reads += [(number, [place + moved for place in where]) for number, where in row.reads]
    del parents[:straight]
    return joined


def plain_rows(requests: list[Encoded], window: int) -> list[Row]:
    """One row a distinct input, as lm-eval makes them: cut from the left at the window, without the last token."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(window + 1) :][:-1]
        row = rows.setdefault(tuple(tokens), Row(tokens))
        row.reads.append((number, list(range(len(tokens) - len(continuation), len(tokens)))))
    return list(rows.values())
