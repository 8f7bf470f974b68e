"""`hf-longspec bench attention`: the inputs, the floors, and that what is timed computes what it should."""

import pytest
import torch

from hf_longspec.benchmark import attention, tables
from hf_longspec.benchmark.attention import Heads
from hf_longspec.benchmark.timing import Speed, milliseconds
from hf_longspec.modeling import fast_choose_longspec
from hf_longspec.modeling.engine_longspec import Demand
from hf_longspec.modeling.fast_choose_longspec import load_backend

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)


def exact(layer):
    """Every query by itself, over a list of the keys that it may see."""
    out = torch.zeros(layer.query.shape, dtype=torch.float64)
    groups = layer.query.shape[1] // layer.key.shape[1]
    nodes = layer.query.shape[2]
    for node in range(nodes):
        line, parent = [node], node
        while parent:
            parent = (parent - 1) // 4
            line.append(parent)
        seen = list(range(layer.context)) + [layer.context + ancestor for ancestor in line]
        for head in range(layer.query.shape[1]):
            keys, values = (store[0, head // groups, seen].double() for store in (layer.key, layer.value))
            weights = (keys @ layer.query[0, head, node].double() * 16**-0.5).softmax(0)
            out[0, head, node] = weights @ values
    return out


@pytest.mark.parametrize("nodes", [1, 7])
def test_all_ways_attend_to_the_prefix_and_to_ancestors(nodes):
    layers = [attention.random_layer(HEADS, 300, nodes, CPU, torch.float32, seed) for seed in range(2)]
    assert layers[0].key.shape == (1, 2, 512, 16)  # as a cache would have it, with room behind
    ways = [attention.with_backend(load_backend(name), layers) for name in ("eager", "torch")]
    for calls in (*ways, attention.with_sdpa(layers)):
        for call, layer in zip(calls, layers, strict=True):
            torch.testing.assert_close(call().double(), exact(layer), atol=1e-5, rtol=1e-5)
    assert not torch.equal(layers[0].key, layers[1].key)


def test_floors_are_of_bytes_and_of_products():
    """One K/V head of 2 dimensions, 6 keys and values in float32 are 96 bytes; 3 nodes × 6 keys × 2 dimensions are 36
    multiplications and additions for the scores and as many for the output, twice that with two query heads.
    """
    speed = Speed(bandwidth=9600.0, operations=288.0)
    case = attention.measure(Heads(2, 1, 2), 3, 3, [load_backend("eager")], speed, CPU, torch.float32, repeats=1)
    assert case.bytes_floor == pytest.approx(10.0)
    assert case.arithmetic_floor == pytest.approx(1000 * 2 * 2 * 36 * 2 / 288.0)
    assert [timed.name for timed in case.timed] == ["eager", "sdpa, mask"]
    assert all(timed.milliseconds > 0 and timed.error < 1e-5 for timed in case.timed)
    assert tables.attention_table([case]).row_count == 1


def test_a_wrong_backend_shows():
    right = load_backend("eager")
    wrong = right._replace(name="wrong", attention=lambda query, *rest: right.attention(-query, *rest))
    case = attention.measure(HEADS, 64, 3, [wrong], Speed(1.0, 1.0), CPU, torch.float32, repeats=1)
    assert case.timed[0].error > 0.1


def test_backends_are_all_that_can_run_or_those_that_are_named():
    found, missing = attention.choose((), CPU, torch.float32, HEADS)
    names = [backend.name for backend in found]
    assert {"eager", "torch"} <= set(names) and "auto" not in names and not set(names) & set(missing)
    assert [backend.name for backend in attention.choose(["torch"], CPU, torch.float32, HEADS)[0]] == ["torch"]
    with pytest.raises(ValueError, match="expected backends among .*eager.*, got wrong"):
        attention.choose(["eager", "wrong"], CPU, torch.float32, HEADS)
    with pytest.raises(ValueError, match="cannot run here"):
        attention.choose(["torch"], torch.device("meta"), torch.float32, HEADS)
    found, missing = attention.choose((), torch.device("meta"), torch.float32, HEADS)
    assert "torch" in missing and "cannot run here" in missing["torch"]


def test_milliseconds_are_of_one_call():
    ran = []
    span = milliseconds([lambda: ran.append(0), lambda: ran.append(1)], CPU, repeats=3)
    assert ran == [0, 1] * 4 and span >= 0


@pytest.mark.gpu
def test_attention_on_a_gpu():
    device, dtype = torch.device("cuda"), torch.bfloat16
    found, _ = attention.choose((), device, dtype, Heads(8, 2, 64))
    for nodes in (1, 16):
        case = attention.measure(Heads(8, 2, 64), 1000, nodes, found, Speed(4e12, 8e14), device, dtype, repeats=3)
        assert all(timed.milliseconds > 0 for timed in case.timed)
        assert all(timed.error < 0.05 for timed in case.timed if timed.error is not None)


def test_a_broken_package_has_no_row(monkeypatch, tmp_path):
    """FlashAttention-3 without a mask stands beside our backends where it can run."""
    (tmp_path / "fa3_fwd_interface.py").write_text("raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fast_choose_longspec, "FLASH_3", ("fa3_fwd_interface",))
    monkeypatch.setattr(attention, "flash_3_misfit", lambda demand: None)  # as on a Hopper GPU
    assert attention.flash_3(Demand(CPU, torch.bfloat16, 64, None)) is None
