"""Samples of a run: sources are mixed by weight and shuffled; each sample is a function of seed and place alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .sample import Sample
from .stored import StoredSamples


def shares_of(weights: Sequence[float], total: int) -> np.ndarray:
    """Return how many of `total` samples each source gives, (S,): exact shares, rounded by the largest remainders.

    Raises `ValueError` if a source would give none.
    """
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if not counts.all():
        raise ValueError(f"`weight`: a source has less than one of {total} samples by its weight, {list(weights)}")
    return counts


def shuffled_sources(counts: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return which source each sample of a round is from: source s stands there counts[s] times."""
    return np.random.RandomState(list(seed)).permutation(np.repeat(np.arange(len(counts)), counts))


class MixedSamples(Dataset[Sample]):
    """An epoch of samples from sources on disk, in the order of training.

    Each source has an order of its own, and all of its samples come before any of them comes again, across epochs. An
    epoch has as many samples as the sources have together, in exact proportion to the weights (to within one sample),
    in random order.
    """

    def __init__(self, sources: Sequence[StoredSamples], weights: Sequence[float], seed: int, summary: dict[str, Any]):
        self.sources, self.seed, self.summary = sources, seed, summary
        self.counts = shares_of(weights, sum(map(len, sources)))
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # (source, round) -> order; a cache, not state
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. Must be called before a data loader starts its workers, as accelerate does."""
        self.epoch = epoch
        self._chosen = shuffled_sources(self.counts, (self.seed, epoch))
        self._place = np.empty(len(self._chosen), np.int64)  # the index of each sample among the samples of its source
        for number in range(len(self.counts)):
            mine = self._chosen == number
            self._place[mine] = np.arange(self.counts[number])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self._chosen[index])
        source = self.sources[number]
        turn, place = divmod(self.epoch * int(self.counts[number]) + int(self._place[index]), len(source))
        return source[int(self._order(number, turn)[place])]

    def _order(self, number: int, turn: int) -> np.ndarray:
        if (number, turn) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != number}
            random = np.random.RandomState([self.seed, number, turn])
            self._orders[number, turn] = random.permutation(len(self.sources[number]))
        return self._orders[number, turn]


class HeldOutSamples(Dataset[Sample]):
    """At most `most` samples, spread evenly over the sources laid end to end."""

    def __init__(self, sources: Sequence[StoredSamples | list[Sample]], most: int, summary: dict[str, Any]):
        self.sources, self.summary = sources, summary
        places = [(number, index) for number, source in enumerate(sources) for index in range(len(source))]
        chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)
        self.places = [places[index] for index in chosen]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        number, place = self.places[index]
        return self.sources[number][place]
