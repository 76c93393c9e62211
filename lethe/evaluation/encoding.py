"""Requests as token ids, split into context and answer exactly where lm-eval splits them."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lethe.errors import LetheError
from lethe.evaluation.lm_eval_api import HFLM, has_bos_prefix
from lethe.evaluation.token_trees import Encoded


class Encoder(HFLM):
    """lm-eval's `hf` model around a model in memory, which tokenises each distinct text once."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        self._forward: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        super().__init__(pretrained=self._forward, tokenizer=tokenizer, backend="causal", batch_size=1)

    def encode(self, pairs: list[tuple[str, str]]) -> list[Encoded]:
        """Token ids of contexts and answers. Spaces at the end of a context belong to its answer."""
        split = []
        for context, answer in pairs:
            spaces = len(context) - len(context.rstrip())
            cut = len(context) - spaces
            split.append((context[:cut], context[cut:] + answer) if context else ("", answer))
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
        """lm-eval's `tok_encode` for many texts: the tokenizer adds its first token unless the text starts with it."""
        first = "" if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        bare = [text for text in texts if special is False or (first and has_bos_prefix(text, first))]
        rest = sorted(set(texts) - set(bare))
        found: dict[str, list[int]] = {}
        added = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for some, settings in ((bare, {"add_special_tokens": False}), (rest, added)):
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
