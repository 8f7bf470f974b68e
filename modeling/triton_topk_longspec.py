"""The best children of a level of the tree, from logits in three launches, with all logits read once.

First chunks of the vocabulary, each with its best tokens and its share of the normalizer; then the best of a node;
then the best of a tree. Tokens and candidates are integers that sort by value, and of equal values the smaller index
first, so ties are broken alike everywhere. Needs triton; imported only when chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .children_longspec import best_children
from .tree_longspec import Level
from .triton_blocks_longspec import tl, triton

CHUNK = 2048
MOST_CHILDREN, MOST_CANDIDATES = 64, 4096  # of a level; beyond them sorting spills registers
LOWEST = tl.constexpr(-(2**63))  # below the key of any value


@triton.jit
def sort_key(x, index):
    """float32 and index -> int64 that sorts by value, and of equal values the smaller index first."""
    x = x + 0.0  # minus zero is zero
    bits = x.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def value_of(key):
    """The float32 in a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def best_of(keys, lowest, K: tl.constexpr):
    """The K largest of keys (N,), largest first; no two are alike but for `lowest`, which is put where they end.

    One maximum after the other: for so few of so many, less than half the instructions of sorting.
    """
    slot = tl.arange(0, K)
    best = tl.full([K], lowest, keys.dtype)
    for place in range(K):
        top = tl.max(keys, 0)
        best = tl.where(slot == place, top, best)
        keys = tl.where(keys == top, lowest, keys)
    return best


@triton.jit
def chunk_kernel(
    logits, keys, tops, sums, row_stride, vocab, chunks, BLOCK: tl.constexpr, K: tl.constexpr, NARROW: tl.constexpr
):
    """Program (chunk, node): its K best tokens as keys, its maximum, its sum of exponentials against that."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    token = chunk * BLOCK + column
    real = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=real, other=float("-inf"))
    wide = x.to(tl.float32)
    top = tl.max(wide, 0)
    total = tl.sum(tl.exp(wide - tl.where(top == float("-inf"), 0.0, top)), 0)
    place = row * chunks + chunk
    tl.store(tops + place, top)
    tl.store(sums + place, total)
    if NARROW:  # 16 bits of value and 12 of column: half the registers and shuffles
        bits = (wide + 0.0).to(x.dtype).to(tl.int16, bitcast=True).to(tl.int32)  # minus zero is zero
        narrow = ((bits ^ ((bits >> 31) & 0x7FFF)) << 12) | (BLOCK - 1 - column)
        best = best_of(tl.where(real, narrow, -(2**30)), -(2**30), K)
        bits = best >> 12
        bits = bits ^ ((bits >> 31) & 0x7FFF)
        value = bits.to(tl.int16).to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
        token = chunk * BLOCK + BLOCK - 1 - (best & 0xFFF)
        key = tl.where(best > -(2**30), sort_key(value, token), LOWEST)
    else:
        key = best_of(tl.where(real, sort_key(wide, token), LOWEST), LOWEST, K)
    tl.store(keys + place * K + tl.arange(0, K), key)


@triton.jit
def node_kernel(keys, tops, sums, scores, best_keys, totals, chunks, CHUNKS: tl.constexpr, K: tl.constexpr):
    """Program (node): the K best of all its chunks, and their cumulative log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    chunk, slot = tl.arange(0, CHUNKS), tl.arange(0, K)
    top = tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    total = tl.load(sums + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    log_total = tl.maximum(tl.log(tl.sum(total * tl.exp(top - shift), 0)), 0.0)
    candidate = tl.arange(0, CHUNKS * K)
    known = tl.load(keys + row * chunks * K + candidate, mask=candidate < chunks * K, other=LOWEST)
    best = best_of(known, LOWEST, K)
    # in this order: a log-probability is never positive, so that none can round to a child that outranks its parent
    score = tl.load(scores + row) + ((value_of(best) - shift) - log_total)
    tl.store(best_keys + row * K + slot, best)
    tl.store(totals + row * K + slot, tl.where(best == LOWEST, float("-inf"), score))


@triton.jit
def tree_kernel(
    best_keys, totals, tokens, parents, chosen, nodes, width, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr
):
    """Program (tree): the `width` best of the candidates of all its nodes, best first."""
    tree = tl.program_id(0).to(tl.int64)
    candidate, slot = tl.arange(0, N), tl.arange(0, W)
    real = candidate < nodes * K
    total = tl.load(totals + tree * nodes * K + candidate, mask=real, other=float("-inf"))
    exists = tl.load(best_keys + tree * nodes * K + candidate, mask=real, other=LOWEST) != LOWEST
    best = best_of(tl.where(exists, sort_key(total, candidate), LOWEST), LOWEST, W)
    index = tl.where(best == LOWEST, 0, index_of(best))
    kept = slot < width
    own = tl.load(best_keys + tree * nodes * K + index, mask=kept, other=0)
    tl.store(tokens + tree * width + slot, index_of(own), mask=kept)
    tl.store(parents + tree * width + slot, index // K, mask=kept)
    tl.store(chosen + tree * width + slot, value_of(best), mask=kept)


def fused_best_children(
    logits: Tensor, scores: Tensor, width: int, vocab: Tensor | None = None, chunk: int = CHUNK
) -> Level:
    """As `best_children`; of continuations that score alike the one of the smaller node, and there of the smaller
    token. A level too wide for it is left to `best_children`. chunk: tokens of a program of the first launch.
    """
    batch, nodes, size = logits.shape
    if width > MOST_CHILDREN or nodes * min(width, size) > MOST_CANDIDATES:
        return best_children(logits, scores, width, vocab)
    rows, device = batch * nodes, logits.device
    logits = logits.reshape(rows, size)
    best = triton.next_power_of_2(min(width, size))
    block = max(min(chunk, triton.next_power_of_2(size)), best)
    chunks = triton.cdiv(size, block)
    keys = torch.empty(rows, chunks, best, dtype=torch.int64, device=device)
    tops, sums = torch.empty(2, rows, chunks, dtype=torch.float32, device=device)
    narrow = logits.element_size() == 2 and block <= 4096
    chunk_kernel[(chunks, rows)](
        logits, keys, tops, sums, logits.stride(0), size, chunks, BLOCK=block, K=best, NARROW=narrow, num_warps=4
    )
    best_keys = torch.empty(rows, best, dtype=torch.int64, device=device)
    totals = torch.empty(rows, best, dtype=torch.float32, device=device)
    power = triton.next_power_of_2(chunks)
    node_kernel[(rows,)](
        keys, tops, sums, scores.contiguous(), best_keys, totals, chunks, CHUNKS=power, K=best, num_warps=4
    )
    tokens, parents = torch.empty(2, batch, width, dtype=torch.int64, device=device)
    chosen = torch.empty(batch, width, dtype=torch.float32, device=device)
    most = triton.next_power_of_2(width)
    candidates = max(triton.next_power_of_2(nodes * best), most)
    tree_kernel[(batch,)](
        best_keys, totals, tokens, parents, chosen, nodes, width, N=candidates, K=best, W=most, num_warps=4
    )
    return Level(tokens if vocab is None else vocab[tokens], parents, chosen)
