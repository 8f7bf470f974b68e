"""Batch: samples of one length, what is learned at each token, and which tokens a query may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .documents import LONGEST_MASKED, Span, spans_of
from .loss import IGNORED


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), as `labels_of` makes them
    positions: Tensor  # (B, T), the positions at which target and draft read the tokens
    lags: Tensor  # (B,), see `attention.lagged_attention`
    document_ids: Tensor | None = None  # (B, T), given if a row holds several documents
    spans: Sequence[Span] = ()  # all documents of the batch, given if the samples are too long for a mask

    def to(self, device: torch.device) -> Batch:
        tensors: dict[str, Any] = {name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)

    def with_lag(self, lag: int) -> Batch:
        """Return the batch with the same lag for all rows."""
        return self._replace(lags=torch.full_like(self.lags, lag))


def batch_of(samples: Sequence[Any], lags: Tensor | None = None) -> Batch:
    """Stack samples, each a `data.Sample`, into a batch. lags: (B,), one for each sample; None: 1 for all."""
    ids, document_ids, positions, loss_mask = (
        torch.stack([sample[name] for sample in samples])
        for name in ("input_ids", "document_ids", "positions", "loss_mask")
    )
    lags = torch.ones(len(samples), dtype=torch.long) if lags is None else lags
    batch = Batch(ids, labels_of(ids, loss_mask), positions, lags)
    document_ids = torch.stack([without_filling(*pair) for pair in zip(document_ids, loss_mask, strict=True)])
    if not (document_ids != document_ids[:, :1]).any():
        return batch
    spans = tuple(spans_of(document_ids)) if ids.shape[1] > LONGEST_MASKED else ()
    return batch._replace(document_ids=document_ids, spans=spans)


def labels_of(ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the token after each of `ids` (B, T); `IGNORED` where none is learned, and in the last column."""
    following = ids.roll(-1, dims=1).where(loss_mask.roll(-1, dims=1), IGNORED)
    following[:, -1] = IGNORED
    return following


def without_filling(document_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Return document_ids (T,) where a last document that teaches nothing belongs to the document before.

    No token sees the tokens behind it, so filling needs no mask of its own.
    """
    last = document_ids == document_ids[-1]
    if last.all() or (loss_mask & last).any():
        return document_ids
    return document_ids.masked_fill(last, int(document_ids[~last][-1]))
