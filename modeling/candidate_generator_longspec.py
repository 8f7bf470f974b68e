"""LongSpecCandidateGenerator: lets the draft grow one tree of guesses per round.

Knows the draft's layer, the window it keeps and the target's prefix; knows nothing of verification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_longspec import attend
from .backends_longspec import Backend
from .cache_longspec import SpeculativeCache
from .draft_window_longspec import DraftWindow
from .target_longspec import BoundTarget
from .tree_longspec import TokenTree


class LongSpecCandidateGenerator:
    """Grows token trees by beam search over cumulative draft log-probability, one draft forward per level."""

    def __init__(self, draft: Any, target: BoundTarget, backend: Backend, batch: int):
        config = draft.config
        self.draft, self.target, self.backend = draft, target, backend
        self.shape = tuple(config.tree_shape)
        self.verify_tokens = config.verify_tokens
        self.inner_nodes = 1 + sum(self.shape[:-1])
        levels = [level for level, width in enumerate((1, *self.shape[:-1])) for _ in range(width)]
        self.levels = torch.tensor(levels, device=target.device)  # of each inner node
        self.scaling = config.head_dim**-0.5
        heads = (batch, config.num_key_value_heads, config.head_dim)
        self.window = DraftWindow(config.window, self.inner_nodes, heads, draft.dtype, target.device)

    def prefill(self, embeds: Tensor, last_position: Tensor, real: Tensor) -> None:
        """Fill the window from the text's embeddings (B, T, hidden), whose last tokens stand at `last_position` (B,).

        real: (B, T), false where a token is padding.
        """
        if not self.shape:
            return
        tail = slice(-self.window.window, None)
        embeds, real = embeds[:, tail], real[:, tail]
        back = torch.arange(1 - embeds.shape[1], 1, device=embeds.device)
        positions = last_position[:, None] + back
        # counted back from the last one, padding inside a text can take them below zero
        real = real & (positions >= 0)
        self.window.first = positions.masked_fill(~real, last_position.max()).amin(dim=1)
        key, value = self.draft.window_kv(embeds, positions)
        self.window.write(key, value, positions, real)

    def advance(self, tokens: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Add emitted tokens (B, T) at `positions` (B, T) to the window; where `real` (B, T) is false is padding."""
        if self.shape:
            key, value = self.draft.window_kv(self.target.embed(tokens.to(positions.device)), positions)
            self.window.write(key, value, positions, real)

    def grow(self, root: Tensor, position: Tensor, cache: SpeculativeCache, levels: int | None = None) -> TokenTree:
        """The tree below `root` (B,), which stands at `position` (B,), pruned to `verify_tokens`.

        levels: at most so many levels of the tree shape.
        """
        root = root.to(position.device)
        tree = TokenTree.from_root(root)
        shape = self.shape[:levels]
        if not shape:
            return tree
        batch = root.shape[0]
        ancestry = torch.zeros(batch, 1, self.inner_nodes, dtype=torch.bool, device=root.device)
        tokens, scores, first = tree.tokens, tree.scores, 0
        for depth, width in enumerate(shape):
            nodes = torch.arange(first, first + tokens.shape[1], device=root.device)
            is_self = nodes[:, None] == torch.arange(self.inner_nodes, device=root.device)
            ancestry = ancestry | is_self
            within_window = ancestry & (self.levels > depth - self.window.window)
            logits = self._level_logits(tokens, position + depth, position, within_window, first, cache)
            tokens, parents, scores = best_children(logits, scores, width)
            tree = tree.extend(tokens, parents + first, scores)
            ancestry = ancestry.gather(1, parents[:, :, None].expand(-1, -1, self.inner_nodes))
            first += len(nodes)
        return tree.prune(self.verify_tokens)

    def _level_logits(
        self,
        tokens: Tensor,
        position: Tensor,
        root_position: Tensor,
        ancestry: Tensor,
        first: int,
        cache: SpeculativeCache,
    ) -> Tensor:
        """Logits (B, T, vocab) of one level: nodes `first`… with `tokens` (B, T), all at `position` (B,)."""
        window, layer = self.window, cache.layers[self.target.layer]
        positions = position[:, None].expand_as(tokens)
        mask = window.mask(positions, root_position, ancestry)
        prefix = layer.prefix(cache.place(positions - root_position[:, None]))

        def self_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window.place(key, value, first)
            return attend(query, window.keys, window.values, mask, self.scaling)[0].to(query.dtype)

        def cross_attend(query: Tensor) -> Tensor:
            return self.backend.attention(query, prefix, None, self.scaling, None, None).transpose(1, 2)

        embeds = self.target.embed(tokens)
        hidden = self.draft.layer(embeds, positions, self.target.rotate, self_attend, cross_attend)
        return self.target.logits(hidden)


def best_children(logits: Tensor, scores: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` best continuations of nodes with cumulative log-probability `scores` (B, T), logits (B, T, V).

    Returns tokens, parents (index into T), scores, each (B, width), best first. No node can have more than `width`
    of them, so each node's own best `width` are candidates enough, and only they need a log-softmax.
    """
    logits = logits.float()
    vocab = logits.shape[-1]
    best, tokens = logits.topk(min(width, vocab), dim=-1)  # (B, T, k)
    # in this order: a difference that is never positive cannot round to a child that scores above its parent
    totals = scores[:, :, None] + (best - logits.logsumexp(dim=-1, keepdim=True))
    chosen, index = totals.flatten(1).topk(width, dim=-1)
    return tokens.flatten(1).gather(1, index), index // best.shape[-1], chosen
