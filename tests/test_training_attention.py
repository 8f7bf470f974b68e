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
    mask = torch.tensor([[may_see(t, s) for s in range(length)] for t in range(length)])
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


@pytest.mark.parametrize("lag", [1, 2, 5, 9, 12])
def test_lagged_attention_equals_dense(lag):
    query, key, value = random_qkv(9)
    out = lagged_attention(query, key, value, lag)
    torch.testing.assert_close(out, dense(query, key, value, lambda t, s: s <= t - lag))
    assert (out[:, :, :lag] == 0).all()


@pytest.mark.parametrize("lag", [1, 3, 4, 6])
def test_lagged_attention_to_a_sliding_layer(lag):
    query, key, value = random_qkv(15)
    expected = dense(query, key, value, lambda t, s: t - 4 < s <= t - lag)
    torch.testing.assert_close(lagged_attention(query, key, value, lag, window=4), expected)


def test_a_query_without_keys_gives_no_nan_gradient():
    query, key, value = random_qkv(6)
    query.requires_grad_()
    lagged_attention(query, key, value, 4).sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[:, :, :4] == 0).all()


def test_lag_zero_is_refused():
    with pytest.raises(ValueError, match="lag must be at least 1, got 0"):
        lagged_attention(*random_qkv(4), 0)


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


@pytest.mark.parametrize("lag", [1, 3, 6])
@pytest.mark.parametrize("window", [None, 4])
def test_lagged_attention_within_documents(lag, window):
    inputs = [x.requires_grad_() for x in random_qkv(15)]
    expected = dense(*inputs, lambda t, s: s <= t - lag and (window is None or t - window < s), DOCUMENTS)
    weight = torch.randn_like(expected)
    for out in (
        lagged_attention_by_mask(*inputs, lag, window, DOCUMENTS),
        lagged_attention_by_span(*inputs, lag, window, spans_of(DOCUMENTS)),
    ):
        torch.testing.assert_close(out, expected)
        if expected.any():
            gradients = [torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (out, expected)]
            torch.testing.assert_close(*gradients)
