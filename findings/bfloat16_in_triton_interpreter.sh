#!/usr/bin/env bash
# triton 3.9.0 with TRITON_INTERPRET=1, torch 2.13.0, CPU.
#
# Kernels that are tried on a CPU by Triton's interpreter compute with the bit patterns of bfloat16 numbers: 1 + 1 is
# 1.7e38, and sums and dot products are as wrong. Triton's guide says that the format is not supported and to cast to
# float32; nothing is raised. Nor is the way back right: a cast from float32 cuts the low bits off, also where rounding to
# the nearest is asked for, so that about half of all results differ from a GPU's by one unit.
# Who meets it: tests of kernels on machines without a GPU. A comparison in bfloat16 needs float32 arithmetic in the
# kernel, and a bound of a whole unit (not half of one) for what it stores. float16 is computed and rounded right.
#
# Seen on 2026-11-30:
#   bfloat16: 1 + 1 = 1.7e+38, dot product off by 5e+10, casts rounded to nearest: 51%
#   float16: 1 + 1 = 2.0e+00, dot product off by 3e-06, casts rounded to nearest: 100%
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 triton==3.9.0 numpy==2.4.6
cd "$room"
cat > tried.py << 'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def multiply(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty, fp_downcast_rounding="rtne"))


torch.manual_seed(0)
numbers, a, b = torch.randn(1024), torch.randn(32, 32), torch.randn(32, 32)
for dtype in (torch.bfloat16, torch.float16):
    ones, two = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    add[(1,)](ones, two, 16)
    product, short = torch.zeros(32, 32), torch.zeros(1024, dtype=dtype)
    multiply[(1,)](a.to(dtype), b.to(dtype), product, 32)
    off = (product - a.to(dtype).float() @ b.to(dtype).float()).abs().max().item()
    cast[(1,)](numbers, short, 1024)
    nearest = (short == numbers.to(dtype)).float().mean().item()
    print(f"{str(dtype)[6:]}: 1 + 1 = {two[0].item():.1e}, dot product off by {off:.0e},", end=" ")
    print(f"casts rounded to nearest: {nearest:.0%}")
    assert (two[0] == 2) == (off < 1e-4) == (nearest == 1) == (dtype == torch.float16)
    assert short.view(torch.int16).sub(numbers.to(dtype).view(torch.int16)).abs().max() <= 1
    assert 0.4 < nearest < 0.6 or nearest == 1
PYTHON
TRITON_INTERPRET=1 bin/python tried.py
