"""Prefix attention by PyTorch's built-in flash kernels, which return the log-sum-exp; on CUDA and on CPU.

Grouped queries are rows of one matrix, so keys and values are not expanded. Needs no package beside torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_longspec import NEG_INF, Prefix, Spans, eager_prefix, pack_heads, unpack_heads

# A prefix is read in parts of at least so many tokens, up to so many in all: enough to occupy a large GPU.
PART_TOKENS = 512
SEQUENCES = 256


def torch_prefix(query: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attend to a prefix, (out, lse) as `attend`; a mask goes to the reference, as masked layers have few keys."""
    if softcap is not None:
        raise ValueError(f"the torch attention backend has no soft-capping, got softcap={softcap}")
    if prefix.mask is not None:
        return eager_prefix(query, prefix, scaling, softcap)
    key, value, spans, _ = prefix
    common = spans.common
    if common is not None:
        return _flash(query, key[:, :, common], value[:, :, common], scaling)
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return _flash_by_row(query, key, value, spans, scaling)
    if spans.host is None:
        return eager_prefix(query, prefix, scaling, softcap)
    # the CPU kernel and the one for float32 know no lengths: a call a row
    rows = [
        _flash(query[row : row + 1], key[row : row + 1, :, start:end], value[row : row + 1, :, start:end], scaling)
        for row, (start, end) in enumerate(spans.host)
    ]
    out, lse = zip(*rows, strict=True)
    return torch.cat(out), torch.cat(lse)


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend to all of `key` without a mask."""
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
    """Attend by one CUDA kernel to rows of different spans, which the kernel reads on the device.

    Each part of the keys of each (row, K/V head) is a sequence for the kernel, so that a long prefix has many readers,
    as in flash-decoding; the parts are merged afterwards. The stores must be contiguous and are not copied.
    """
    batch, kv_heads, slots, dim = key.shape
    rows = pack_heads(query, kv_heads)  # (B, K, G·T, D)
    packed = rows.shape[2]
    parts = max(min(SEQUENCES // (batch * kv_heads), slots // PART_TOKENS), 1)
    part = -(-slots // parts)
    begins, held = spans.memo.once((kv_heads, slots), lambda: _sequences(spans, kv_heads, slots, parts, part))
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
    """Return the first slot (N + 1,) and the length (N,) of each part of each (row, K/V head) in a flat store."""
    device = spans.starts.device
    offsets = torch.arange(parts, device=device) * part
    held = (spans.ends - spans.starts)[:, None] - offsets  # (B, parts)
    held = held.clamp(0, part)[:, None].expand(-1, kv_heads, -1).reshape(-1)
    stores = torch.arange(len(spans.starts) * kv_heads, device=device).view(-1, kv_heads, 1) * slots
    begins = stores + (spans.starts[:, None] + offsets)[:, None]
    return torch.nn.functional.pad(begins.reshape(-1), (0, 1)).int(), held.int()
