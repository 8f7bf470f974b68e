"""`attend`, `merge` and the backends against a float64 softmax written out over expanded heads.

Which token lies in which slot is checked against plain Python.
"""

import math

import pytest
import torch
from level_cases import check_moves
from reference_attention import INF, assert_as_good_as_plain, spans_of

from hf_longspec.modeling import torch_attention_longspec
from hf_longspec.modeling.attention_longspec import (
    Memo,
    Nodes,
    Prefix,
    apply_sinks,
    attend,
    merge,
    move_slots,
    ring_contents,
    write_slots,
)
from hf_longspec.modeling.engine_longspec import Backend, Demand
from hf_longspec.modeling.fast_choose_longspec import by_size, load_backend, resolve_backend

BACKENDS = ("eager", "torch")
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


def tensors(batch, heads, kv_heads, nodes, keys, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, nodes, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    value = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def whole(key):
    """Spans over all keys (B, K, S, D)."""
    return spans_of([(0, key.shape[2])] * key.shape[0], key.device)


def visible(spans, nodes, slots):
    """(B, T, S) bool: the spans as a dense mask."""
    mask = torch.zeros(len(spans), nodes, slots, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, :, start:end] = True
    return mask


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
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_as_good_as_plain_arithmetic(name, dtype, dim, keys):
    query, key, value = tensors(1, 4, 2, nodes=5, keys=keys, dim=dim, dtype=dtype)
    scaling = dim**-0.5
    out, lse = load_backend(name).prefix_attention(query, Prefix(key, value, whole(key), None), scaling, None)
    assert out.shape == (1, 4, 5, dim)
    assert lse.shape == (1, 4, 5) and lse.dtype == torch.float32
    assert_as_good_as_plain((out, lse), query, key, value, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_with_no_keys(name, dtype):
    query, key, value = tensors(2, 4, 2, nodes=3, keys=0, dim=64, dtype=dtype)
    out, lse = load_backend(name).prefix_attention(query, Prefix(key, value, whole(key), None), 0.125, None)
    assert torch.equal(out.float(), torch.zeros(2, 4, 3, 64))
    assert torch.equal(lse, torch.full((2, 4, 3), -INF))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (14, 2)])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_reads_the_cache_where_it_lies(name, heads, kv_heads):
    """Keys are a slice of a larger buffer, queries the transposed view of a projection."""
    query, key, value = tensors(2, heads, kv_heads, nodes=3, keys=50, dim=16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    garbage = torch.full((2, kv_heads, 70, 16), float("nan"))
    key_store, value_store = garbage.clone(), garbage.clone()
    key_store[:, :, 5:55], value_store[:, :, 5:55] = key, value
    spans = spans_of([(5, 55)] * 2, CPU)
    out, lse = load_backend(name).prefix_attention(query, Prefix(key_store, value_store, spans, None), 0.25, None)
    assert_as_good_as_plain((out, lse), query, key, value, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_backend_caps_scores(dtype):
    query, key, value = tensors(1, 4, 2, nodes=3, keys=20, dim=16, dtype=dtype)
    out, lse = load_backend("eager").prefix_attention(query, Prefix(key, value, whole(key), None), 1.0, 2.0)
    assert_as_good_as_plain((out, lse), query, key, value, 1.0, softcap=2.0)
    assert lse.max() <= 2.0 + math.log(20)


def test_torch_backend_refuses_to_forget_the_softcap():
    with pytest.raises(ValueError, match=r"no soft-capping, got softcap=30\.0"):
        query, key, value = tensors(1, 2, 1, 1, 1, 8)
        load_backend("torch").prefix_attention(query, Prefix(key, value, spans_of([(0, 1)], CPU), None), 1.0, 30.0)


# --- rows of different spans -----------------------------------------------------------------------------------------

STAGES = 2  # first the log-sum-exp, then weights that it has part in
RAGGED = {
    "lengths": [(0, 50), (0, 7), (0, 49)],
    "starts": [(5, 60), (0, 60), (59, 60)],
    "both": [(5, 55), (30, 31), (0, 17), (69, 70)],
    "one is empty": [(0, 20), (9, 9), (3, 21)],
    "all are empty": [(0, 0), (9, 9), (70, 70)],
    "far apart": [(0, 3), (60, 70)],
}


def test_spans_by_hand():
    spans = spans_of([(2, 9), (0, 7), (4, 4)], CPU)
    assert spans.starts.tolist() == [2, 0, 4] and spans.ends.tolist() == [9, 7, 4]
    assert spans.starts.dtype == spans.ends.dtype == torch.int64
    assert spans.host == ((2, 9), (0, 7), (4, 4))
    assert spans.common is None and spans.cover(20) == slice(0, 9)
    same = spans_of([(2, 9)] * 3, CPU)
    assert same.common == same.cover(20) == slice(2, 9)
    assert spans_of([(5, 6), (3, 4)], CPU).cover(20) == slice(3, 6)
    on_device = same._replace(host=None)  # as in a CUDA graph
    assert on_device.common is None and on_device.cover(20) == slice(0, 20)


def test_spans_with_one_slot_more():
    spans = spans_of([(2, 9), (4, 4)], CPU)
    assert spans.longer.starts.tolist() == [2, 4] and spans.longer.ends.tolist() == [10, 5]
    assert spans.longer.host == ((2, 10), (4, 5)) and spans.longer is spans.longer  # for all layers of a round
    assert spans._replace(host=None, memo=Memo()).longer.host is None


@pytest.mark.parametrize("host", [[(0, 20), (0, 20)], [(3, 20), (7, 7)]], ids=["alike", "apart"])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_node_alone_needs_no_merge(name, on_device, host):
    """It goes behind its prefix, and all of that is one span."""
    query, key, value = tensors(2, 4, 2, nodes=1, keys=30, dim=16)
    fresh_key, fresh_value = torch.randn(2, 2, 2, 1, 16)
    spans = spans_of(host, CPU)
    spans = spans._replace(host=None) if on_device else spans
    itself = torch.ones(2, 1, 1, dtype=torch.bool)
    for nodes in (Nodes(fresh_key, fresh_value, itself, None), Nodes(fresh_key, fresh_value, itself, spans.ends)):
        outs = load_backend(name).attention(query, Prefix(key, value, spans, None), nodes, 0.25, None, None)
        for row, (start, end) in enumerate(host):
            keys = torch.cat([key[row, :, start:end], fresh_key[row]], dim=1)[None]
            values = torch.cat([value[row, :, start:end], fresh_value[row]], dim=1)[None]
            out = outs[row : row + 1].transpose(1, 2)
            assert_as_good_as_plain((out,), query[row : row + 1], keys, values, 0.25, stages=STAGES)
    for row, (_, end) in enumerate(host):
        assert torch.equal(key[row, :, end], fresh_key[row, :, 0])
        assert torch.equal(value[row, :, end], fresh_value[row, :, 0])


def ragged(host, heads, kv_heads, dim, dtype, slots=70):
    """Queries and stores for spans; what no row may see is NaN, what another row sees holds other numbers."""
    query, key, value = tensors(len(host), heads, kv_heads, nodes=5, keys=slots, dim=dim, dtype=dtype)
    seen_by_any = visible(host, 1, slots)[:, 0].any(dim=0)
    cover = slice(min(start for start, _ in host), max(end for _, end in host))
    seen_by_any[cover] = True
    for store in (key, value):
        store[:, :, ~seen_by_any] = float("nan")
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 63, 128])
@pytest.mark.parametrize("host", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_with_rows_of_different_spans(name, host, dim, dtype):
    query, key, value = ragged(host, 4, 2, dim, dtype)
    scaling = dim**-0.5
    out, lse = load_backend(name).prefix_attention(query, Prefix(key, value, spans_of(host, CPU), None), scaling, None)
    assert out.shape == query.shape and lse.shape == query.shape[:3] and lse.dtype == torch.float32
    key, value = key.nan_to_num(), value.nan_to_num()
    assert_as_good_as_plain((out, lse), query, key, value, scaling, mask=visible(host, 5, 70), stages=STAGES)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (14, 2)])
@pytest.mark.parametrize("host", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_is_what_it_is_alone(name, host, heads, kv_heads):
    """Whatever the others hold: bit by bit the same among other contents, and by arithmetic the same as alone."""
    query, key, value = ragged(host, heads, kv_heads, 16, torch.float32)
    prefix = load_backend(name).prefix_attention
    spans = spans_of(host, CPU)
    out, lse = prefix(query, Prefix(key, value, spans, None), 0.25, None)
    single = []
    for row, span in enumerate(host):
        others = torch.arange(len(host)) != row
        changed = [states.clone() for states in (query, key, value)]
        for states in changed:
            states[others] = 7 * states[others]
        again = prefix(changed[0], Prefix(*changed[1:], spans, None), 0.25, None)
        assert torch.equal(again[0][row], out[row]) and torch.equal(again[1][row], lse[row])
        part = slice(row, row + 1)
        held = Prefix(key[part], value[part], spans_of([span], CPU), None)
        single.append(prefix(query[part], held, 0.25, None))
    alone = [torch.cat(parts) for parts in zip(*single, strict=True)]
    if name == "torch":
        assert torch.equal(out, alone[0]) and torch.equal(lse, alone[1])
    inputs = query, key.nan_to_num(), value.nan_to_num(), 0.25
    for result in (alone, (out, lse)):
        assert_as_good_as_plain(result, *inputs, mask=visible(host, 5, 70), stages=STAGES)


def test_eager_backend_caps_scores_of_rows_of_different_spans():
    host = RAGGED["both"]
    query, key, value = ragged(host, 4, 2, 16, torch.float32)
    out, lse = load_backend("eager").prefix_attention(query, Prefix(key, value, spans_of(host, CPU), None), 1.0, 2.0)
    key, value = key.nan_to_num(), value.nan_to_num()
    assert_as_good_as_plain((out, lse), query, key, value, 1.0, mask=visible(host, 5, 70), stages=STAGES, softcap=2.0)


@pytest.mark.parametrize("parts, part", [(1, 70), (2, 35), (3, 24), (70, 1)])
@pytest.mark.parametrize("host", RAGGED.values(), ids=RAGGED)
def test_sequences_of_a_flat_store(host, parts, part):
    """Each part of the keys of each K/V head of each row is a sequence: where it begins, how much of it is held."""
    kv_heads, slots = 3, 70
    store = torch.arange(len(host) * kv_heads * slots).view(len(host), kv_heads, slots)
    begins, held = torch_attention_longspec._sequences(spans_of(host, CPU), kv_heads, slots, parts, part)
    assert begins.dtype == held.dtype == torch.int32
    assert len(begins) == len(held) + 1 == len(host) * kv_heads * parts + 1
    sequences = iter(zip(begins.tolist(), held.tolist(), strict=False))
    for row, (start, end) in enumerate(host):
        for head in range(kv_heads):
            keys = []
            for _ in range(parts):
                begin, count = next(sequences)
                assert 0 <= count <= part
                keys += store.flatten()[begin : begin + count].tolist()
            assert keys == store[row, head, start:end].tolist()


def variable_length_kernel(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k
):
    """What the CUDA kernel is said to compute, sequence by sequence; lse is +inf for queries without keys."""
    assert query.dim() == key.dim() == 3 and not causal and dropout == 0.0
    out, lse = torch.zeros_like(query), query.new_full((query.shape[1], len(query)), float("inf"), dtype=torch.float32)
    for index, held in enumerate(seqused_k.tolist()):
        rows = slice(int(cum_seq_q[index]), int(cum_seq_q[index + 1]))
        keys = slice(int(cum_seq_k[index]), int(cum_seq_k[index]) + held)
        assert rows.stop - rows.start <= max_q and held <= max_k
        if held:
            single = [
                states[part].transpose(0, 1)[None] for states, part in ((query, rows), (key, keys), (value, keys))
            ]
            over, log_sum = attend(*single, None, scale)
            out[rows], lse[:, rows] = over[0].transpose(0, 1), log_sum[0]
    return out, lse, None, None, None


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("host", RAGGED.values(), ids=RAGGED)
def test_one_kernel_for_rows_of_different_spans(monkeypatch, host, heads, kv_heads):
    """How stores and queries are laid out for the CUDA kernel; the kernel itself is tested on a GPU."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", variable_length_kernel)
    query, key, value = ragged(host, heads, kv_heads, 16, torch.float32)
    out, lse = torch_attention_longspec._flash_by_row(query, key, value, spans_of(host, CPU), 0.25)
    assert_as_good_as_plain(
        (out, lse), query, key.nan_to_num(), value.nan_to_num(), 0.25, mask=visible(host, 5, 70), stages=STAGES
    )


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
    assert resolve_backend(name, Demand(device, torch.float32, head_dim, softcap)).name == expected


@pytest.mark.parametrize(
    "device, head_dim, softcap, reason",
    [
        (CPU, 64, 50.0, r"caps its attention scores \(softcap=50\.0\)"),
        (META, 64, None, r"no flash kernel with log-sum-exp for torch.float32 on meta"),
        (CUDA, 63, None, r"multiple of 8 and at most 256, got 63"),
        (CUDA, 264, None, r"multiple of 8 and at most 256, got 264"),
    ],
)
def test_backend_asked_for_by_name_says_why_it_cannot(device, head_dim, softcap, reason):
    with pytest.raises(
        ValueError, match=rf"attention_backend='torch' cannot run here: .*{reason}.*use 'auto' or 'eager'"
    ):
        resolve_backend("torch", Demand(device, torch.float32, head_dim, softcap))


def test_only_the_reference_computes_in_float64_on_a_gpu():
    demand = Demand(CUDA, torch.float64, 64, None)
    for name, reason in (("torch", "for torch.float64 on cuda"), ("triton", "in float32, got a target in float64")):
        with pytest.raises(ValueError, match=f"{name!r} cannot run here: .*{reason}"):
            resolve_backend(name, demand)
    assert resolve_backend("auto", demand).name == "eager"
    assert resolve_backend("auto", Demand(CPU, torch.float64, 64, None)).name == "torch"


def test_the_number_of_queries_chooses_between_two_backends():
    small, large = (
        Backend(name, lambda *given, name=name: (name, len(given)), lambda *given, name=name: (name, len(given)))
        for name in ("small", "large")
    )
    both = by_size(small, large)
    prefix = Prefix(torch.empty(1, 2, 9, 4), torch.empty(1, 2, 9, 4), spans_of([(0, 9)], CPU), None)
    for nodes, name in ((1, "small"), (16, "small"), (17, "large"), (64, "large")):  # four heads a key/value head
        query = torch.empty(1, 8, nodes, 4)
        assert both.attention(query, prefix, None, 0.5, None, None) == (name, 6)
        assert both.prefix_attention(query, prefix, 0.5, None) == (name, 4)
    assert both.name == "small and large"


# --- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [1, 2, 3, 7])
def test_ring_contents_by_filling_a_ring(ring):
    slots = [-1] * ring
    for token in range(25):
        held = ring_contents(torch.tensor([token, 24]), ring)
        assert [max(position, -1) for position in held[0].tolist()] == slots
        assert sorted(held[1].tolist()) == list(range(24 - ring, 24))
        slots[token % ring] = token


@pytest.mark.parametrize("dim, value_dim", [(4, 4), (6, 5)])
def test_moves_read_before_they_write(dim, value_dim):
    check_moves(move_slots, dim, value_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_slots_are_written_to_the_bit_in_every_format(dtype):
    """Two-byte floats go through integers on a CPU; numbers, infinities and what is no number arrive as they are."""
    states = torch.tensor([1.0, -0.0, float("inf"), float("nan"), 3e-5, -7.0]).to(dtype).repeat(1, 2, 3, 1)
    store, other = torch.zeros(1, 2, 9, 6, dtype=dtype), torch.ones(1, 2, 9, 6, dtype=dtype)
    write_slots(store, torch.tensor([[4, 0, 8]]), states.transpose(1, 2).contiguous().transpose(1, 2))
    width = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(store[:, :, [4, 0, 8]].view(width), states.view(width))
    assert store[:, :, [1, 2, 3, 5, 6, 7]].count_nonzero() == 0
    move_slots(store, other, torch.tensor([[4, 0]]), torch.tensor([[0, 1]]))
    assert torch.equal(store[:, :, [0, 1]].view(width), states[:, :, :2].view(width)) and bool((other == 1).all())
