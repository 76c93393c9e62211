"""Log-likelihoods of answers, as lm-eval's `hf` model computes them, with less work.

lm-eval runs one row a choice and computes logits at every position. Here rows are trees (`rows.py`): contexts, run first and
kept as keys and values, then answers. An attention mask lets each token see its own branch alone and its position counts along
the branch, so that every architecture with ordinary attention computes what it would for separate rows. No logits of a context
are read, so its pass ends with the last block's keys and values. What all questions of a task begin with (description, few-shot
examples) is run once for all. Rows of like length make a batch, and the output layer is applied only where an answer is read.

Whether a model takes such rows is found out on a batch of the longest and the shortest of each kind, beside separate rows;
where it does not take those of several questions, rows are of one, and where it does not take these, separate. A batch is
as large as the free memory and the model's size allow; one that does not fit after all is halved and tried again.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import logging
import math
import os
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from lethe.errors import LetheError
from lethe.evaluation.lm_eval_api import HFLM, has_bos_prefix
from lethe.evaluation.token_trees import Encoded, Row, longest_first, plain_rows, rows_of, unlike
from lethe.models.allocator import kept_memory
from lethe.progress import bar

logger = logging.getLogger(__name__)
TOKENS_PER_BATCH = 2048  # more are no faster on a CPU, whose caches a block's states leave long before
TOKENS_PER_BATCH_ON_GPU = 16384
LOGITS_PER_BATCH = 2**27
PARALLELISM = "TOKENIZERS_PARALLELISM"
_with_threads: set[int] = set()
"""Processes whose tokenizers were asked for threads: this one alone, unless it is a fork of another."""
_taken: WeakKeyDictionary[nn.Module, dict[tuple[bool, bool, bool], tuple[bool, int, int]]] = WeakKeyDictionary()
"""By kind of row: whether the model takes it, and the width and the padding, in tokens, that this was tried with."""
_shrunk: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class NotNumbersError(LetheError):
    """The model answers nothing: there is no accuracy to record, not even that of guessing."""


class _FilledError(Exception):
    """The last block's keys and values are kept: nothing that the pass would go on to compute is read."""


class Contexts(DynamicCache):
    """Keys and values. While it is `filling`, a pass ends as soon as they are complete."""

    filling = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        kept = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.filling and layer_idx == len(self.layers) - 1:
            raise _FilledError
        return kept


class Scorer(HFLM):
    """lm-eval's `hf` model around a model in memory, with an inner loop of our own."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, description: str | None = None):
        plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        super().__init__(pretrained=plain, tokenizer=tokenizer, backend="causal", batch_size=1)
        self._forward = plain
        self._description = description
        most, logits = batch_sizes(plain, self.device)
        self._tokens = min(most, _shrunk.get(plain, most))
        vocabulary = getattr(plain.config.get_text_config(), "vocab_size", None) or len(tokenizer)
        self._kept: tuple[tuple[int, ...], Contexts] | None = None
        self._of_one_length = False
        self._reads = max(1, logits // vocabulary)

    def loglikelihood(self, requests, disable_tqdm=False):  # type: ignore[no-untyped-def]
        """Log-likelihood and greediness of each of lm-eval's instances."""
        return self.score(self.encode([request.args for request in requests]))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):  # type: ignore[no-untyped-def]
        return self.score([(context, continuation) for _, context, continuation in requests])

    def encode(self, pairs: list[tuple[str, str]]) -> list[Encoded]:
        """Tokens of contexts and continuations, split where lm-eval splits them, with each distinct text tokenised once."""
        split = []
        for context, continuation in pairs:
            spaces = len(context) - len(context.rstrip())
            cut = len(context) - spaces
            split.append((context[:cut], context[cut:] + continuation) if context else ("", continuation))
        texts = {text for context, rest in split for text in ((context, context + rest) if context else ())}
        whole = self._tokenise(list(texts))
        alone = self._tokenise([rest for context, rest in split if not context], special=False)
        encoded = []
        for context, rest in split:
            if context:
                encoded.append((whole[context], whole[context + rest][len(whole[context]) :]))
            elif self.prefix_token_id is None:
                raise LetheError(
                    f"the tokenizer has no BOS and no EOS token, and a question without a context needs one: {rest[:60]!r}; "
                    f"set tokenizer.eos_token and save it again, or leave the task out"
                )
            elif alone[rest][:1] == [self.prefix_token_id]:
                encoded.append((alone[rest][:1], alone[rest][1:]))
            else:
                encoded.append(([self.prefix_token_id], alone[rest]))
        return encoded

    def _tokenise(self, texts: list[str], special: bool | None = None) -> dict[str, list[int]]:
        """As `tok_encode`, many at once: a first token is added as the tokenizer does, unless the text begins with it."""
        first = "" if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        bare = [text for text in texts if special is False or (first and has_bos_prefix(text, first))]
        rest = sorted(set(texts) - set(bare))
        found: dict[str, list[int]] = {}
        added = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        with _all_cores():
            for some, settings in ((bare, {"add_special_tokens": False}), (rest, added)):
                if some:
                    ids = self.tokenizer(some, return_attention_mask=False, verbose=False, **settings)["input_ids"]
                    found |= dict(zip(some, ids, strict=True))
        return found

    def refuse_unscorable(self, requests: list[Encoded]) -> int:
        """The model's window.

        Raises:
            LetheError: an answer has no tokens, or more than the window.
        """
        window: int = self.max_length  # looked for in the configuration each time
        for _, continuation in requests:
            if not 0 < len(continuation) <= window:
                answer = self.tokenizer.decode(continuation)[:60]
                raise LetheError(
                    f"tasks: an answer has {len(continuation)} tokens, 1 to {window} can be scored: {answer!r}; "
                    f"leave its task out"
                )
        return window

    def score(self, requests: list[Encoded], groups: list[int] | None = None) -> list[tuple[float, bool]]:
        """For each context and continuation: the log-likelihood, and whether each of its tokens is the most likely one.

        A log-likelihood of a broken model is nan. `groups` says which task each request belongs to.

        Raises:
            LetheError: an answer has no tokens or more than the window, or a single row does not fit into memory.
        """
        window = self.refuse_unscorable(requests)
        for join in (True, False):
            rows = rows_of(requests, window, groups or [0] * len(requests), join)
            if self._takes(rows, requests):
                break
        else:
            rows = sorted(plain_rows(requests, window), key=longest_first)
            self._of_one_length = not self._pads(rows, requests)
        results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_memory())
            advance = stack.enter_context(bar(self._description, len(rows), "rows")) if self._description else None
            for batch, found in self._batches(rows, requests):
                for number, result in found.items():
                    results[number] = result
                if advance:
                    advance(len(batch))
        return results

    def _batches(self, rows: list[Row], requests: list[Encoded]) -> Iterator[tuple[list[Row], dict[int, tuple[float, bool]]]]:
        """Batches of rows with their results. One that does not fit into memory is halved, and so are those after it."""
        start = 0
        while start < len(rows):
            batch = rows[start : start + self._fitting(rows, start)]
            found = None
            try:
                found = self._run(batch, requests)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise LetheError(
                        f"evaluate: a question of {len(batch[0].tokens)} tokens does not fit into memory by itself; "
                        f"free some, or use dtype bfloat16"
                    ) from error
            if found is None:  # outside of the handler: what the failed batch held is only now let go
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._tokens = _shrunk[self._forward] = max(1, len(batch) * len(batch[0].tokens) // 2)
                logger.info("a batch did not fit into memory; going on with %d tokens a batch", self._tokens)
                continue
            yield batch, found
            start += len(batch)

    def _fitting(self, rows: list[Row], start: int) -> int:
        """How many rows from `start` on make a batch; they come longest first."""
        context = rest = reads = count = 0
        for row in rows[start:]:
            reads += sum(len(where) for _, where in row.reads)
            context, rest = max(context, row.context), max(rest, len(row.tokens) - row.context)
            full = (count + 1) * (context + rest) > self._tokens or reads > self._reads
            same = row.begins == rows[start].begins and not (row.begins and row.group != rows[start].group)
            unlike_first = self._of_one_length and len(row.tokens) != len(rows[start].tokens)
            if count and (full or not same or unlike_first):
                break
            count += 1
        return count

    @torch.inference_mode()
    def _run(self, batch: list[Row], requests: list[Encoded]) -> dict[int, tuple[float, bool]]:
        """The results of the requests that a batch answers, by number."""
        width = max(len(row.tokens) - row.context for row in batch)
        reads = [
            (number, k * width + place - row.context, token)
            for k, row in enumerate(batch)
            for number, where in row.reads
            for place, token in zip(where, requests[number][1], strict=True)
        ]
        places = sorted({place for _, place, _ in reads})
        inputs = {"input_ids": self._padded([row.tokens[row.context :] for row in batch], width), "use_cache": False}
        if batch[0].split:
            inputs |= self._contexts(batch, width)
        logits = self._logits(inputs, places)
        line = {place: n for n, place in enumerate(places)}
        numbers = [number for number, *_ in reads]
        lines = [line[place] for _, place, _ in reads]
        targets = [token for *_, token in reads]
        at, target = torch.tensor(lines, device=self.device), torch.tensor(targets, device=self.device)
        values = logits[at, target].float() - _logsumexp(logits)[at]
        greedy = logits.argmax(-1)[at] == target
        found: dict[int, tuple[float, bool]] = {}
        for number, value, best in zip(numbers, values.tolist(), greedy.tolist(), strict=True):
            total, all_best = found.get(number, (0.0, True))
            found[number] = (total + value, all_best and best)
        return found

    def _padded(self, rows: list[list[int]], width: int) -> Tensor:
        """Token ids (batch, width), padded on the right: what comes before a token does not see what comes after."""
        ids = np.zeros((len(rows), width), dtype=np.int64)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = row
        return torch.from_numpy(ids).to(self.device)

    def _contexts(self, batch: list[Row], rest: int) -> dict[str, Any]:
        """What the answers' tokens (batch, rest) see: keys and values of their contexts, computed here, positions
        (batch, rest), and an additive mask (batch, 1, rest, kept + rest)."""
        begins = batch[0].begins
        width = max(row.context for row in batch) - begins
        kept = copy.deepcopy(self._beginning(tuple(batch[0].tokens[:begins]))) if begins else None
        if kept is not None:
            kept.batch_repeat_interleave(len(batch))
        sights = [row.sight() for row in batch]
        if width:
            contexts = {"input_ids": self._padded([row.tokens[begins : row.context] for row in batch], width)}
            if any(row.straight < row.context for row in batch):
                contexts |= self._seen(batch, sights, width, 0)
            kept = self._keys_and_values(contexts, kept)
        return {"past_key_values": kept, "use_cache": kept is not None} | self._seen(batch, sights, width, rest)

    def _seen(self, batch: list[Row], sights: list[tuple[list[int], np.ndarray]], width: int, rest: int) -> dict[str, Tensor]:
        """Positions (batch, tokens) and an additive mask (batch, 1, tokens, beginning + width + rest) of the `rest` tokens
        after the contexts, or, without any, of the `width` tokens of the contexts."""
        begins = batch[0].begins
        positions = np.zeros((len(batch), rest or width), dtype=np.int64)
        visible = np.zeros((len(batch), 1, rest or width, begins + width + rest), dtype=bool)
        for k, (row, (depths, seen)) in enumerate(zip(batch, sights, strict=True)):
            context, branched = row.context, row.context - row.straight
            if rest:
                n = len(row.tokens) - context
                positions[k, :n] = depths[branched:]
                visible[k, 0, :n, :context] = seen[branched:, :context]
                visible[k, 0, :n, begins + width : begins + width + n] = seen[branched:, context:]
                visible[k, 0, n:] = True  # what sees nothing is no number in a small type, and spreads
            else:
                positions[k, : context - begins] = [*range(begins, row.straight), *depths[:branched]]
                straight = row.straight - begins
                visible[k, 0, :straight, : row.straight] = np.tri(straight, row.straight, begins, dtype=bool)
                visible[k, 0, straight : context - begins, :context] = seen[:branched, :context]
                visible[k, 0, context - begins :] = True
        dtype = self._forward.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return {"position_ids": torch.from_numpy(positions).to(self.device), "attention_mask": mask.to(self.device)}

    def _beginning(self, tokens: tuple[int, ...]) -> Contexts:
        """Keys and values of what the rows of a task begin with; kept until another task's are asked for."""
        if self._kept is None or self._kept[0] != tokens:
            self._kept = None
            self._kept = tokens, self._keys_and_values({"input_ids": torch.tensor([tokens], device=self.device)})
        return self._kept[1]

    def _keys_and_values(self, inputs: dict[str, Tensor], kept: Contexts | None = None) -> Contexts:
        """Keys and values of the inputs' tokens (batch, width), after those that are kept already."""
        kept = kept or Contexts(config=self._forward.config)
        kept.filling = True
        with contextlib.suppress(_FilledError):
            getattr(self._forward, self._forward.base_model_prefix, self._forward)(
                **inputs, past_key_values=kept, use_cache=True
            )
        kept.filling = False
        return kept

    def _logits(self, inputs: dict[str, Any], places: list[int]) -> Tensor:
        """Logits (places, vocabulary) at flat places of a batch; the output layer sees nothing else."""
        where = torch.tensor(places, dtype=torch.long, device=self.device)
        head = self._forward.get_output_embeddings()
        if head is None:
            return self._forward(**inputs).logits.flatten(0, 1)[where]
        hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[where][None],))
        try:
            return self._forward(**inputs).logits[0]
        finally:
            hook.remove()

    def _takes(self, rows: list[Row], requests: list[Encoded]) -> bool:
        """Whether the model computes the same for shared rows as for separate ones.

        Tried on rows as unlike as there are: attention that looks so many places back, for instance, sees padding between a
        short context and its answers where it would see the context.
        """
        known = _taken.setdefault(self._forward, {})
        for kind in {row.kind for row in rows if row.split}:
            for batch, width, padding in unlike([row for row in rows if row.kind == kind]):
                takes, widest, most = known.get(kind, (True, 0, -1))
                if takes and (widest < width or most < padding):
                    takes = self._ordinary_attention(width) and self._agrees(batch, requests)
                    known[kind] = takes, max(widest, width), max(most, padding)
                if not takes:
                    logger.info("questions do not share what they have in common: this model has to be given separate rows")
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

    def _agrees(self, batch: list[Row], requests: list[Encoded]) -> bool:
        numbers = [number for row in batch for number, _ in row.reads]
        alone = [requests[number] for number in numbers]
        plain = sorted(plain_rows(alone, self.max_length), key=longest_first)
        try:
            tree = self._run(batch, requests)
            apart: dict[int, tuple[float, bool]] = {}
            for row in plain:  # each by itself: padding must not be what both have in common
                apart |= self._run([row], alone)
        except (LetheError, MemoryError, RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.info("shared rows: %s", (str(error).splitlines() or [type(error).__name__])[0])
            return False
        return self._equal([(apart[i][0], tree[number][0]) for i, number in enumerate(numbers)])

    def _pads(self, rows: list[Row], requests: list[Encoded]) -> bool:
        """Whether the shortest of separate rows gives the same beside the longest, padded, as alone."""
        try:
            together, alone = self._run([rows[0], rows[-1]], requests), self._run([rows[-1]], requests)
        except (MemoryError, RuntimeError):
            return False
        return self._equal([(value, together[number][0]) for number, (value, _) in alone.items()])

    def _equal(self, pairs: list[tuple[float, float]]) -> bool:
        rounding = 1e-4 if self._forward.dtype == torch.float32 else 2e-2
        return all(not abs(a - b) > rounding * max(10.0, abs(a)) for a, b in pairs)  # nan is no disagreement


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Inside, tokenizers use all cores, whatever TOKENIZERS_PARALLELISM says; not in a fork, which lacks their threads."""
    _with_threads.add(os.getpid())
    if len(_with_threads) > 1:
        yield
        return
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def batch_sizes(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """The most tokens and logits of a batch: what half of the free memory holds, up to what pays.

    Three quarters of that half are for tokens. One takes hidden · (2 layers + 22) numbers at most: keys and values of all
    blocks, and in one block ten states of the hidden size and three of an MLP four times as wide.
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
    """log Σ exp over the vocabulary in float32, some lines at a time: logits are the largest thing in memory."""
    return torch.cat([part.float().logsumexp(-1) for part in logits.split(64)])


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc", "could not allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
