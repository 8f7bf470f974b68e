"""Triton kernels of hybrid attention: the split kernel over prefix ++ tree, and the merge of its splits.

All nodes of all query heads that share a key/value head are rows of one matrix, so that keys are read once for them.
Each split attends to its share of the prefix, masked in sliding layers only, and then to its share of the tree. The
merge kernel joins the splits by their log-sum-exp. One variant of the split kernel goes on from FlashAttention over
the prefix, and needs no merge. The kernels read lengths on the device, so that CUDA graphs can capture the launches.
Needs the package triton; imported only when a backend with Triton kernels is chosen.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_longspec import Nodes, Prefix

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the attention backends of a GPU need the package triton, which is not installed") from error

MOST_SPLITS = 128
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# --- parts of the kernels --------------------------------------------------------------------------------------------


@triton.jit
def online_softmax(scores, factor, accumulated, top, total, value):
    """Add one block of keys to a running softmax.

    scores: (M, N), exponents of two once multiplied by `factor`; value: (N, DV); accumulated: (M, DV), the weighted
    sum of the values so far; top, total: (M,), the largest exponent and the sum of the weights so far.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    weights = tl.math.exp2(scores * factor - shift[:, None])  # one instruction, then the power
    fade = tl.math.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    accumulated = tl.dot(
        weights.to(value.dtype), value, accumulated * fade[:, None], input_precision="ieee", out_dtype=tl.float32
    )
    return accumulated, new_top, total


@triton.jit
def products(query, key, scale, CAPPED: tl.constexpr):
    """Multiply query (M, D) by key (D, N); CAPPED: return tanh(scale · product) instead of the product."""
    scores = tl.dot(query, key, input_precision="ieee", out_dtype=tl.float32)
    if CAPPED:
        scores = 2.0 * tl.sigmoid(2.0 * scale * scores) - 1.0
    return scores


@triton.jit
def exponent_factor(scale, softcap, CAPPED: tl.constexpr):
    """Return the factor that turns the result of `products` into exponents of two."""
    if CAPPED:
        return softcap * LOG2_E
    else:
        return scale * LOG2_E


@triton.jit
def attend_to_prefix(
    q, accumulated, top, total, key, value, mask, start, end, first, last, real_row, scale, factor, key_s, value_s,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax of queries q (M, D) over blocks `first` to `last` of slots `start` to `end`.

    key, value: pointers to the stores of one row of the batch and one key/value head; mask: (M,) pointers to what each
    query may see of the slots, if MASKED. Blocks behind the last slot are left out.
    """
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    real_d, real_dv = d < DIM, dv < VALUE_DIM
    held = tl.maximum(end - start, 0)
    whole = held // BLOCK_N
    for block in tl.range(first, tl.minimum(last, whole)):
        slot = start + block * BLOCK_N + n
        if BLOCK_D == DIM:
            k = tl.load(key + slot[None, :] * key_s + d[:, None])
        else:
            k = tl.load(key + slot[None, :] * key_s + d[:, None], mask=real_d[:, None], other=0.0)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        if MASKED:
            seen = tl.load(mask[:, None] + slot[None, :], mask=real_row[:, None], other=0)
            scores = tl.where(seen != 0, scores, float("-inf"))
        if BLOCK_V == VALUE_DIM:
            v = tl.load(value + slot[:, None] * value_s + dv[None, :])
        else:
            v = tl.load(value + slot[:, None] * value_s + dv[None, :], mask=real_dv[None, :], other=0.0)
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))

    # the last block, if the prefix ends inside it
    for block in tl.range(tl.maximum(first, whole), tl.minimum(last, tl.cdiv(held, BLOCK_N)), num_stages=1):
        slot = start + block * BLOCK_N + n
        inside = slot < end
        k = tl.load(key + slot[None, :] * key_s + d[:, None], mask=real_d[:, None] & inside[None, :], other=0.0)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        seen = inside[None, :]
        if MASKED:
            seen = seen & (tl.load(mask[:, None] + slot[None, :], mask=real_row[:, None] & seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(value + slot[:, None] * value_s + dv[None, :], mask=inside[:, None] & real_dv[None, :], other=0.0)
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))
    return accumulated, top, total


@triton.jit
def attend_to_tree(
    q, accumulated, top, total, node_key, node_value, node_mask, key, value, first_slot, nodes, first, last, real_row,
    writes, scale, factor, node_key_t, node_value_t, key_s, value_s,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    PLACED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax of queries q (M, D) over blocks `first` to `last` of a tree of `nodes` nodes.

    node_key, node_value: pointers to the tree of one row of the batch and one key/value head; node_mask: (M,) pointers
    to what each query may see of the tree; key, value: pointers to the stores. PLACED: a program that `writes` copies
    the tree into the stores, from `first_slot` on.
    """
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    real_d, real_dv = d < DIM, dv < VALUE_DIM
    for block in tl.range(first, last, num_stages=1):
        other = block * BLOCK_N + n
        inside = other < nodes
        known_key = real_d[:, None] & inside[None, :]
        known_value = inside[:, None] & real_dv[None, :]
        k = tl.load(node_key + other[None, :] * node_key_t + d[:, None], mask=known_key, other=0.0)
        v = tl.load(node_value + other[:, None] * node_value_t + dv[None, :], mask=known_value, other=0.0)
        if PLACED:  # no program of this launch reads these slots
            if writes:
                slot = first_slot + other
                tl.store(key + slot[None, :] * key_s + d[:, None], k, mask=known_key)
                tl.store(value + slot[:, None] * value_s + dv[None, :], v, mask=known_value)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        seen = tl.load(node_mask[:, None] + other[None, :], mask=real_row[:, None] & inside[None, :], other=0)
        scores = tl.where(seen != 0, scores, float("-inf"))
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))
    return accumulated, top, total


# --- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def split_kernel(
    query, key, value, mask, node_key, node_value, node_mask, starts, ends, slots, known_out, known_lse, sinks,
    out, lse, scale, softcap, heads, nodes, rows,
    query_b, query_h, query_t, key_b, key_h, key_s, value_b, value_h, value_s, mask_b, mask_t,
    node_key_b, node_key_h, node_key_t, node_value_b, node_value_h, node_value_t,
    known_b, known_k, known_g, known_t, out_s, out_b, out_h, out_t,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TREE: tl.constexpr, PLACED: tl.constexpr,
    CAPPED: tl.constexpr, KNOWN: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of rows to one split of the keys; store out (S, B, H, T, DV) and lse (S, B, H, T) in log2.

    Programs are (split, tile of rows and key/value head, row of the batch). KNOWN: begin with attention over the whole
    prefix, known_out (B, K, G, T, DV) and known_lse (B, H, T), attend to the whole tree, and store no lse; one split.
    """
    split, batch = tl.program_id(0), tl.program_id(2)
    tiles = tl.cdiv(rows, BLOCK_M)
    tile, head = tl.program_id(1) % tiles, tl.program_id(1) // tiles
    wide = batch.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group, node = row // nodes, row % nodes
    query_head = head * (rows // nodes) + group
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    real_row, real_d, real_dv = row < rows, d < DIM, dv < VALUE_DIM
    q = tl.load(
        query + wide * query_b + (query_head * query_h + node * query_t)[:, None] + d[None, :],
        mask=real_row[:, None] & real_d[None, :],
        other=0.0,
    )
    key_row = key + wide * key_b + head.to(tl.int64) * key_h
    value_row = value + wide * value_b + head.to(tl.int64) * value_h
    factor = exponent_factor(scale, softcap, CAPPED)
    first, last = 0, tl.cdiv(nodes, BLOCK_N)  # blocks of the tree
    if KNOWN:
        known = tl.load(
            known_lse + wide * heads * nodes + query_head * nodes + node, mask=real_row, other=float("-inf")
        )
        # without keys FlashAttention-2 says +inf and FlashAttention-3 says -inf, and out has no meaning
        seen = tl.abs(known) < float("inf")
        top = tl.where(seen, known * LOG2_E, float("-inf"))
        total = tl.where(seen, 1.0, 0.0)
        accumulated = tl.load(
            known_out + wide * known_b + (head * known_k + group * known_g + node * known_t)[:, None] + dv[None, :],
            mask=real_row[:, None] & real_dv[None, :] & seen[:, None],
            other=0.0,
        ).to(tl.float32)
    else:
        accumulated = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        start, end = tl.load(starts + batch).to(tl.int32), tl.load(ends + batch).to(tl.int32)
        prefix_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
        blocks = prefix_blocks
        if TREE:
            blocks += last
        share = tl.cdiv(blocks, tl.num_programs(0))
        first = split * share
        last = tl.minimum(first + share, blocks)
        accumulated, top, total = attend_to_prefix(
            q, accumulated, top, total, key_row, value_row, mask + wide * mask_b + node * mask_t,
            start, end, first, last, real_row, scale, factor, key_s, value_s,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, MASKED, CAPPED,
        )  # fmt: skip
        first, last = tl.maximum(first - prefix_blocks, 0), last - prefix_blocks
    if TREE:
        first_slot = 0
        if PLACED:
            first_slot = tl.load(slots + batch).to(tl.int32)
        accumulated, top, total = attend_to_tree(
            q, accumulated, top, total,
            node_key + wide * node_key_b + head * node_key_h,
            node_value + wide * node_value_b + head * node_value_h,
            node_mask + wide * nodes * nodes + node * nodes,
            key_row, value_row, first_slot, nodes, first, last, real_row,
            tile == 0,  # one tile of each head copies the tree into the stores
            scale, factor, node_key_t, node_value_t, key_s, value_s,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PLACED, CAPPED,
        )  # fmt: skip

    nothing = total == 0.0
    accumulated = accumulated / tl.where(nothing, 1.0, total)[:, None]
    log_total = tl.where(nothing, float("-inf"), top + tl.math.log2(total))
    if SINKS:
        sink = tl.load(sinks + query_head, mask=real_row, other=0.0).to(tl.float32)
        accumulated = accumulated * tl.sigmoid(log_total * LN_2 - sink)[:, None]
    out_row = out + split.to(tl.int64) * out_s + wide * out_b + query_head * out_h + node * out_t
    tl.store(out_row[:, None] + dv[None, :], accumulated, mask=real_row[:, None] & real_dv[None, :])
    if not KNOWN:
        offset = (split * tl.num_programs(2) + batch).to(tl.int64) * heads * nodes + query_head * nodes + node
        tl.store(lse + offset, log_total, mask=real_row)


@triton.jit
def merge_kernel(
    parts, part_lse, sinks, out, lse, splits, heads, nodes, out_b, out_h, out_t,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merge the splits' parts (S, B, H, T, DV) by part_lse (S, B, H, T) in log2; store out (B, H, T, DV).

    Programs are (query head and node, row of the batch). LSE: store lse (B, H, T), natural, too.
    """
    row, batch = tl.program_id(0), tl.program_id(1)
    head, node = row // nodes, row % nodes
    split, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    offset = (split * tl.num_programs(1) + batch).to(tl.int64) * heads * nodes + row
    own = tl.load(part_lse + offset, mask=split < splits, other=float("-inf"))
    top = tl.max(own, 0)
    weights = tl.math.exp2(own - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    states = tl.load(
        parts + offset[:, None] * VALUE_DIM + dv[None, :],
        mask=(split < splits)[:, None] & (dv < VALUE_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(states * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    whole = tl.where(total == 0.0, float("-inf"), top + tl.math.log2(total)) * LN_2
    if SINKS:
        merged = merged * tl.sigmoid(whole - tl.load(sinks + head).to(tl.float32))
    if LSE:
        tl.store(lse + batch.to(tl.int64) * heads * nodes + row, whole)
    tl.store(out + batch.to(tl.int64) * out_b + head * out_h + node * out_t + dv, merged, mask=dv < VALUE_DIM)


# --- how the work is cut ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Sizes of a program of the split kernel: rows and keys of a block, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
    per_processor: int  # programs that a multiprocessor holds at once

    def bytes(self, width: int, itemsize: int) -> int:
        """Count the bytes of shared memory: the queries, and the keys and values of each stage."""
        return width * itemsize * (self.rows + 2 * self.stages * self.keys)


def choose_tiles(rows: int, width: int, itemsize: int, shared: float) -> Tiles:
    """Choose the tiles of an attention over prefix ++ tree.

    rows: queries of a key/value head; width: head dimension, rounded up to a power of two; itemsize: bytes of an
    element; shared: bytes of shared memory that a program can have. On sm_90 more rows a warp would spill registers.
    For heads of 128 in 16 bits these are the fastest of 157 tiles that were tried on an H200.
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
    """Choose into how many splits to cut the keys, so that splits · programs fill the device once.

    slots: capacity of the stores, since only the device knows lengths.
    """
    fitting = processors(device) * tiles.per_processor // programs
    return max(min(fitting, slots // (2 * tiles.keys), MOST_SPLITS), 1)


def choose_rows(rows: int, copies: int, processors: int, most: int) -> int:
    """Choose the rows of a tile of the tree: few, to spread a small work over the GPU; more once that fills it twice.

    copies: matrices of `rows` rows in the launch; most: what registers hold on sm_90.
    """
    block = 16
    while block < most and triton.cdiv(rows, block) * copies > 2 * processors:
        block *= 2
    return block


def padded_dims(query: Tensor, prefix: Prefix) -> tuple[int, int]:
    """Round the dimensions of keys and of values up to what `tl.dot` takes: powers of two, at least 16."""
    dims = query.shape[-1], prefix.value.shape[-1]
    block_d, block_v = (max(triton.next_power_of_2(dim), 16) for dim in dims)
    return block_d, block_v


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; a few on a CPU, so that Triton's interpreter splits the work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def shared_bytes(device: torch.device) -> float:
    """Look up how many bytes of shared memory one program can have."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


# --- attention -------------------------------------------------------------------------------------------------------


class Partial(NamedTuple):
    """Attention over a prefix, as FlashAttention leaves it, for G query heads a key/value head.

    out: (B, K, G, T, DV), any strides but the last; lse: (B, H, T) float32, contiguous. A row without keys has an
    infinite lse, and its out has no meaning.
    """

    out: Tensor
    lse: Tensor


def triton_prefix(query: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attend to a prefix alone: (out, lse) as `attend`."""
    out = torch.empty(*query.shape[:3], prefix.value.shape[-1], dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _split_and_merge(query, prefix, None, scaling, softcap, None, out, lse, None)
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
    """Attend to prefix and tree in two launches, as `merged_attention`; tiles: None for those of `choose_tiles`."""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, prefix.value.shape[-1])
    _split_and_merge(query, prefix, nodes, scaling, softcap, sinks, out.transpose(1, 2), None, tiles)
    return out


def tail_attention(
    partial: Partial,
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend to a tree, and merge that with the attention over its prefix, in one launch, as `merged_attention`."""
    batch, heads, length, _ = query.shape
    kv_heads = prefix.key.shape[1]
    narrow = max(padded_dims(query, prefix)) <= 128
    tiles = Tiles(
        rows=choose_rows(
            heads // kv_heads * length, kv_heads * batch, processors(query.device), most=64 if narrow else 32
        ),
        keys=min(max(triton.next_power_of_2(length), 16), 64 if narrow else 32),
        warps=4,
        stages=1,
        per_processor=1,
    )
    out = query.new_empty(batch, length, heads, prefix.value.shape[-1])
    _launch_split(query, prefix, nodes, scaling, softcap, tiles, out.transpose(1, 2)[None], None, partial, sinks)
    return out


def _split_and_merge(
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
    """Fill out (B, H, T, DV), of any strides but the last, and lse (B, H, T) if given."""
    batch, heads, length, _ = query.shape
    kv_heads, slots, value_dim = prefix.key.shape[1], prefix.key.shape[2], prefix.value.shape[-1]
    rows = heads // kv_heads * length
    block_d, block_v = padded_dims(query, prefix)
    if tiles is None:
        tiles = choose_tiles(rows, max(block_d, block_v), query.element_size(), shared_bytes(query.device))
    splits = choose_splits(triton.cdiv(rows, tiles.rows) * kv_heads * batch, slots, tiles, query.device)
    parts = torch.empty(splits, batch, heads, length, value_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(splits, batch, heads, length, dtype=torch.float32, device=query.device)
    _launch_split(query, prefix, nodes, scaling, softcap, tiles, parts, part_lse, None, None)
    merge_kernel[(heads * length, batch)](
        parts,
        part_lse,
        part_lse if sinks is None else sinks,
        out,
        part_lse if lse is None else lse,
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


def _launch_split(
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    tiles: Tiles,
    out: Tensor,
    lse: Tensor | None,
    partial: Partial | None,
    sinks: Tensor | None,
) -> None:
    """Fill out (S, B, H, T, DV), of any strides but the last, by S splits, and lse (S, B, H, T) in log2.

    partial: attention over the prefix to go on from, with one split, lse None, and sinks; None: attend to the prefix.
    """
    key, value, spans, mask = prefix
    splits, batch, heads, length, value_dim = out.shape
    kv_heads = key.shape[1]
    rows = heads // kv_heads * length
    block_d, block_v = padded_dims(query, prefix)
    unused = query  # a pointer that a variant of the kernel does not read
    tree = nodes if nodes is not None else Nodes(unused, unused, unused, None)
    split_kernel[(splits, triton.cdiv(rows, tiles.rows) * kv_heads, batch)](
        query,
        key,
        value,
        unused if mask is None else mask.view(torch.uint8),
        tree.key,
        tree.value,
        unused if nodes is None else nodes.mask.contiguous().view(torch.uint8),
        unused if partial is not None else spans.starts.contiguous(),
        unused if partial is not None else spans.ends.contiguous(),
        unused if tree.slots is None else tree.slots.contiguous(),
        unused if partial is None else partial.out,
        unused if partial is None else partial.lse,
        unused if sinks is None else sinks,
        out,
        unused if lse is None else lse,
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
        *((0, 0, 0, 0) if partial is None else partial.out.stride()[:4]),
        *out.stride()[:4],
        DIM=query.shape[-1],
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        MASKED=mask is not None,
        TREE=nodes is not None,
        PLACED=tree.slots is not None,
        CAPPED=softcap is not None,
        KNOWN=partial is not None,
        SINKS=sinks is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
