"""The held-out split: whole documents or packages, chosen by a hash that never moves, or by name.

Windows are never held out alone, since neighbouring windows of one package share their vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .section import HeldOut, Source
from .store import Document


def is_named(name: str, names: Iterable[str]) -> bool:
    """Tell whether a folder of the path `name`, or its file without the suffix, bears one of `names`."""
    path = Path(name)
    return not {*path.parts, path.stem}.isdisjoint(names)


def package_of(name: str) -> str:
    """Return the top-level folder of a path, or the path of a file that lies in no folder."""
    return name.split("/", 1)[0]


def in_share(key: bytes, share: float) -> bool:
    """Tell whether `key` is among the `share` of all keys with the lowest hashes."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2**64


def is_held_out_package(name: str, held_out: HeldOut) -> bool:
    """Tell whether the package of a file is held out: by the package's hash, or by a name in the file's path."""
    return is_named(name, held_out.names) or in_share(package_of(name).encode(), held_out.share)


def is_held_out(document: Document, source: Source, held_out: HeldOut) -> bool:
    """Tell whether a document is held out: by its name, its package's hash, or the hash of its tokens.

    Where only some tokens are learned, the hash is of the tokens before the first learned one: two answers to one
    prompt stand on the same side.
    """
    if source.document == "package":
        return is_held_out_package(document.name, held_out)
    if is_named(document.name, held_out.names):
        return True
    if not held_out.share:
        return False
    ids = document.ids
    if document.loss_mask is not None:
        ids = ids[: int(document.loss_mask.argmax())]
    return in_share(ids.astype("<u4").tobytes(), held_out.share)


def group_key(document: Document, held: bool, source: Source, number: int) -> tuple[Any, ...]:
    """Return a key that neighbours share if they are one document: files of one package on one side of the split."""
    return (held, package_of(document.name)) if source.document == "package" else (held, number)
