"""Text as one packed token array, and fixed windows of it.

Documents keep their order (files of one package in path order), so that a long window is real long context. The array
is a memory-mapped ``.npy`` of the smallest unsigned type that holds the vocabulary, with document offsets beside it.
This module knows tokenizers and files; it does not know the model, the batch or the order of training.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True)
class PackedTokens:
    """Documents laid end to end; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``, its separator included."""

    tokens: np.ndarray  # (N,) unsigned integers
    offsets: np.ndarray  # (documents + 1,) int64, from 0 to N
    names: tuple[str, ...]

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        np.save(folder / "offsets.npy", self.offsets)
        (folder / "names.json").write_text(json.dumps(self.names))

    @classmethod
    def load(cls, folder: str | Path) -> PackedTokens:
        folder = Path(folder)
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        return cls(tokens, np.load(folder / "offsets.npy"), tuple(json.loads((folder / "names.json").read_text())))


def find_files(root: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """All files below ``root`` with one of ``suffixes``, in path order."""
    return sorted(path for path in Path(root).rglob("*") if path.suffix in suffixes and path.is_file())


def is_held_out(name: str, held_out: Iterable[str]) -> bool:
    """Whether any folder of the path ``name``, or its file without the suffix, bears a held-out name.

    The split is by package, never by window: neighbouring windows of one package share their vocabulary.
    """
    path = Path(name)
    return not {*path.parts, path.stem}.isdisjoint(held_out)


def reason_to_skip(text: str, longest_line: int = 1000, most_digits: float = 0.3) -> str | None:
    """Why ``text`` teaches nothing (generated tables, encoded data), or None when it is worth training on."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary"
    if max(map(len, text.splitlines())) > longest_line:
        return "long lines"
    dense = "".join(text.split())
    if sum(map(dense.count, "0123456789")) > most_digits * len(dense):
        return "mostly digits"
    return None


def read_documents(
    root: str | Path, paths: Iterable[Path], seen: set[bytes], skipped: Counter[str], longest_line: int = 1000
) -> Iterator[Document]:
    """The files' texts, named relative to ``root``.

    A text that is already in ``seen`` (by hash), is not UTF-8, or fails ``reason_to_skip`` is left out and counted in
    ``skipped`` by reason. Fill ``seen`` with the held-out texts first and copies of them never reach training.
    """
    for path in paths:
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).digest()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            reason: str | None = "not UTF-8"
        else:
            reason = "duplicate" if digest in seen else reason_to_skip(text, longest_line)
        if reason is not None:
            skipped[reason] += 1
            continue
        seen.add(digest)
        yield Document(str(path.relative_to(root)), text)


def pack(documents: Iterable[Document], tokenizer, separator: int, vocab_size: int, batch: int = 256) -> PackedTokens:
    """Tokenizes ``documents`` and ends each with the token ``separator``."""
    dtype = np.min_scalar_type(vocab_size - 1)
    if not 0 <= separator < vocab_size:
        raise ValueError(f"separator must be a token id in 0..{vocab_size - 1}, got {separator}")
    pieces, names = [], []
    source = iter(documents)
    while group := list(islice(source, batch)):
        encoded = tokenizer([document.text for document in group], add_special_tokens=False)["input_ids"]
        for document, ids in zip(group, encoded, strict=True):
            if max(ids, default=0) >= vocab_size:
                raise ValueError(f"{document.name}: token id {max(ids)} is outside the vocabulary of {vocab_size}")
            pieces.append(np.array([*ids, separator], dtype=dtype))
            names.append(document.name)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return PackedTokens(np.concatenate(pieces) if pieces else np.empty(0, dtype), offsets, tuple(names))


def concatenate(parts: Sequence[PackedTokens]) -> PackedTokens:
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return PackedTokens(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        tuple(chain.from_iterable(part.names for part in parts)),
    )


class TokenWindows(Dataset[torch.Tensor]):
    """Windows of ``length`` inputs and one more token, the last label: ``(length + 1,)`` int64.

    Windows are cut from the flat array, so one may span documents, as in pre-training. Neighbours share one token.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if length < 2:
            raise ValueError(f"a window needs at least 2 tokens, got length={length}")
        if len(tokens) <= length:
            raise ValueError(f"windows of {length} tokens need more than {length} tokens, got {len(tokens)}")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
