"""Verification: which nodes of a tree the target accepts, and the text that grows by them.

At each node of a path the target's own sampler picks the next token exactly as plain `generate` would, so any tree and
any processor give the same text. Where tokens are just the largest logits, those behind all nodes are picked at once
and `walk` finds the paths on the device; an engine may know more that the device can pick. Else the host picks along
the paths, step by step. Knows trees and logits, not models or caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .copies_longspec import Report, Written
from .sampling_longspec import Sampler
from .text_longspec import Text
from .tree_longspec import TokenTree, children


class Verified(NamedTuple):
    """What the target's forward says of each node of a batch of trees.

    ancestors: (B, T, T) bool; depths: (B, T); logits: (B, T, vocab); hidden_states: (…, B, T, hidden) of each layer,
    if they are returned; hidden: (B, T, hidden), the target's last hidden state, for drafts that read it.
    """

    ancestors: Tensor
    depths: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    hidden: Tensor | None = None


class Accepted(NamedTuple):
    """What a round keeps: the first `counts` (B,) nodes of each path (B, levels + 1); each row's newest token (B,).

    A row that rests keeps no node and has the newest token that it had.
    """

    path: Tensor
    counts: Tensor
    newest: Tensor

    @classmethod
    def of(cls, paths: list[list[int]], newest: list[int], levels: int, device: torch.device) -> Accepted:
        """Send paths and newest tokens from the host to `device` in one transfer."""
        rows = [
            [*path, *[0] * (levels + 1 - len(path)), len(path), token]
            for path, token in zip(paths, newest, strict=True)
        ]
        table = torch.tensor(rows, device="cpu")
        if device.type == "cuda":
            table = table.pin_memory()
        table = table.to(device, non_blocking=True)
        return cls(table[:, :-2], table[:, -2], table[:, -1])


class RowWalk(NamedTuple):
    """The walk of one row on the host: the accepted nodes, root first, and the token picked behind each.

    report: of the round before, see `Report`.
    """

    nodes: list[int]
    tokens: list[int]
    report: Report | None = None

    @classmethod
    def of(cls, row: list[int], steps: int) -> RowWalk:
        """Read a row of `Walk.table`, of paths of so many steps."""
        count, report = row[2 * steps], row[2 * steps + 1 :]
        return cls(row[:count], row[steps : steps + count], Report(*report) if report else None)


class Walk(NamedTuple):
    """How far each tree agrees with the picked tokens.

    table: (B, 2 · levels + 3), what the host reads: path, the token picked behind each node of the path, and count;
    then `Written.report`, if there is one.
    """

    accepted: Accepted
    table: Tensor

    def on_host(self, written: Written | None = None) -> list[RowWalk]:
        """Read the walks, and what `written` reports, in one transfer: the round's only wait for the device."""
        table = sent = self.reporting(written).table
        if table.device.type == "cuda":
            table = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
            table.copy_(sent, non_blocking=True)
            torch.cuda.current_stream(sent.device).synchronize()
        steps = self.accepted.path.shape[1]
        return [RowWalk.of(row, steps) for row in table.tolist()]

    def reporting(self, written: Written | None) -> Walk:
        """Return the walk with a report in its table."""
        if written is None:
            return self
        return self._replace(table=torch.cat([self.table, written.report.to(self.table.device)], dim=1))


def walk(tree: TokenTree, ancestors: Tensor, depths: Tensor, picks: Tensor) -> Walk:
    """Find the paths along which each node carries the token picked (B, T) behind its parent, on the device alone."""
    if tree.levels == 0:
        path, counts = torch.zeros_like(picks), torch.ones_like(picks[:, 0])
    else:
        path, counts = _agreed(tree, ancestors, depths, picks)
    tokens = picks.gather(1, path)
    newest = tokens.gather(1, counts[:, None] - 1)[:, 0]
    return Walk(Accepted(path, counts, newest), torch.cat([path, tokens, counts[:, None]], dim=1))


def _agreed(tree: TokenTree, ancestors: Tensor, depths: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Return path and counts of `walk`. Of siblings with the same token, only the first is ever on a path."""
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


# Writes the token behind one node of each of some rows; returns the node that carries it, {row: node or None}.
WriteNext = Callable[[list[int], list[int]], dict[int, int | None]]


def accept(text: Text, paths: list[list[int]], write_next: WriteNext) -> None:
    """Extend `text` along accepted nodes as far as it continues, and each row by the target's own next token.

    paths: the accepted nodes of each row so far: just the root `[0]`, or none where a row is to rest. Paths grow in
    place, so that they are right even if `text` raises; in the end a row has as many nodes as tokens were written.
    """
    room, stopped = text.room(), text.stopped
    moving = [row for row, path in enumerate(paths) if path]
    while moving:
        following = write_next(moving, [paths[row][-1] for row in moving])
        moving = [
            row
            for row, node in following.items()
            if node is not None and len(paths[row]) < room[row] and (stopped[row] or text.ends[row] is None)
        ]
        if text.together and len(moving) < text.batch:
            return
        for row in moving:
            node = following[row]
            assert node is not None
            paths[row].append(node)


def along_walk(walks: list[RowWalk], verified: Verified | None, text: Text) -> WriteNext:
    """Write the tokens that the device has picked; verified: None where nothing of it is recorded.

    Scores, if they are recorded, are logits: see `Engine.draw`.
    """
    step = 0  # all that move are equally far

    def write_next(rows: list[int], nodes: list[int]) -> dict[int, int | None]:
        nonlocal step
        if verified is not None and not text.records.empty:
            logits = verified.logits[rows, nodes]
            text.record(rows, logits, logits, _states(verified, rows, nodes))
        text.write(rows, [walks[row].tokens[step] for row in rows])
        step += 1
        return {row: walks[row].nodes[step] if step < len(walks[row].nodes) else None for row in rows}

    return write_next


def step_by_step(tree: TokenTree, verified: Verified, sampler: Sampler, text: Text) -> WriteNext:
    """Pick each token with the text before it, then write it."""
    host = torch.stack([tree.tokens, tree.parents]).cpu()  # one transfer a round
    below = [children(*pair) for pair in zip(host[0].tolist(), host[1].tolist(), strict=True)]

    def write_next(rows: list[int], nodes: list[int]) -> dict[int, int | None]:
        tokens = emit(text, sampler, rows, verified.logits[rows, nodes], _states(verified, rows, nodes))
        return {row: below[row][node].get(token) for row, node, token in zip(rows, nodes, tokens, strict=True)}

    return write_next


def emit(
    text: Text, sampler: Sampler, rows: list[int], logits: Tensor, hidden_states: tuple[Tensor, ...] | None = None
) -> list[int]:
    """Pick the next token of `rows` from the target's logits (R, vocab) and write it. Returns the tokens.

    hidden_states: (…, R, length, hidden) of each layer, of the forward that gave the logits.
    """
    logits = logits.to(copy=True, dtype=torch.float32, device=text.device)
    picks = sampler.pick(lambda rows: text.ids(rows).to(text.device), rows, [text.steps[row] for row in rows], logits)
    text.record(rows, picks.scores, logits, hidden_states)
    return text.write(rows, picks.tokens.tolist())


def _states(verified: Verified, rows: list[int], nodes: list[int]) -> tuple[Tensor, ...] | None:
    """Return the hidden states (…, R, 1, hidden) of one node of each of `rows`."""
    if verified.hidden_states is None:
        return None
    return tuple(layer[..., rows, nodes, None, :] for layer in verified.hidden_states)
