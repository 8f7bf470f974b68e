"""TokenTree: a tree of guessed tokens as a list of parents, and everything that follows from it.

Node 0 is the root: the newest emitted token. A node's parent always has a smaller index. Pure tensors of fixed shape:
no host synchronization, nothing here depends on the values. Knows nothing of models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    def from_root(cls, root: Tensor) -> TokenTree:
        """The tree that is only its root (B,)."""
        tokens = root[:, None]
        return cls(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32), 0)

    def extend(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> TokenTree:
        """This tree with one more level of nodes: tokens, parents, scores (B, width)."""
        return TokenTree(
            torch.cat([self.tokens, tokens], dim=1),
            torch.cat([self.parents, parents], dim=1),
            torch.cat([self.scores, scores], dim=1),
            self.levels + 1,
        )

    def forced(self, rows: Tensor, token: int) -> TokenTree:
        """In `rows` (B,) bool, chains of `token` instead: what follows there is known (padding)."""
        node = torch.arange(self.tokens.shape[1], device=rows.device)
        chain = torch.where(node <= self.levels, node - 1, 0).clamp(min=0)
        rows = rows[:, None]
        root = node == 0
        return self._replace(
            tokens=torch.where(rows & ~root, token, self.tokens), parents=torch.where(rows, chain, self.parents)
        )

    def prune(self, size: int | None) -> TokenTree:
        """The `size` best nodes by score, root included, in their old order; all of them if `size` is None.

        Scores never rise along a path and ties go to the smaller index, so the kept set is closed under parents.
        """
        batch, nodes = self.tokens.shape
        if size is None or size >= nodes:
            return self
        best = torch.sort(self.scores, dim=1, descending=True, stable=True).indices[:, :size]
        kept = best.sort(dim=1).values  # (B, size), ascending: parents stay ahead of their children
        new_index = torch.zeros_like(self.parents).scatter_(
            1, kept, torch.arange(size, device=kept.device).expand(batch, size)
        )
        parents = new_index.gather(1, self.parents.gather(1, kept))
        levels = min(self.levels, size - 1)  # a path of more steps than nodes would reach past the cache's room
        return TokenTree(self.tokens.gather(1, kept), parents, self.scores.gather(1, kept), levels)


def ancestor_mask(parents: Tensor, levels: int) -> Tensor:
    """(B, T, T) bool: `mask[b, i, j]` is true where node j is node i or an ancestor of it.

    parents: (B, T) as in `TokenTree`; levels: a bound on the depth.
    """
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    ancestor = index.expand_as(parents)
    mask = ancestor[:, :, None] == index
    for _ in range(levels):
        ancestor = parents.gather(1, ancestor)
        mask = mask | (ancestor[:, :, None] == index)
    return mask


def node_depths(mask: Tensor) -> Tensor:
    """(B, T) int64 depth of each node, the root's is 0, from the ancestor mask (B, T, T)."""
    return mask.sum(dim=-1) - 1


def children(tokens: list[int], parents: list[int]) -> list[dict[int, int]]:
    """For each node of one tree on the host, its children as {token: node}; the root is nobody's child."""
    table: list[dict[int, int]] = [{} for _ in tokens]
    for node in range(1, len(tokens)):
        table[parents[node]].setdefault(tokens[node], node)
    return table
