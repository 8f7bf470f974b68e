"""FlashAttention-2 and -3 over the prefix, where they need no mask; the tree and the merge are one launch of our own.

Both packages attend to a cache as it lies, say the log-sum-exp, and read lengths on the device, so that they can be
captured in a CUDA graph. Their packages are imported only when chosen; the tail needs triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_longspec import NEG_INF, Nodes, Prefix, Spans, apply_sinks, pack_heads
from .triton_longspec import triton_attention
from .triton_tail_longspec import tail_attention

HALF = (torch.float16, torch.bfloat16)
ROWS = 64  # queries that a program of FlashAttention-2's split kernel takes


class Partial(NamedTuple):
    """Attention over a prefix: out (B, K, G, T, D) for G query heads a key/value head, lse (B, H, T) float32.

    out may have any strides but the last; where a row has no keys, lse is infinite and out of no meaning.
    """

    out: Tensor
    lse: Tensor


Flash = Callable[[Tensor, Prefix, float, float | None], Partial]


def load_flash_2(package: Any) -> Flash:
    """package: flash_attn. Raises `AttributeError` if it is too old."""
    return functools.partial(flash_2, package.flash_attn_with_kvcache)


def load_flash_3(package: Any) -> Flash:
    """package: the one that is installed. Raises `AttributeError` if it is too old."""
    return functools.partial(flash_3, package.flash_attn_with_kvcache, package.get_scheduler_metadata)


def flash_2(
    with_kvcache: Callable[..., Any], query: Tensor, prefix: Prefix, scaling: float, softcap: float | None
) -> Partial:
    """With `flash_attn_with_kvcache` of the package flash_attn.

    It gives each query head programs of `ROWS` rows. Where that leaves most of them empty, the query heads of a
    key/value head become rows of one; for one query a head it does that itself.
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
    """With `flash_attn_with_kvcache` of FlashAttention-3, which packs query heads itself.

    How it cuts the work depends on lengths that only the device knows, so it is planned there, once a round and shape.
    """
    heads, length = query.shape[1:3]
    _, kv_heads, slots, dim = prefix.key.shape
    starts, ends = lengths(prefix.spans)
    plans = prefix.spans.derived
    shape = "flash_3", heads, length, kv_heads, slots, dim, query.dtype, softcap is None
    if shape not in plans:
        plans[shape] = scheduler_metadata(
            len(query),
            length,
            slots,
            heads,
            kv_heads,
            dim,
            ends,
            qkv_dtype=query.dtype,
            cache_leftpad=starts,
            has_softcap=softcap is not None,
        )
    out, lse, *_ = with_kvcache(
        query.transpose(1, 2),
        prefix.key.transpose(1, 2),
        prefix.value.transpose(1, 2),
        cache_seqlens=ends,
        cache_leftpad=starts,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        scheduler_metadata=plans[shape],
        return_softmax_lse=True,
    )
    return Partial(out.transpose(1, 2).unflatten(1, (kv_heads, -1)), lse)


def lengths(spans: Spans) -> tuple[Tensor, Tensor]:
    """The spans as the packages want them, (B,) int32: the slots before each row's first, and those up to its last."""
    if "int32" not in spans.derived:
        spans.derived["int32"] = torch.stack([spans.starts, spans.ends]).int().unbind()
    return spans.derived["int32"]


def serves(query: Tensor, prefix: Prefix) -> bool:
    """Whether the packages can attend to this layer: no mask, one format of 16 bits, values as large as keys."""
    alike = query.dtype == prefix.key.dtype == prefix.value.dtype and prefix.key.shape == prefix.value.shape
    return prefix.mask is None and alike and query.dtype in HALF


def flash_prefix(
    flash: Flash, query: Tensor, prefix: Prefix, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `attend`."""
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
    """As `merged_attention`. Layers that the packages cannot serve, such as sliding ones, go through our kernel."""
    if not serves(query, prefix):
        return triton_attention(query, prefix, nodes, scaling, softcap, sinks)
    if nodes is not None:
        partial = flash(query, prefix, scaling, softcap)
        return tail_attention(*partial, query, prefix, nodes, scaling, softcap, sinks)
    if sinks is not None:
        out = apply_sinks(*flash_prefix(flash, query, prefix, scaling, softcap), sinks)
        return out.transpose(1, 2).to(query.dtype).contiguous()
    out = flash(query, prefix, scaling, softcap).out  # zero where a row has no keys
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()
