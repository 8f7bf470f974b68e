"""Accepted nodes move next to the prefix: one launch for the keys and values of a layer.

Each program moves all steps of a path for one key/value head of one row. Needs triton; imported only when chosen.
"""

from __future__ import annotations

from torch import Tensor

from .triton_blocks_longspec import tl, triton


@triton.jit
def move_kernel(
    keys,
    values,
    source,
    target,
    steps,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    source_b,
    target_b,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (key/value head, row of the batch)."""
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
    """As `move_slots`."""
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
