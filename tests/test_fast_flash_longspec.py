"""FlashAttention over the prefix and the tree behind it, against attention written out in float64.

The packages need a GPU; without one, stand-ins check how they are called and answer as they do, and Triton's
interpreter runs the launch over the tree.
"""

import functools
import importlib
import re
import sys
import types

import pytest
import torch
from helpers import interpreted
from reference_attention import INF, spans_of
from transformers.utils import logging
from tree_cases import CPU, SPANS, case, check, random_tree, rest_slow

from hf_longspec.modeling import fast_choose_longspec
from hf_longspec.modeling.attention_longspec import Memo, Nodes, Prefix, attend, eager_prefix, merged_attention
from hf_longspec.modeling.engine_longspec import Demand
from hf_longspec.modeling.fast_choose_longspec import build_misfit, load_backend, resolve_backend

CUDA = torch.device("cuda")


# --- how the packages are called -------------------------------------------------------------------------------------


class StandIn:
    """What both packages say that `flash_attn_with_kvcache` computes, and what they ask of its arguments."""

    def __init__(self, nothing, metadata=False):
        self.nothing, self.metadata, self.shapes, self.plans = nothing, metadata, [], []

    def plan(self, batch, length, slots, heads, kv_heads, dim, ends, *, qkv_dtype, cache_leftpad, has_softcap):
        assert ends.dtype == cache_leftpad.dtype == torch.int32 and qkv_dtype in (torch.float16, torch.bfloat16)
        self.plans.append(torch.tensor([batch, length, slots, heads, kv_heads, dim, int(has_softcap)]))
        return self.plans[-1]

    def attend(
        self, query, key, value, *, cache_seqlens, cache_leftpad, softmax_scale, softcap, return_softmax_lse, **more
    ):
        batch, length, heads, dim = query.shape
        slots, kv_heads = key.shape[1:3]
        assert key.shape == value.shape == (batch, slots, kv_heads, dim) and return_softmax_lse
        for states in (query, key, value):
            assert states.stride(-1) == 1
        for lengths in (cache_seqlens, cache_leftpad):
            assert lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.shape == (batch,)
        if self.metadata:
            expected = [batch, length, slots, heads, kv_heads, dim, int(softcap > 0)]
            assert more.pop("scheduler_metadata").tolist() == expected
        assert not more
        self.shapes.append((length, heads))
        mask = torch.zeros(batch, length, slots, dtype=torch.bool)
        for row, (start, end) in enumerate(zip(cache_leftpad.tolist(), cache_seqlens.tolist(), strict=True)):
            mask[row, :, start:end] = True
        states = (part.transpose(1, 2) for part in (query, key, value))
        out, lse = attend(*states, mask, softmax_scale, softcap or None)
        out = torch.empty_like(query).copy_(out.transpose(1, 2))  # in the order of the queries, as FlashAttention-2
        result = out, lse.masked_fill(lse == -INF, self.nothing)
        return (*result, torch.tensor([]), torch.tensor([])) if self.metadata else result


def flash(version):
    """A stand-in for FlashAttention-2 or -3, and it as a `Flash`."""
    from hf_longspec.modeling.fast_flash_longspec import flash_2, flash_3

    if version == 2:
        package = StandIn(nothing=INF)
        return package, functools.partial(flash_2, package.attend)
    package = StandIn(nothing=-INF, metadata=True)
    return package, functools.partial(flash_3, package.attend, package.plan)


def attention_of(version):
    from hf_longspec.modeling.fast_flash_longspec import flash_attention

    package, function = flash(version)
    return package, functools.partial(flash_attention, function)


SHAPES = [(4, 2, 1), (6, 2, 5), (4, 4, 5)]  # query heads, key/value heads, nodes


@interpreted
@pytest.mark.parametrize(
    "version, heads, kv_heads, nodes, spans",
    rest_slow(
        [(version, *shape, spans) for version in (2, 3) for shape in SHAPES for spans in SPANS],
        [
            *[(2, *SHAPES[1], spans) for spans in SPANS],
            *[(version, *SHAPES[0], "rows") for version in (2, 3)],
            (2, *SHAPES[2], "a cut block"),
            (3, *SHAPES[1], "rows"),
            (3, *SHAPES[1], "nothing"),
        ],
    ),
)
def test_prefix_and_tree(version, heads, kv_heads, nodes, spans):
    package, attention = attention_of(version)
    check(attention, SPANS[spans], heads=heads, kv_heads=kv_heads, nodes=nodes, dtype=torch.float16)
    packs = version == 2 and nodes > 1 and heads > kv_heads
    groups = heads // kv_heads
    assert package.shapes == [(groups * nodes, kv_heads) if packs else (nodes, heads)]


@interpreted
@pytest.mark.parametrize("version", [2, 3])
def test_soft_cap_and_sinks_reach_both_parts(version):
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    check(attention_of(version)[1], [(0, 130), (4, 9)], dtype=torch.float16, softcap=2.0, sinks=sinks)


@interpreted
@pytest.mark.parametrize("version", rest_slow([2, 3], [3]))
@pytest.mark.parametrize("options", [{"masked": True}, {"value_dim": 24}, {"dtype": torch.float32}], ids=str)
def test_what_the_packages_cannot_goes_through_our_kernel(version, options):
    package, attention = attention_of(version)
    check(attention, [(3, 130), (0, 40)], **{"dtype": torch.float16, **options})
    assert not package.shapes


@interpreted
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])], ids=["", "sinks"])
def test_a_prefix_alone(version, sinks):
    """The draft's cross-attention. Rows that see nothing get nothing."""
    query, key, value, *_ = case(3, 4, 2, 3, 80, 16, 16, torch.float16)
    prefix = Prefix(key, value, spans_of([(5, 60), (0, 70), (4, 4)], CPU), None)
    ours = attention_of(version)[1](query, prefix, None, 0.25, None, sinks)
    expected = merged_attention(eager_prefix, query, prefix, None, 0.25, None, sinks)
    assert ours.is_contiguous() and ours.dtype == torch.float16 and not ours[2].any()
    torch.testing.assert_close(ours, expected)


@interpreted
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("nodes", [1, 3])
def test_out_and_log_sum_exp_are_those_of_the_reference(version, nodes):
    from hf_longspec.modeling.fast_flash_longspec import flash_prefix

    query, key, value, *_ = case(3, 4, 2, nodes, 80, 16, 16, torch.float16)
    prefix = Prefix(key, value, spans_of([(5, 60), (0, 70), (4, 4)], CPU), None)
    out, lse = flash_prefix(flash(version)[1], query, prefix, 0.25, None)
    expected = eager_prefix(query, prefix, 0.25, None)
    torch.testing.assert_close((out.float(), lse), expected, atol=1e-3, rtol=1e-3)


@interpreted
def test_queries_are_packed_where_that_saves_tiles():
    """FlashAttention-2 gives a head whole tiles of 64 queries."""
    for nodes, heads, kv_heads, expected in [
        (16, 8, 2, (64, 2)),  # four heads of 16 in one tile
        (64, 8, 2, (64, 8)),  # four full tiles either way
        (69, 8, 2, (276, 2)),  # five tiles instead of eight
        (1, 8, 2, (1, 8)),  # it does that itself
        (16, 2, 2, (16, 2)),
    ]:
        package, function = flash(2)
        query, key, value, *_ = case(1, heads, kv_heads, nodes, 20, 16, 16, torch.float16)
        function(query, Prefix(key, value, spans_of([(0, 20)], CPU), None), 0.25, None)
        assert package.shapes == [expected]


@interpreted
def test_the_work_is_planned_once_a_round_and_shape():
    package, function = flash(3)
    spans = spans_of([(0, 20)], CPU)
    for nodes, softcap in [(3, None), (3, None), (5, None), (3, 2.0), (3, None)]:
        query, key, value, *_ = case(1, 4, 2, nodes, 20, 16, 16, torch.float16)
        function(query, Prefix(key, value, spans, None), 0.25, softcap)
    assert len(package.plans) == 3 and len(package.shapes) == 5


# --- who can be served -----------------------------------------------------------------------------------------------


def demand(device=CUDA, dtype=torch.bfloat16, head_dim=128, softcap=None):
    return Demand(device, dtype, head_dim, softcap)


@pytest.mark.parametrize(
    "asked, reason",
    [
        (demand(device=CPU), r"needs a CUDA device, got cpu"),
        (demand(dtype=torch.float32), r"needs a target in float16 or bfloat16, got torch\.float32"),
        (demand(head_dim=63), r"multiple of 8 and at most 256, got 63"),
        (demand(head_dim=264), r"multiple of 8 and at most 256, got 264"),
    ],
)
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
def test_backend_asked_for_by_name_says_why_it_cannot(monkeypatch, tmp_path, name, asked, reason):
    packages(monkeypatch, tmp_path, flash_attn="", fa3_fwd_interface="")
    with pytest.raises(ValueError, match=rf"attention_backend='{name}' cannot run here: .*{reason}"):
        resolve_backend(name, asked)


def packages(monkeypatch, folder, version="2.8.3", **sources):
    """Packages of these names and sources, and no other FlashAttention."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    if "flash_attn" in sources:
        information = folder / f"flash_attn-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(fast_choose_longspec, "FLASH_3", tuple(sources))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("flash_attn_2", "the package flash_attn is not installed"),
        ("flash_attn_3", r"no package with FlashAttention-3 is installed \(flash_attn_interface, or the wheel"),
    ],
)
def test_a_package_that_is_not_installed(monkeypatch, name, reason):
    own = importlib.util.find_spec
    util = types.SimpleNamespace(find_spec=lambda name: None if name.startswith(("flash_attn", "fa3")) else own(name))
    monkeypatch.setattr(fast_choose_longspec.importlib, "util", util)
    with pytest.raises(ValueError, match=f"attention_backend='{name}' cannot run here: {reason}"):
        resolve_backend(name, demand(device=CPU))


def test_a_package_that_is_too_old(monkeypatch, tmp_path):
    packages(monkeypatch, tmp_path, version="2.6.3", flash_attn="")
    with pytest.raises(ValueError, match=r"flash_attn 2\.7 or newer, got 2\.6\.3"):
        resolve_backend("flash_attn_2", demand())


SYMBOL = "undefined symbol: _ZN3c105Error"
# How packages fail at their import: their module, its source, and what is said.
FAULTS = {
    "missing symbol": (f"raise ImportError('{SYMBOL}')", f"cannot be imported: {SYMBOL}"),
    "missing library": (
        "raise OSError('libcudart.so.13: no such file')",
        r"cannot be imported: libcudart\.so\.13: no",
    ),
    "known operators": ("raise RuntimeError('Only a single one\\nat 0x0')", "cannot be imported: Only a single one$"),
    "too old": ("", "has no attribute 'flash_attn_with_kvcache'"),
}


@interpreted
@pytest.mark.parametrize("source, said", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name, module", [("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")])
def test_a_package_that_cannot_be_imported(monkeypatch, tmp_path, name, module, source, said):
    """As one that was built for another torch."""
    broken(monkeypatch, tmp_path, **{module: source})
    with pytest.raises(ImportError, match=rf"^attention_backend='{name}' cannot be loaded: .*{module}'? {said}"):
        load_backend(name)


@interpreted
@pytest.mark.parametrize("source, said", FAULTS.values(), ids=FAULTS)
def test_auto_passes_a_broken_package_over(monkeypatch, tmp_path, caplog, source, said):
    """On a Hopper GPU, as far as the choice can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    broken(monkeypatch, tmp_path, flash_attn_interface=source)
    assert [resolve_backend("auto", demand()).name for _ in range(2)] == ["triton", "triton"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and re.search(said, record.getMessage())
    with pytest.raises(ImportError, match=f"^attention_backend='flash_attn_3' cannot be loaded: .*{said}"):
        resolve_backend("flash_attn_3", demand())


def test_auto_passes_a_broken_triton_over(monkeypatch, tmp_path, caplog):
    broken(monkeypatch, tmp_path, triton=f"raise ImportError('{SYMBOL}')", flash_attn_interface="")
    assert [resolve_backend("auto", demand()).name for _ in range(2)] == ["torch", "torch"]
    (record,) = caplog.records
    assert f"the package triton cannot be imported: {SYMBOL}" in record.getMessage()
    with pytest.raises(ImportError, match=f"^the package triton cannot be imported: {SYMBOL}"):
        resolve_backend("triton", demand())


def broken(monkeypatch, folder, **sources):
    """Packages of these sources, as if they had not been imported yet, and nothing said so far."""
    for module in sources:
        monkeypatch.setitem(sys.modules, module, None)  # taken off again in the end, also what is imported here
        del sys.modules[module]
    packages(monkeypatch, folder, **sources)
    logging.set_verbosity_warning()  # whatever a test before asked for
    logging.warning_once.cache_clear()


FLAGS = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_SOFTCAP": True}
FLAGS |= {"FLASHATTENTION_DISABLE_HDIM192": True, "FLASHATTENTION_DISABLE_HDIM256": True}


@pytest.mark.parametrize(
    "asked, reason",
    [
        (demand(), None),
        (demand(dtype=torch.float16), "fa3_fwd_interface is built without float16"),
        (demand(softcap=30.0), r"built without soft-capping, the target has softcap=30\.0"),
        (demand(head_dim=136), "built for head dimensions of at most 128, got 136"),
    ],
)
def test_what_a_build_left_out(asked, reason):
    assert build_misfit("fa3_fwd_interface", {}, asked) is None
    said = build_misfit("fa3_fwd_interface", FLAGS, asked)
    assert said is None if reason is None else re.search(reason, said)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def backend_on_gpu(name, dtype, dim, softcap=None):
    asked = Demand(CUDA, dtype, dim, softcap)
    if reason := fast_choose_longspec.MISFITS[name](asked):
        pytest.skip(f"{name}: {reason}")
    return load_backend(name)


BFLOAT16 = [(torch.bfloat16, dim, nodes) for dim in (64, 80, 96, 128, 256) for nodes in (1, 16, 69)]
FLOAT16 = [(torch.float16, 128, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
@pytest.mark.parametrize(
    "dtype, dim, nodes", [*BFLOAT16, (torch.bfloat16, 128, 64), (torch.bfloat16, 128, 128), *FLOAT16]
)
@pytest.mark.parametrize("spans", [[(3, 700)], [(0, 900), (5, 6), (9, 9), (100, 228)]], ids=["one row", "rows"])
def test_on_a_gpu(name, dtype, dim, nodes, spans):
    for softcap in (None, 20.0) if nodes == 16 else (None,):
        attention = backend_on_gpu(name, dtype, dim, softcap).attention
        options = {} if softcap is None else {"softcap": softcap}
        check(attention, spans, heads=8, nodes=nodes, slots=1100, dim=dim, dtype=dtype, device=CUDA, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
def test_a_prefix_alone_on_a_gpu(name):
    """Long enough for many splits; a row without keys gets nothing."""
    backend = backend_on_gpu(name, torch.bfloat16, 128)
    query, key, value, *_ = case(3, 32, 8, 16, 20_000, 128, 128, torch.bfloat16, CUDA)
    prefix = Prefix(key, value, spans_of([(5, 19_990), (0, 70), (4, 4)], CUDA)._replace(host=None), None)
    out, lse = backend.prefix_attention(query, prefix, 0.1, None)
    expected = eager_prefix(query, prefix, 0.1, None)
    torch.testing.assert_close(out.float(), expected[0], atol=2e-3, rtol=0.02)
    torch.testing.assert_close(lse, expected[1], atol=1e-3, rtol=1e-4)
    ours = backend.attention(query, prefix, None, 0.1, None, None)
    torch.testing.assert_close(ours.float(), expected[0].transpose(1, 2), atol=2e-3, rtol=0.02)
    assert not ours[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_layers_of_a_round_in_a_cuda_graph(name, kv_heads):
    """What is made once a round serves all layers; a replay reads lengths that have changed since."""
    attention = backend_on_gpu(name, torch.bfloat16, 128).attention
    layers = []
    for seed in range(3):
        tensors = [part.roll(seed, dims=-1) for part in case(2, 8, kv_heads, 13, 3000, 128, 128, torch.bfloat16, CUDA)]
        layers.append(tensors)
    spans = spans_of([(0, 2000), (7, 900)], CUDA)._replace(host=None)
    tree = random_tree(2, 13).to(CUDA)

    def run():
        once = spans._replace(memo=Memo())
        outs = []
        for query, key, value, fresh_key, fresh_value in layers:
            nodes = Nodes(fresh_key, fresh_value, tree, spans.ends)
            outs.append(attention(query, Prefix(key, value, once, None), nodes, 0.1, None, None))
        return outs

    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = run()
    for step in range(4):
        expected = []
        for query, key, value, fresh_key, fresh_value in layers:
            nodes = Nodes(fresh_key, fresh_value, tree, None)
            expected.append(
                merged_attention(eager_prefix, query, Prefix(key, value, spans, None), nodes, 0.1, None, None)
            )
        graph.replay()
        torch.testing.assert_close(outs, expected, atol=5e-3, rtol=0.02, msg=lambda text, step=step: f"{step}: {text}")
        spans.ends.add_(5)
