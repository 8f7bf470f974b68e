"""Hybrid tree attention: prefix ++ tree, as two attentions merged by their log-sum-exp.

The prefix needs no mask, so it runs at flash-decoding speed; only the small tree block is masked. `attend` is the
reference, slow and readable; every backend must agree with it. Knows nothing of models or of the decoding loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")


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


PrefixAttention = Callable[[Tensor, Tensor, Tensor, float, float | None], tuple[Tensor, Tensor]]


class Backend(NamedTuple):
    """How queries attend to the unmasked prefix: (query, key, value, scaling, softcap) -> (out, lse) as `attend`."""

    name: str
    prefix: PrefixAttention


def eager_prefix(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return attend(query, key, value, None, scaling, softcap)


def torch_prefix(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """torch's built-in flash kernels, which return the log-sum-exp; grouped queries are rows, nothing is expanded."""
    if softcap is not None:
        raise ValueError(f"the torch attention backend has no soft-capping, got softcap={softcap}")
    if key.shape[2] == 0:  # the CPU kernel divides by the number of keys and kills the process
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(
            query.shape[:3], NEG_INF, dtype=torch.float32
        )
    rows = pack_heads(query, key.shape[1])
    key, value = key.to(query.dtype), value.to(query.dtype)  # they differ under autocast only
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
