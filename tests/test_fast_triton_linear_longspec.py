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
GROUPS = [  # of queries, keys and values, and of gate and up, in Llama 8B, Qwen2.5 0.5B and SmolLM2 135M
    *[((4096, 1024, 1024), 4096), ((14336, 14336), 4096)],
    *[((896, 128, 128), 896), ((4864, 4864), 896)],
    *[((576, 192, 192), 576), ((1536, 1536), 576)],
]
UNEVEN = [((40, 7, 33), 100), ((1, 70), 33), ((20,), 300)]
ROWS = [2, 16, 31, 37, 64, 69, 96]


def case(rows, columns, inner, dtype, with_bias, device="cpu"):
    """x, weights, biases, and the exact outcomes."""
    x = torch.randn(rows, inner, device=device).to(dtype)
    weights = [(torch.randn(n, inner, device=device) / inner**0.5).to(dtype) for n in columns]
    biases = [torch.randn(n, device=device).to(dtype) for n in columns if with_bias]
    return (x, weights, biases), plain(x.double(), weights, biases)


def plain(x, weights, biases):
    """torch's own products, in the format of x."""
    added = [bias.to(x.dtype) for bias in biases] or [None] * len(weights)
    return [linear(x, weight.to(x.dtype), bias) for weight, bias in zip(weights, added, strict=True)]


def check(rows, columns, inner, dtype, with_bias):
    """Against the bound of sums in float32, rounded once at the end."""
    from hf_longspec.modeling.fast_triton_linear_longspec import linears

    inputs, exact = case(rows, columns, inner, dtype, with_bias)
    x, *others = inputs
    sizes = plain(x.double().abs(), *([tensor.abs() for tensor in some] for some in others))
    for out, expected, size in zip(linears(*inputs), exact, sizes, strict=True):
        assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
        summing = (inner + 1) * torch.finfo(torch.float32).eps * size
        rounding = torch.finfo(dtype).eps * (expected.abs() + summing) + torch.finfo(dtype).smallest_normal
        assert bool(((out.double() - expected).abs() <= summing + rounding).all())


def check_on_gpu(*options):
    """At most twice the error of cuBLAS."""
    from hf_longspec.modeling.fast_triton_linear_longspec import linears

    inputs, exact = case(*options, "cuda")
    for ours, cublas, expected in zip(linears(*inputs), plain(*inputs), exact, strict=True):
        assert (ours.double() - expected).abs().max() <= 2 * (cublas.double() - expected).abs().max()


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
    check(1, shape[:1], shape[1], dtype, with_bias)


@interpreted
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns, inner", UNEVEN, ids=str)
@pytest.mark.parametrize("rows", [1, *ROWS])
def test_groups(rows, columns, inner, with_bias):
    check(rows, columns, inner, torch.float16, with_bias)


@interpreted
@pytest.mark.parametrize("rows", [1, 6])
def test_inputs_of_any_strides(rows):
    from hf_longspec.modeling.fast_triton_linear_longspec import linears

    x, weights = torch.randn(64, 12)[:, 3 : 3 + 2 * rows : 2].T, [torch.randn(24, 64), torch.randn(8, 64)]
    for out, expected in zip(linears(x, weights, []), plain(x, weights, []), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (7, 100), (70, 33), (130, 896)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(shape, dtype):
    for with_bias in (False, True):
        check_on_gpu(1, shape[:1], shape[1], dtype, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("columns, inner", [*GROUPS, *UNEVEN], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_groups_on_a_gpu(columns, inner, dtype):
    for rows, with_bias in itertools.product([1, *ROWS], [False, True]):
        check_on_gpu(rows, columns, inner, dtype, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("columns, inner", GROUPS, ids=str)
def test_other_rows_do_not_change_a_row(columns, inner):
    from hf_longspec.modeling.fast_triton_linear_longspec import linears

    (x, *others), _ = case(96, columns, inner, torch.bfloat16, True, "cuda")
    expected = linears(x, *others)
    for rows in ROWS:
        for out, all_rows in zip(linears(x[:rows], *others), expected, strict=True):
            assert torch.equal(out, all_rows[:rows])
