"""Packing of documents into samples: short documents whole, long ones by the section's rule.

Knows lengths and masks, not tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .section import DataSection

OPEN_SAMPLES = 64  # samples that wait for a piece that fits; more are filled better, fewer keep the order of documents


class Piece(NamedTuple):
    """Tokens start..end of a document; `document` is whatever the caller knows the document by."""

    document: Any
    start: int
    end: int


def pieces_of(
    document: Any,
    tokens: int,
    loss_mask: np.ndarray | None,
    section: DataSection,
    length: int,
    left_out: Counter[str],
) -> Iterator[Piece]:
    """Cut a document of `tokens` tokens into pieces for samples of `length`; count in `left_out` what is not used."""
    if tokens < section.min_tokens:
        left_out["shorter than min_tokens"] += 1
    elif tokens > length and section.long_documents == "drop":
        left_out["longer than a sample"] += 1
    elif tokens < length and section.long_documents == "full":
        left_out["shorter than a sample"] += 1
    else:
        for start in starts_of(tokens, length, section.long_documents):
            end = min(start + length, tokens)
            if loss_mask is None or loss_mask[start + 1 : end].any():
                yield Piece(document, start, end)
            else:
                left_out["pieces with no token to learn"] += 1


def starts_of(tokens: int, length: int, long_documents: str) -> list[int]:
    """Return where the pieces of a document begin."""
    if long_documents == "first":
        return [0]
    if long_documents == "full":  # the last piece ends where the document ends, over some of the one before
        return [*range(0, tokens - length, length), tokens - length]
    return list(range(0, tokens, length))


class Packer:
    """Pack pieces by best fit, online: a piece goes where it leaves the least room.

    At most `OPEN_SAMPLES` samples are unfinished. A sample is given out when it is full, or, as the fullest, when
    another must be begun. The result depends on the order and the sizes of pieces only, so a stream and a dataset on
    disk are packed alike.
    """

    def __init__(self, length: int):
        self.length = length
        self.rooms: list[tuple[int, int]] = []  # (tokens left, number of the sample), sorted
        self.samples: dict[int, list[Piece]] = {}
        self.begun = 0

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """Add a piece; yield the samples that it finishes, at most two."""
        size = piece.end - piece.start
        place = bisect_left(self.rooms, (size, -1))
        if place < len(self.rooms):
            room, number = self.rooms.pop(place)
        else:
            if len(self.rooms) == OPEN_SAMPLES:
                yield self.samples.pop(self.rooms.pop(0)[1])
            room, number = self.length, self.begun
            self.samples[number] = []
            self.begun += 1
        self.samples[number].append(piece)
        if room == size:
            yield self.samples.pop(number)
        else:
            insort(self.rooms, (room - size, number))

    def flush(self) -> Iterator[list[Piece]]:
        """Yield the unfinished samples, fullest first."""
        for _, number in self.rooms:
            yield self.samples.pop(number)
        self.rooms = []
