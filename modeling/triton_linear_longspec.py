"""A linear layer of few rows, at the speed of reading its weight: one pass over it, by programs of a few of its rows.

With so few rows of input all time goes into the weight's bytes, so a program keeps several loads of it in flight and
splits the inner dimension only where the weight has too few rows to occupy the GPU. Needs triton; imported only when
called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .triton_blocks_longspec import tl, triton

MOST_ROWS = 16  # of the input: what matrix units take at least


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    columns,
    inner,
    share,
    x_m,
    x_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Program (block of the weight's rows, share of the inner dimension): out (shares, rows, columns).

    By matrix units if DOT, whose other rows stay empty; else one row of input, multiplied and summed.
    """
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(column, columns - 1)  # in the last block rows are read again rather than masked
    weight_row = weight + known.to(tl.int64)[:, None] * inner
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, inner)
    if DOT:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        place = start + k
        if EVEN:
            w = tl.load(weight_row + place[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(weight_row + place[None, :], mask=(place < last)[None, :], other=0.0)
        if DOT:
            real = (row < rows)[:, None] & (place < last)[None, :]
            state = tl.load(x + row[:, None] * x_m + place[None, :] * x_k, mask=real, other=0.0)
            total = tl.dot(state, tl.trans(w), total, input_precision="ieee", out_dtype=tl.float32)
        else:
            state = tl.load(x + place * x_k, mask=place < last, other=0.0)
            total += w.to(tl.float32) * state.to(tl.float32)[None, :]
    part = out + tl.program_id(1).to(tl.int64) * rows * columns
    if DOT:
        if BIAS:
            total += tl.load(bias + known).to(tl.float32)[None, :]
        seen = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(part + row[:, None] * columns + column[None, :], total, mask=seen)
    else:
        summed = tl.sum(total, 1)
        if BIAS:
            summed += tl.load(bias + known).to(tl.float32)
        tl.store(part + column, summed, mask=column < columns)


@triton.jit
def add_kernel(parts, bias, out, size, columns, shares, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """Program (block of out): the sum of its shares, in their order, and the bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for share in range(shares):
        total += tl.load(parts + share * size + place, mask=real, other=0.0)
    if BIAS:
        total += tl.load(bias + place % columns, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, total, mask=real)


class Tiles(NamedTuple):
    """How the work is cut: rows of the weight, elements of each, loads in flight, shares of the inner dimension."""

    columns: int
    inner: int
    warps: int
    stages: int
    shares: int = 1
    dot: bool = True


def choose_tiles(rows: int, columns: int, inner: int) -> Tiles:
    """rows of the input, (columns, inner) of the weight."""
    block = min(inner & -inner, 256)  # the largest power of two that divides it: no masks
    if block < 64:
        block = 128
    if columns <= 2048:
        return Tiles(8, block, 4, 4)
    return Tiles(16 if columns <= 8192 else 32, block, 4, 4)


def triton_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles | None = None) -> Tensor:
    """x (M, K) of at most `MOST_ROWS` rows, weight (N, K) contiguous, bias (N,) or None -> (M, N), summed in float32.

    tiles: others than `choose_tiles` would take, to measure them.
    """
    (rows, inner), columns = x.shape, weight.shape[0]
    assert rows <= MOST_ROWS and weight.shape[1] == inner and weight.is_contiguous()
    tiles = choose_tiles(rows, columns, inner) if tiles is None else tiles
    assert tiles.dot or rows == 1
    share = triton.cdiv(triton.cdiv(inner, tiles.shares), tiles.inner) * tiles.inner
    shares = triton.cdiv(inner, share)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    parts = out if shares == 1 else torch.empty(shares, rows, columns, dtype=torch.float32, device=x.device)
    added = x if bias is None else bias.contiguous()  # a pointer that a variant of the kernel does not look at
    linear_kernel[(triton.cdiv(columns, tiles.columns), shares)](
        x,
        weight,
        added,
        parts,
        rows,
        columns,
        inner,
        share,
        *x.stride(),
        BLOCK_M=MOST_ROWS,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.inner,
        STAGES=tiles.stages,
        EVEN=inner % tiles.inner == 0,
        BIAS=bias is not None and shares == 1,
        DOT=tiles.dot,
        num_warps=tiles.warps,
    )
    if shares > 1:
        size = rows * columns
        add_kernel[(triton.cdiv(size, 256),)](
            parts, added, out, size, columns, shares, BLOCK=256, BIAS=bias is not None, num_warps=4
        )
    return out
