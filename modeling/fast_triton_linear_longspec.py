"""The Triton kernel of a linear layer of one row, at the speed of reading the weight from memory.

All time goes into the weight's bytes, and a matrix unit would mostly wait. cuBLAS splits the inner dimension and adds
the parts in a second launch; here a program reads whole rows of the weight, enough of them at a time to keep the
memory busy. Needs the package triton; imported only when the kernel is first called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fast_triton_attention_longspec import tl, triton

ROWS = 4  # rows of the weight in a program; with the widths below, the best of 42 settings on an H200 (docs/LOG.md)


@triton.jit
def one_row_kernel(
    x, weight, bias, out, columns, inner, x_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of weight (columns, inner) by x (inner,), and store that block of out (columns,)."""
    k = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(column, columns - 1)  # the last block reads a row again rather than with a mask
    weight_row = weight + known.to(tl.int64)[:, None] * inner
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        position = start + k
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
    tl.store(out + column, summed, mask=column < columns)


def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (1, K) by weight (N, K), contiguous, and add bias (N,) or None: (1, N), summed in float32."""
    (rows, inner), columns = x.shape, weight.shape[0]
    assert rows == 1 and weight.shape[1] == inner and weight.is_contiguous()
    out = torch.empty(1, columns, dtype=x.dtype, device=x.device)
    width, warps = (2048, 8) if inner > 1024 else (1024, 4)
    one_row_kernel[(triton.cdiv(columns, ROWS),)](
        x,
        weight,
        x if bias is None else bias.contiguous(),  # a pointer that one variant of the kernel does not read
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
