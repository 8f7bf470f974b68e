"""Samples of one source whose tokens are on disk: which pieces share a sample is computed once, at the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_longspec.vocabulary import vocabulary_sha256

from .packing import Packer, Piece, pieces_of
from .sample import Sample, make_sample
from .section import DataSection, Source
from .split import group_key, is_held_out
from .store import Document, TokenStore


class Span(NamedTuple):
    """Tokens start..end of the store with the number `store`."""

    store: int
    start: int
    end: int


@dataclass(frozen=True)
class StoredSamples:
    """Samples of one source on one side of the split, in the order of its documents."""

    stores: Sequence[TokenStore]
    length: int
    pieces: np.ndarray  # (P, 3) int64: store, start, end
    offsets: np.ndarray  # (samples + 1,) int64: sample i is pieces[offsets[i]:offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        chosen = self.pieces[self.offsets[index] : self.offsets[index + 1]]
        return make_sample([self._read(*piece) for piece in chosen], self.length)

    def _read(self, number: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        store = self.stores[number]
        return store.tokens[start:end], None if store.loss_mask is None else store.loss_mask[start:end]


def pack_stores(
    stores: Sequence[TokenStore],
    source: Source,
    section: DataSection,
    lengths: tuple[int, int],
    left_out: Counter[str],
) -> tuple[StoredSamples, StoredSamples]:
    """Pack a source into samples of `lengths`; lengths and result are (train, held out)."""
    sides: dict[bool, list[list[Piece]]] = {False: [], True: []}
    packers = {side: Packer(lengths[side]) for side in sides}
    for held, span in documents(stores, source, section):
        mask = stores[span.store].loss_mask
        its_mask = None if mask is None else mask[span.start : span.end]
        for piece in pieces_of(span, span.end - span.start, its_mask, section, lengths[held], left_out):
            sides[held].extend(packers[held].add(piece))
    for side, packer in packers.items():
        sides[side].extend(packer.flush())
    train, held_out = (stored_samples(stores, lengths[side], samples) for side, samples in sides.items())
    return train, held_out


def documents(stores: Sequence[TokenStore], source: Source, section: DataSection) -> Iterator[tuple[bool, Span]]:
    """Yield for each document whether it is held out, and its span; the files of a package are one document."""
    spans = islice(numbered_documents(stores), source.limit if source.format == "tokens" else None)
    sided = ((is_held_out(document, source, section.held_out), document, span) for span, document in spans)
    keyed = (
        ((span.store, *group_key(document, held, source, number)), held, span)
        for number, (held, document, span) in enumerate(sided)
    )
    for _, group in groupby(keyed, key=lambda item: item[0]):
        items = list(group)
        yield items[0][1], Span(items[0][2].store, items[0][2].start, items[-1][2].end)


def numbered_documents(stores: Sequence[TokenStore]) -> Iterator[tuple[Span, Document]]:
    for number, store in enumerate(stores):
        offsets = store.offsets.tolist()
        for name, start, end in zip(store.names, offsets[:-1], offsets[1:], strict=True):
            mask = None if store.loss_mask is None else store.loss_mask[start:end]
            yield Span(number, start, end), Document(name, store.tokens[start:end], mask)


def stored_samples(stores: Sequence[TokenStore], length: int, samples: list[list[Piece]]) -> StoredSamples:
    rows = [
        (piece.document.store, piece.document.start + piece.start, piece.document.start + piece.end)
        for sample in samples
        for piece in sample
    ]
    offsets = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    return StoredSamples(stores, length, np.array(rows, dtype=np.int64).reshape(-1, 3), offsets)


def open_stores(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[TokenStore]:
    """Open the stores of a `tokens` source. Raises `ValueError` for a store whose tokens are of another vocabulary."""
    stores = [TokenStore.load(folder) for folder in token_folders(Path(source.path))]
    size, sha256 = vocabulary_size(tokenizer), vocabulary_sha256(tokenizer)
    for store in stores:
        if store.summary.get("vocabulary_sha256", sha256) != sha256:
            theirs = store.summary.get("tokenizer", "another tokenizer")
            raise ValueError(f"{store.folder}: holds tokens of {theirs}, whose vocabulary is not that of the target")
        if len(store.tokens) and int(store.tokens.max()) >= size:
            raise ValueError(
                f"{store.folder}: token id {store.tokens.max()} is outside the tokenizer's vocabulary of {size}"
            )
    return stores


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the highest token id; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def token_folders(root: Path) -> list[Path]:
    """Return the folders at or below `root` that hold tokens, in path order. Raises `ValueError` if there are none."""
    found = {file.parent for file in root.rglob("tokens.npy*") if file.name in ("tokens.npy", "tokens.npy.xz")}
    hidden = {folder for folder in found if any(part.startswith(".") for part in folder.relative_to(root).parts)}
    finished = sorted(found - hidden)  # hidden folders are being written
    if not finished:
        raise ValueError(f"{root}: expected a folder with tokens.npy, or folders of such below it")
    return finished
