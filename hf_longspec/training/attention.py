"""The draft's two attentions over whole samples: each token sees exactly what it would see in a decoding round.

Heads are grouped: query is (B, H, T, D), key and value are (B, K, T, D), and H is a multiple of K. In a sample of
several documents, no token sees the tokens of another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .documents import Span


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend where the boolean `mask`, (T, S) or one for each of the batch (B, 1, T, S), is true.

    Every query must see a key.
    """
    # With a mask the fused CUDA kernels take no grouped-query heads.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    document_ids: Tensor | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Attend causally to the last ``window`` tokens, including the current one, in time and memory linear in T.

    Queries are split into blocks of ``window``; a block needs its own keys and the keys of the block before. Without
    documents, one (window, 2·window) mask serves all blocks but the first, which is plain causal attention. With
    document_ids (B, T), or with reach (B,), the 1..window tokens that the queries of each sample see, each block has
    its own mask: B·T·2·window bytes in all. Returns (B, H, T, D).
    """
    if reach is not None and document_ids is None:
        document_ids = torch.zeros_like(query[:, 0, :, 0], dtype=torch.long)
    if document_ids is not None:
        return _blocks(query, key, value, block_masks(window, document_ids, reach))
    first = causal_attention(query[:, :, :window], key[:, :, :window], value[:, :, :window])
    if query.shape[2] <= window:
        return first
    rest = _blocks(query[:, :, window:], key, value, window_mask(window, query.device))
    return torch.cat([first, rest], dim=2)


def _blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend in blocks from queries (B, H, Q, D), the last Q of T tokens; mask: one for all blocks or for each.

    Q is T - window, or T. For T, a block without tokens stands before the first, and the masks must hide it.
    """
    batch, _, length, _ = query.shape
    window = mask.shape[-2]
    # The last block is filled up with keys in the future of every real query, which need no mask of their own.
    missing = -length % window
    before = window + length - key.shape[2]

    def pairs(x: Tensor) -> Tensor:
        """Join each block with the block before: keys (B, K, T, D) -> (B · blocks, K, 2·window, D)."""
        blocks = pad(x, (0, 0, before, missing)).unflatten(2, (-1, window))
        return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3).transpose(1, 2).flatten(0, 1)

    blocks = pad(query, (0, 0, 0, missing)).unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
    out = masked_attention(blocks, pairs(key), pairs(value), mask)
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def block_masks(window: int, document_ids: Tensor, reach: Tensor | None = None) -> Tensor:
    """Return each block's `window_mask`, (B · blocks, 1, window, 2·window), within documents (B, T) and reach (B,)."""
    own = pad(document_ids, (window, -document_ids.shape[1] % window), value=-1).unflatten(1, (-1, window))
    seen = torch.cat([own[:, :-1], own[:, 1:]], dim=2)  # (B, blocks, 2·window)
    masks = window_mask(window, own.device) & (own[:, 1:, :, None] == seen[:, :, None, :])
    if reach is not None:
        places = torch.arange(2 * window, device=own.device)
        masks = masks & (places > places[window:, None] - reach[:, None, None])[:, None]
    return masks.flatten(0, 1)[:, None]


def window_mask(window: int, device: torch.device) -> Tensor:
    """Return (window, 2·window), True where query i of a block sees key j of the block before and the block itself."""
    query = torch.arange(window, device=device)[:, None] + window
    key = torch.arange(2 * window, device=device)
    return (key <= query) & (key > query - window)


def lagged_attention(query: Tensor, key: Tensor, value: Tensor, lags: Tensor, window: int | None = None) -> Tensor:
    """Attend from query t to the target's keys 0..t-lag; the first ``lag`` queries see nothing and get zeros.

    lags (B,) are at least 1 and may differ from sample to sample. Turning each sample's queries by its lag gives plain
    causal attention without a mask (LongSpec's Flash Noisy Training shifts the keys), and shapes are the same for all
    lags. A node at depth j of the tree has lag j + 1. Where the target's layer has a sliding ``window``, query t sees
    no key before t-window+1 either. Returns (B, H, T, D).
    """
    turned = Turn.apply(query, lags)
    blind = torch.arange(query.shape[2], device=query.device) < lags[:, None]
    if window is None:
        out = causal_attention(turned, key, value)
    else:
        reach = (window - lags).clamp(min=1)
        out = windowed_attention(turned, key, value, max(window - 1, 1), reach=reach)
        blind = blind | (lags >= window)[:, None]
    return Turn.apply(out, -lags).masked_fill(blind[:, None, :, None], 0.0)


class Turn(torch.autograd.Function):
    """Rotate the tokens of x (B, H, T, D): token t of the result is token t + by[b] of row b, counted modulo T.

    The gradient is rotated back, and no two threads write to one place: `gather` alone would add gradients up in no
    certain order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        return _turned(x, by)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        return _turned(gradient, -by), None


def _turned(x: Tensor, by: Tensor) -> Tensor:
    source = (torch.arange(x.shape[2], device=x.device) + by[:, None]) % x.shape[2]
    return x.gather(2, source[:, None, :, None].expand_as(x))


def lagged_attention_by_mask(
    query: Tensor, key: Tensor, value: Tensor, lags: Tensor, window: int | None, document_ids: Tensor
) -> Tensor:
    """Compute `lagged_attention` within each document, by a mask of (B, T, T) bytes; document_ids: (B, T)."""
    places = torch.arange(query.shape[2], device=query.device)
    distance = places[:, None] - places
    near = distance >= lags[:, None, None]
    if window is not None:
        near = near & (distance < window)
    mask = near & (document_ids[:, :, None] == document_ids[:, None, :])
    # A query without keys would give NaN: such a query sees its own key, and its output is set to zero.
    empty = ~mask.any(dim=-1, keepdim=True)
    out = masked_attention(query, key, value, (mask | (empty & (distance == 0)))[:, None])
    return out.masked_fill(empty[:, None], 0.0)


def lagged_attention_by_span(
    query: Tensor, key: Tensor, value: Tensor, lags: Tensor, window: int | None, spans: Sequence[Span]
) -> Tensor:
    """Compute `lagged_attention` one document at a time, without a mask; spans: all documents of the batch."""
    rows: list[list[Tensor]] = [[] for _ in range(len(query))]
    for row, start, end in spans:
        own_query, own_key, own_value = (x[row : row + 1, :, start:end] for x in (query, key, value))
        rows[row].append(lagged_attention(own_query, own_key, own_value, lags[row : row + 1], window))
    return torch.cat([torch.cat(row, dim=2) for row in rows])
