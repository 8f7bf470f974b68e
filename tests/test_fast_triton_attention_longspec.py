"""The split kernel against attention written out in float64: in Triton's interpreter, and on a GPU where there is one.

The interpreter multiplies no bfloat16, so float16 stands for it on a CPU. The variant behind FlashAttention goes on
from a prefix that the torch backend has read.
"""

import functools
import itertools

import pytest
import torch
from helpers import interpreted, tiny_draft, tiny_target
from reference_attention import INF, spans_of
from tree_cases import CPU, SPANS, case, check, random_tree, rest_slow

from hf_longspec.modeling.attention_longspec import Nodes, Prefix, attend, eager_prefix, merge, merged_attention
from hf_longspec.modeling.fast_choose_longspec import load_backend
from hf_longspec.modeling.torch_attention_longspec import torch_prefix


def attention():
    return load_backend("triton").attention


# --- prefix and tree -------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16]
SHAPES = list(itertools.product([(4, 4), (6, 1), (14, 2)], [1, 16, 33, 70]))  # query and key/value heads, nodes


@interpreted
@pytest.mark.parametrize(
    "spans, dtype, masked",
    rest_slow(
        itertools.product(SPANS, DTYPES, [False, True]),
        [
            *[(spans, torch.float16, False) for spans in SPANS],
            ("rows", torch.float16, True),
            ("a cut block", torch.float32, True),
            ("behind padding", torch.float32, False),
        ],
    ),
    ids=str,
)
def test_prefix_and_tree_in_one_pass(spans, dtype, masked):
    check(attention(), SPANS[spans], dtype=dtype, masked=masked)


@interpreted
@pytest.mark.parametrize(
    "dim, value_dim",
    rest_slow(
        [(16, 16), (63, 63), (64, 64), (80, 80), (96, 96), (128, 128), (24, 40)], [(63, 63), (128, 128), (24, 40)]
    ),
)
def test_head_dimensions(dim, value_dim):
    check(attention(), [(3, 130)], dim=dim, value_dim=value_dim)


@interpreted
@pytest.mark.parametrize("shape, nodes", rest_slow(SHAPES, [((14, 2), 1), ((4, 4), 33)]), ids=str)
def test_rows_of_tiles(shape, nodes):
    """Fewer rows than a tile has, tiles that are cut, and more of a tree than a block of keys."""
    heads, kv_heads = shape
    check(attention(), [(0, 150)], heads=heads, kv_heads=kv_heads, nodes=nodes)


@interpreted
def test_a_tree_is_cut_into_splits():
    """Behind a short prefix splits begin in the tree, and the last one has no share."""
    from hf_longspec.modeling.fast_triton_attention_longspec import Tiles, triton_attention

    tiles = Tiles(rows=64, keys=16, warps=4, stages=1, per_processor=16)
    spans = [(0, 3), (4, 30)]
    check(functools.partial(triton_attention, tiles=tiles), spans, heads=2, kv_heads=2, nodes=40)


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
    out, lse = load_backend("triton").prefix_attention(query, prefix, 0.25, None)
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
        ours, merged_attention(load_backend("eager").prefix_attention, query, prefix, None, 0.25, None, None)
    )


@interpreted
@pytest.mark.parametrize("family, do_sample", rest_slow([("llama", False), ("gemma2", True)], [("gemma2", True)]))
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


# --- the tree behind a known prefix ----------------------------------------------------------------------------------

# How a partial result (B, H, T, D) of K key/value heads may lie in memory.
LAYOUTS = {
    "by head": lambda out, kv_heads: out.contiguous().unflatten(1, (kv_heads, -1)),
    "by token": lambda out, kv_heads: out.transpose(1, 2).contiguous().transpose(1, 2).unflatten(1, (kv_heads, -1)),
    "packed": lambda out, kv_heads: (
        out.unflatten(1, (kv_heads, -1)).permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    ),
}


# What a package may say is the log-sum-exp of a row without keys, each with one layout.
NOTHING = dict(zip(LAYOUTS, (-INF, INF, float("nan")), strict=True))


def tail(query, prefix, nodes, scaling, softcap, sinks, layout="by head", nothing=-INF):
    """The tail behind a real prefix; nothing: what a package says of rows without keys, whose result is garbage."""
    from hf_longspec.modeling.fast_triton_attention_longspec import Partial, tail_attention

    out, lse = (torch_prefix if softcap is None else eager_prefix)(query, prefix, scaling, softcap)
    empty = lse == -INF
    out = LAYOUTS[layout](out.to(query.dtype).masked_fill(empty[..., None], float("nan")), prefix.key.shape[1])
    known = Partial(out, lse.masked_fill(empty, nothing))
    return tail_attention(known, query, prefix, nodes, scaling, softcap, sinks)


@interpreted
@pytest.mark.parametrize(
    "spans, layout, dtype",
    rest_slow(
        itertools.product(SPANS, LAYOUTS, DTYPES),
        [
            *[("rows", layout, torch.float16) for layout in LAYOUTS],
            *[(spans, "by token", torch.float16) for spans in ("one token", "nothing", "a cut block")],
            ("rows", "by head", torch.float32),
        ],
    ),
    ids=str,
)
def test_a_tree_behind_a_known_prefix(spans, layout, dtype):
    attention = functools.partial(tail, layout=layout, nothing=NOTHING[layout])
    check(attention, SPANS[spans], dtype=dtype, on_device=False)


@interpreted
@pytest.mark.parametrize("dim", rest_slow([16, 24, 63, 64, 80, 96, 128, 256], [16, 63, 128, 256]))
def test_head_dimensions_behind_a_known_prefix(dim):
    check(tail, [(3, 130)], dim=dim, on_device=False)


@interpreted
def test_values_of_another_size_than_keys():
    def triton_tail(query, prefix, nodes, scaling, softcap, sinks):
        from hf_longspec.modeling.fast_triton_attention_longspec import Partial, tail_attention

        out, lse = load_backend("triton").prefix_attention(query, prefix, scaling, softcap)
        known = Partial(out.unflatten(1, (2, -1)), lse)
        return tail_attention(known, query, prefix, nodes, scaling, softcap, sinks)

    check(triton_tail, [(3, 130)], dim=24, value_dim=40)


@interpreted
@pytest.mark.parametrize("shape, nodes", rest_slow(SHAPES, [((6, 1), 1), ((14, 2), 16), ((4, 4), 70)]), ids=str)
def test_rows_of_tiles_behind_a_known_prefix(shape, nodes):
    heads, kv_heads = shape
    check(tail, [(0, 150)], heads=heads, kv_heads=kv_heads, nodes=nodes, on_device=False)


@interpreted
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_and_softcap_behind_a_known_prefix(softcap):
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    check(tail, [(0, 130), (4, 9), (7, 7)], softcap=softcap, sinks=sinks, on_device=False)


@interpreted
@pytest.mark.parametrize("name", ["prefix and tree", "tree behind a known prefix"])
def test_a_tree_that_is_in_the_stores(name):
    """A layer that shares another one's keys and values puts nothing there."""
    query, key, value, fresh_key, fresh_value = case(1, 4, 2, 5, 80, 16, 16, torch.float32)
    before = key.clone(), value.clone()
    nodes = Nodes(fresh_key, fresh_value, random_tree(1, 5), None)
    prefix = Prefix(key, value, spans_of([(5, 60)], CPU), None)
    expected = merged_attention(eager_prefix, query, prefix, nodes, 0.25, None, None)
    ours = attention() if name == "prefix and tree" else tail
    torch.testing.assert_close(ours(query, prefix, nodes, 0.25, None, None), expected)
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])


@interpreted
def test_tiles_grow_where_small_ones_would_fill_the_device_twice():
    from hf_longspec.modeling.fast_triton_attention_longspec import choose_rows

    assert choose_rows(256, 8, 132, 64) == 16  # 16 tiles of 8 heads are 128 programs
    assert choose_rows(256, 8 * 4, 132, 64) == 32  # 512 would be too many, 256 are not
    assert choose_rows(256, 8 * 64, 132, 64) == 64
    assert choose_rows(256, 8 * 64, 132, 32) == 32
    assert choose_rows(4, 8, 132, 64) == 16


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("nodes", [1, 16, 64, 69, 128])
@pytest.mark.parametrize("spans", [[(0, 0)], [(3, 700)], [(0, 900), (5, 6), (9, 9), (100, 228)]])
def test_on_a_gpu(spans, nodes, dim, dtype):
    device = torch.device("cuda")
    for options in ({}, {"masked": True}, {"softcap": 20.0}):
        check(attention(), spans, heads=8, nodes=nodes, slots=1100, dim=dim, dtype=dtype, device=device, **options)
