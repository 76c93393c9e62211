"""Log-likelihoods of answers: the numbers of lm-eval's `hf` model, with fewer matrix multiplications.

lm-eval runs each context with each of its choices. Here requests become token trees (`token_trees.py`), sorted by length and
cut into batches. For each batch the model runs the contexts first and caches their keys and values, then it runs the answers.
An attention mask lets each token attend to its own branch only, and positions count along the branch, so the model computes
what it would compute for separate inputs. The output layer runs only where an answer is read.

Not every model supports this. Before a model is scored, Lethe compares two batches of each kind of tree with separate inputs.
If a model fails with trees of several contexts, it gets trees of one context. If it fails with these, it gets separate inputs.

The batch size depends on the free memory and the model's size. A batch that does not fit is halved and tried again.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from lethe.errors import LetheError
from lethe.evaluation.encoding import Encoder
from lethe.evaluation.token_trees import Encoded, Tree, longest_first, probe_batches, single_inputs, trees_of
from lethe.progress import bar

logger = logging.getLogger(__name__)
TOKENS_PER_BATCH = 2048
"""On a CPU more are no faster: its caches are smaller than a block's activations long before."""
TOKENS_PER_BATCH_ON_GPU = 16384
LOGITS_PER_BATCH = 2**27
_supported: WeakKeyDictionary[nn.Module, dict[tuple[bool, bool, bool], tuple[bool, int, int]]] = WeakKeyDictionary()
"""By kind of tree: whether the model supports it, and the width and the padding in tokens that this was tested with."""
_reduced: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Tokens in a batch for models whose batches did not fit into memory."""


class NotNumbersError(LetheError):
    """The model's log-likelihoods are not numbers, so it has no accuracy."""


class Scorer(Encoder):
    """lm-eval's `hf` model around a model in memory, with Lethe's inner loop."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, description: str | None = None):
        super().__init__(model, tokenizer)
        self._description = description
        most, logits = batch_sizes(self._forward, self.device)
        self._tokens = min(most, _reduced.get(self._forward, most))
        vocabulary = getattr(self._forward.config.get_text_config(), "vocab_size", None) or len(tokenizer)
        self._reads = max(1, logits // vocabulary)
        self._prefix: tuple[tuple[int, ...], DynamicCache] | None = None
        self._of_one_length = False

    def loglikelihood(self, requests, disable_tqdm=False):  # type: ignore[no-untyped-def]
        """Log-likelihood and greediness of each of lm-eval's instances."""
        return self.score(self.encode([request.args for request in requests]))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):  # type: ignore[no-untyped-def]
        return self.score([(context, answer) for _, context, answer in requests])

    def score(self, requests: list[Encoded], tasks: list[int] | None = None) -> list[tuple[float, bool]]:
        """For each request: the log-likelihood of its answer, and whether greedy decoding would give this answer.

        A log-likelihood of a broken model is nan. `tasks`: the number of the task that each request belongs to.

        Raises:
            LetheError: an answer has no tokens or more than the window, or a single tree does not fit into memory.
        """
        window = self.refuse_unscorable(requests)
        for join in (True, False):
            trees = trees_of(requests, window, tasks or [0] * len(requests), join)
            if self._supports(trees, requests):
                break
        else:
            trees = sorted(single_inputs(requests, window), key=longest_first)
            self._of_one_length = not self._pads(trees, requests)
        results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with bar(self._description, len(trees), "inputs") if self._description else contextlib.nullcontext() as advance:
            for batch, found in self._batches(trees, requests):
                for number, result in found.items():
                    results[number] = result
                if advance:
                    advance(len(batch))
        return results

    def _batches(
        self, trees: list[Tree], requests: list[Encoded]
    ) -> Iterator[tuple[list[Tree], dict[int, tuple[float, bool]]]]:
        """Batches of trees with their results. If a batch does not fit into memory, it and all later ones are halved."""
        start = 0
        while start < len(trees):
            batch = trees[start : start + self._fitting(trees, start)]
            found = None
            try:
                found = self._run(batch, requests)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise LetheError(
                        f"evaluate: a question of {len(batch[0].tokens)} tokens does not fit into memory by itself; "
                        f"free memory, or use dtype bfloat16"
                    ) from error
            if found is None:  # outside of the handler, where the error no longer holds the failed batch's tensors
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._tokens = _reduced[self._forward] = max(1, len(batch) * len(batch[0].tokens) // 2)
                logger.info("a batch did not fit into memory; the next ones have %d tokens", self._tokens)
                continue
            yield batch, found
            start += len(batch)

    def _fitting(self, trees: list[Tree], start: int) -> int:
        """How many trees from `start` on make a batch. They are sorted longest first."""
        context = rest = reads = count = 0
        for tree in trees[start:]:
            reads += sum(len(where) for _, where in tree.reads)
            context, rest = max(context, tree.context), max(rest, len(tree.tokens) - tree.context)
            full = (count + 1) * (context + rest) > self._tokens or reads > self._reads
            other = tree.batch_key != trees[start].batch_key
            another_length = self._of_one_length and len(tree.tokens) != len(trees[start].tokens)
            if count and (full or other or another_length):
                break
            count += 1
        return count

    @torch.inference_mode()
    def _run(self, batch: list[Tree], requests: list[Encoded]) -> dict[int, tuple[float, bool]]:
        """The results of the requests in a batch, by number."""
        width = max(len(tree.tokens) - tree.context for tree in batch)
        reads = [
            (number, k * width + place - tree.context, token)
            for k, tree in enumerate(batch)
            for number, where in tree.reads
            for place, token in zip(where, requests[number][1], strict=True)
        ]
        places = sorted({place for _, place, _ in reads})
        inputs = {"input_ids": self._padded([tree.tokens[tree.context :] for tree in batch], width), "use_cache": False}
        if batch[0].split:
            inputs |= self._run_contexts(batch, width)
        logits = self._logits(inputs, places)
        index = {place: n for n, place in enumerate(places)}
        at = torch.tensor([index[place] for _, place, _ in reads], device=self.device)
        target = torch.tensor([token for *_, token in reads], device=self.device)
        values = logits[at, target].float() - _logsumexp(logits)[at]
        greedy = logits.argmax(-1)[at] == target
        found: dict[int, tuple[float, bool]] = {}
        for (number, *_), value, best in zip(reads, values.tolist(), greedy.tolist(), strict=True):
            total, all_best = found.get(number, (0.0, True))
            found[number] = (total + value, all_best and best)
        return found

    def _padded(self, sequences: list[list[int]], width: int) -> Tensor:
        """Token ids (batch, width), padded on the right, where no real token attends to the padding."""
        ids = np.zeros((len(sequences), width), dtype=np.int64)
        for k, sequence in enumerate(sequences):
            ids[k, : len(sequence)] = sequence
        return torch.from_numpy(ids).to(self.device)

    def _run_contexts(self, batch: list[Tree], rest: int) -> dict[str, Any]:
        """Run the contexts. Returns the model's arguments for the answers' tokens (batch, rest): keys and values of the
        contexts, positions (batch, rest) and an additive mask (batch, 1, rest, cached + rest)."""
        prefix = batch[0].prefix
        width = max(tree.context for tree in batch) - prefix
        cache = copy.deepcopy(self._prefix_cache(tuple(batch[0].tokens[:prefix]))) if prefix else None
        if cache is not None:
            cache.batch_repeat_interleave(len(batch))
        attention = [tree.attention() for tree in batch]
        if width:
            contexts = {"input_ids": self._padded([tree.tokens[prefix : tree.context] for tree in batch], width)}
            if any(tree.straight < tree.context for tree in batch):
                contexts |= self._positions_and_mask(batch, attention, width, 0)
            cache = self._keys_and_values(contexts, cache)
        arguments = {"past_key_values": cache, "use_cache": cache is not None}
        return arguments | self._positions_and_mask(batch, attention, width, rest)

    def _positions_and_mask(
        self, batch: list[Tree], attention: list[tuple[list[int], np.ndarray]], width: int, rest: int
    ) -> dict[str, Tensor]:
        """Positions (batch, tokens) and an additive mask (batch, 1, tokens, prefix + width + rest).

        The tokens are the `rest` after the contexts. If `rest` is 0, they are the `width` tokens of the contexts.
        """
        prefix = batch[0].prefix
        positions = np.zeros((len(batch), rest or width), dtype=np.int64)
        visible = np.zeros((len(batch), 1, rest or width, prefix + width + rest), dtype=bool)
        for k, (tree, (depths, seen)) in enumerate(zip(batch, attention, strict=True)):
            context, branched = tree.context, tree.context - tree.straight
            if rest:
                n = len(tree.tokens) - context
                positions[k, :n] = depths[branched:]
                visible[k, 0, :n, :context] = seen[branched:, :context]
                visible[k, 0, :n, prefix + width : prefix + width + n] = seen[branched:, context:]
                visible[k, 0, n:] = True  # in a small dtype, padding that attends to nothing becomes nan, and nan spreads
            else:
                positions[k, : context - prefix] = [*range(prefix, tree.straight), *depths[:branched]]
                straight = tree.straight - prefix
                visible[k, 0, :straight, : tree.straight] = np.tri(straight, tree.straight, prefix, dtype=bool)
                visible[k, 0, straight : context - prefix, :context] = seen[:branched, :context]
                visible[k, 0, context - prefix :] = True
        dtype = self._forward.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return {"position_ids": torch.from_numpy(positions).to(self.device), "attention_mask": mask.to(self.device)}

    def _prefix_cache(self, tokens: tuple[int, ...]) -> DynamicCache:
        """Keys and values of a task's prefix, cached until another task's prefix is needed."""
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = None
            self._prefix = tokens, self._keys_and_values({"input_ids": torch.tensor([tokens], device=self.device)})
        return self._prefix[1]

    def _keys_and_values(self, inputs: dict[str, Tensor], cache: DynamicCache | None = None) -> DynamicCache:
        """Add keys and values of the inputs' tokens (batch, width) to the cache."""
        cache = cache or DynamicCache(config=self._forward.config)
        without_head = getattr(self._forward, self._forward.base_model_prefix, self._forward)
        without_head(**inputs, past_key_values=cache, use_cache=True)
        return cache

    def _logits(self, inputs: dict[str, Any], places: list[int]) -> Tensor:
        """Logits (places, vocabulary) at places of the flattened batch. The output layer runs on these places only."""
        where = torch.tensor(places, dtype=torch.long, device=self.device)
        head = self._forward.get_output_embeddings()
        if head is None:
            return self._forward(**inputs).logits.flatten(0, 1)[where]
        hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[where][None],))
        try:
            return self._forward(**inputs).logits[0]
        finally:
            hook.remove()

    def _supports(self, trees: list[Tree], requests: list[Encoded]) -> bool:
        """Whether the model computes the same for trees as for separate inputs.

        Tested on the batches that differ most. For example, a model whose attention has a window of so many places would see
        padding between a short context and its answers.
        """
        known = _supported.setdefault(self._forward, {})
        for kind in {tree.kind for tree in trees if tree.split}:
            for batch, width, padding in probe_batches([tree for tree in trees if tree.kind == kind]):
                supports, widest, most = known.get(kind, (True, 0, -1))
                if supports and (widest < width or most < padding):
                    supports = self._ordinary_attention(width) and self._agrees(batch, requests)
                    known[kind] = supports, max(widest, width), max(most, padding)
                if not supports:
                    logger.info("this model gives other results for token trees, so it gets separate inputs")
                    return False
        return True

    def _ordinary_attention(self, length: int) -> bool:
        config = self._forward.config.get_text_config()
        window = getattr(config, "sliding_window", None) or length
        layers = set(getattr(config, "layer_types", None) or ())
        return (
            "position_ids" in inspect.signature(self._forward.forward).parameters
            and getattr(config, "_attn_implementation", None) in {"sdpa", "eager"}
            and window >= length
            and layers <= {"full_attention", "sliding_attention"}
        )

    def _agrees(self, batch: list[Tree], requests: list[Encoded]) -> bool:
        numbers = [number for tree in batch for number, _ in tree.reads]
        alone = [requests[number] for number in numbers]
        plain = sorted(single_inputs(alone, self.max_length), key=longest_first)
        try:
            together = self._run(batch, requests)
            apart: dict[int, tuple[float, bool]] = {}
            for one in plain:  # each in a batch of its own, so that the comparison covers padding too
                apart |= self._run([one], alone)
        except (LetheError, MemoryError, RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.info("token trees failed: %s", (str(error).splitlines() or [type(error).__name__])[0])
            return False
        return self._equal([(apart[i][0], together[number][0]) for i, number in enumerate(numbers)])

    def _pads(self, inputs: list[Tree], requests: list[Encoded]) -> bool:
        """Whether the shortest input gives the same result alone as padded in a batch with the longest."""
        try:
            together, alone = self._run([inputs[0], inputs[-1]], requests), self._run([inputs[-1]], requests)
        except (MemoryError, RuntimeError):
            return False
        return self._equal([(value, together[number][0]) for number, (value, _) in alone.items()])

    def _equal(self, pairs: list[tuple[float, float]]) -> bool:
        rounding = 1e-4 if self._forward.dtype == torch.float32 else 2e-2
        return all(not abs(a - b) > rounding * max(10.0, abs(a)) for a, b in pairs)  # nan counts as equal


def batch_sizes(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """The maximum numbers of tokens and of logits in a batch, from half of the free memory.

    Three quarters of this half are for tokens. A token takes at most hidden · (2 layers + 22) numbers: keys and values of all
    blocks, and in one block ten activations of the hidden size and three of an MLP four times as wide.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, most = torch.cuda.mem_get_info(device)[0] + unused, TOKENS_PER_BATCH_ON_GPU
    else:
        free, most = psutil.virtual_memory().available, TOKENS_PER_BATCH
    plain: Any = model
    config = plain.config.get_text_config()
    size = plain.dtype.itemsize
    token = size * config.hidden_size * (2 * config.num_hidden_layers + 22)
    return min(most, max(1, free * 3 // 8 // token)), min(LOGITS_PER_BATCH, free // 8 // size)


def _logsumexp(logits: Tensor) -> Tensor:
    """log Σ exp over the vocabulary in float32, in chunks, because logits are the largest tensor in memory."""
    return torch.cat([part.float().logsumexp(-1) for part in logits.split(64)])


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc", "could not allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
