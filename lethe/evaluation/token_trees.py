"""Token trees: what an evaluation gives the model, so that requests share the tokens they have in common.

A request is a context and an answer to score. All answers to one context are branches of one tree: the context once, then the
answers. Contexts with a common prefix can be branches of one tree as well. This saves tokens, but costs attention: each token
also attends to the tokens of other branches, which the mask hides. So a tree may hide at most `MAX_HIDDEN` tokens from any of
its contexts. The prefix that all questions of a task share (`Tree.prefix`) is not part of this count, because the model runs
it once for the whole task.

`trees_of` makes trees from requests, `single_inputs` makes one plain input for each request. `scoring.py` runs both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Encoded = tuple[list[int], list[int]]
"""Token ids of a context and of an answer."""
MIN_PREFIX = 8
"""A prefix of fewer tokens is not worth a pass of its own."""
MIN_SHARED = 0.25
"""Share of a context that it must have in common with the one before it to become a branch of its tree."""
MAX_HIDDEN = 96
"""Tokens of a tree, at most, that one of its contexts does not attend to."""
_last: dict[bool, tuple[tuple[list[Encoded], int, list[int]], list[Tree]]] = {}


@dataclass
class Tree:
    """One tree of tokens, or a plain input if it is not `split`."""

    tokens: list[int]
    """Contexts, then the answers' tokens."""
    parents: list[int] = field(default_factory=list)
    """For each token from `straight` on, the place of the token before it on its branch."""
    reads: list[tuple[int, list[int]]] = field(default_factory=list)
    """For each request: its number, and the places whose logits score the tokens of its answer."""
    split: bool = False
    """Whether the model runs the contexts first and caches their keys and values."""
    context: int = 0
    """How many tokens come before the first place that is read, if `split`."""
    straight: int = 0
    """How many tokens from the first on form one line, before the contexts branch."""
    branches: bool = False
    """Whether the answers branch."""
    prefix: int = 0
    """How many first tokens all trees of the task share. Their keys and values are computed once."""
    task: int = 0
    """The number of the task."""

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What a model must support to run this tree: branches of answers, branches of contexts, a cached prefix."""
        return self.branches, self.straight < self.context, self.prefix > 0

    @property
    def batch_key(self) -> tuple[int, int]:
        """Trees can be in one batch if this is equal: they have no prefix, or the same one."""
        return (self.prefix and self.task), self.prefix

    def attention(self) -> tuple[list[int], np.ndarray]:
        """Of the tokens from `straight` on: positions along their branches, and seen[i, j]: whether token i attends to j."""
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


def longest_first(tree: Tree) -> tuple[Any, ...]:
    """Sorts trees for batching: by prefix, then by length."""
    return *tree.batch_key, -len(tree.tokens), tree.tokens


def probe_batches(trees: list[Tree]) -> list[tuple[list[Tree], int, int]]:
    """Two small batches to test a model on, the widest and the one with most padding, each with its width and its padding.

    A batch has the longest tree, the one with the longest context, the one with most answer tokens, and the shortest.
    """
    by_key: dict[tuple[int, int], list[Tree]] = defaultdict(list)
    for tree in trees:
        by_key[tree.batch_key].append(tree)
    batches = []
    for some in by_key.values():
        shortest, longest = (choose(some, key=lambda tree: len(tree.tokens)) for choose in (min, max))
        context = max(some, key=lambda tree: tree.context)
        answers = max(some, key=lambda tree: len(tree.tokens) - tree.context)
        width = context.context + len(answers.tokens) - answers.context
        batch = list({id(tree): tree for tree in (longest, context, answers, shortest)}.values())
        batches.append((batch, width, width - len(shortest.tokens)))
    return [max(batches, key=lambda batch: batch[1]), max(batches, key=lambda batch: batch[2])]


def trees_of(requests: list[Encoded], window: int, tasks: list[int], join: bool = True) -> list[Tree]:
    """`make_trees`, longest first. The last result is cached, because a training evaluates the same requests repeatedly."""
    given = list(requests), window, list(tasks)
    if join not in _last or _last[join][0] != given:
        _last[join] = given, sorted(make_trees(*given, join), key=longest_first)
    return _last[join][1]


def make_trees(requests: list[Encoded], window: int, tasks: list[int], join: bool = True) -> list[Tree]:
    """One tree for each distinct context, or, with `join`, for several contexts with a common prefix.

    A context that does not fit into the window together with its answer is cut from the left, as lm-eval does. Cut contexts
    share nothing with others.
    """
    trees: dict[tuple[int, tuple[int, ...]], list[Tree]] = defaultdict(list)
    branches: dict[tuple[int, tuple[int, ...]], dict[tuple[int, ...], int]] = {}
    cut = set()
    for number, (text, answer) in enumerate(requests):
        context = text[-(window + 1 - len(answer)) :]
        key = tasks[number], tuple(context)
        if not trees[key] or len(trees[key][-1].tokens) - len(context) >= max(MAX_HIDDEN, len(context)):
            before = len(context) - 1
            trees[key].append(Tree(list(context), [before - 1], [], True, before, before, task=tasks[number]))
            branches[key] = {}
        if len(context) < len(text):
            cut.add(key)
        places = _add_answer(trees[key][-1], branches[key], len(context) - 1, answer)
        trees[key][-1].reads.append((number, places))
    whole = [tree for key, some in trees.items() if key not in cut for tree in some]
    _find_prefixes(whole)
    joined = [_joined(some) for some in _joinable(whole)] if join else whole
    return [tree for key in trees if key in cut for tree in trees[key]] + joined


def _add_answer(tree: Tree, known: dict[tuple[int, ...], int], last: int, answer: list[int]) -> list[int]:
    """Add an answer as a branch after place `last`; returns the places whose logits score it.

    `known`: places of the beginnings of answers that are in the tree, which this answer may share.
    """
    place, places = last, [last]
    for end in range(1, len(answer)):
        beginning = tuple(answer[:end])
        if beginning not in known:
            known[beginning] = len(tree.tokens)
            tree.branches |= place != len(tree.tokens) - 1
            tree.tokens.append(answer[end - 1])
            tree.parents.append(place)
        place = known[beginning]
        places.append(place)
    return places


def _find_prefixes(trees: list[Tree]) -> None:
    """Set `prefix` of the trees of each task, where it is long enough."""
    by_task: dict[int, list[Tree]] = defaultdict(list)
    for tree in trees:
        by_task[tree.task].append(tree)
    for some in by_task.values():
        contexts = [tree.tokens[: tree.context] for tree in some]
        common = _common(min(contexts), max(contexts))
        if common >= MIN_PREFIX and len(some) > 1:
            for tree in some:
                tree.prefix = common


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix of two lists."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _joinable(trees: list[Tree]) -> Iterator[list[Tree]]:
    """Groups of trees with similar contexts, each small enough to become one tree."""
    group: list[Tree] = []
    size = 0
    for tree in sorted(trees, key=lambda tree: (tree.batch_key, tree.tokens[: tree.context])):
        own = len(tree.tokens) - tree.prefix
        last = group[-1] if group else tree
        same = bool(group) and tree.batch_key == last.batch_key
        shared = _common(last.tokens[: last.context], tree.tokens[: tree.context]) - tree.prefix if same else 0
        enough = shared >= max(1, MIN_SHARED * (tree.context - tree.prefix))
        if enough and size - shared <= MAX_HIDDEN >= own - 2 * shared:
            group.append(tree)
            size += own - shared
            continue
        if group:
            yield group
        group, size = [tree], own
    if group:
        yield group


def _joined(trees: list[Tree]) -> Tree:
    """One tree: all contexts first, each as a branch from the one before it, then all answers."""
    first = trees[0]
    if len(trees) == 1:
        return first
    tokens = first.tokens[: first.context]
    parents, paths = list(range(-1, first.context - 1)), [list(range(first.context))]
    for last, tree in pairwise(trees):
        common = _common(last.tokens[: last.context], tree.tokens[: tree.context])
        path = paths[-1][:common]
        for token in tree.tokens[common : tree.context]:
            parents.append(path[-1])
            path.append(len(tokens))
            tokens.append(token)
        paths.append(path)
    straight = next((i for i, parent in enumerate(parents) if parent != i - 1), len(parents))
    joined = Tree(tokens, parents, [], True, len(tokens), straight, True, first.prefix, first.task)
    for tree, path in zip(trees, paths, strict=True):
        moved = len(tokens) - tree.context
        tokens += tree.tokens[tree.context :]
        parents += [path[parent] if parent < tree.context else parent + moved for parent in tree.parents]
        joined.reads += [(number, [place + moved for place in where]) for number, where in tree.reads]
    del parents[:straight]
    return joined


def single_inputs(requests: list[Encoded], window: int) -> list[Tree]:
    """One plain input for each distinct request, as in lm-eval: cut from the left at the window, without the last token."""
    inputs: dict[tuple[int, ...], Tree] = {}
    for number, (context, answer) in enumerate(requests):
        tokens = (context + answer)[-(window + 1) :][:-1]
        tree = inputs.setdefault(tuple(tokens), Tree(tokens))
        tree.reads.append((number, list(range(len(tokens) - len(answer), len(tokens)))))
    return list(inputs.values())
