"""A linear layer of one row, at the speed of reading its weight: each program multiplies and sums a few of its rows.

All time goes into the weight's bytes, and a matrix unit would mostly wait. cuBLAS splits the inner dimension and adds
the parts in a second launch; here a program reads whole rows, enough of them at a time to keep the memory busy. Needs
triton; imported only when called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_blocks_longspec import tl, triton

ROWS = 4  # of the weight in a program; with the widths below the best of 42 settings on an H200 (docs/LOG.md)


@triton.jit
def one_row_kernel(
    x,
    weight,
    bias,
    out,
    columns,
    inner,
    x_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program: a block of the weight's rows, which are the columns of out (columns,)."""
    k = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(column, columns - 1)  # in the last block rows are read again rather than masked
    weight_row = weight + known.to(tl.int64)[:, None] * inner
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        place = start + k
        if EVEN:
            w = tl.load(weight_row + place[None, :], eviction_policy="evict_first")
            state = tl.load(x + place * x_k)
        else:
            real = place < inner
            w = tl.load(weight_row + place[None, :], mask=real[None, :], other=0.0)
            state = tl.load(x + place * x_k, mask=real, other=0.0)
        total += w.to(tl.float32) * state.to(tl.float32)[None, :]
    summed = tl.sum(total, 1)
    if BIAS:
        summed += tl.load(bias + known).to(tl.float32)
    tl.store(out + column, summed, mask=column < columns)


def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (1, K), weight (N, K) contiguous, bias (N,) or None -> (1, N), summed in float32."""
    (rows, inner), columns = x.shape, weight.shape[0]
    assert rows == 1 and weight.shape[1] == inner and weight.is_contiguous()
    out = torch.empty(1, columns, dtype=x.dtype, device=x.device)
    width, warps = (2048, 8) if inner > 1024 else (1024, 4)
    one_row_kernel[(triton.cdiv(columns, ROWS),)](
        x,
        weight,
        x if bias is None else bias.contiguous(),  # a pointer that one variant of the kernel does not look at
        out,
        columns,
        inner,
        x.stride(1),
        BLOCK_N=ROWS,
        BLOCK_K=width,
        EVEN=inner % width == 0,
        BIAS=bias is not None,
        num_warps=warps,
    )
    return out
