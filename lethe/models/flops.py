"""Floating-point operations of a model's passes, by formula.

    forward, a document of n tokens = depth · (2 · matrices · n + 2 · attention · n²) + 2 · hidden · vocabulary · n
    backward                        = 2 · matrices · n for the inputs, 2 · trained · n for the weights, 4 · attention · n²

matrices: numbers in the matrices of a block that a token passes, adapters among them. trained: those of them that are trained.
attention: heads · head size; half of causal attention is masked, and not counted. The last term is the output head, where the
pass computes logits. Gradients end at the lowest block with trained weights. Norms, embeddings, losses and the scans of
state-space blocks are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lethe.models.activations import blocks

ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
"""Settings that say how many experts a token passes. Without one of them, it counts as passing all."""


class Flops:
    """The operations of passes of one model, whose weights may be on the meta device. Padding does not count.

    `layers`: how many blocks a pass runs. With `logits`, it runs all of them and the output head.
    """

    def __init__(self, model: nn.Module):
        config: Any = model.config
        text = config.get_text_config()
        found = list(blocks(model))
        active = next((getattr(text, name) for name in ACTIVE if type(getattr(text, name, None)) is int), None)
        self.matrices = [_numbers(block.parameters(), active) for block in found]
        self.trained = [_numbers((p for p in block.parameters() if p.requires_grad), active) for block in found]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        ending = list(head.parameters()) if head is not None else []
        self.head, self.trained_head = _numbers(ending, None), _numbers((p for p in ending if p.requires_grad), None)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        first = any(p.requires_grad for p in embedding.parameters())
        self.lowest = 0 if first else next((n for n, count in enumerate(self.trained) if count), len(found))
        heads = getattr(text, "num_attention_heads", None) or 0  # none in a state-space model
        self.attention = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))

    def forward(self, lengths: Sequence[int], layers: int, logits: bool) -> int:
        """Of a pass forward over documents of these lengths."""
        n, squares, depth = self._sums(lengths, layers, logits)
        inside = 2 * sum(self.matrices[:depth]) * n + 2 * depth * self.attention * squares
        return inside + (2 * self.head * n if logits else 0)

    def backward(self, lengths: Sequence[int], layers: int, logits: bool, again: bool = False) -> int:
        """Of the pass back. `again`: it computes the blocks' activations again (gradient checkpointing)."""
        n, squares, depth = self._sums(lengths, layers, logits)
        reached = range(self.lowest, depth)
        total = sum(2 * (self.matrices[block] + self.trained[block]) * n + 4 * self.attention * squares for block in reached)
        total += 2 * (self.head + self.trained_head) * n if logits else 0
        return total + (self.forward(lengths, depth, False) if again else 0)

    def ending(self, lengths: Sequence[int], layer: int | None) -> int:
        """Of what follows a layer (None: the last) in a pass forward: later blocks and the output head."""
        before = len(self.matrices) if layer is None else layer + 1
        return self.forward(lengths, 0, True) - self.forward(lengths, before, False)

    def _sums(self, lengths: Sequence[int], layers: int, logits: bool) -> tuple[int, int, int]:
        return sum(lengths), sum(n * n for n in lengths), len(self.matrices) if logits else layers


def _numbers(parameters: Iterable[nn.Parameter], active: int | None) -> int:
    """Numbers in matrices. Of the experts of a block, [experts, …, …], those that a token passes."""
    return sum(
        p.numel() * min(active, p.shape[0]) // p.shape[0] if active and p.ndim == 3 else p.numel()
        for p in parameters
        if p.ndim > 1
    )
