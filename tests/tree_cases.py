"""Attention over a prefix and a tree behind it: random cases, and their check against the float64 reference."""

import pytest
import torch
from reference_attention import assert_as_good_as_plain, spans_of

from hf_longspec.modeling.attention_longspec import Nodes, Prefix
from hf_longspec.modeling.tree_longspec import ancestor_mask

CPU = torch.device("cpu")
STAGES = 3  # the parts of the prefix, the tree, their merge


def random_tree(batch, nodes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parents = [[0] + [int(torch.randint(node, (1,), generator=generator)) for node in range(1, nodes)]] * batch
    return ancestor_mask(torch.tensor(parents), nodes)


def case(batch, heads, kv_heads, nodes, slots, dim, value_dim, dtype, device=CPU):
    """Make queries, stores and a tree as a target does: queries and fresh keys are views, heads behind tokens."""
    torch.manual_seed(0)
    query = torch.randn(batch, nodes, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    key = torch.randn(batch, kv_heads, slots, dim, dtype=dtype, device=device)
    value = torch.randn(batch, kv_heads, slots, value_dim, dtype=dtype, device=device)
    fresh_key = torch.randn(batch, nodes, kv_heads, dim, dtype=dtype, device=device).transpose(1, 2)
    fresh_value = torch.randn(batch, nodes, kv_heads, value_dim, dtype=dtype, device=device).transpose(1, 2)
    return query, key, value, fresh_key, fresh_value


def assert_is_dense(out, query, key, value, fresh_key, fresh_value, tree, spans, mask, scaling, **options):
    """Assert that `out` attends, row by row, to the prefix tokens that the row may see and to the whole tree."""
    for row, (start, end) in enumerate(spans):
        one = slice(row, row + 1)
        keys = torch.cat([key[one, :, start:end], fresh_key[one]], dim=2)
        values = torch.cat([value[one, :, start:end], fresh_value[one]], dim=2)
        nodes = query.shape[2]
        before = torch.ones(1, nodes, end - start, dtype=torch.bool) if mask is None else mask[one, :, start:end]
        seen = torch.cat([before.cpu(), tree[one].cpu()], dim=2)
        inputs = [states.cpu() for states in (query[one], keys, values)]
        result = out[one].transpose(1, 2).cpu()
        assert_as_good_as_plain((result,), *inputs, scaling, mask=seen, stages=STAGES, **options)


def check(
    attention,
    spans,
    heads=4,
    kv_heads=2,
    nodes=5,
    slots=300,
    dim=16,
    value_dim=None,
    dtype=torch.float32,
    device=CPU,
    masked=False,
    on_device=True,
    **options,
):
    """Check `attention`, as `merged_attention`, over stores whose rows show `spans`, and where it stores the tree.

    masked: the prefix has a mask too; on_device: only the device knows the spans. options: softcap, sinks.
    """
    batch = len(spans)
    tensors = case(batch, heads, kv_heads, nodes, slots, dim, value_dim or dim, dtype, device)
    query, key, value, fresh_key, fresh_value = tensors
    tree = random_tree(batch, nodes).to(device)
    mask = None
    if masked:
        mask = (torch.rand(batch, nodes, slots) < 0.5).to(device)
    before = key.clone(), value.clone()
    ends = torch.tensor([end for _, end in spans], device=device)
    known = spans_of(spans, device)
    prefix = Prefix(key, value, known._replace(host=None) if on_device else known, mask)
    scaling, softcap, sinks = dim**-0.5, options.get("softcap"), options.get("sinks")
    out = attention(query, prefix, Nodes(fresh_key, fresh_value, tree, ends), scaling, softcap, sinks)
    assert out.shape == (batch, nodes, heads, value_dim or dim) and out.dtype == dtype and out.is_contiguous()
    assert_is_dense(out, query, *before, fresh_key, fresh_value, tree, spans, mask, scaling, **options)
    for row, (_, end) in enumerate(spans):  # the tree is in the stores, and nothing else has changed there
        for store, old, fresh in ((key, before[0], fresh_key), (value, before[1], fresh_value)):
            old[row, :, end : end + nodes] = fresh[row]
            assert torch.equal(store[row], old[row])


SPANS = {
    "one token": [(0, 1)],
    "nothing": [(0, 0)],
    "whole blocks": [(0, 256)],
    "a cut block": [(0, 201)],
    "behind padding": [(37, 280)],
    "rows": [(0, 290), (5, 6), (9, 9), (100, 228)],
}


def rest_slow(cases, quick):
    """Mark the cases of a parametrization as slow, except the cases in `quick`."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    quick = [case if isinstance(case, tuple) else (case,) for case in quick]
    assert all(case in cases for case in quick), "quick cases are among the cases"
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]
