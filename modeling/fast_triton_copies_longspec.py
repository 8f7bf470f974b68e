"""Triton kernels of copies: the text goes on, its last tokens are looked for in it, and the copy joins the tree.

A round takes four launches: what was written is appended, each chunk of the text tells its best place, what follows
the best of all is taken over; and a tree, its copied branch and the choice of its best nodes are one. Needs the
package triton; imported only when a backend with Triton kernels is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .copies_longspec import AGREEMENT, Report, Written, join_copy
from .fast_triton_attention_longspec import tl, triton
from .tree_longspec import TokenTree, TreeForm

CHUNK = 2048  # tokens of a text in a program
MOST_NODES = 128  # of a tree with its branch; nodes are ranked by comparing each with each
MOST_SAME = len(AGREEMENT) - 1
FIELDS = tl.constexpr(len(Report._fields))


@triton.jit
def append_kernel(
    tree_tokens, path, counts, newest, ids, lengths, found, same, report, rung, room, steps, copied, tree_row,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Append a row's accepted tokens to its text, one program each, and report how many of them a copy had."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, STEPS)
    count, length = tl.load(counts + row), tl.load(lengths + row)
    node = tl.load(path + row * steps + step + 1, mask=step + 1 < steps, other=0)
    token = tl.load(tree_tokens + row * tree_row + node, mask=step + 1 < count, other=0)
    token = tl.where(step == count - 1, tl.load(newest + row), token)
    guess = tl.load(found + row * copied + step, mask=step < copied, other=-1)
    wrong = (token != guess) | (step >= count) | (step >= copied)
    agreed = tl.min(tl.where(wrong, step, STEPS), 0)
    place = length + step
    tl.store(ids + row * room + place, token.to(tl.int32), mask=(step < count) & (place < room))
    tl.store(lengths + row, tl.minimum(length + count, room - 1))
    told = report + row * FIELDS
    tl.store(told, row * 0 + rung)  # a host's 1 is a constant, which has no format
    tl.store(told + 1, tl.load(same + row))
    tl.store(told + 2, agreed.to(tl.int64))
    tl.store(told + 3, count)


@triton.jit
def place_kernel(ids, lengths, best, room, chunks, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """Store the best place of a chunk as same · room + index; programs are (chunk, row)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    index = (chunk * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    text = ids + row * room
    agrees = index < length - 1
    same = tl.zeros([BLOCK], dtype=tl.int64)
    if chunk * BLOCK < length - 1:
        for back in range(MOST):
            last = tl.load(text + tl.maximum(length - 1 - back, 0))
            token = tl.load(text + index - back, mask=agrees & (index >= back), other=-2)
            agrees = agrees & (index >= back) & (token == last)
            same += agrees.to(tl.int64)
    tl.store(best + row * chunks + chunk, tl.max(tl.where(same > 0, same * room + index, 0), 0))


@triton.jit
def found_kernel(
    ids, lengths, best, found, same, report, room, chunks, copied, CHUNKS: tl.constexpr, STEPS: tl.constexpr
):
    """Take over what follows the best place of a row, one program each."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    key = tl.max(tl.load(best + row * chunks + chunk, mask=chunk < chunks, other=0), 0)
    place = key % room
    period = tl.maximum(tl.load(lengths + row) - 1 - place, 1)
    step = tl.arange(0, STEPS)
    ahead = tl.minimum(place + 1 + step % period, room - 1)
    token = tl.load(ids + row * room + ahead).to(tl.int64)
    tl.store(found + row * copied + step, tl.where(key > 0, token, -1), mask=step < copied)
    tl.store(same + row, key // room)
    tl.store(report + row * FIELDS + 4, key // room)


@triton.jit
def join_kernel(
    tokens, parents, scores, found, same, likely, joined_tokens, joined_parents, joined_scores,
    nodes, copies, kept, copied, vocab, token_row, parent_row, score_row,
    LEVELS: tl.constexpr, MOST: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add the copied branch to a row's tree and keep the best nodes, one program each; see `join_copy`."""
    row = tl.program_id(0).to(tl.int64)
    n, step = tl.arange(0, N), tl.arange(0, STEPS)
    drawn = n < nodes
    token = tl.load(tokens + row * token_row + n, mask=drawn, other=-1)
    parent = tl.load(parents + row * parent_row + n, mask=drawn, other=0)
    score = tl.load(scores + row * score_row + n, mask=drawn, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    agree = tl.load(same + row)
    guess = tl.load(found + row * copied + step, mask=step < copied, other=-1)
    end = tl.min(tl.where((guess >= 0) & (guess < vocab), STEPS, step), 0)  # where no token can be copied any more
    share = tl.load(likely + tl.minimum(agree + step, MOST))
    node, depth, sure, going = tl.zeros([], tl.int64), 0, 0.0, True
    for level in range(LEVELS):
        copy = tl.load(found + row * copied + level)
        sure += tl.load(likely + tl.minimum(agree + level, MOST))
        same_token = (parent == node) & (token == copy) & drawn & (n > 0)
        child = tl.min(tl.where(same_token, n, N), 0)
        going = going & (child < N)
        node = tl.where(going, child.to(tl.int64), node)
        depth += going.to(tl.int32)
        score = tl.where(going & (n == node), tl.maximum(score, tl.where(level < end, sure, float("-inf"))), score)
    place = depth + n - nodes  # of each node of the branch in the copy
    branch = (n >= nodes) & (n < nodes + copies)
    known = branch & (place < end)
    token = tl.where(branch, tl.load(found + row * copied + place, mask=known, other=0), token)
    parent = tl.where(branch, tl.where(n == nodes, node, (n - 1).to(tl.int64)), parent)
    sum_to = tl.sum(tl.where(step[None, :] <= place[:, None], share[None, :], 0.0), 1)
    top = tl.max(tl.where(n == node, score, float("-inf")), 0)
    score = tl.where(branch, tl.where(known, tl.minimum(sum_to, top), float("-inf")), score)
    real = n < nodes + copies
    # rank among all: a better score, or the same and a smaller index
    better = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (n[None, :] < n[:, None]))
    rank = tl.sum((better & real[None, :]).to(tl.int32), 1)
    stays = real & (rank < kept)
    index = tl.cumsum(stays.to(tl.int32), 0) - 1
    above = tl.sum(tl.where(n[None, :] == parent[:, None], index[None, :], 0), 1)
    tl.store(joined_tokens + row * kept + index, token, mask=stays)
    tl.store(joined_parents + row * kept + index, above.to(tl.int64), mask=stays)
    tl.store(joined_scores + row * kept + index, score, mask=stays)


def fused_append(written: Written, tokens: Tensor, path: Tensor, counts: Tensor, newest: Tensor, rung: int) -> None:
    """Do as `append` does, in three launches."""
    ids, lengths, _, found, report = written
    (batch, room), (_, steps), copied = ids.shape, path.shape, found.tokens.shape[1]
    chunks = triton.cdiv(room, CHUNK)
    best = torch.empty(batch, chunks, dtype=torch.int64, device=ids.device)
    append_kernel[(batch,)](
        tokens, path.contiguous(), counts, newest, ids, lengths, found.tokens, found.same, report, rung, room, steps,
        copied, tokens.stride(0), STEPS=triton.next_power_of_2(max(steps, copied)), num_warps=1,
    )  # fmt: skip
    place_kernel[(chunks, batch)](ids, lengths, best, room, chunks, BLOCK=CHUNK, MOST=MOST_SAME, num_warps=4)
    found_kernel[(batch,)](
        ids, lengths, best, found.tokens, found.same, report, room, chunks, copied,
        CHUNKS=triton.next_power_of_2(chunks), STEPS=triton.next_power_of_2(copied), num_warps=1,
    )  # fmt: skip


def fused_join(tree: TokenTree, written: Written, form: TreeForm, vocab: int) -> TokenTree:
    """Do as `join_copy` does, in one launch; large trees are left to that."""
    batch, nodes = tree.tokens.shape
    if nodes + form.copies > MOST_NODES or form.least:
        return join_copy(tree, written, form, vocab)
    kept, device, copied = form.nodes, tree.tokens.device, written.found.tokens.shape[1]
    tokens, parents = torch.empty(2, batch, kept, dtype=torch.int64, device=device)
    scores = torch.empty(batch, kept, dtype=torch.float32, device=device)
    join_kernel[(batch,)](
        tree.tokens, tree.parents, tree.scores, written.found.tokens, written.found.same, written.likely,
        tokens, parents, scores, nodes, form.copies, kept, copied, vocab, tree.tokens.stride(0),
        tree.parents.stride(0), tree.scores.stride(0), LEVELS=tree.levels, MOST=MOST_SAME,
        N=triton.next_power_of_2(nodes + form.copies), STEPS=triton.next_power_of_2(copied), num_warps=4,
    )  # fmt: skip
    return TokenTree(tokens, parents, scores, min(tree.levels + form.copies, kept - 1))
