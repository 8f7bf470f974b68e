"""Copies: guesses from the text itself. Where its last tokens stand earlier too, what followed may follow again.

The whole text is looked through anew each round: on a GPU that is less work than to keep an index up to date, it works
where the host is a round behind, and there is nothing to undo. Knows tokens, no models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tree_longspec import TokenTree, TreeForm

# How often the next token is the one that followed an earlier place where so many tokens agree, the last one first: an
# average over code and prose (docs/LOG.md). A guess needs a likelihood beside the draft's only to be ranked with them.
AGREEMENT = (0.0, 0.2, 0.33, 0.42, 0.52, 0.6, 0.7, 0.77, 0.88)
# Tokens: buffers are multiples of ROOM, with some to spare, so that calls of about one length share graphs.
ROOM, SPARE = 4096, 512
LONGEST = 2**20  # tokens that a call may write into a buffer; what follows is not looked through


class Found(NamedTuple):
    """What followed an earlier place: tokens (B, N) int64, −1 where none is; same (B,), how many tokens agree."""

    tokens: Tensor
    same: Tensor


class Report(NamedTuple):
    """What the host may learn of a row.

    Of its last round the number of the form in the ladder, how many tokens agreed before the copy, how many of the
    copy were written, and how many were written at all; then how many tokens agree now.
    """

    rung: int
    same: int
    agreed: int
    wrote: int
    now: int


class Written(NamedTuple):
    """The texts on the device, and what may follow them by their own example; all kept up to date in place.

    ids: (B, room) int32 and lengths (B,), the roots included. likely: the logarithms of `AGREEMENT`. found: of the
    texts as they are. report: (B, 5), see `Report`.
    """

    ids: Tensor
    lengths: Tensor
    likely: Tensor
    found: Found
    report: Tensor

    @classmethod
    def of(cls, ids: Tensor, more: int, count: int, device: torch.device) -> Written:
        """Begin with texts (B, L) that may grow by `more` tokens; count: the most tokens to copy at once."""
        batch, length = ids.shape
        room = room_for(length + min(max(more, SPARE), LONGEST))
        kept = torch.zeros(batch, room, dtype=torch.int32, device=device)
        kept[:, :length] = ids.clamp(-1, 2**31 - 1)
        lengths = torch.full((batch,), length, dtype=torch.long, device=device)
        likely = torch.tensor(AGREEMENT, dtype=torch.float32, device=device).log()
        found = find(kept, lengths, count)
        report = torch.zeros(batch, len(Report._fields), dtype=torch.long, device=device)
        report[:, -1] = found.same
        return cls(kept, lengths, likely, found, report)


def room_for(tokens: int) -> int:
    """Return the size of a buffer that holds so many tokens of a text."""
    return -(-tokens // ROOM) * ROOM


def append(written: Written, tokens: Tensor, path: Tensor, counts: Tensor, newest: Tensor, rung: int) -> None:
    """Append what a round wrote: the tokens (B, T) of the first `counts` (B,) nodes of `path` (B, P), but the root's.

    newest: (B,), the last tokens written. rung: the number of the form of the trees. Then look at the texts anew.
    """
    ids, lengths, _, found, report = written
    steps = torch.arange(path.shape[1], device=path.device)
    following = tokens.gather(1, path).roll(-1, 1)
    following = torch.where(steps < counts[:, None] - 1, following, newest[:, None])
    most = min(len(steps), found.tokens.shape[1])
    agrees = (following[:, :most] == found.tokens[:, :most]) & (steps[:most] < counts[:, None])
    agreed = agrees.cumprod(dim=1).sum(dim=1)
    # those beyond `counts` lie behind the end until others take their place
    ids.scatter_(1, (lengths[:, None] + steps).clamp(max=ids.shape[1] - 1), following.int())
    lengths.add_(counts).clamp_(max=ids.shape[1] - 1)
    anew = find(ids, lengths, found.tokens.shape[1])
    report.copy_(torch.stack([torch.full_like(counts, rung), found.same, agreed, counts, anew.same], dim=1))
    found.tokens.copy_(anew.tokens)
    found.same.copy_(anew.same)


def find(ids: Tensor, lengths: Tensor, count: int) -> Found:
    """Find the last of the places where most of the last tokens stand too, and `count` tokens behind it.

    ids: (B, room), of which `lengths` (B,) are the texts. At most len(AGREEMENT) − 1 tokens are compared. What
    followed a place just before the end is repeated.
    """
    room, most = ids.shape[1], min(len(AGREEMENT), ids.shape[1])
    index = torch.arange(room, device=ids.device)
    last = ids.gather(1, (lengths[:, None] - 1 - index[:most]).clamp(min=0))
    agrees = (ids == last[:, :1]) & (index < lengths[:, None] - 1)
    same = agrees.long()
    for step in range(1, most - 1):
        agrees = agrees[:, 1:] & (ids[:, : room - step] == last[:, step, None])
        same[:, step:] += agrees
    key = torch.where(same > 0, same * room + index, 0).amax(dim=1)
    place, found = key % room, key > 0
    period = (lengths - 1 - place).clamp(min=1)
    ahead = torch.arange(count, device=ids.device) % period[:, None]
    tokens = ids.gather(1, (place[:, None] + 1 + ahead).clamp(max=room - 1)).long()
    return Found(tokens.masked_fill(~found[:, None], -1), key // room)


def copy_branch(tree: TokenTree, written: Written, copies: int, vocab: int) -> TokenTree:
    """Add the text's own guesses to trees that the draft has grown, as a branch of `copies` nodes.

    The branch begins below the deepest node whose path carries the copied tokens, so that no node comes twice; nodes
    on that path count at least as much as the copy itself. vocab: tokens that the target can embed; a copy ends before
    others. Nodes without a token to copy have a score of −inf.
    """
    batch, nodes = tree.tokens.shape
    device = tree.tokens.device
    copied = written.found
    known = ((copied.tokens >= 0) & (copied.tokens < vocab)).cumprod(dim=1).bool()
    steps = torch.arange(copied.tokens.shape[1], device=device)
    likely = written.likely[(copied.same[:, None] + steps).clamp(max=len(written.likely) - 1)]
    sure = likely.masked_fill(~known, float("-inf")).cumsum(dim=1)
    index = torch.arange(nodes, device=device)
    node, depth = torch.zeros_like(copied.same), torch.zeros_like(copied.same)
    scores, agrees = tree.scores, torch.ones_like(copied.same, dtype=torch.bool)
    for level in range(tree.levels):
        token = copied.tokens[:, level, None]
        child = torch.where((tree.parents == node[:, None]) & (tree.tokens == token) & (index > 0), index, nodes)
        child = child.amin(dim=1)  # of siblings with the same token, the first
        agrees = agrees & (child < nodes)
        node, depth = torch.where(agrees, child, node), depth + agrees
        raised = torch.maximum(scores, sure[:, level, None])
        scores = torch.where(agrees[:, None] & (index == node[:, None]), raised, scores)
    ahead = depth[:, None] + torch.arange(copies, device=device)
    tokens = torch.where(known, copied.tokens, 0).gather(1, ahead)
    chain = torch.arange(nodes - 1, nodes - 1 + copies, device=device).expand(batch, -1)
    parents = torch.cat([node[:, None], chain[:, 1:]], dim=1)
    # no higher than the node it begins at, whose score the draft or the copy gave
    branch = torch.minimum(sure.gather(1, ahead), scores.gather(1, node[:, None]))
    return TokenTree(
        torch.cat([tree.tokens, tokens], dim=1),
        torch.cat([tree.parents, parents], dim=1),
        torch.cat([scores, branch], dim=1),
        tree.levels + copies,
    )


def join_copy(tree: TokenTree, written: Written, form: TreeForm, vocab: int) -> TokenTree:
    """Return trees of a form, with the copied branch, from what the draft has grown; see `copy_branch`."""
    return copy_branch(tree, written, form.copies, vocab).of_form(form)
