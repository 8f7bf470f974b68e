"""The masked tail: attention over a tree, merged with what another kernel made of the prefix, in one launch.

A kernel that knows no masks leaves its result over the prefix and the log-sum-exp of that. Here the softmax goes on
where it stopped: over the tree, with its ancestor mask. Needs triton; imported only when chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_longspec import Nodes, Prefix
from .triton_blocks_longspec import attend_to_tree, exponent_factor, processors, tl, triton


@triton.jit
def tail_kernel(
    query,
    partial,
    partial_lse,
    key,
    value,
    node_key,
    node_value,
    node_mask,
    slots,
    sinks,
    out,
    scale,
    softcap,
    heads,
    nodes,
    rows,
    query_b,
    query_h,
    query_t,
    partial_b,
    partial_k,
    partial_g,
    partial_t,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    node_key_b,
    node_key_h,
    node_key_t,
    node_value_b,
    node_value_h,
    node_value_t,
    out_b,
    out_h,
    out_t,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLACED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Program (tile of rows and key/value head, row of the batch); rows are the queries of the head's whole group."""
    batch = tl.program_id(1)
    tiles = tl.cdiv(rows, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    wide = batch.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group, node = row // nodes, row % nodes
    query_head = head * (rows // nodes) + group
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    real_row = row < rows
    known = real_row[:, None] & (dv < VALUE_DIM)[None, :]
    q = tl.load(
        query + wide * query_b + (query_head * query_h + node * query_t)[:, None] + d[None, :],
        mask=real_row[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    # where there are no keys FlashAttention-2 says +inf and -3 says -inf, and neither's result is to be looked at
    lse = tl.load(partial_lse + wide * heads * nodes + query_head * nodes + node, mask=real_row, other=float("-inf"))
    seen = tl.abs(lse) < float("inf")
    top = tl.where(seen, lse * 1.4426950408889634, float("-inf"))  # log2(e)
    total = tl.where(seen, 1.0, 0.0)
    accumulated = tl.load(
        partial + wide * partial_b + (head * partial_k + group * partial_g + node * partial_t)[:, None] + dv[None, :],
        mask=known & seen[:, None],
        other=0.0,
    ).to(tl.float32)

    first_slot = 0
    if PLACED:
        first_slot = tl.load(slots + batch).to(tl.int32)
    accumulated, top, total = attend_to_tree(
        q,
        accumulated,
        top,
        total,
        node_key + wide * node_key_b + head * node_key_h,
        node_value + wide * node_value_b + head * node_value_h,
        node_mask + wide * nodes * nodes + node * nodes,
        key + wide * key_b + head.to(tl.int64) * key_h,
        value + wide * value_b + head.to(tl.int64) * value_h,
        first_slot,
        nodes,
        0,
        tl.cdiv(nodes, BLOCK_N),
        real_row,
        tile == 0,
        scale,
        exponent_factor(scale, softcap, CAPPED),
        node_key_t,
        node_value_t,
        key_s,
        value_s,
        DIM,
        VALUE_DIM,
        BLOCK_D,
        BLOCK_V,
        BLOCK_N,
        PLACED,
        CAPPED,
    )
    total = tl.where(real_row, total, 1.0)  # never zero: a node sees itself
    merged = accumulated / total[:, None]
    if SINKS:
        sink = tl.load(sinks + query_head, mask=real_row, other=0.0).to(tl.float32)
        merged = merged * tl.sigmoid((top + tl.math.log2(total)) * 0.6931471805599453 - sink)[:, None]  # ln 2
    place = wide * out_b + (query_head * out_h + node * out_t)[:, None] + dv[None, :]
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=known)


def tail_attention(
    partial: Tensor,
    lse: Tensor,
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What `merged_attention` makes of a tree and of what is known of its prefix.

    partial: (B, K, G, T, DV), attention over the prefix for G query heads a key/value head, any strides but the last;
    lse: (B, H, T) float32, contiguous, infinite where a row has no keys. Returns (B, T, H, DV).
    """
    batch, heads, length, dim = query.shape
    kv_heads, value_dim = partial.shape[1], partial.shape[-1]
    rows = heads // kv_heads * length
    block_d, block_v = (max(triton.next_power_of_2(size), 16) for size in (dim, value_dim))
    narrow = max(block_d, block_v) <= 128
    block = choose_rows(rows, kv_heads * batch, processors(query.device), most=64 if narrow else 32)
    out = query.new_empty(batch, length, heads, value_dim)
    unused = query  # a pointer that a variant of the kernel does not look at
    tail_kernel[(triton.cdiv(rows, block) * kv_heads, batch)](
        query,
        partial,
        lse,
        prefix.key,
        prefix.value,
        nodes.key,
        nodes.value,
        nodes.mask.contiguous().view(torch.uint8),
        unused if nodes.slots is None else nodes.slots.contiguous(),
        unused if sinks is None else sinks,
        out,
        scaling if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap,
        heads,
        length,
        rows,
        *query.stride()[:3],
        *partial.stride()[:4],
        *prefix.key.stride()[:3],
        *prefix.value.stride()[:3],
        *nodes.key.stride()[:3],
        *nodes.value.stride()[:3],
        out.stride(0),
        out.stride(2),
        out.stride(1),
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=block,
        BLOCK_N=min(max(triton.next_power_of_2(length), 16), 64 if narrow else 32),
        PLACED=nodes.slots is not None,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        num_warps=4,
        num_stages=1,
    )
    return out


def choose_rows(rows: int, copies: int, processors: int, most: int) -> int:
    """Rows of a tile: few, so that all of a GPU is at a small work's disposal; more where they fill it twice over.

    copies: how many times there are so many rows; most: what registers hold on sm_90.
    """
    block = 16
    while block < most and triton.cdiv(rows, block) * copies > 2 * processors:
        block *= 2
    return block
