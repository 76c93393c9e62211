"""Log-likelihoods of answers: the numbers of lm-eval's `hf` model, with fewer matrix multiplications.

lm-eval runs each context with each of its choices. Here requests become token trees (`token_trees.py`), sorted by length and
cut into batches. For each batch the model runs the contexts first and caches their keys and values, then it runs the answers.
An attention mask lets each token attend to its own branch only, and positions count along the branch, so the model computes
what it would compute for separate inputs. The output layer runs only where an answer is read.

Not every model supports this. Before a model is scored, Lethe compares a batch of each kind of tree with lm-eval's own
log-likelihoods. A model that fails is scored by lm-eval.

The batch size depends on the free memory and the model's size. A batch that does not fit is halved and tried again.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from lethe import distributed
from lethe.errors import LetheError
from lethe.evaluation.lm_eval_api import HFLM, has_bos_prefix
from lethe.evaluation.token_trees import Encoded, Tree, make_trees, probe_batch
from lethe.models.activations import skipped

logger = logging.getLogger(__name__)
TOKENS_PER_BATCH = 2048
"""On a CPU more are no faster: its caches are smaller than a block's activations long before."""
TOKENS_PER_BATCH_ON_GPU = 16384
LOGITS_PER_BATCH = 2**27
COMPARED = 8
"""Requests of a tree, about, that are compared with lm-eval."""
_supported: WeakKeyDictionary[nn.Module, dict[tuple[bool, bool, bool], tuple[bool, int, int]]] = WeakKeyDictionary()
"""By kind of tree: whether the model supports it, and the width and the padding in tokens that this was tested with."""


class NotNumbersError(LetheError):
    """The model's log-likelihoods are not numbers, so it has no accuracy."""


class Scorer(HFLM):
    """lm-eval's `hf` model around a model in memory, with Lethe's inner loop. It tokenises each distinct text once."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._forward: Any = base
        super().__init__(pretrained=base, tokenizer=tokenizer, backend="causal", batch_size=1, softmax_dtype=torch.float32)
        self._tokens, logits = batch_sizes(self._forward, self.device)
        vocabulary = getattr(base.config.get_text_config(), "vocab_size", None) or len(tokenizer)
        self._reads = max(1, logits // vocabulary)
        self._prefix: tuple[list[int], DynamicCache] | None = None

    def encode(self, pairs: list[tuple[str, str]]) -> list[Encoded]:
        """Token ids of contexts and answers, split exactly where lm-eval splits them."""
        split = []
        for context, answer in pairs:  # spaces at the end of a context belong to its answer
            cut = len(context.rstrip()) if context else 0
            split.append((context[:cut], context[cut:] + answer))
        whole = self._tokenise({text for context, rest in split if context for text in (context, context + rest)}, False)
        alone = self._tokenise({rest for context, rest in split if not context}, True)
        encoded = []
        for context, rest in split:
            if context:
                encoded.append((whole[context], whole[context + rest][len(whole[context]) :]))
            elif self.prefix_token_id is None:
                raise LetheError(
                    f"the tokenizer has no BOS and no EOS token, and a question without a context needs one: {rest[:60]!r}; "
                    f"set tokenizer.eos_token and save it again, or leave the task out"
                )
            else:
                begins = alone[rest][:1] == [self.prefix_token_id]
                encoded.append(([self.prefix_token_id], alone[rest][begins:]))
        return encoded

    def _tokenise(self, texts: set[str], bare: bool) -> dict[str, list[int]]:
        """lm-eval's `tok_encode` for many texts: unless `bare`, the tokenizer adds its first token to texts without it."""
        first = "" if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        without = {text for text in texts if bare or (first and has_bos_prefix(text, first))}
        added = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        found: dict[str, list[int]] = {}
        for some, settings in ((sorted(without), {"add_special_tokens": False}), (sorted(texts - without), added)):
            if some:
                ids = self.tokenizer(some, return_attention_mask=False, verbose=False, **settings)["input_ids"]
                found |= dict(zip(some, ids, strict=True))
        return found

    def refuse_unscorable(self, requests: list[Encoded]) -> int:
        """The model's window in tokens.

        Raises:
            LetheError: an answer has no tokens, or more than the window.
        """
        window: int = self.max_length  # a property that searches the configuration
        for _, answer in requests:
            if not 0 < len(answer) <= window:
                text = self.tokenizer.decode(answer)[:60]
                raise LetheError(
                    f"tasks: an answer has {len(answer)} tokens, 1 to {window} can be scored: {text!r}; leave its task out"
                )
        return window

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):  # type: ignore[no-untyped-def]
        return self.score([(context, answer) for _, context, answer in requests])

    def score(self, requests: list[Encoded], advance: Callable[[float], None] = lambda done: None) -> list[tuple[float, bool]]:
        """For each request of a task: the log-likelihood of its answer, and whether greedy decoding would give this answer.

        A log-likelihood of a broken model is nan. `advance` is called with the number of requests scored since the last call.

        Raises:
            LetheError: an answer has no tokens or more than the window, or a single tree does not fit into memory.
        """
        trees = make_trees(requests, self.refuse_unscorable(requests))
        in_trees = not distributed.total([not self._supports(trees, requests)])[0]
        own: dict[int, tuple[float, bool]] = {}
        with distributed.uneven(self._forward, self._idle):
            mine, groups = distributed.share(trees), distributed.share(_by_context(requests))
            count = sum(len(tree.reads) for tree in mine) if in_trees else sum(map(len, groups))
            for found in self._in_trees(mine, requests) if in_trees else self._separately(groups, requests):
                own |= found
                advance(len(found) * len(requests) / count)
        everything = {number: result for part in distributed.gather(own) for number, result in part.items()}
        return [everything.get(number, (math.nan, False)) for number in range(len(requests))]

    @torch.no_grad()
    def _idle(self) -> None:
        """A pass for the sake of other processes, which need this one's part of the model."""
        self._forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def _separately(self, groups: Sequence[list[int]], requests: list[Encoded]) -> Iterator[dict[int, tuple[float, bool]]]:
        """The results by number that lm-eval gives, one input at a time, for groups of requests with one context each.

        Contexts are scored one by one, because lm-eval confuses equal inputs whose contexts end at different places.

        Raises:
            LetheError: an input does not fit into memory.
        """
        for numbers in groups:
            some = [(("", ""), *requests[number]) for number in numbers]
            try:
                found = super()._loglikelihood_tokens(some, disable_tqdm=True)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                raise _too_long(max(len(context) + len(answer) for _, context, answer in some)) from error
            yield dict(zip(numbers, found, strict=True))

    def _in_trees(self, trees: Sequence[Tree], requests: list[Encoded]) -> Iterator[dict[int, tuple[float, bool]]]:
        """The results by number, of a batch at a time. If a batch does not fit into memory, it and later ones are halved."""
        start = 0
        while start < len(trees):
            batch = trees[start : start + self._fitting(trees, start)]
            found = None
            try:
                found = self._run(batch, requests)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1 or distributed.sharded_modules(self._forward):  # others are in the middle of the same pass
                    raise _too_long(len(batch[0].tokens)) from error
            if found is None:  # outside of the handler, where the error no longer holds the failed batch's tensors
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._tokens = max(1, len(batch) * len(batch[0].tokens) // 2)
                logger.info("a batch did not fit into memory; the next ones have %d tokens", self._tokens)
                continue
            yield found
            start += len(batch)

    def _fitting(self, trees: Sequence[Tree], start: int) -> int:
        """How many trees from `start` on make a batch. They are sorted longest first."""
        context = rest = reads = count = 0
        for tree in trees[start:]:
            reads += sum(len(where) for _, where in tree.reads)
            context, rest = max(context, tree.context), max(rest, len(tree.tokens) - tree.context)
            full = (count + 1) * (context + rest) > self._tokens or reads > self._reads
            if count and (full or tree.prefix != trees[start].prefix):
                break
            count += 1
        return count

    @torch.no_grad()  # not inference_mode: parameters that FSDP2 gathers in it could not be used outside of it
    def _run(self, batch: Sequence[Tree], requests: list[Encoded]) -> dict[int, tuple[float, bool]]:
        """The results of the requests in a batch, by number."""
        width = max(len(tree.tokens) - tree.context for tree in batch)
        reads = [
            (number, k * width + place - tree.context, token)
            for k, tree in enumerate(batch)
            for number, where in tree.reads
            for place, token in zip(where, requests[number][1], strict=True)
        ]
        places = sorted({place for _, place, _ in reads})
        inputs = {"input_ids": self._padded([tree.tokens[tree.context :] for tree in batch], width)}
        logits = self._logits(inputs | self._run_contexts(batch, width), places)
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

    def _run_contexts(self, batch: Sequence[Tree], rest: int) -> dict[str, Any]:
        """Run the contexts. Returns the model's arguments for the answers' tokens (batch, rest): keys and values of the
        contexts, positions (batch, rest) and an additive mask (batch, 1, rest, cached + rest)."""
        prefix = batch[0].prefix
        width = max(tree.context for tree in batch) - prefix
        cache = copy.deepcopy(self._prefix_cache(batch[0].tokens[:prefix])) if prefix else None
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
        self, batch: Sequence[Tree], attention: list[tuple[list[int], np.ndarray]], width: int, rest: int
    ) -> dict[str, Tensor]:
        """Positions (batch, tokens) and an additive mask (batch, 1, tokens, prefix + width + rest).

        The tokens are the `rest` after the contexts. If `rest` is 0, they are the `width` tokens of the contexts.
        """
        cached = batch[0].prefix + width
        positions = np.zeros((len(batch), rest or width), dtype=np.int64)
        visible = np.zeros((len(batch), 1, rest or width, cached + rest), dtype=bool)
        for k, (tree, (depths, seen)) in enumerate(zip(batch, attention, strict=True)):
            start, end = (tree.context, len(tree.tokens)) if rest else (tree.prefix, tree.context)
            n = end - start
            positions[k, :n] = depths[start:end]
            visible[k, 0, :n, : tree.context] = seen[start:end, : tree.context]
            if rest:
                visible[k, 0, :n, cached : cached + n] = seen[start:, start:]
            visible[k, 0, n:] = True  # in a small dtype, padding that attends to nothing becomes nan, and nan spreads
        dtype = self._forward.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return {"position_ids": torch.from_numpy(positions).to(self.device), "attention_mask": mask.to(self.device)}

    def _prefix_cache(self, tokens: list[int]) -> DynamicCache:
        """Keys and values of a task's prefix, cached until another task's prefix is needed."""
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = None
            self._prefix = tokens, self._keys_and_values({"input_ids": torch.tensor([tokens], device=self.device)})
        return self._prefix[1]

    def _keys_and_values(self, inputs: dict[str, Tensor], cache: DynamicCache | None = None) -> DynamicCache:
        """Add keys and values of the inputs' tokens (batch, width) to the cache."""
        cache = cache or DynamicCache(config=self._forward.config)
        with skipped(self._forward.get_output_embeddings()):
            self._forward(**inputs, past_key_values=cache, use_cache=True)
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

        Tested on the trees that differ most. For example, a model whose attention has a window of so many places would see
        padding between a short context and its answers.
        """
        known = _supported.setdefault(self._forward, {})
        for kind in {tree.kind for tree in trees}:
            batch, width, padding = probe_batch([tree for tree in trees if tree.kind == kind])
            supports, widest, most = known.get(kind, (True, 0, -1))
            if supports and (widest < width or most < padding):
                supports = self._ordinary_attention(width) and self._agrees(batch, requests)
                known[kind] = supports, max(widest, width), max(most, padding)
            if not supports:
                logger.info("this model gives other results for token trees, so lm-eval scores it")
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
        """Whether some results of each tree are those of lm-eval, up to rounding. Results that are nan agree with all."""
        numbers = [number for tree in batch for number, _ in tree.reads[:: max(1, len(tree.reads) // COMPARED)]]
        try:
            together = self._run(batch, requests)
        except (LetheError, MemoryError, RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.info("token trees failed: %s", (str(error).splitlines() or [type(error).__name__])[0])
            return False
        rounding = 1e-4 if self._forward.dtype == torch.float32 else 2e-2
        some = [requests[i] for i in numbers]
        apart = [pair for found in self._separately(_by_context(some), some) for pair in found.items()]
        pairs = [(value, together[numbers[i]][0]) for i, (value, _) in apart]
        return all(not abs(a - b) > rounding * max(10.0, abs(a)) for a, b in pairs)


def _by_context(requests: list[Encoded]) -> list[list[int]]:
    """The numbers of requests with the same context."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        found[tuple(context)].append(number)
    return list(found.values())


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


def _too_long(tokens: int) -> LetheError:
    advice = "free memory, or use dtype bfloat16"
    return LetheError(f"evaluate: a question of {tokens} tokens does not fit into memory by itself; {advice}")


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc", "could not allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
