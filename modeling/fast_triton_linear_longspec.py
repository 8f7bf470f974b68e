"""Triton kernels of linear layers of few rows that share their input, at the speed of reading the weights from memory.

One launch reads up to three weights where they lie, such as those of queries, keys and values. With one row all time
goes into the weights' bytes, and a matrix unit would mostly wait: a program reads whole rows of a weight, enough of
them at a time to keep the memory busy. With more, a program holds all rows of the input, whose reading again costs
as much as that of a weight's block of as many rows, so blocks are wide. Needs the package triton; imported only when a
kernel is first called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fast_triton_attention_longspec import tl, triton


class Tiles(NamedTuple):
    """How a launch cuts products: a program multiplies so many rows of a weight, `width` numbers at a time."""

    columns: int  # of the product, which are rows of the weight
    width: int
    warps: int
    stages: int


def tiles_of(rows: int, inner: int, columns: int) -> Tiles:
    """Choose the tiles for x (rows, inner) and weights of so many columns in all.

    The best of some fourteen on an H200 (docs/LOG.md); the same for 2 rows and for 96, so that the others do not
    change a row's result.
    """
    if rows == 1:
        return Tiles(2, 2048, 8, 3) if inner > 1024 else Tiles(4, 1024, 4, 3)
    if columns > 16384:
        return Tiles(128, 64, 4, 3)
    return Tiles(64, 64, 4, 4) if inner <= 1024 and columns > 2048 else Tiles(64, 128, 4, 4)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def part_of(block, weights, biases, outs, columns, BLOCK_N: tl.constexpr):
    """Return weight, bias, out and number of columns of the product that a block is of, and the block's columns."""
    weight, bias, out, end, first = weights[0], biases[0], outs[0], columns[0], 0
    start = 0
    for part in tl.static_range(1, len(weights)):
        start += tl.cdiv(columns[part - 1], BLOCK_N)
        here = block >= start
        weight, bias = tl.where(here, weights[part], weight), tl.where(here, biases[part], bias)
        out, end = tl.where(here, outs[part], out), tl.where(here, columns[part], end)
        first = tl.where(here, start, first)
    return weight, bias, out, end, (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def one_row_kernel(
    x, weights, biases, outs, columns, inner, x_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of a weight (N, inner) by x (inner,), and store that block of its out (N,)."""
    weight, bias, out, end, column = part_of(tl.program_id(0), weights, biases, outs, columns, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    known = tl.minimum(column, end - 1)  # the last block reads a row again rather than with a mask
    weight_row = weight + known.to(tl.int64)[:, None] * inner
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for first in range(0, inner, BLOCK_K):
        position = first + k
        if EVEN:
            w = tl.load(weight_row + position[None, :], eviction_policy="evict_first")
            state = tl.load(x + position * x_k)
        else:
            real = position < inner
            w = tl.load(weight_row + position[None, :], mask=real[None, :], other=0.0)
            state = tl.load(x + position * x_k, mask=real, other=0.0)
        total += w.to(tl.float32) * state.to(tl.float32)[None, :]
    summed = tl.sum(total, 1)
    if BIAS:
        summed += tl.load(bias + known).to(tl.float32)
    tl.store(out + column, summed, mask=column < end)


@triton.jit
def states_of(x, row, position, rows, inner, x_m, x_k, EVEN: tl.constexpr):
    """Load numbers (K, M) of rows of x, zeros behind the last."""
    real = (row < rows)[None, :]
    if not EVEN:
        real = real & (position < inner)[:, None]
    return tl.load(x + row[None, :] * x_m + position[:, None] * x_k, mask=real, other=0.0)


@triton.jit
def keep(total, row, rows, out, bias, column, end, BIAS: tl.constexpr):
    """Store sums (N, M) of a block into out (rows, end)."""
    inside = column < end
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[None, :] * end + column[:, None], total, mask=(row < rows)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x, weights, biases, outs, columns, rows, inner, x_m, x_k,
    ROWS: tl.constexpr, MORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of a weight (N, inner) by all of x (rows, inner).

    Triton's blocks are powers of two, so the rows beyond the first ROWS are a second block, of MORE.
    """
    weight, bias, out, end, column = part_of(tl.program_id(0), weights, biases, outs, columns, BLOCK_N)
    k, row = tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    known = tl.minimum(column, end - 1)
    weight_row = weight + known.to(tl.int64)[:, None] * inner
    total = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    if MORE:
        further = ROWS + tl.arange(0, MORE)
        more = tl.zeros([BLOCK_N, MORE], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        position = start + k
        if EVEN:
            w = tl.load(weight_row + position[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(weight_row + position[None, :], mask=(position < inner)[None, :], other=0.0)
        total = tl.dot(w, states_of(x, row, position, rows, inner, x_m, x_k, EVEN), total)
        if MORE:
            more = tl.dot(w, states_of(x, further, position, rows, inner, x_m, x_k, EVEN), more)
    keep(total, row, rows, out, bias, column, end, BIAS)
    if MORE:
        keep(more, further, rows, out, bias, column, end, BIAS)


# --- launches --------------------------------------------------------------------------------------------------------


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Multiply x (M, K), M at most 96, by each weight (N, K), contiguous: (M, N) each, summed in float32.

    biases: (N,) for each weight, or none at all.
    """
    rows, inner = x.shape
    columns = tuple(weight.shape[0] for weight in weights)
    assert all(weight.shape[1] == inner and weight.is_contiguous() for weight in weights)
    tiles = tiles_of(rows, inner, sum(columns))
    outs = tuple(torch.empty(rows, n, dtype=x.dtype, device=x.device) for n in columns)
    blocks = sum(triton.cdiv(n, tiles.columns) for n in columns)
    # without biases, pointers that one variant of each kernel does not read
    held = tuple(bias.contiguous() for bias in biases) or outs
    options = dict(BLOCK_N=tiles.columns, BIAS=bool(biases), num_warps=tiles.warps, num_stages=tiles.stages)
    widths = dict(BLOCK_K=tiles.width, EVEN=inner % tiles.width == 0)
    if rows == 1:
        one_row_kernel[(blocks,)](x, tuple(weights), held, outs, columns, inner, x.stride(1), **widths, **options)
        return list(outs)
    first, more = row_blocks(rows)
    few_rows_kernel[(blocks,)](
        x, tuple(weights), held, outs, columns, rows, inner, x.stride(0), x.stride(1), ROWS=first, MORE=more,
        **widths, **options,
    )  # fmt: skip
    return list(outs)


def row_blocks(rows: int) -> tuple[int, int]:
    """Return two powers of two, or one and 0, that hold at most 96 rows with less than 16 to spare."""
    padded = triton.cdiv(rows, 16) * 16
    first = 1 << padded.bit_length() - 1
    assert padded <= 96
    return first, padded - first
