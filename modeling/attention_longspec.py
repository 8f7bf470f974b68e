"""Hybrid tree attention: prefix ++ tree, as two attentions merged by their log-sum-exp.

The prefix needs no mask, so it runs at flash-decoding speed; only the small tree block is masked. `attend` is the
reference, slow and readable; every backend must agree with it. Knows nothing of models or of the decoding loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")
# A prefix is read in parts of at least so many tokens, up to so many in all: enough to occupy a large GPU.
PART_TOKENS = 512
SEQUENCES = 256


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Masked attention with its log-sum-exp, in float32: the reference.

    Args:
        query: (B, H, T, D); key, value: (B, K, S, D) with H a multiple of K; not expanded.
        mask: (B, T, S) bool, true where a query may look; None: everywhere.
        scaling: factor of the scores. softcap: scores become `softcap · tanh(scores / softcap)`.
    Returns: out (B, H, T, D) float32, zero where a row sees nothing; lse (B, H, T) float32, −inf there.
    """
    scores = pack_heads(query, key.shape[1]).float() @ key.float().transpose(-1, -2) * scaling  # (B, K, G·T, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        groups = query.shape[1] // key.shape[1]
        scores = scores.masked_fill(~mask.repeat(1, groups, 1)[:, None], NEG_INF)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])
    return unpack_heads(weights @ value.float(), query), lse.reshape(query.shape[:3])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attentions over each, in float32.

    out (B, H, T, D), lse (B, H, T) of either; a side with lse −inf has no keys and no weight.
    Returns: out, lse of the union. Source: LongSpec section 3.3; Dao et al., Flash-Decoding.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == NEG_INF, 0.0)
    weight_a, weight_b = torch.exp(lse_a - shift)[..., None], torch.exp(lse_b - shift)[..., None]
    return out_a.float() * weight_a + out_b.float() * weight_b, lse


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention sinks (gpt_oss): one more key per head with score `sinks` (H,) and value zero."""
    return out * torch.sigmoid(lse - sinks.float()[None, :, None])[..., None]


def pack_heads(query: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, D) -> (B, K, G·T, D): the queries that share a K/V head become rows of one matrix."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def unpack_heads(packed: Tensor, query: Tensor) -> Tensor:
    """The inverse of `pack_heads` for a tensor shaped as the packed `query`."""
    return packed.reshape(query.shape)


class Spans(NamedTuple):
    """Which keys each row of a batch may see: those from its start up to its end, in slots of a key store.

    starts, ends: (B,) int64 on the device; host: the same pairs, None where only the device shall know them, as in a
    CUDA graph; derived: what kernels make of them, once a round.
    """

    starts: Tensor
    ends: Tensor
    host: tuple[tuple[int, int], ...] | None
    derived: dict[Any, Any]

    def to(self, device: torch.device) -> Spans:
        return Spans(self.starts.to(device), self.ends.to(device), self.host, {})

    @property
    def common(self) -> slice | None:
        """The slots of every row, if they are known to be the same."""
        return slice(*self.host[0]) if self.host is not None and len(set(self.host)) == 1 else None

    def cover(self, slots: int) -> slice:
        """The slots from the first that any row may see to the last; all `slots` of a store if that is not known."""
        if self.host is None:
            return slice(0, slots)
        return slice(min(start for start, _ in self.host), max(end for _, end in self.host))


PrefixAttention = Callable[[Tensor, Tensor, Tensor, Spans, float, float | None], tuple[Tensor, Tensor]]


class Backend(NamedTuple):
    """How queries attend to the prefix: (query, key, value, spans, scaling, softcap) -> (out, lse) as `attend`.

    key, value: (B, K, S, D) stores, of which each row sees its span.
    """

    name: str
    prefix: PrefixAttention


def eager_prefix(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    cover = spans.cover(key.shape[2])
    mask = None
    if spans.common is None:
        slot = torch.arange(cover.start, cover.stop, device=query.device)
        mask = (slot >= spans.starts[:, None]) & (slot < spans.ends[:, None])
        mask = mask[:, None].expand(-1, query.shape[2], -1)
    return attend(query, key[:, :, cover], value[:, :, cover], mask, scaling, softcap)


def torch_prefix(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """torch's built-in flash kernels, which return the log-sum-exp; grouped queries are rows, nothing is expanded."""
    if softcap is not None:
        raise ValueError(f"the torch attention backend has no soft-capping, got softcap={softcap}")
    common = spans.common
    if common is not None:
        return _flash(query, key[:, :, common], value[:, :, common], scaling)
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return _flash_by_row(query, key, value, spans, scaling)
    if spans.host is None:
        return eager_prefix(query, key, value, spans, scaling, softcap)
    # the CPU kernel and the one for float32 know no lengths: a call a row
    rows = [
        _flash(query[row : row + 1], key[row : row + 1, :, start:end], value[row : row + 1, :, start:end], scaling)
        for row, (start, end) in enumerate(spans.host)
    ]
    out, lse = zip(*rows, strict=True)
    return torch.cat(out), torch.cat(lse)


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Unmasked attention over all of `key`."""
    if key.shape[2] == 0:  # the CPU kernel divides by the number of keys and kills the process
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(
            query.shape[:3], NEG_INF, dtype=torch.float32
        )
    rows = pack_heads(query, key.shape[1])
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, key, value, scale=scaling)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(rows, key, value, scale=scaling)
    else:  # float32 on a GPU: the memory-efficient kernel pads its log-sum-exp to a multiple of 32 rows
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            rows, key, value, None, True, scale=scaling
        )
        lse = lse[..., : rows.shape[2]]
    return unpack_heads(out, query), lse.reshape(query.shape[:3])


def _flash_by_row(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float) -> tuple[Tensor, Tensor]:
    """One kernel for rows of different spans, which it reads on the device (CUDA).

    Each part of the keys of each (row, K/V head) is a sequence of its own, so that a long prefix has many readers, as
    in flash-decoding; the parts are merged. The stores must be contiguous; they are taken as they lie.
    """
    batch, kv_heads, slots, dim = key.shape
    rows = pack_heads(query, kv_heads)  # (B, K, G·T, D)
    packed = rows.shape[2]
    parts = max(min(SEQUENCES // (batch * kv_heads), slots // PART_TOKENS), 1)
    part = -(-slots // parts)
    if (kv_heads, slots) not in spans.derived:
        spans.derived[kv_heads, slots] = _sequences(spans, kv_heads, slots, parts, part)
    begins, held = spans.derived[kv_heads, slots]
    queries = torch.arange(0, batch * kv_heads * parts * packed + 1, packed, device=query.device, dtype=torch.int32)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        rows[:, :, None].expand(-1, -1, parts, -1, -1).reshape(-1, 1, dim),
        key.view(-1, 1, dim),
        value.view(-1, 1, dim),
        queries,
        begins,
        packed,
        part,
        0.0,
        False,
        False,
        scale=scaling,
        seqused_k=held,
    )
    lse = lse.reshape(batch, kv_heads, parts, packed)
    lse = lse.masked_fill(lse == float("inf"), NEG_INF)  # a part without keys
    out = out.reshape(batch, kv_heads, parts, packed, dim)
    if parts == 1:
        return unpack_heads(out, query), lse.reshape(query.shape[:3])
    whole = lse.logsumexp(dim=2, keepdim=True)
    weights = torch.exp(lse - whole.masked_fill(whole == NEG_INF, 0.0))
    merged = (out.float() * weights[..., None]).sum(dim=2)
    return unpack_heads(merged, query), whole.reshape(query.shape[:3])


def _sequences(spans: Spans, kv_heads: int, slots: int, parts: int, part: int) -> tuple[Tensor, Tensor]:
    """Where each part of the keys of each (row, K/V head) begins in a flat store, (N + 1,), and its length, (N,)."""
    device = spans.starts.device
    offsets = torch.arange(parts, device=device) * part
    held = (spans.ends - spans.starts)[:, None] - offsets  # (B, parts)
    held = held.clamp(0, part)[:, None].expand(-1, kv_heads, -1).reshape(-1)
    stores = torch.arange(len(spans.starts) * kv_heads, device=device).view(-1, kv_heads, 1) * slots
    begins = stores + (spans.starts[:, None] + offsets)[:, None]
    return torch.nn.functional.pad(begins.reshape(-1), (0, 1)).int(), held.int()


BACKENDS = {"eager": Backend("eager", eager_prefix), "torch": Backend("torch", torch_prefix)}


def resolve_backend(name: str, device: torch.device, head_dim: int, softcap: float | None) -> Backend:
    """The backend for a call: `name`, or the fastest that fits for `"auto"`.

    Raises `ValueError` with the reason where a backend asked for by name cannot run.
    """
    reason = torch_backend_misfit(device, head_dim, softcap)
    if name == "auto":
        return BACKENDS["eager" if reason else "torch"]
    if name == "torch" and reason:
        raise ValueError(f"attention_backend='torch' cannot run here: {reason}; use 'auto' or 'eager'")
    return BACKENDS[name]


def torch_backend_misfit(device: torch.device, head_dim: int, softcap: float | None) -> str | None:
    """Why torch's built-in kernels cannot serve a target, or None."""
    if softcap is not None:
        return f"the target caps its attention scores (softcap={softcap}), torch's flash kernels cannot"
    if device.type not in ("cpu", "cuda"):
        return f"no flash kernel with log-sum-exp on {device.type}"
    if device.type == "cuda" and (head_dim % 8 or head_dim > 256):
        return f"the CUDA kernels need a head dimension that is a multiple of 8 and at most 256, got {head_dim}"
    return None
