"""`attend`, `merge` and the backends against a float64 softmax written out over expanded heads."""

import math

import pytest
import torch
from reference_attention import INF, assert_as_good_as_plain

from hf_longspec.modeling.attention_longspec import BACKENDS, apply_sinks, attend, merge, resolve_backend


def tensors(batch, heads, kv_heads, nodes, keys, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, nodes, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    value = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_definition(heads, kv_heads, softcap, masked):
    query, key, value = tensors(2, heads, kv_heads, nodes=5, keys=9, dim=8)
    mask = torch.rand(2, 5, 9) < 0.5 if masked else None
    out, lse = attend(query, key, value, mask, 0.4, softcap)
    assert out.dtype == lse.dtype == torch.float32
    assert_as_good_as_plain((out, lse), query, key, value, 0.4, mask=mask, softcap=softcap)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_computes_half_precision_inputs_in_float32(masked):
    query, key, value = tensors(2, 4, 2, nodes=5, keys=9, dim=8, dtype=torch.bfloat16)
    mask = torch.rand(2, 5, 9) < 0.5 if masked else None
    out, lse = attend(query, key, value, mask, 0.4)
    assert out.dtype == lse.dtype == torch.float32
    assert_as_good_as_plain((out, lse), query.float(), key.float(), value.float(), 0.4, mask=mask)


def test_each_row_of_the_batch_has_its_own_mask():
    query, key, value = tensors(2, 4, 2, nodes=2, keys=3, dim=8)
    mask = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 1, 0]]], dtype=torch.bool)
    out, _ = attend(query, key, value, mask, 1.0)
    expanded = value.repeat_interleave(2, 1)
    torch.testing.assert_close(out[0], expanded[0, :, [0, 1]])
    torch.testing.assert_close(out[1], expanded[1, :, [2, 1]])


def test_row_that_sees_nothing():
    query, key, value = tensors(1, 4, 2, nodes=3, keys=4, dim=8)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 1] = False
    out, lse = attend(query, key, value, mask, 0.5)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 4, 8))
    assert torch.equal(lse[:, :, 1], torch.full((1, 4), -INF))
    assert torch.isfinite(lse[:, :, [0, 2]]).all()
    assert not out.isnan().any()


def test_attend_to_no_keys():
    query, key, value = tensors(2, 4, 2, nodes=3, keys=0, dim=8)
    for mask in (None, torch.ones(2, 3, 0, dtype=torch.bool)):
        out, lse = attend(query, key, value, mask, 0.5)
        assert torch.equal(out, torch.zeros(2, 4, 3, 8))
        assert torch.equal(lse, torch.full((2, 4, 3), -INF))


def test_large_scores_do_not_overflow():
    _, key, value = tensors(1, 1, 1, nodes=1, keys=3, dim=4)
    out, lse = attend(torch.eye(4)[None, None] * 1e4, key, value, None, 1.0)
    best = key[0, 0].max(dim=0)  # query i picks the largest component i
    assert torch.equal(lse[0, 0], best.values * 1e4)
    assert torch.equal(out[0, 0], value[0, 0, best.indices])


@pytest.mark.parametrize("split", [0, 1, 4, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_merge_is_attention_over_the_union(split, softcap):
    query, key, value = tensors(2, 4, 2, nodes=5, keys=9, dim=8)
    mask = torch.rand(2, 5, 9) < 0.4
    mask[0, 0] = False  # nothing on either side
    mask[1, 1] = True
    parts = [
        attend(query, key[:, :, part], value[:, :, part], mask[:, :, part], 0.4, softcap)
        for part in (slice(None, split), slice(split, None))
    ]
    for first, second in (parts, reversed(parts)):
        out, lse = merge(*first, *second)
        assert out.dtype == lse.dtype == torch.float32
        assert_as_good_as_plain((out, lse), query, key, value, 0.4, mask=mask, softcap=softcap)


def test_merge_with_an_empty_side_changes_nothing():
    query, key, value = tensors(1, 4, 2, nodes=5, keys=9, dim=8)
    out, lse = attend(query, key, value, None, 0.4)
    nothing = torch.zeros_like(out), torch.full_like(lse, -INF)
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    out, lse = merge(*nothing, *nothing)
    assert torch.equal(out, nothing[0]) and torch.equal(lse, nothing[1])


def test_merge_of_sides_that_are_far_apart():
    """Weights e⁰ and e⁻⁵⁰⁰ must not meet in an overflow, nor the difference in a NaN."""
    ones, minus = torch.ones(1, 1, 1, 2), -torch.ones(1, 1, 1, 2)
    high, low = torch.full((1, 1, 1), 400.0), torch.full((1, 1, 1), -100.0)
    out, lse = merge(ones, high, minus, low)
    assert torch.equal(out, ones) and torch.equal(lse, high)


@pytest.mark.parametrize("level", [-3.0, 0.0, 4.0])
def test_sinks_are_one_more_key_of_value_zero(level):
    query, key, value = tensors(2, 4, 2, nodes=3, keys=7, dim=8)
    sinks = level + torch.randn(4)
    mask = torch.rand(2, 3, 7) < 0.7
    out, lse = attend(query, key, value, mask, 0.4)
    assert_as_good_as_plain((apply_sinks(out, lse, sinks),), query, key, value, 0.4, mask=mask, sinks=sinks)


def test_sinks_take_all_where_nothing_is_seen():
    out, lse = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -INF)
    assert torch.equal(apply_sinks(out, lse, torch.tensor([0.0, -50.0])), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [63, 64, 80, 128, 256])
@pytest.mark.parametrize("keys", [1, 2, 37, 600])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backend_is_as_good_as_plain_arithmetic(name, dtype, dim, keys):
    query, key, value = tensors(1, 4, 2, nodes=5, keys=keys, dim=dim, dtype=dtype)
    scaling = dim**-0.5
    out, lse = BACKENDS[name].prefix(query, key, value, scaling, None)
    assert out.shape == (1, 4, 5, dim)
    assert lse.shape == (1, 4, 5) and lse.dtype == torch.float32
    assert_as_good_as_plain((out, lse), query, key, value, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backend_with_no_keys(name, dtype):
    query, key, value = tensors(2, 4, 2, nodes=3, keys=0, dim=64, dtype=dtype)
    out, lse = BACKENDS[name].prefix(query, key, value, 0.125, None)
    assert torch.equal(out.float(), torch.zeros(2, 4, 3, 64))
    assert torch.equal(lse, torch.full((2, 4, 3), -INF))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (14, 2)])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backend_reads_the_cache_where_it_lies(name, heads, kv_heads):
    """Keys are a slice of a larger buffer, queries the transposed view of a projection."""
    query, key, value = tensors(2, heads, kv_heads, nodes=3, keys=50, dim=16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    garbage = torch.full((2, kv_heads, 70, 16), float("nan"))
    key_store, value_store = garbage.clone(), garbage.clone()
    key_store[:, :, 5:55], value_store[:, :, 5:55] = key, value
    out, lse = BACKENDS[name].prefix(query, key_store[:, :, 5:55], value_store[:, :, 5:55], 0.25, None)
    assert_as_good_as_plain((out, lse), query, key, value, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_backend_caps_scores(dtype):
    query, key, value = tensors(1, 4, 2, nodes=3, keys=20, dim=16, dtype=dtype)
    out, lse = BACKENDS["eager"].prefix(query, key, value, 1.0, 2.0)
    assert_as_good_as_plain((out, lse), query, key, value, 1.0, softcap=2.0)
    assert lse.max() <= 2.0 + math.log(20)


def test_torch_backend_refuses_to_forget_the_softcap():
    with pytest.raises(ValueError, match=r"no soft-capping, got softcap=30\.0"):
        BACKENDS["torch"].prefix(*tensors(1, 2, 1, 1, 1, 8), 1.0, 30.0)


CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize(
    "name, device, head_dim, softcap, expected",
    [
        ("auto", CPU, 64, None, "torch"),
        ("auto", CPU, 63, None, "torch"),
        ("auto", CPU, 512, None, "torch"),
        ("auto", CPU, 64, 50.0, "eager"),
        ("auto", CUDA, 128, None, "torch"),
        ("auto", CUDA, 63, None, "eager"),
        ("auto", CUDA, 512, None, "eager"),
        ("auto", META, 64, None, "eager"),
        ("torch", CPU, 64, None, "torch"),
        ("torch", CUDA, 256, None, "torch"),
        ("eager", CPU, 64, None, "eager"),
        ("eager", CUDA, 63, 50.0, "eager"),
    ],
)
def test_resolve_backend(name, device, head_dim, softcap, expected):
    assert resolve_backend(name, device, head_dim, softcap).name == expected


@pytest.mark.parametrize(
    "device, head_dim, softcap, reason",
    [
        (CPU, 64, 50.0, r"caps its attention scores \(softcap=50\.0\)"),
        (META, 64, None, r"no flash kernel with log-sum-exp on meta"),
        (CUDA, 63, None, r"multiple of 8 and at most 256, got 63"),
        (CUDA, 264, None, r"multiple of 8 and at most 256, got 264"),
    ],
)
def test_backend_asked_for_by_name_says_why_it_cannot(device, head_dim, softcap, reason):
    with pytest.raises(
        ValueError, match=rf"attention_backend='torch' cannot run here: .*{reason}.*use 'auto' or 'eager'"
    ):
        resolve_backend("torch", device, head_dim, softcap)
