"""The draft's two attentions over whole training samples, as the exact counterpart of what a decoding round sees.

Query heads are not expanded: query is (B, H, T, D), key and value are (B, K, T, D) with H a multiple of K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Causal attention to the last ``window`` tokens, the current one included, in time linear in T.

    Queries go in blocks of ``window``: a block needs its own keys and those of the block before, so one fixed
    (window, 2·window) mask serves all blocks but the first, which is plain causal attention. Returns (B, H, T, D).
    """
    batch, heads, length, dim = query.shape
    first = causal_attention(query[:, :, :window], key[:, :, :window], value[:, :, :window])
    if length <= window:
        return first
    # The last block is filled up with keys that lie in the future of every real query: no mask of their own.
    missing = -length % window
    query = pad(query[:, :, window:], (0, 0, 0, missing))

    def pairs(x: Tensor) -> Tensor:
        """Each later block with the one before: (B, K, T, D) -> (B · blocks, H, 2·window, D)."""
        blocks = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, window))
        paired = torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3).transpose(1, 2).flatten(0, 1)
        # With a mask the fused CUDA kernels take no grouped-query heads.
        return paired.repeat_interleave(heads // x.shape[1], dim=1)

    blocks = query.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
    rest = scaled_dot_product_attention(blocks, pairs(key), pairs(value), attn_mask=window_mask(window, query.device))
    rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, : length - window]
    return torch.cat([first, rest], dim=2)


def window_mask(window: int, device: torch.device) -> Tensor:
    """(window, 2·window), True where query i of a block may see key j of the block before and its own."""
    query = torch.arange(window, device=device)[:, None] + window
    key = torch.arange(2 * window, device=device)
    return (key <= query) & (key > query - window)


def lagged_attention(query: Tensor, key: Tensor, value: Tensor, lag: int, window: int | None = None) -> Tensor:
    """Attention of query t to the target's keys 0..t-lag; the first ``lag`` queries see nothing and get zeros.

    Shifting the keys by the lag makes it plain causal attention without a mask (LongSpec's Flash Noisy Training).
    A node at depth j of the tree has lag j + 1. Where the target's layer has a sliding ``window``, query t sees no key
    before t-window+1 either. Returns (B, H, T, D).
    """
    if lag < 1:
        raise ValueError(f"a draft never sees the target's key of its own token: lag must be at least 1, got {lag}")
    seen = query.shape[2] - lag
    if seen <= 0 or (window is not None and window <= lag):
        return torch.zeros_like(query)
    shifted = query[:, :, lag:], key[:, :, :seen], value[:, :, :seen]
    out = causal_attention(*shifted) if window is None else windowed_attention(*shifted, window - lag)
    return pad(out, (0, 0, lag, 0))
