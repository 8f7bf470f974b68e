"""The linear layer of one row against float64: in Triton's interpreter, and on a GPU where there is one.

The interpreter multiplies no bfloat16, so float16 stands for it on a CPU.
"""

import itertools

import pytest
import torch
from helpers import interpreted
from torch.nn.functional import linear
from tree_cases import rest_slow

SHAPES = [  # of the weights of Llama 8B, Qwen2.5 0.5B and 1.5B
    *[(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)],
    *[(896, 896), (128, 896), (4864, 896), (896, 4864), (151936, 896)],
    *[(1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)],
]

SMALL = [(32, 64), (33, 128), (7, 100), (70, 33), (1, 1), (130, 2048), (9, 5000)]  # where the kernel is interpreted


def case(shape, dtype, with_bias, device="cpu"):
    """x, weight, bias, and the exact outcome."""
    x = torch.randn(1, shape[1], device=device).to(dtype)
    weight = (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype)
    bias = torch.randn(shape[0], device=device).to(dtype) if with_bias else None
    return x, weight, bias, linear(x.double(), weight.double(), None if bias is None else bias.double())


def check(shape, dtype, with_bias):
    """Against the bound of sums in float32, rounded once at the end."""
    from hf_longspec.modeling.fast_triton_linear_longspec import one_row_linear

    x, weight, bias, exact = case(shape, dtype, with_bias)
    out = one_row_linear(x, weight, bias)
    assert out.dtype == dtype and out.shape == exact.shape
    sizes = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    summing = (shape[1] + 1) * torch.finfo(torch.float32).eps * sizes
    rounding = torch.finfo(dtype).eps * (exact.abs() + summing) + torch.finfo(dtype).smallest_normal
    assert bool(((out.double() - exact).abs() <= summing + rounding).all())


def check_on_gpu(*options):
    """At most twice the error of cuBLAS."""
    from hf_longspec.modeling.fast_triton_linear_longspec import one_row_linear

    *inputs, exact = case(*options, "cuda")
    ours, plain = ((out.double() - exact).abs().max() for out in (one_row_linear(*inputs), linear(*inputs)))
    assert ours <= 2 * plain


@interpreted
@pytest.mark.parametrize(
    "shape, dtype, with_bias",
    rest_slow(
        itertools.product(SMALL, [torch.float32, torch.float16], [False, True]),
        [
            *[(shape, torch.float16, True) for shape in SMALL[2:]],
            *[(shape, torch.float16, False) for shape in ((7, 100), (9, 5000))],
            ((33, 128), torch.float32, True),
        ],
    ),
    ids=str,
)
def test_shapes(shape, dtype, with_bias):
    check(shape, dtype, with_bias)


@interpreted
def test_inputs_of_any_strides():
    from hf_longspec.modeling.fast_triton_linear_longspec import one_row_linear

    x, weight = torch.randn(64, 6)[:, 3:4].T, torch.randn(24, 64)
    torch.testing.assert_close(one_row_linear(x, weight, None), linear(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (7, 100), (70, 33), (130, 896)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(shape, dtype):
    for with_bias in (False, True):
        check_on_gpu(shape, dtype, with_bias)
