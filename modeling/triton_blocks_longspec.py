"""What the Triton kernels of attention share: softmax that goes on block by block, and the block of a tree.

Needs triton; imported only when a kernel is chosen.
"""

from __future__ import annotations

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the attention backends of a GPU need the package triton, which is not installed") from error


@triton.jit
def online_softmax(scores, factor, accumulated, top, total, value):
    """One block of keys more: scores (M, N), times `factor` in powers of two, value (N, DV); maximum and sum (M,)."""
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
    """query (M, D) · key (D, N); the hyperbolic tangent of them, scaled, where scores are capped."""
    scores = tl.dot(query, key, input_precision="ieee", out_dtype=tl.float32)
    if CAPPED:
        scores = 2.0 * tl.sigmoid(2.0 * scale * scores) - 1.0
    return scores


@triton.jit
def exponent_factor(scale, softcap, CAPPED: tl.constexpr):
    """What `products` are multiplied by to be exponents of two."""
    if CAPPED:
        return softcap * 1.4426950408889634
    else:
        return scale * 1.4426950408889634


@triton.jit
def attend_to_tree(
    q,
    accumulated,
    top,
    total,
    node_key,
    node_value,
    node_mask,
    key,
    value,
    first_slot,
    nodes,
    first,
    last,
    real_row,
    writes,
    scale,
    factor,
    node_key_t,
    node_value_t,
    key_s,
    value_s,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLACED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The running softmax of queries q (M, D) goes on over blocks `first` to `last` of a tree of `nodes` nodes.

    Pointers are those of one row of the batch and one key/value head: node_key, node_value of the tree, node_mask (M,)
    of what each query may see of it, key, value of the stores, where a program that `writes` puts it if PLACED.
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
        if PLACED:  # where nobody looks in this launch
            if writes:
                slot = first_slot + other
                tl.store(key + slot[None, :] * key_s + d[:, None], k, mask=known_key)
                tl.store(value + slot[:, None] * value_s + dv[None, :], v, mask=known_value)
        scores = products(q, k.to(q.dtype), scale, CAPPED)
        seen = tl.load(node_mask[:, None] + other[None, :], mask=real_row[:, None] & inside[None, :], other=0)
        scores = tl.where(seen != 0, scores, float("-inf"))
        accumulated, top, total = online_softmax(scores, factor, accumulated, top, total, v.to(q.dtype))
    return accumulated, top, total


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for Triton's interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def shared_bytes(device: torch.device) -> float:
    """Shared memory that one program can have."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
