"""A run's state on disk: step, draft and optimizer, in one file that is either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = "checkpoint.pt"


class Checkpoint(NamedTuple):
    step: int  # steps done
    config: dict[str, Any]  # TrainingConfig.to_dict() of the run
    draft: dict[str, Any]
    optimizer: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Writes beside the old checkpoint and replaces it in one move: a kill at any moment leaves one of the two."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / (FILE + ".tmp")
        with open(unfinished, "wb") as file:
            torch.save(self._asdict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Checkpoint | None:
        """The checkpoint in ``folder``, on the CPU, or None if there is none."""
        path = Path(folder) / FILE
        if not path.exists():
            return None
        return cls(**torch.load(path, map_location="cpu", weights_only=True))
