"""The best children of a level against sorting everything: torch's operations, and the Triton kernels."""

import math

import pytest
import torch
from helpers import interpreted

from hf_longspec.modeling.children_longspec import best_children


def fused(*inputs, chunk=32):
    """The kernels, by small chunks: Triton's interpreter sorts slowly."""
    from hf_longspec.modeling.fast_triton_tree_longspec import fused_best_children

    return fused_best_children(*inputs, chunk=chunk)


def fused_on_gpu(*inputs):
    return fused(*inputs, chunk=2048)


both = pytest.mark.parametrize("children", [best_children, pytest.param(fused, marks=interpreted)])


def check(children, nodes, vocab, width, dtype, device="cpu"):
    logits = (3 * torch.randn(2, nodes, vocab, device=device)).to(dtype)
    scores = -3 * torch.rand(2, nodes, device=device)
    tokens, parents, chosen = (part.cpu() for part in children(logits, scores, width))
    assert tokens.dtype == parents.dtype == torch.int64 and chosen.dtype == torch.float32
    everything = (scores.double()[:, :, None] + logits.double().log_softmax(-1)).cpu()
    units = 4 * torch.finfo(torch.float32).eps * everything.abs().max()
    for row in range(2):
        pairs = list(zip(parents[row].tolist(), tokens[row].tolist(), strict=True))
        assert len(set(pairs)) == width
        own = torch.stack([everything[row, parent, token] for parent, token in pairs])
        assert (chosen[row] - own).abs().max() <= units
        best = everything[row].flatten().sort(descending=True).values[:width]
        assert (chosen[row] - best).abs().max() <= units


@both
@pytest.mark.parametrize(
    "nodes, vocab, width", [(1, 5, 3), (1, 5, 5), (4, 5, 20), (3, 70, 7), (6, 7, 9), (2, 70, 16), (1, 70, 60)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_best_children_against_sorting_everything(children, nodes, vocab, width, dtype):
    check(children, nodes, vocab, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nodes, width", [(1, 4), (4, 16), (16, 16), (16, 64), (64, 16), (300, 16)])
@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
def test_on_a_gpu(nodes, width, vocab, dtype):
    check(fused_on_gpu, nodes, vocab, width, dtype, "cuda")


@both
def test_impossible_tokens_come_last(children):
    logits = torch.full((1, 2, 4), -math.inf)
    logits[0, 0, 2] = logits[0, 1, 1] = 0.0
    tokens, parents, scores = children(logits, torch.tensor([[-2.0, -1.0]]), 3)
    assert tokens[0, :2].tolist() == [1, 2] and parents[0, :2].tolist() == [1, 0]
    assert scores.tolist() == [[-1.0, -2.0, -math.inf]]


@both
def test_rounding_never_lifts_a_child_above_its_parent(children):
    """Pruning relies on it: a node may not outrank the parent it hangs on, however sure the draft is."""
    logits = 3 * torch.randn(3, 4, 50)
    logits[..., 7] += 40
    scores = -20 * torch.rand(3, 4)
    _, parents, chosen = children(logits, scores, 4)
    assert (chosen <= scores.gather(1, parents)).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab, width", [(40, 7), (70, 16), (6, 12)])
def test_of_equals_the_smaller_node_and_token(dtype, vocab, width):
    """Three nodes with the same logits, of which there are five kinds; minus zero is zero."""
    logits = torch.randint(-2, 3, (2, 1, vocab)).to(dtype).expand(-1, 3, -1).contiguous()
    logits[:, :, ::3] *= -1.0
    tokens, parents, _ = fused(logits, torch.full((2, 3), -1.5), width)
    for row in range(2):
        values = (logits[row] + 0.0).tolist()
        order = sorted((-values[node][token], node, token) for node in range(3) for token in range(vocab))
        expected = [(node, token) for _, node, token in order[:width]]
        assert list(zip(parents[row].tolist(), tokens[row].tolist(), strict=True)) == expected


@both
def test_tokens_of_a_draft_vocabulary(children):
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 5.0]]])
    tokens, parents, _ = children(logits, torch.zeros(1, 2), 2, torch.tensor([7, 30, 90]))
    assert tokens.tolist() == [[90, 30]] and parents.tolist() == [[1, 0]]


@interpreted
def test_a_level_too_wide_for_the_kernels():
    check(fused, 2, 300, 65, torch.float32)
    check(fused, 300, 20, 16, torch.float32)
