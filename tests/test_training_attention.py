"""Windowed and lagged attention of training against a float64 softmax under a dense mask drawn from the definition."""

import pytest
import torch

from hf_longspec.training.attention import (
    lagged_attention,
    lagged_attention_by_mask,
    lagged_attention_by_span,
    window_mask,
    windowed_attention,
)
from hf_longspec.training.documents import spans_of

HEADS, GROUPS, DIM = 2, 3, 8


def random_qkv(length):
    query = torch.randn(2, HEADS * GROUPS, length, DIM, dtype=torch.float64)
    key, value = torch.randn(2, 2, HEADS, length, DIM, dtype=torch.float64)
    return query, key, value


def dense(query, key, value, may_see, documents=None):
    """may_see(t, s): whether query t sees key s of its document. Rows that see nothing are zero."""
    key, value = (x.repeat_interleave(GROUPS, dim=1) for x in (key, value))
    length = query.shape[2]
    # (T, T), or (T, T, B) of samples that see different things
    mask = torch.tensor([[may_see(t, s) for s in range(length)] for t in range(length)])
    mask = mask if mask.dim() == 2 else mask.permute(2, 0, 1)[:, None]
    if documents is not None:
        rows = [[[a == b for b in row] for a in row] for row in documents.tolist()]
        mask = mask & torch.tensor(rows)[:, None]
    weights = (query @ key.transpose(-1, -2) * DIM**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.nan_to_num(0.0) @ value


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 21, 28, 29])
def test_windowed_attention_equals_dense(length, window):
    query, key, value = random_qkv(length)
    expected = dense(query, key, value, lambda t, s: t - window < s <= t)
    torch.testing.assert_close(windowed_attention(query, key, value, window), expected)


def test_windowed_attention_has_the_dense_gradient():
    inputs = [x.requires_grad_() for x in random_qkv(13)]
    weight = torch.randn_like(inputs[0])
    ours = torch.autograd.grad((windowed_attention(*inputs, 4) * weight).sum(), inputs)
    expected = torch.autograd.grad((dense(*inputs, lambda t, s: t - 4 < s <= t) * weight).sum(), inputs)
    torch.testing.assert_close(ours, expected)


def test_window_mask_by_hand():
    o, x = False, True
    assert window_mask(3, torch.device("cpu")).tolist() == [
        [o, x, x, x, o, o],
        [o, o, x, x, x, o],
        [o, o, o, x, x, x],
    ]


def within(distance, lags, window=None):
    """Whether query t of each sample sees key s, by the definition of a lag."""
    return [lag <= distance and (window is None or distance < window) for lag in lags]


LAGS = [(1, 1), (1, 2), (5, 2), (9, 1), (12, 3)]


@pytest.mark.parametrize("lags", LAGS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4])
def test_lagged_attention_equals_dense(lags, window):
    inputs = [x.requires_grad_() for x in random_qkv(9)]
    out = lagged_attention(*inputs, torch.tensor(lags), window)
    expected = dense(*inputs, lambda t, s: within(t - s, lags, window))
    torch.testing.assert_close(out, expected)
    for row, lag in enumerate(lags):
        assert (out[row, :, :lag] == 0).all()
    weight = torch.randn_like(out)
    if expected.any():
        gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected)]
        torch.testing.assert_close(*gradients)


def test_a_query_without_keys_gives_no_nan_gradient():
    query, key, value = random_qkv(6)
    query.requires_grad_()
    lagged_attention(query, key, value, torch.tensor([4, 6])).sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[0, :, :4] == 0).all() and (query.grad[1] == 0).all()


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 9, [0] * 1 + [1] * 12 + [2] * 2])


@pytest.mark.parametrize("window", [1, 4, 15, 40])
def test_windowed_attention_within_documents(window):
    inputs = [x.requires_grad_() for x in random_qkv(15)]
    out = windowed_attention(*inputs, window, DOCUMENTS)
    expected = dense(*inputs, lambda t, s: t - window < s <= t, DOCUMENTS)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("lags", [(1, 1), (3, 1), (2, 6)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_lagged_attention_within_documents(lags, window):
    inputs = [x.requires_grad_() for x in random_qkv(15)]
    expected = dense(*inputs, lambda t, s: within(t - s, lags, window), DOCUMENTS)
    lags = torch.tensor(lags)
    weight = torch.randn_like(expected)
    for out in (
        lagged_attention_by_mask(*inputs, lags, window, DOCUMENTS),
        lagged_attention_by_span(*inputs, lags, window, spans_of(DOCUMENTS)),
    ):
        torch.testing.assert_close(out, expected)
        if expected.any():
            gradients = [torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (out, expected)]
            torch.testing.assert_close(*gradients)
