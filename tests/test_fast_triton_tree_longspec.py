"""The kernels of the tree: the best children of a level against sorting everything, and moves of accepted nodes."""

import itertools

import pytest
import torch
from helpers import interpreted
from level_cases import (
    DTYPES,
    LEVELS,
    check,
    check_draft_vocabulary,
    check_impossible_tokens,
    check_moves,
    check_rounding,
)
from tree_cases import rest_slow


def fused(*inputs, chunk=32):
    """Choose children by the kernels, in small chunks: Triton's interpreter sorts slowly."""
    from hf_longspec.modeling.fast_triton_tree_longspec import fused_best_children

    return fused_best_children(*inputs, chunk=chunk)


def fused_on_gpu(*inputs):
    return fused(*inputs, chunk=2048)


@interpreted
@pytest.mark.parametrize(
    "level, dtype",
    rest_slow(
        itertools.product(LEVELS, DTYPES),
        [(level, DTYPES[index % 3]) for index, level in enumerate(LEVELS)] + [((3, 70, 7), torch.bfloat16)],
    ),
    ids=str,
)
def test_best_children_against_sorting_everything(level, dtype):
    check(fused, *level, dtype)


@interpreted
def test_impossible_tokens_come_last():
    check_impossible_tokens(fused)


@interpreted
def test_rounding_never_lifts_a_child_above_its_parent():
    check_rounding(fused)


@interpreted
def test_tokens_of_a_draft_vocabulary():
    check_draft_vocabulary(fused)


EQUAL = [(40, 7), (70, 16), (6, 12)]  # vocab, width


@interpreted
@pytest.mark.parametrize(
    "level, dtype",
    # the last again: levels as wide as these twelve reach the zeros among the logits
    rest_slow(itertools.product(EQUAL, DTYPES), [*zip(EQUAL, DTYPES, strict=True), (EQUAL[-1], torch.float32)]),
    ids=str,
)
def test_of_equals_the_smaller_node_and_token(level, dtype):
    """Three nodes with the same logits, of which there are five kinds; minus zero is zero."""
    vocab, width = level
    logits = torch.randint(-2, 3, (2, 1, vocab)).to(dtype).expand(-1, 3, -1).contiguous()
    logits[:, :, ::3] *= -1.0
    tokens, parents, _ = fused(logits, torch.full((2, 3), -1.5), width)
    for row in range(2):
        values = (logits[row] + 0.0).tolist()
        order = sorted((-values[node][token], node, token) for node in range(3) for token in range(vocab))
        expected = [(node, token) for _, node, token in order[:width]]
        assert list(zip(parents[row].tolist(), tokens[row].tolist(), strict=True)) == expected


@interpreted
def test_a_level_too_wide_for_the_kernels():
    check(fused, 2, 300, 65, torch.float32)
    check(fused, 300, 20, 16, torch.float32)


@interpreted
@pytest.mark.parametrize("dim, value_dim", [(4, 4), (6, 5)])
def test_moves_read_before_they_write(dim, value_dim):
    from hf_longspec.modeling.fast_triton_tree_longspec import triton_move

    check_moves(triton_move, dim, value_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nodes, width", [(1, 4), (4, 16), (16, 16), (16, 64), (64, 16), (300, 16)])
@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
def test_on_a_gpu(nodes, width, vocab, dtype):
    check(fused_on_gpu, nodes, vocab, width, dtype, "cuda")
