"""TokenTree: a tree of guessed tokens as a list of parents, and everything that follows from it.

Node 0 is the root: the newest emitted token. A node's parent always has a smaller index. Pure tensors of fixed shape:
no host synchronization, and no shape depends on a value. Knows logits and scores, not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class TreeForm(NamedTuple):
    """What the trees of a round look like.

    shape: the nodes of each level that the draft grows. copies: tokens that are copied from the text, in one branch.
    verified: nodes that are verified, root included: the best; None: all. least: the likelihood that makes a guess
    worth its arithmetic: where none has as much, fewer levels are grown and fewer nodes verified. The host reads
    scores for that, so it is for CPUs.
    """

    shape: tuple[int, ...]
    copies: int = 0
    verified: int | None = None
    least: float = 0.0

    @property
    def levels(self) -> int:
        """A bound on the depth of any node: a copied branch may begin below the last level."""
        return len(self.shape) + self.copies

    @property
    def nodes(self) -> int:
        """The number of nodes that are verified."""
        grown = 1 + sum(self.shape) + self.copies
        return grown if self.verified is None else min(grown, self.verified)

    @property
    def steps(self) -> int:
        """The number of nodes of the longest path."""
        return min(self.levels + 1, self.nodes)

    def within(self, levels: int) -> TreeForm:
        """Return the form of trees that are not deeper than this."""
        return self if self.levels <= levels else self._replace(shape=self.shape[:levels], copies=0)


class Level(NamedTuple):
    """The nodes of one depth, best first: tokens, parents (index into the level above), scores, each (B, width)."""

    tokens: Tensor
    parents: Tensor
    scores: Tensor

    @classmethod
    def of_root(cls, root: Tensor) -> Level:
        """Return the level that holds only the root (B,), which counts as its own parent."""
        tokens = root[:, None]
        return cls(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32))


class TokenTree(NamedTuple):
    """Trees of `T` nodes for `B` sequences.

    tokens:  (B, T) int64
    parents: (B, T) int64, the index of each node's parent; the root's is 0 (itself)
    scores:  (B, T) float32, cumulative draft log-probability; 0 at the root, never rising from parent to child
    levels:  static bound on the depth of any node
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    levels: int

    @classmethod
    def from_levels(cls, levels: Sequence[Level], above: Tensor) -> TokenTree:
        """Join levels, the root's first, into a tree; above: (T,), see `levels_above`."""
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return cls(tokens, parents + above, scores, len(levels) - 1)

    def forced(self, rows: Tensor, token: int) -> TokenTree:
        """Replace the trees of `rows` (B,) bool by chains of `token`: a stopped row continues with padding."""
        node = torch.arange(self.tokens.shape[1], device=rows.device)
        chain = torch.where(node <= self.levels, node - 1, 0).clamp(min=0)
        rows = rows[:, None]
        root = node == 0
        return self._replace(
            tokens=torch.where(rows & ~root, token, self.tokens), parents=torch.where(rows, chain, self.parents)
        )

    def of_form(self, form: TreeForm) -> TokenTree:
        """Return the tree with the nodes that a form verifies."""
        return self.prune(min(self.worth(form.least), form.nodes) if form.least else form.verified)

    def worth(self, least: float) -> int:
        """Return how many nodes have at least this likelihood in the tree with most of them; asks the device."""
        return max(int((self.scores >= math.log(least)).sum(dim=1).max()), 1)

    def prune(self, size: int | None) -> TokenTree:
        """Keep the `size` best nodes by score, root included, in their old order; all nodes if `size` is None.

        Scores never rise along a path and ties go to the smaller index, so the kept set is closed under parents.
        A score that is no number, of a draft that diverged, counts as −inf.
        """
        nodes = self.tokens.shape[1]
        if size is None or size >= nodes:
            return self
        scores = self.scores.masked_fill(self.scores.isnan(), float("-inf"))
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :size]
        kept = best.sort(dim=1).values  # (B, size), ascending: parents stay ahead of their children
        parents = torch.searchsorted(kept, self.parents.gather(1, kept))  # their places among the kept
        levels = min(self.levels, size - 1)  # a path of more steps than nodes would reach past the cache's room
        return TokenTree(self.tokens.gather(1, kept), parents, self.scores.gather(1, kept), levels)


def levels_above(shape: Sequence[int]) -> list[int]:
    """Return, for each node of a tree of this shape, the first node of the level above the node's own level."""
    widths = [1, *shape]
    above = [0, *accumulate(widths[:-1], initial=0)]  # where the level above each level starts; the root's is its own
    return [start for start, width in zip(above, widths, strict=False) for _ in range(width)]


def ancestor_mask(parents: Tensor, levels: int) -> Tensor:
    """Return (B, T, T) bool: `mask[b, i, j]` is true where node j is node i or an ancestor of node i.

    parents: (B, T) as in `TokenTree`; levels: a bound on the depth.
    """
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    mask = (index[:, None] == index).expand(len(parents), -1, -1)
    ancestor, reach = parents, 1  # of each node, so many levels up: as far as `mask` knows
    while reach <= levels:
        mask = mask | mask.gather(1, ancestor[:, :, None].expand(-1, -1, nodes))
        ancestor, reach = ancestor.gather(1, ancestor), 2 * reach
    return mask


def node_depths(mask: Tensor) -> Tensor:
    """Return the depth (B, T) int64 of each node, 0 for the root, from the ancestor mask (B, T, T)."""
    return mask.sum(dim=-1) - 1


def children(tokens: list[int], parents: list[int]) -> list[dict[int, int]]:
    """Return the children {token: node} of each node of one tree on the host; the root is no node's child."""
    table: list[dict[int, int]] = [{} for _ in tokens]
    for node in range(1, len(tokens)):
        table[parents[node]].setdefault(tokens[node], node)
    return table


Children = Callable[[Tensor, Tensor, int, Tensor | None], Level]


def best_children(logits: Tensor, scores: Tensor, width: int, vocab: Tensor | None = None) -> Level:
    """Choose the `width` best continuations of a level with `scores` (B, T), from the draft's logits (B, T, N).

    vocab: the tokens (N,) that the logits belong to; None: 0, 1, …
    A node can have at most `width` children in the new level, so its own best `width` tokens are candidates enough.
    Among continuations of one score any may be chosen, as `topk` does.
    """
    best = logits.topk(min(width, logits.shape[-1]), dim=-1, sorted=False).indices  # (B, T, k)
    # in this order: a log-probability is never positive, so that none can round to a child that outranks its parent
    totals = scores[:, :, None] + log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, best)
    chosen, index = totals.flatten(1).topk(width, dim=-1)
    tokens = best.flatten(1).gather(1, index)
    return Level(tokens if vocab is None else vocab[tokens], index // best.shape[-1], chosen)
