"""A sample: pieces of documents side by side, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


class Sample(TypedDict):
    """Whole documents, or pieces of long ones, side by side in a sample of L tokens. All fields are (L,) on the CPU.

    input_ids: int64.
    document_ids: int64, 0, 1, … from left to right; tokens see only tokens of the same number. The filling behind the
        last document has a number of its own, one more than the last.
    positions: int64, 0, 1, … within each document (piece), and within the filling.
    loss_mask: bool; True where token t is one to learn *to predict*, from the tokens before it in its document. So the
        row t-1 of the logits counts where `loss_mask[t]`. Never True for the first token of a document or the filling.
    """

    input_ids: Tensor
    document_ids: Tensor
    positions: Tensor
    loss_mask: Tensor


def make_sample(pieces: Sequence[tuple[np.ndarray, np.ndarray | None]], length: int) -> Sample:
    """Make a sample of the tokens and loss masks of pieces, which have together at most `length` tokens."""
    sizes = [len(ids) for ids, _ in pieces]
    filling = length - sum(sizes)
    ids, loss = np.zeros(length, np.int64), np.zeros(length, bool)
    start = 0
    for (tokens, mask), size in zip(pieces, sizes, strict=True):
        ids[start : start + size] = tokens
        loss[start + 1 : start + size] = True if mask is None else mask[1:]
        start += size
    sizes = [*sizes, filling] if filling else sizes
    documents = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    return Sample(
        input_ids=torch.from_numpy(ids),
        document_ids=torch.from_numpy(documents),
        positions=torch.from_numpy(np.arange(length) - np.repeat(starts, sizes)),
        loss_mask=torch.from_numpy(loss),
    )
