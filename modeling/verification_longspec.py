"""Verification: which nodes of a tree the target accepts, and the text that grows by them.

At each node of a path the target's own sampler picks the next token exactly as plain `generate` would, so any tree and
any processor give the same text. Where picks do not depend on the text so far, those of all nodes are made at once and
`walk` finds the paths on the device; else `accept_step_by_step` picks along the paths. Knows trees and logits, not
models or caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sampling_longspec import Picks
from .text_longspec import Text
from .tree_longspec import TokenTree, children


class Verified(NamedTuple):
    """Of each node: its ancestors (B, T, T) and depth (B, T); the target's logits (B, T, vocab) and, for each layer,
    hidden_states (…, B, T, hidden); hidden: (B, T, hidden), what the draft reads of them, if it does."""

    ancestors: Tensor
    depths: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    hidden: Tensor | None = None


class Steps(NamedTuple):
    """What a round keeps: the first `counts` (B,) nodes of each path (B, levels + 1); each row's newest token (B,).

    A row that rests keeps no node and has the newest token that it had.
    """

    path: Tensor
    counts: Tensor
    newest: Tensor

    @classmethod
    def of(cls, paths: list[list[int]], newest: list[int], levels: int, device: torch.device) -> Steps:
        """From the host, in one transfer."""
        rows = [
            [*path, *[0] * (levels + 1 - len(path)), len(path), token]
            for path, token in zip(paths, newest, strict=True)
        ]
        table = torch.tensor(rows)
        if device.type == "cuda":
            table = table.pin_memory()
        table = table.to(device, non_blocking=True)
        return cls(table[:, :-2], table[:, -2], table[:, -1])


class Walk(NamedTuple):
    """How far each tree agrees with the picks; `known` (B, 2 · levels + 3) is what the host has to know of it: the
    path, the tokens picked behind its nodes, and how many nodes it has."""

    steps: Steps
    known: Tensor

    def on_host(self) -> list[list[int]]:
        if self.known.device.type != "cuda":
            return self.known.tolist()
        buffer = torch.empty(self.known.shape, dtype=self.known.dtype, pin_memory=True)
        buffer.copy_(self.known, non_blocking=True)
        torch.cuda.current_stream(self.known.device).synchronize()
        return buffer.tolist()


def walk(tree: TokenTree, ancestors: Tensor, depths: Tensor, picks: Tensor) -> Walk:
    """The paths along which each node carries what is picked (B, T) behind its parent. Work of the device alone."""
    if tree.levels == 0:
        path, counts = torch.zeros_like(picks), torch.ones_like(picks[:, 0])
    else:
        path, counts = _agreed(tree, ancestors, depths, picks)
    tokens = picks.gather(1, path)
    newest = tokens.gather(1, counts[:, None] - 1)[:, 0]
    return Walk(Steps(path, counts, newest), torch.cat([path, tokens, counts[:, None]], dim=1))


def _agreed(tree: TokenTree, ancestors: Tensor, depths: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Path and counts of `walk`. Of siblings with the same token, only the first is ever on a path."""
    node = torch.arange(picks.shape[1], device=picks.device)
    is_root = node == 0
    same_token = tree.tokens[:, :, None] == tree.tokens[:, None]
    same_parent = (tree.parents[:, :, None] == tree.parents[:, None]) & ~is_root  # the root is nobody's sibling
    first = ~(same_token & same_parent).tril(-1).any(dim=-1)
    agrees = is_root | (first & (tree.tokens == picks.gather(1, tree.parents)))
    accepted = (agrees[:, None] | ~ancestors).all(dim=-1)
    beyond = tree.levels + 1  # where all go that are not accepted
    path = picks.new_zeros(len(picks), beyond + 1)
    path.scatter_(1, torch.where(accepted, depths, beyond), node.expand_as(picks))
    return path[:, :beyond], accepted.sum(dim=-1)


def accept(
    known: list[list[int]], verified: Verified, picks: Picks | None, text: Text, paths: list[list[int]]
) -> None:
    """Extend `text` along walked paths as far as it goes on, and each row by the target's own next token.

    known: `Walk.known`; picks: where they are not the argmax of the logits. paths: the accepted nodes of each row so
    far: just the root `[0]`, or none where a row is to rest. They grow in place, so that they are right even if `text`
    raises; in the end a row has as many as tokens were written.
    """
    room, stopped = text.room(), text.stopped
    width = len(known[0]) // 2
    moving = [row for row, path in enumerate(paths) if path]
    while moving:
        step = len(paths[moving[0]])  # all that move are equally far
        if not text.records.empty:
            nodes = [paths[row][-1] for row in moving]
            logits = verified.logits[moving, nodes]
            scores = logits if picks is None else picks.scores[moving, nodes]
            text.record(moving, scores, logits, _states(verified, moving, nodes))
        text.write(moving, [known[row][width + step - 1] for row in moving])
        heirs = {row: known[row][step] if step < known[row][-1] else None for row in moving}
        moving = _go_on(text, paths, heirs, room, stopped)


def accept_step_by_step(tree: TokenTree, verified: Verified, text: Text, paths: list[list[int]]) -> None:
    """The same where each pick depends on the text before it."""
    room, stopped = text.room(), text.stopped
    host = torch.stack([tree.tokens, tree.parents]).cpu()  # one transfer a round
    below = [children(*pair) for pair in zip(host[0].tolist(), host[1].tolist(), strict=True)]
    moving = [row for row, path in enumerate(paths) if path]
    while moving:
        nodes = [paths[row][-1] for row in moving]
        tokens = text.emit(moving, verified.logits[moving, nodes], _states(verified, moving, nodes))
        rows = zip(moving, nodes, tokens, strict=True)
        moving = _go_on(text, paths, {row: below[row][node].get(token) for row, node, token in rows}, room, stopped)


def _states(verified: Verified, rows: list[int], nodes: list[int]) -> tuple[Tensor, ...] | None:
    """Hidden states (…, R, 1, hidden) of one node of each of `rows`."""
    if verified.hidden_states is None:
        return None
    return tuple(layer[..., rows, nodes, None, :] for layer in verified.hidden_states)


def _go_on(
    text: Text, paths: list[list[int]], heirs: dict[int, int | None], room: list[int], stopped: list[bool]
) -> list[int]:
    """The rows that write one more token in this round; the path of each grows by its heir, {row: node}."""
    going = [
        row
        for row, heir in heirs.items()
        if heir is not None and len(paths[row]) < room[row] and (stopped[row] or text.ends[row] is None)
    ]
    if text.together and len(going) < text.batch:
        return []
    for row in going:
        heir = heirs[row]
        assert heir is not None
        paths[row].append(heir)
    return going
