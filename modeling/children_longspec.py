"""The best children of a level of the tree. Knows logits and scores, not models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .tree_longspec import Level

Children = Callable[[Tensor, Tensor, int, Tensor | None], Level]


def best_children(logits: Tensor, scores: Tensor, width: int, vocab: Tensor | None = None) -> Level:
    """The `width` best continuations of nodes with cumulative log-probability `scores` (B, T), logits (B, T, N).

    vocab: the tokens (N,) that these are the logits of; None: 0, 1, …
    No node can have more than `width` of them, so each node's own best `width` are candidates enough. Of continuations
    that score alike any may be taken, as `topk` does.
    """
    best = logits.topk(min(width, logits.shape[-1]), dim=-1, sorted=False).indices  # (B, T, k)
    # in this order: a log-probability is never positive, so that none can round to a child that outranks its parent
    totals = scores[:, :, None] + log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, best)
    chosen, index = totals.flatten(1).topk(width, dim=-1)
    tokens = best.flatten(1).gather(1, index)
    return Level(tokens if vocab is None else vocab[tokens], index // best.shape[-1], chosen)
