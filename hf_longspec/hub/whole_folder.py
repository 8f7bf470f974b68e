"""A new folder that appears under its name when all of it is written, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..writing import writing


def check_new(folder: Path) -> None:
    """Raise `ValueError` unless `folder` is empty or can be made."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, got {folder}")
    if not (above := nearest(folder)).is_dir():
        raise ValueError(f"expected a new or empty folder to write to, got {folder}: {above} is a file")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `folder` at the end, with the folders above it.

    After an error nothing is left. Raises what `writing` raises; other errors pass.
    """
    whole = Path(os.path.realpath(folder))  # a link's target; `resolve` has no one-line error for a link to itself
    with writing(folder), tempfile.TemporaryDirectory(prefix=f".{whole.name}.", dir=nearest(whole)) as place:
        unfinished = Path(place) / whole.name
        unfinished.mkdir()
        yield unfinished
        whole.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(whole)  # replaces an empty folder of this name


def nearest(folder: Path) -> Path:
    """Return the nearest folder above `folder` that exists, on the disk that `folder` will be on."""
    return next(above for above in folder.absolute().parents if above.exists())
