"""What a run trains on, sample by sample and batch by batch, as a pure function of the seed and the sample's number.

So a run needs no random state to be resumed exactly: the number of samples seen says it all. Numbers count through
all epochs. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .data import Sample
from .documents import LONGEST_MASKED, spans_of
from .loss import IGNORED
from .positions import anchor_offset_positions
from .recipe import Signal

NumberedSample = dict[str, Any]


@dataclass(frozen=True)
class AnchorOffset:
    """Moves a sample's documents, by draws that depend on the seed and the sample's number alone."""

    signal: Signal
    max_position: int
    seed: int

    def __call__(self, number: int, sample: Sample) -> NumberedSample:
        moved: dict[str, Any] = {"number": number, **sample}
        if self.signal.offset:
            rng = np.random.default_rng([self.seed, number])
            moved["positions"] = anchor_offset_positions(sample["positions"], self.max_position, self.signal.sink, rng)
        return moved


class NumberedSamples(Dataset[NumberedSample]):
    """The first `count` samples of the endless row of epochs of a map-style dataset."""

    def __init__(self, dataset: Any, count: int, move: AnchorOffset):
        if not len(dataset):
            raise ValueError(
                "the data hold not one sample of the wished length: expected more text, or shorter samples"
            )
        self.dataset, self.count, self.move = dataset, count, move

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> NumberedSample:
        if not 0 <= number < self.count:
            raise IndexError(f"sample {number} of {self.count}")
        epoch, index = divmod(number, len(self.dataset))
        if epoch != self.dataset.epoch:  # an epoch's order takes time to make
            self.dataset.set_epoch(epoch)
        return self.move(number, self.dataset[index])


class NumberedStream(IterableDataset[NumberedSample]):
    """The same of a stream, which starts anew when it ends."""

    def __init__(self, dataset: Any, count: int, move: AnchorOffset):
        self.dataset, self.count, self.move = dataset, count, move

    def __iter__(self) -> Iterator[NumberedSample]:
        number = epoch = 0
        while number < self.count:
            self.dataset.set_epoch(epoch)
            first = number
            for sample in self.dataset:
                yield self.move(number, sample)
                number += 1
                if number == self.count:
                    return
            if number == first:
                raise ValueError("the data hold not one sample of the wished length: expected more text")
            epoch += 1


@dataclass(frozen=True)
class Collator:
    """Samples to the arguments of `Distillation`; each sample has a lag, drawn by its number."""

    max_lag: int
    seed: int

    def __call__(self, samples: list[NumberedSample]) -> dict[str, Any]:
        draws = (random.Random(f"{self.seed} {sample['number']}") for sample in samples)
        lags = torch.tensor([draw.randint(1, self.max_lag) for draw in draws])
        return batch_of(samples) | {"lags": lags}


def batch_of(samples: list[Any]) -> dict[str, Any]:
    """input_ids, labels, positions (B, T); document_ids (B, T) and their spans only if a row has several documents."""
    ids, document_ids, positions, loss_mask = (
        torch.stack([sample[name] for sample in samples])
        for name in ("input_ids", "document_ids", "positions", "loss_mask")
    )
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels_of(ids, loss_mask), "positions": positions}
    document_ids = torch.stack([without_filling(*pair) for pair in zip(document_ids, loss_mask, strict=True)])
    if (document_ids != document_ids[:, :1]).any():
        batch["document_ids"] = document_ids
        batch["spans"] = tuple(spans_of(document_ids)) if ids.shape[1] > LONGEST_MASKED else ()
    return batch


def labels_of(ids: Tensor, loss_mask: Tensor) -> Tensor:
    """The token after each of `ids` (B, T); `IGNORED` where it is not to be learned, and for the last."""
    following = ids.roll(-1, dims=1).where(loss_mask.roll(-1, dims=1), IGNORED)
    following[:, -1] = IGNORED
    return following


def without_filling(document_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """document_ids (T,) where a last document that teaches nothing belongs to the one before.

    Nothing sees what stands behind it, so filling needs no mask of its own.
    """
    last = document_ids == document_ids[-1]
    if last.all() or (loss_mask & last).any():
        return document_ids
    return document_ids.masked_fill(last, int(document_ids[~last][-1]))
