"""Token trees: what an evaluation gives the model, so that requests share the tokens they have in common.

A request is a context and an answer to score. A tree holds contexts with a common beginning, then the answers to each of them
as branches. This saves tokens, but costs attention: each token also attends to the tokens of other branches, which the mask
hides. So a tree may hide from a request as many tokens as the request shares with the one before it, or `MAX_HIDDEN`. The
prefix that all contexts of a task share (`Tree.prefix`) is not counted, because the model runs it once for the whole task.
"""

from __future__ import annotations

import numpy as np

Encoded = tuple[list[int], list[int]]
"""Token ids of a context and of an answer."""
MIN_PREFIX = 8
"""A prefix of fewer tokens is not worth a pass of its own."""
MIN_SHARED = 0.25
"""Share of a context that it must have in common with the one before it to become a branch of its tree."""
MAX_HIDDEN = 96


class Tree:
    """Requests with a common beginning. Contexts come first, without their last token, whose logits score the answers.

    `tokens`: the contexts, then the rest. `context`: how many tokens come before the rest. `parents`: for each token, the place
    of the token before it on its branch (-1: none). `straight`: how many first tokens form one line. `reads`: for each request,
    its number and the places whose logits score the tokens of its answer.
    """

    def __init__(self, requests: list[tuple[int, tuple[int, ...], list[int]]], prefix: int):
        """`requests`: numbers, contexts and answers. `prefix`: how many first tokens all trees of the task share."""
        self.prefix = prefix
        self.tokens: list[int] = []
        self.parents: list[int] = []
        known: dict[tuple[int, int], int] = {}
        ends = {context: self._branch(-1, context[:-1], known) for _, context, _ in requests}
        self.context = len(self.tokens)
        known.clear()  # an answer is read behind the contexts, even if it begins as another context goes on
        self.reads = []
        for number, context, answer in requests:
            before = (ends[context] or [-1])[-1]
            self.reads.append((number, self._branch(before, (context[-1], *answer[:-1]), known)))
        self.straight = next((i for i, parent in enumerate(self.parents) if parent != i - 1), len(self.tokens))

    def _branch(self, place: int, tokens: tuple[int, ...], known: dict[tuple[int, int], int]) -> list[int]:
        """The places of `tokens` in a line after `place`. `known`: the places that other lines have added."""
        places = []
        for token in tokens:
            if (place, token) not in known:
                known[place, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(place)
            place = known[place, token]
            places.append(place)
        return places

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What a model must support to run this tree: branches of answers, branches of contexts, a cached prefix."""
        answers = self.parents[self.context + 1 :]
        branches = any(parent != place for place, parent in enumerate(answers, self.context))
        return branches, self.straight < self.context, self.prefix > 0

    def attention(self) -> tuple[list[int], np.ndarray]:
        """Positions of all tokens along their branches, and seen[i, j]: whether token i attends to token j."""
        depths = list(range(self.straight))
        seen = np.tri(len(self.tokens), dtype=bool)
        for i in range(self.straight, len(self.tokens)):
            parent = self.parents[i]
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            seen[i] = seen[parent] if parent >= 0 else False
            seen[i, i] = True
        return depths, seen


def make_trees(requests: list[Encoded], window: int) -> list[Tree]:
    """The trees of a task's requests, for batching: by prefix, longest first.

    A context that does not fit into the window together with its answer is cut from the left, as lm-eval does.
    """
    contexts = [tuple(context[-(window + 1 - len(answer)) :]) for context, answer in requests]
    whole = {cut[:-1] for cut, (context, _) in zip(contexts, requests, strict=True) if len(cut) == len(context)}
    common = _common(min(whole), max(whole)) if len(whole) > 1 else 0
    start = min(whole)[:common] if common >= MIN_PREFIX else ()
    trees: list[Tree] = []
    group: list[tuple[int, tuple[int, ...], list[int]]] = []
    size = prefix = 0
    last: tuple[int, ...] = ()
    for number in sorted(range(len(requests)), key=contexts.__getitem__):
        context, answer = contexts[number], requests[number][1]
        begins = len(start) if context[: len(start)] == start and len(context) > len(start) else 0
        own = len(context) - begins
        shared = _common(last, context) - begins
        more = len(answer) - 1 + own - shared
        most = max(shared, 2 * MAX_HIDDEN if context == last else MAX_HIDDEN)
        fits = begins == prefix and shared >= max(1, MIN_SHARED * own) and size - shared <= most >= more - shared
        if group and not fits:
            trees.append(Tree(group, prefix))
            group, size = [], 0
        size += more if group else own + len(answer) - 1
        group.append((number, context, answer))
        last, prefix = context, begins
    if group:
        trees.append(Tree(group, prefix))
    return sorted(trees, key=lambda tree: (tree.prefix, -len(tree.tokens), tree.tokens))


def probe_batch(trees: list[Tree]) -> tuple[list[Tree], int, int]:
    """A small batch to test a model on, its width and its padding in tokens.

    It has the longest tree, the one with the longest context, the one with most answer tokens, and the shortest.
    """
    shortest, longest = (choose(trees, key=lambda tree: len(tree.tokens)) for choose in (min, max))
    context = max(trees, key=lambda tree: tree.context)
    answers = max(trees, key=lambda tree: len(tree.tokens) - tree.context)
    width = context.context + len(answers.tokens) - answers.context
    batch = list({id(tree): tree for tree in (longest, context, answers, shortest)}.values())
    return batch, width, width - len(shortest.tokens)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
