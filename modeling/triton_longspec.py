"""The fused kernel: attention over prefix ++ tree in one pass over the keys, split among the whole GPU.

All query heads of a key/value head and all nodes are rows of one matrix. Each split reads its share of the prefix
without a mask; the tree, and what a mask hides, come last. A second kernel merges the splits by their log-sum-exp.
Lengths are read on the device, so a launch can be captured in a CUDA graph. Needs triton; imported only when chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_longspec import Nodes, Prefix
from .triton_blocks_longspec import (
    attend_to_tree,
    exponent_factor,
    online_softmax,
    processors,
    products,
    shared_bytes,
    tl,
    triton,
)

MOST_SPLITS = 128


@triton.jit
def split_kernel(
    query,
    key,
    value,
    mask,
    node_key,
    node_value,
    node_mask,
    starts,
    ends,
    slots,
    out,
    lse,
    scale,
    softcap,
    heads,
    nodes,
    rows,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    mask_b,
    mask_t,
    node_key_b,
    node_key_h,
    node_key_t,
    node_value_b,
    node_value_h,
    node_value_t,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TREE: tl.constexpr,
    PLACED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Program (split, tile of rows and key/value head, row of the batch): out (splits, B, H, T, DV), lse in log2."""
    split, batch = tl.program_id(0), tl.program_id(2)
    tiles = tl.cdiv(rows, BLOCK_M)
    tile, head = tl.program_id(1) % tiles, tl.program_id(1) // tiles
    wide = batch.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group, node = row // nodes, row % nodes
    group_heads = rows // nodes
    query_head = head * group_heads + group
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    real_row, real_d, real_dv = row < rows, d < DIM, dv < VALUE_DIM
    q = tl.load(
        query + wide * query_b + (query_head * query_h + node * query_t)[:, None] + d[None, :],
        mask=real_row[:, None] & real_d[None, :],
        other=0.0,
    )
    accumulated = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    factor = exponent_factor(scale, softcap, CAPPED)
    start, end = tl.load(starts + batch).to(tl.int32), tl.load(ends + batch).to(tl.int32)
    held = tl.maximum(end - start, 0)
    whole = held // BLOCK_N
    prefix_blocks = tl.cdiv(held, BLOCK_N)
    blocks = prefix_blocks
    if TREE:
        blocks += tl.cdiv(nodes, BLOCK_N)
    share = tl.cdiv(blocks, tl.num_programs(0))
    first = split * share
    last = tl.minimum(first + share, blocks)

    key_row = key + wide * key_b + head.to(tl.int64) * key_h
    value_row = value + wide * value_b + head.to(tl.int64) * value_h
    mask_row = mask + wide * mask_b + node * mask_t
    for block in tl.range(first, tl.minimum(last, whole)):
        slot = start + block * BLOCK_N + n
        if BLOCK_D == DIM:
            k = tl.load(key_row + slot[None, :] * key_s + d[:, None])
        else:
            k = tl.load(key_row + slot[None, :] * key_s + d[:, None], mask=real_d[:, None], other=0.0)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        if MASKED:
            seen = tl.load(mask_row[:, None] + slot[None, :], mask=real_row[:, None], other=0)
            scores = tl.where(seen != 0, scores, float("-inf"))
        if BLOCK_V == VALUE_DIM:
            v = tl.load(value_row + slot[:, None] * value_s + dv[None, :])
        else:
            v = tl.load(value_row + slot[:, None] * value_s + dv[None, :], mask=real_dv[None, :], other=0.0)
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))

    for block in tl.range(tl.maximum(first, whole), tl.minimum(last, prefix_blocks), num_stages=1):  # the last, cut
        slot = start + block * BLOCK_N + n
        inside = slot < end
        k = tl.load(key_row + slot[None, :] * key_s + d[:, None], mask=real_d[:, None] & inside[None, :], other=0.0)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        seen = inside[None, :]
        if MASKED:
            seen = seen & (tl.load(mask_row[:, None] + slot[None, :], mask=real_row[:, None] & seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(
            value_row + slot[:, None] * value_s + dv[None, :], mask=inside[:, None] & real_dv[None, :], other=0.0
        )
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))

    if TREE:
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
            key_row,
            value_row,
            first_slot,
            nodes,
            tl.maximum(first - prefix_blocks, 0),
            last - prefix_blocks,
            real_row,
            tile == 0,  # one tile of each head puts the tree into the cache
            scale,
            factor,
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

    place = (split * tl.num_programs(2) + batch).to(tl.int64) * heads * nodes + query_head * nodes + node
    nothing = total == 0.0
    accumulated = accumulated / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + place[:, None] * VALUE_DIM + dv[None, :], accumulated, mask=real_row[:, None] & real_dv[None, :])
    tl.store(lse + place, tl.where(nothing, float("-inf"), top + tl.math.log2(total)), mask=real_row)


@triton.jit
def merge_kernel(
    parts,
    part_lse,
    sinks,
    out,
    lse,
    splits,
    heads,
    nodes,
    out_b,
    out_h,
    out_t,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):
    """Program (head and node, row of the batch): the splits' outs and log-sum-exps become one."""
    place, batch = tl.program_id(0), tl.program_id(1)
    head, node = place // nodes, place % nodes
    split, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    index = (split * tl.num_programs(1) + batch).to(tl.int64) * heads * nodes + place
    own = tl.load(part_lse + index, mask=split < splits, other=float("-inf"))
    top = tl.max(own, 0)
    weights = tl.math.exp2(own - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    states = tl.load(
        parts + index[:, None] * VALUE_DIM + dv[None, :],
        mask=(split < splits)[:, None] & (dv < VALUE_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(states * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    whole = tl.where(total == 0.0, float("-inf"), top + tl.math.log2(total)) * 0.6931471805599453  # ln 2
    if SINKS:
        merged = merged * tl.sigmoid(whole - tl.load(sinks + head).to(tl.float32))
    if LSE:
        tl.store(lse + batch.to(tl.int64) * heads * nodes + place, whole)
    tl.store(out + batch.to(tl.int64) * out_b + head * out_h + node * out_t + dv, merged, mask=dv < VALUE_DIM)


class Tiles(NamedTuple):
    """How the work is cut: rows and keys of a block, and what a program gets of a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    per_processor: int  # programs that a multiprocessor holds at once

    def bytes(self, width: int, itemsize: int) -> int:
        """Of shared memory: the queries, and the keys and values of each stage."""
        return width * itemsize * (self.rows + 2 * self.stages * self.keys)


def choose_tiles(rows: int, width: int, itemsize: int, shared: float) -> Tiles:
    """rows: queries of a key/value head; width: of a head, a power of two; itemsize: bytes of an element.

    shared: bytes of shared memory that a program can have. More rows than these for a warp spill registers on sm_90.
    With heads of 128 in two bytes, the fastest of 157 that were tried on an H200.
    """
    block = min(max(16, triton.next_power_of_2(rows)), 128)
    if itemsize == 4:  # no matrix units
        tiles = Tiles(16, 16 if width > 128 else 32, 4, 2, 1)
    elif width > 128:
        tiles = Tiles(min(block, 64), 32, 4 if block < 64 else 8, 2, 1)
    else:
        tiles = Tiles(block, 64, 4, 4, 1)
        if block == 16:
            tiles = Tiles(block, 128, 4, 3, 1)
        if block == 128:
            tiles = Tiles(block, 64, 8, 3, 1)
    while tiles.stages > 1 and tiles.bytes(width, itemsize) > shared:
        tiles = tiles._replace(stages=tiles.stages - 1)
    return tiles


def choose_splits(programs: int, slots: int, tiles: Tiles, device: torch.device) -> int:
    """Into how many parts the keys are split, so that `programs` times as many fill the device once.

    From the capacity of the store, not from lengths, which only the device knows.
    """
    fitting = processors(device) * tiles.per_processor // programs
    return max(min(fitting, slots // (2 * tiles.keys), MOST_SPLITS), 1)


def triton_prefix(query: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention over the prefix alone, with its log-sum-exp, as `attend`."""
    out = torch.empty(*query.shape[:3], prefix.value.shape[-1], dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _launch(query, prefix, None, scaling, softcap, None, out, lse, None)
    return out, lse


def triton_attention(
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """As `merged_attention`, in two launches. tiles: others than `choose_tiles` would take, to measure them."""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, prefix.value.shape[-1])
    _launch(query, prefix, nodes, scaling, softcap, sinks, out.transpose(1, 2), None, tiles)
    return out


def _launch(
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    tiles: Tiles | None,
) -> None:
    """Fills out (B, H, T, DV), of any strides but the last, and lse (B, H, T)."""
    key, value, spans, mask = prefix
    batch, heads, length, dim = query.shape
    kv_heads, slots, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    rows = heads // kv_heads * length
    block_d, block_v = (max(triton.next_power_of_2(size), 16) for size in (dim, value_dim))
    if tiles is None:
        tiles = choose_tiles(rows, max(block_d, block_v), query.element_size(), shared_bytes(query.device))
    programs = triton.cdiv(rows, tiles.rows) * kv_heads
    splits = choose_splits(programs * batch, slots, tiles, query.device)
    parts = torch.empty(splits, batch, heads, length, value_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(splits, batch, heads, length, dtype=torch.float32, device=query.device)
    unused = query  # a pointer that a variant of the kernel does not look at
    tree = nodes if nodes is not None else Nodes(unused, unused, unused, None)
    split_kernel[(splits, programs, batch)](
        query,
        key,
        value,
        unused if mask is None else mask.view(torch.uint8),
        tree.key,
        tree.value,
        unused if nodes is None else nodes.mask.contiguous().view(torch.uint8),
        spans.starts.contiguous(),
        spans.ends.contiguous(),
        unused if tree.slots is None else tree.slots.contiguous(),
        parts,
        part_lse,
        scaling if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap,
        heads,
        length,
        rows,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0) if mask is None else mask.stride()[:2]),
        *tree.key.stride()[:3],
        *tree.value.stride()[:3],
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        MASKED=mask is not None,
        TREE=nodes is not None,
        PLACED=tree.slots is not None,
        CAPPED=softcap is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    merge_kernel[(heads * length, batch)](
        parts,
        part_lse,
        unused if sinks is None else sinks,
        out,
        unused if lse is None else lse,
        splits,
        heads,
        length,
        *out.stride()[:3],
        VALUE_DIM=value_dim,
        BLOCK_V=block_v,
        BLOCK_S=triton.next_power_of_2(splits),
        SINKS=sinks is not None,
        LSE=lse is not None,
        num_warps=4,
    )
