"""Tokenized documents on disk: one memory-mapped array, so that a dataset costs no memory and starts at once.

A folder holds `tokens.npy` (N,) of the smallest unsigned type that holds the vocabulary, `offsets.npy`
(documents + 1,), `names.json` and, where not all tokens are learned, `loss_mask.npy` (N,). `summary.json` says where
the documents are from. `tokens.npy.xz` can take the place of `tokens.npy`: it is unpacked when it is first opened.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hf_longspec.writing import whole_file, writing


class Document(NamedTuple):
    """A document of L tokens.

    ids: (L,) unsigned integers.
    loss_mask: (L,) bool, the tokens to learn; None: all of them.
    """

    name: str
    ids: np.ndarray
    loss_mask: np.ndarray | None = None


@dataclass(frozen=True)
class TokenStore:
    """Documents laid end to end; document `i` is `tokens[offsets[i]:offsets[i + 1]]`."""

    folder: Path
    tokens: np.ndarray  # (N,) unsigned integers
    loss_mask: np.ndarray | None  # (N,) bool
    offsets: np.ndarray  # (documents + 1,) int64, from 0 to N
    names: tuple[str, ...]
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> TokenStore:
        """Open a folder. Raises `ValueError` that names a file that is missing, broken, or does not fit the others."""
        folder = Path(folder)
        if not (folder / "tokens.npy").exists() and (folder / "tokens.npy.xz").exists():
            unpack(folder / "tokens.npy.xz")
        tokens, offsets = load_array(folder / "tokens.npy"), load_array(folder / "offsets.npy", mapped=False)
        masked = (folder / "loss_mask.npy").exists()
        loss_mask = load_array(folder / "loss_mask.npy") if masked else None
        names = load_json(folder / "names.json")
        if len(offsets) != len(names) + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError(f"{folder / 'offsets.npy'}: does not fit the {len(names)} names of names.json")
        for name, array in (("tokens", tokens), ("loss_mask", loss_mask)):
            if array is not None and array.shape != (offsets[-1],):
                raise ValueError(
                    f"{folder / name}.npy: expected {offsets[-1]} entries as offsets.npy says, got {len(array)}"
                )
        summary = load_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
        return cls(folder, tokens, loss_mask, offsets, tuple(names), summary)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker process open the files again; else the arrays themselves would be sent to the process."""
        return TokenStore.load, (self.folder,)


def load_array(path: Path, mapped: bool = True) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: broken file: {error}") from None
    return np.asarray(array)  # a plain view: slices of `memmap` are slow to make


def load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # bad JSON, bad UTF-8
        raise ValueError(f"{path}: broken file: {error}") from None


def unpack(packed: Path) -> None:
    """Unpack `name.xz` beside itself as `name`, whole or not at all."""
    try:
        with (
            whole_file(packed.with_suffix("")) as unfinished,
            lzma.open(packed) as source,
            open(unfinished, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{packed}: broken file: {error}") from None


class StoreWriter:
    """Write a `TokenStore` document by document, beside `folder`; the store takes that name when it is whole.

    So a kill at any moment leaves no half folder. The writer is a context; an error inside leaves nothing. Raises what
    `writing` does.
    """

    def __init__(self, folder: str | Path, vocab_size: int, masked: bool):
        self.folder = Path(folder)
        self.unfinished = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        self.vocab_size, self.masked = vocab_size, masked
        self.lengths: list[int] = []
        self.names: list[str] = []
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> StoreWriter:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        with writing(self.folder):
            self.unfinished.mkdir(parents=True)
            self._tokens = ArrayWriter(self.unfinished / "tokens.npy", np.min_scalar_type(self.vocab_size - 1))
            self._mask = ArrayWriter(self.unfinished / "loss_mask.npy", np.dtype(bool)) if self.masked else None
        return self

    def add(self, document: Document) -> None:
        """Add a document. Raises `ValueError` for a token outside the vocabulary."""
        if len(document.ids) and int(document.ids.max()) >= self.vocab_size:
            raise ValueError(
                f"{document.name}: token id {document.ids.max()} is outside the vocabulary of {self.vocab_size}"
            )
        self._tokens.append(document.ids)
        if self._mask is not None:
            mask = np.ones(len(document.ids), bool) if document.loss_mask is None else document.loss_mask
            self._mask.append(mask)
        self.lengths.append(len(document.ids))
        self.names.append(document.name)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            for array in (self._tokens, self._mask):
                if array is not None:
                    array.close(whole=error is None)
            if error is None:
                with writing(self.folder):
                    self._finish()
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def _finish(self) -> None:
        offsets = ArrayWriter(self.unfinished / "offsets.npy", np.dtype(np.int64))  # np.save may miss a full disk
        offsets.append(np.cumsum([0, *self.lengths]))
        offsets.close(whole=True)
        (self.unfinished / "names.json").write_text(json.dumps(self.names), encoding="utf-8")
        (self.unfinished / "summary.json").write_text(json.dumps(self.summary, indent=1), encoding="utf-8")
        publish(self.unfinished, self.folder)


def publish(unfinished: Path, folder: Path) -> None:
    """Give a finished folder its name, after its content is on the disk. A folder that is there already stays."""
    for file in [*unfinished.iterdir(), unfinished]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / "summary.json").exists():  # else another process has written the folder meanwhile
            raise


class ArrayWriter:
    """A one-dimensional `.npy` file that grows; numpy leaves room in the header for the length, written last."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.length = path, dtype, 0
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._header()

    def append(self, values: np.ndarray) -> None:
        with writing(self.path):
            self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self, whole: bool) -> None:
        if not whole:
            with suppress(OSError):  # what went wrong is known already; a full disk fails here once more
                self.file.close()
            return
        end = self.file.tell()
        with writing(self.path):  # a full disk is often noticed only here
            self.file.seek(0)
            self._header()
            assert self.file.tell() == end - self.length * self.dtype.itemsize, "the header has changed its size"
            self.file.close()

    def _header(self) -> None:
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, fields)
