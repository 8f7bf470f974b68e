"""Whole checkpoints of a run: a folder is whole if it holds a list of its files, which is written last, and the files.

`Trainer` fills a folder `checkpoint-N` file by file under its final name, so a kill leaves folders that look like
checkpoints. The list names each file with its size, and one rename puts the list in place.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..writing import MachineError

COMPLETE = "complete.json"


class CheckpointError(MachineError):
    """Failure to write a checkpoint; the message is one line for the user."""


def mark_unfinished(folder: Path) -> None:
    """Delete a folder's list before the folder is written again: until `mark_complete` it is no checkpoint."""
    (folder / COMPLETE).unlink(missing_ok=True)


def mark_complete(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then write the list that vouches for the files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    unfinished = folder / (COMPLETE + ".tmp")
    unfinished.write_text(json.dumps(sizes, indent=1))
    _sync(unfinished)
    os.replace(unfinished, folder / COMPLETE)
    _sync(folder)


def is_complete(folder: Path) -> bool:
    if not (folder / COMPLETE).is_file():
        return False
    sizes = json.loads((folder / COMPLETE).read_text())
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def last_complete(run: Path) -> Path | None:
    """Return the whole checkpoint with the most steps below the folder of a run, or None."""
    numbered = (path for path in run.glob("checkpoint-*") if re.search(r"-\d+$", path.name))
    return max(filter(is_complete, numbered), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
