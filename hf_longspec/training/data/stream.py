"""Samples made while training: documents are read, tokenized and packed when needed, and nothing is kept on disk.

The stream has no end: a source that has ended begins again. A run resumes by reading up to where it was, so the start
costs as much as the first reading did; the samples are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from .documents import read_documents
from .mix import shares_of, shuffled_sources
from .packing import Packer, Piece, pieces_of
from .report import SourceReport
from .sample import Sample, make_sample
from .section import DataSection, Source
from .split import group_key, is_held_out, package_of
from .store import Document

T = TypeVar("T")
ROUND = 1000  # samples in which each source has its exact share


class StreamedSamples(IterableDataset[Sample]):
    """Endless samples in the order of training, a function of the seed; in every 1000 each source has its share."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        self.section, self.tokenizer, self.length, self.seed = section, tokenizer, length, seed
        self.counts = shares_of([source.weight or 1.0 for source in section.sources], ROUND)
        self.reports = [SourceReport(source.path, section.max_bad_share) for source in section.sources]

    @property
    def summary(self) -> dict[str, Any]:
        """Counts of what this process has read in its latest pass over each source."""
        return {"sources": [report.as_dict() for report in self.reports]}

    def set_epoch(self, epoch: int) -> None:
        """Raise `ValueError` for any epoch but 0: a stream is one endless epoch; the caller has lost its place."""
        if epoch:
            raise ValueError(f"a stream has one endless epoch, got epoch {epoch}")

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"streaming needs `dataloader_num_workers` of 0 or 1, got {worker.num_workers}")
        streams = [self._endless(number) for number in range(len(self.section.sources))]
        turn = 0
        while True:
            for number in shuffled_sources(self.counts, (self.seed, turn)):
                yield next(streams[number])
            turn += 1

    def _endless(self, number: int) -> Iterator[Sample]:
        turn = 0
        while True:
            report = SourceReport(self.section.sources[number].path, self.section.max_bad_share)
            random, any_sample = np.random.RandomState([self.seed, number, turn]), False
            samples = streamed(self.section, number, self.tokenizer, self.length, False, report)
            self.reports[number] = report
            for pieces in shuffled(samples, self.section.shuffle_buffer, random):
                any_sample = True
                yield sample_of(pieces, self.length)
            if not any_sample:
                raise ValueError(nothing_to_train_on(self.length, report.as_dict()))
            turn += 1


def streamed(
    section: DataSection,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    held_out: bool,
    report: SourceReport,
) -> Iterator[list[Piece]]:
    """Yield the pieces of each sample in one pass over a source, on one side of the split, in the documents' order."""
    packer, source = Packer(length), section.sources[number]
    for document in one_side(read_documents(source, section, tokenizer, report), source, section, held_out):
        for piece in pieces_of(document, len(document.ids), document.loss_mask, section, length, report.left_out):
            yield from packer.add(piece)
    yield from packer.flush()


def one_side(
    documents: Iterable[Document], source: Source, section: DataSection, held_out: bool
) -> Iterator[Document]:
    """Yield the documents of one side of the split; the files of a package are joined."""
    sided = ((is_held_out(document, source, section.held_out), document) for document in documents)
    keyed = ((group_key(document, held, source, number), document) for number, (held, document) in enumerate(sided))
    for (held, _), group in groupby(keyed, key=lambda item: item[0]):
        files = [document for _, document in group]
        if held == held_out:
            yield files[0] if len(files) == 1 else joined(files)


def nothing_to_train_on(length: int, record: dict[str, Any]) -> str:
    return f"{record['path']}: nothing to train on in samples of {length} tokens: {record}"


def joined(files: list[Document]) -> Document:
    """Join the files of a package into one document."""
    ids, mask = np.concatenate([file.ids for file in files]), None
    if files[0].loss_mask is not None:  # then all files have one: they are of one source
        mask = np.concatenate([file.loss_mask for file in files])
    return Document(package_of(files[0].name), ids, mask)


def sample_of(pieces: list[Piece], length: int) -> Sample:
    parts = []
    for piece in pieces:
        mask = piece.document.loss_mask
        part = slice(piece.start, piece.end)
        parts.append((piece.document.ids[part], None if mask is None else mask[part]))
    return make_sample(parts, length)


def shuffled(samples: Iterable[T], size: int, random: np.random.RandomState) -> Iterator[T]:
    """Shuffle in a buffer: each sample waits among `size` others until its place is drawn for a newer one."""
    waiting: list[T] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        place = random.randint(size)
        yield waiting[place]
        waiting[place] = sample
    yield from (waiting[place] for place in random.permutation(len(waiting)))
