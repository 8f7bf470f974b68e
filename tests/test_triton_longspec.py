"""The fused kernel against attention written out in float64: in Triton's interpreter, and on a GPU where there is one.

The interpreter multiplies no bfloat16, so float16 stands for it on a CPU.
"""

import pytest
import torch
from helpers import interpreted, tiny_draft, tiny_target
from reference_attention import spans_of
from tree_cases import CPU, SPANS, case, check

from hf_longspec.modeling.attention_longspec import Prefix, attend, merge, merged_attention
from hf_longspec.modeling.backends_longspec import load_backend


def attention():
    return load_backend("triton").attention


@interpreted
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_prefix_and_tree_in_one_pass(spans, dtype, masked):
    check(attention(), spans, dtype=dtype, masked=masked)


@interpreted
@pytest.mark.parametrize("dim, value_dim", [(16, 16), (63, 63), (64, 64), (80, 80), (96, 96), (128, 128), (24, 40)])
def test_head_dimensions(dim, value_dim):
    check(attention(), [(3, 130)], dim=dim, value_dim=value_dim)


@interpreted
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 1), (14, 2)])
@pytest.mark.parametrize("nodes", [1, 16, 33, 70])
def test_rows_of_tiles(heads, kv_heads, nodes):
    """Fewer rows than a tile has, tiles that are cut, and more of a tree than a block of keys."""
    check(attention(), [(0, 150)], heads=heads, kv_heads=kv_heads, nodes=nodes)


@interpreted
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_and_softcap(softcap):
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    check(attention(), [(0, 130), (4, 9)], softcap=softcap, sinks=sinks)


@interpreted
def test_tiles_have_stages_that_fit_into_shared_memory():
    """Of heads of 128 in 16 bits, a stage of 64 keys and values is 32 KiB, 128 queries are as much."""
    from hf_longspec.modeling.fast_triton_attention_longspec import choose_tiles

    assert choose_tiles(256, 128, 2, shared=float("inf"))[:4] == (128, 64, 8, 3)
    assert choose_tiles(256, 128, 2, shared=128 * 1024)[:4] == (128, 64, 8, 3)
    assert choose_tiles(256, 128, 2, shared=99 * 1024)[:4] == (128, 64, 8, 2)
    assert choose_tiles(40, 128, 2, shared=64 * 1024)[:4] == (64, 64, 4, 1)
    assert choose_tiles(4, 128, 2, shared=99 * 1024).rows == 16


@interpreted
def test_a_row_that_sees_nothing():
    """Over a prefix without keys: out 0, log-sum-exp −inf, as the reference says; in a merge it has no part."""
    query, key, value, *_ = case(2, 4, 2, 3, 80, 16, 16, torch.float32)
    prefix = Prefix(key, value, spans_of([(5, 5), (0, 70)], CPU), None)
    out, lse = load_backend("triton").prefix(query, prefix, 0.25, None)
    assert not out[0].any() and bool((lse[0] == float("-inf")).all())
    expected = attend(query[1:], key[1:, :, :70], value[1:, :, :70], None, 0.25)
    torch.testing.assert_close((out[1:], lse[1:]), expected)
    merged, whole = merge(out, lse, out, lse)
    assert not merged[0].any() and not merged.isnan().any() and whole[0].isneginf().all()


@interpreted
def test_a_prefix_alone_is_the_prefix_of_the_merged_backends():
    query, key, value, *_ = case(2, 4, 2, 3, 80, 16, 16, torch.float32)
    prefix = Prefix(key, value, spans_of([(5, 60), (0, 70)], CPU), None)
    ours = load_backend("triton").attention(query, prefix, None, 0.25, None, None)
    torch.testing.assert_close(
        ours, merged_attention(load_backend("eager").prefix, query, prefix, None, 0.25, None, None)
    )


@interpreted
@pytest.mark.parametrize("family, do_sample", [("llama", False), ("gemma2", True)])
def test_the_text_is_the_one_of_plain_generate(family, do_sample):
    """Window, cross-attention and verification by the kernel: text and guesses are what they are by the reference."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=4, tree_shape=(2, 2))
    ids = torch.randint(2, 13, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": do_sample, "return_dict_in_generate": True}

    def write(**assistant):
        torch.manual_seed(3)
        return target.generate(ids, **options, **assistant)

    expected = write(assistant_model=draft)
    draft.config.attention_backend = "triton"
    output = write(assistant_model=draft)
    assert output.sequences.tolist() == write().sequences.tolist()
    assert output.accept_lengths == expected.accept_lengths


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("nodes", [1, 16, 64, 69, 128])
@pytest.mark.parametrize("spans", [[(0, 0)], [(3, 700)], [(0, 900), (5, 6), (9, 9), (100, 228)]])
def test_on_a_gpu(spans, nodes, dim, dtype):
    device = torch.device("cuda")
    for options in ({}, {"masked": True}, {"softcap": 20.0}):
        check(attention(), spans, heads=8, nodes=nodes, slots=1100, dim=dim, dtype=dtype, device=device, **options)
