"""Verification: which nodes of a tree the target accepts, and the text that grows by them.

`accept` walks from the root; at each node the target's own sampler picks the next token exactly as plain `generate`
would, so any tree and any processor give the same text. Knows trees and logits, not models or caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sampling_longspec import Picks
from .text_longspec import Text
from .tree_longspec import TokenTree, children


class Verified(NamedTuple):
    """Of each node: depths (B, T); the target's logits (B, T, vocab) and hidden_states (…, B, T, hidden) per layer."""

    depths: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


def accept(tree: TokenTree, verified: Verified, text: Text, paths: list[list[int]]) -> None:
    """Extend `text` along the trees as far as the target agrees, and each row by the target's own next token.

    paths: the accepted nodes of each row so far: just the root `[0]`, or none where a row is to rest. They grow in
    place, so that they are right even if `text` raises; in the end a row has as many as tokens were written.
    """
    depths, logits, hidden_states = verified
    room = text.room()
    stopped = text.stopped
    known = [tree.tokens, tree.parents]
    picks = text.pick_tree(logits, depths, tree.levels) if text.by_tree else None
    if picks is not None:
        valid = [] if picks.valid is None else [picks.valid.long()]
        known += [states.to(depths.device) for states in (picks.tokens, *valid)]
    host = torch.stack(known).cpu()  # the walk needs the trees on the host: one transfer a round
    below = [children(*pair) for pair in zip(host[0].tolist(), host[1].tolist(), strict=True)]
    moving = [row for row, path in enumerate(paths) if path]
    while moving:
        nodes = [paths[row][-1] for row in moving]
        states = (
            None if hidden_states is None else tuple(layer[..., moving, nodes, None, :] for layer in hidden_states)
        )
        if picks is None:
            tokens = text.emit(moving, logits[moving, nodes], states)
        else:
            scores = None if picks.scores is None else picks.scores[moving, nodes]
            picked = Picks(host[2, moving, nodes], scores, None if picks.valid is None else host[3, moving, nodes])
            recorded = None if text.records.logits is None else logits[moving, nodes].to(text.device, torch.float32)
            tokens = text.write(moving, picked, recorded, states)
        going = {}
        for row, node, token in zip(moving, nodes, tokens, strict=True):
            child = below[row][node].get(token)
            just_stopped = text.ends[row] is not None and not stopped[row]
            if child is not None and not just_stopped and len(paths[row]) < room[row]:
                going[row] = child
        if text.together and len(going) < text.batch:
            return
        moving = list(going)
        for row, child in going.items():
            paths[row].append(child)
