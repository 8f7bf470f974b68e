"""FlashAttention-2 and -3 over the prefix, which needs no mask, and one Triton launch for tree and merge.

Both packages attend to a cache as it lies, return the log-sum-exp, and read lengths on the device, so that a CUDA
graph can capture their launches. The packages are imported only when chosen; the tree needs the package triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention_longspec import NEG_INF, Nodes, Prefix, Spans, apply_sinks, pack_heads
from .fast_triton_attention_longspec import Partial, tail_attention, triton_attention

HALF = (torch.float16, torch.bfloat16)
ROWS = 64  # queries of a program of FlashAttention-2's split kernel


# (query, prefix, scaling, softcap) -> attention over the prefix
Flash = Callable[[Tensor, Prefix, float, float | None], Partial]


def load_flash_2(package: Any) -> Flash:
    """Take FlashAttention-2 from the package flash_attn. Raises `AttributeError` where the package is too old."""
    return functools.partial(flash_2, package.flash_attn_with_kvcache)


def load_flash_3(package: Any) -> Flash:
    """Take FlashAttention-3 from the package installed here. Raises `AttributeError` where the package is too old."""
    return functools.partial(flash_3, package.flash_attn_with_kvcache, package.get_scheduler_metadata)


def flash_2(
    with_kvcache: Callable[..., Any], query: Tensor, prefix: Prefix, scaling: float, softcap: float | None
) -> Partial:
    """Attend to the prefix with `flash_attn_with_kvcache` of the package flash_attn.

    The package gives each query head programs of `ROWS` queries. Where packing needs fewer programs, the query heads
    of a key/value head become rows of one head; for one query a head the package packs by itself.
    """
    batch, heads, length, dim = query.shape
    kv_heads = prefix.key.shape[1]
    groups = heads // kv_heads
    packs = length > 1 and -(-groups * length // ROWS) < groups * -(-length // ROWS)
    rows = pack_heads(query, kv_heads) if packs else query
    starts, ends = lengths(prefix.spans)
    out, lse = with_kvcache(
        rows.transpose(1, 2),
        prefix.key.transpose(1, 2),
        prefix.value.transpose(1, 2),
        cache_seqlens=ends,
        cache_leftpad=starts,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        return_softmax_lse=True,
    )
    out = out.transpose(1, 2)  # (B, K, G·T, D), or (B, H, T, D)
    out = out.unflatten(2, (groups, length)) if packs else out.unflatten(1, (kv_heads, groups))
    return Partial(out, lse.reshape(batch, heads, length))


def flash_3(
    with_kvcache: Callable[..., Any],
    scheduler_metadata: Callable[..., Tensor],
    query: Tensor,
    prefix: Prefix,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """Attend to the prefix with `flash_attn_with_kvcache` of FlashAttention-3, which packs query heads by itself.

    Lengths, which only the device knows, decide how the package cuts the work, so `scheduler_metadata` plans the cut
    on the device, once a round and shape.
    """
    heads, length = query.shape[1:3]
    _, kv_heads, slots, dim = prefix.key.shape
    starts, ends = lengths(prefix.spans)
    shape = len(query), length, slots, heads, kv_heads, dim
    capped = softcap is not None
    plan = prefix.spans.memo.once(
        ("flash_3", *shape, query.dtype, capped),
        lambda: scheduler_metadata(*shape, ends, qkv_dtype=query.dtype, cache_leftpad=starts, has_softcap=capped),
    )
    out, lse, *_ = with_kvcache(
        query.transpose(1, 2),
        prefix.key.transpose(1, 2),
        prefix.value.transpose(1, 2),
        cache_seqlens=ends,
        cache_leftpad=starts,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        scheduler_metadata=plan,
        return_softmax_lse=True,
    )
    return Partial(out.transpose(1, 2).unflatten(1, (kv_heads, -1)), lse)


def lengths(spans: Spans) -> tuple[Tensor, Tensor]:
    """Convert spans to what the packages take, starts and ends (B,) int32, once a round."""
    return spans.memo.once("int32", lambda: torch.stack([spans.starts, spans.ends]).int().unbind())


def serves(query: Tensor, prefix: Prefix) -> bool:
    """Say whether the packages can attend to a layer: no mask, one 16-bit dtype, values as wide as keys."""
    alike = query.dtype == prefix.key.dtype == prefix.value.dtype and prefix.key.shape == prefix.value.shape
    return prefix.mask is None and alike and query.dtype in HALF


def flash_prefix(
    flash: Flash, query: Tensor, prefix: Prefix, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to a prefix alone: (out, lse) as `attend`."""
    out, lse = flash(query, prefix, scaling, softcap)
    nothing = lse.isinf()
    return out.flatten(1, 2).masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, NEG_INF)


def flash_attention(
    flash: Flash,
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend to prefix and tree as `merged_attention`.

    Layers that the packages cannot serve, such as sliding ones, go through `triton_attention`.
    """
    if not serves(query, prefix):
        return triton_attention(query, prefix, nodes, scaling, softcap, sinks)
    if nodes is not None:
        return tail_attention(flash(query, prefix, scaling, softcap), query, prefix, nodes, scaling, softcap, sinks)
    if sinks is not None:
        out = apply_sinks(*flash_prefix(flash, query, prefix, scaling, softcap), sinks)
        return out.transpose(1, 2).to(query.dtype).contiguous()
    out = flash(query, prefix, scaling, softcap).out  # zero where a row has no keys
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()
