"""Triton kernels of the tree: choosing a level's nodes from the draft's logits, and moving accepted nodes' keys.

A level takes three launches that read all logits once: the best tokens of chunks of the vocabulary and each chunk's
share of the normalizer; the best children of a node; the best nodes of a level. Tokens and candidates become integers
that sort by value, and of equal values the smaller index first, so that ties are broken alike everywhere. Needs the
package triton; imported only when a backend with Triton kernels is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fast_triton_attention_longspec import tl, triton
from .tree_longspec import Level, best_children

CHUNK = 2048  # tokens of a program of the first launch
MOST_CHILDREN, MOST_CANDIDATES = 64, 4096  # of a level; with more of them kernels spill registers
LOWEST = tl.constexpr(-(2**63))  # less than the sort key of any value


# --- sort keys -------------------------------------------------------------------------------------------------------


@triton.jit
def sort_key(x, index):
    """Pack a float32 and its index into an int64 that sorts by value, and of equal values the smaller index first."""
    x = x + 0.0  # minus zero is zero
    bits = x.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def value_of(key):
    """Unpack the float32 of a sort key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    """Unpack the index of a sort key."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def best_of(keys, lowest, K: tl.constexpr):
    """Select the K largest of keys (N,), largest first, and fill up with `lowest`, the only key that may repeat.

    One maximum after another takes less than half the instructions of sorting where K is much smaller than N.
    """
    slot = tl.arange(0, K)
    best = tl.full([K], lowest, keys.dtype)
    for rank in range(K):
        top = tl.max(keys, 0)
        best = tl.where(slot == rank, top, best)
        keys = tl.where(keys == top, lowest, keys)
    return best


# --- the best children of a level ------------------------------------------------------------------------------------


@triton.jit
def chunk_kernel(
    logits, keys, tops, sums, row_stride, vocab, chunks, BLOCK: tl.constexpr, K: tl.constexpr, NARROW: tl.constexpr
):
    """Store the sort keys of the K best tokens of a chunk, the largest logit and the sum of exp(logit − largest).

    Programs are (chunk, node). NARROW: select among 32-bit keys, of logits in 16 bits.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    token = chunk * BLOCK + column
    real = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=real, other=float("-inf"))
    wide = x.to(tl.float32)
    top = tl.max(wide, 0)
    total = tl.sum(tl.exp(wide - tl.where(top == float("-inf"), 0.0, top)), 0)
    offset = row * chunks + chunk
    tl.store(tops + offset, top)
    tl.store(sums + offset, total)
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
    tl.store(keys + offset * K + tl.arange(0, K), key)


@triton.jit
def node_kernel(keys, tops, sums, scores, best_keys, totals, chunks, CHUNKS: tl.constexpr, K: tl.constexpr):
    """Store the sort keys of the K best tokens of a node, one program each, and their cumulative log-probabilities."""
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
    """Store the `width` best of the candidates below all nodes of a tree, best first; one program a tree."""
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
    """Choose the best continuations as `best_children`, and of equal scores the smaller node, then the smaller token.

    A level too wide for the kernels is left to `best_children`. chunk: tokens of a program of the first launch.
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


# --- accepted nodes --------------------------------------------------------------------------------------------------


@triton.jit
def move_kernel(
    keys, values, source, target, steps,
    key_b, key_h, key_s, value_b, value_h, value_s, source_b, target_b,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Copy slots `source` (B, P) of both stores to slots `target` (B, P).

    Programs are (key/value head, row of the batch), each with all steps of the accepted path.
    """
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    step, d, dv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    real = step < steps
    begin = tl.load(source + batch * source_b + step, mask=real, other=0)
    end = tl.load(target + batch * target_b + step, mask=real, other=0)
    key_row, value_row = keys + batch * key_b + head * key_h, values + batch * value_b + head * value_h
    key_seen, value_seen = real[:, None] & (d < DIM)[None, :], real[:, None] & (dv < VALUE_DIM)[None, :]
    key = tl.load(key_row + begin[:, None] * key_s + d[None, :], mask=key_seen, other=0.0)
    value = tl.load(value_row + begin[:, None] * value_s + dv[None, :], mask=value_seen, other=0.0)
    tl.debug_barrier()  # a step may go where another one came from: all are read before any is written
    tl.store(key_row + end[:, None] * key_s + d[None, :], key, mask=key_seen)
    tl.store(value_row + end[:, None] * value_s + dv[None, :], value, mask=value_seen)


def triton_move(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Move accepted nodes next to the prefix, keys and values of a layer in one launch, as `move_slots`."""
    batch, kv_heads, _, dim = keys.shape
    value_dim = values.shape[-1]
    move_kernel[(kv_heads, batch)](
        keys,
        values,
        source,
        target,
        source.shape[1],
        *keys.stride()[:3],
        *values.stride()[:3],
        source.stride(0),
        target.stride(0),
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_V=triton.next_power_of_2(value_dim),
        BLOCK_P=triton.next_power_of_2(source.shape[1]),
        num_warps=4,
    )
