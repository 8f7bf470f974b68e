"""Samples and batches of a run, as a pure function of the seed and the sample's number.

So a run needs no random state to be resumed exactly: the number of samples seen is enough. Numbers count through all
epochs. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from .batch import batch_of
from .data import Sample
from .positions import anchor_offset_positions
from .recipe import Signal

NumberedSample = dict[str, Any]


@dataclass(frozen=True)
class AnchorOffset:
    """Move a sample's documents, by draws that depend on the seed and the sample's number alone."""

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
    """The first `count` samples of a map-style dataset that is repeated endlessly, epoch by epoch."""

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
    """The first `count` samples of a stream, which starts again when it ends."""

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
    """Make a `Batch` of samples, as a mapping for `Trainer`; each sample's number draws its lag."""

    max_lag: int
    seed: int

    def __call__(self, samples: list[NumberedSample]) -> dict[str, Any]:
        draws = (random.Random(f"{self.seed} {sample['number']}") for sample in samples)
        lags = torch.tensor([draw.randint(1, self.max_lag) for draw in draws])
        # accelerate takes no None in batches that it hands out to processes
        return {name: value for name, value in batch_of(samples, lags)._asdict().items() if value is not None}
