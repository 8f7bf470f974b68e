"""Attention straight from its definition in float64, and a bound on the error of a low-precision result."""

import itertools

import torch

from hf_longspec.modeling.attention_longspec import Memo, Span, Spans

INF = float("inf")


def dense(query, key, value, scaling, mask=None, softcap=None, sinks=None):
    """Compute attention and log-sum-exp in float64, one query row at a time, straight from the definition.

    mask: (B, T, S); sinks: (H,), scores of one more key a head, whose value is zero.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, dim = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, length, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, length), -INF, dtype=torch.float64)
    for b, h, t in itertools.product(range(batch), range(heads), range(length)):
        seen = range(key.shape[2]) if mask is None else mask[b, t].nonzero().flatten().tolist()
        keys, values = key[b, h // group, list(seen)], value[b, h // group, list(seen)]
        scores = (keys * query[b, h, t]).sum(-1) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0.0 if sinks is None else sinks[h].double().exp())
        if total > 0:
            out[b, h, t] = (weights[:, None] * values).sum(0) / total
            lse[b, h, t] = total.log()
    return out, lse


def plain(query, key, value, scaling, mask=None, softcap=None, sinks=None):
    """Compute attention as a model would in the inputs' own precision: each step rounded, NaN in empty rows."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -INF)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value, scores.logsumexp(-1)


def assert_as_good_as_plain(results, query, key, *inputs, stages=1, **options):
    """Assert that each stage behind `results` (out, lse) errs at most twice as much as plain arithmetic or the floor.

    One plain run may be exact by luck, so the floor is what any arithmetic may err: one rounding to the dtype, or the
    sums over all keys in float32, unit · √keys.
    """
    inputs = query, key, *inputs
    summing = torch.finfo(torch.float32).eps * key.shape[2] ** 0.5
    for ours, rough, exact in zip(results, plain(*inputs, **options), dense(*inputs, **options), strict=False):
        assert ours.shape == exact.shape and not ours.isnan().any()
        known = rough.isfinite()
        assert torch.equal(ours[~known].double(), exact[~known])  # rows that see nothing: out 0, lse −inf
        if not known.any():
            continue
        exact, rough = exact[known], rough[known]
        floor = max(torch.finfo(rough.dtype).eps, summing) * exact.abs().max()
        assert (ours[known] - exact).abs().max() <= 2 * stages * max((rough - exact).abs().max(), floor)


def spans_of(host, device="cpu"):
    """Make `Spans` of (start, end) pairs, one for each row of a batch."""
    starts, ends = torch.tensor(host, device=device).unbind(dim=1)
    return Spans(starts, ends, tuple(Span(*pair) for pair in host), Memo())
