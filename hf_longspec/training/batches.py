"""What step s trains on: windows, positions and lag as a pure function of (seed, s).

So a run needs no random state to be resumed exactly: the number of steps done says it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import TrainingConfig
from .data import TokenWindows
from .positions import anchor_offset_positions, plain_positions


class Batch(NamedTuple):
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the token after each of `ids`
    positions: Tensor  # (B, T)
    lag: int


class Batches:
    """The batches of a run, by step. Every window of a stage's length is seen once before any is seen again."""

    def __init__(self, tokens: np.ndarray, config: TrainingConfig):
        self.config = config
        self.windows: Mapping[int, TokenWindows] = {
            stage.length: TokenWindows(tokens, stage.length) for stage in config.stages
        }
        self._orders: dict[int, tuple[int, Tensor]] = {}  # window length -> epoch and its order: a cache, not state

    def __getitem__(self, step: int) -> Batch:
        index, step_of_stage = self.config.stage_at(step)
        stage = self.config.stages[index]
        windows = self.windows[stage.length]
        first = step_of_stage * stage.batch_size
        chosen = [self._window(stage.length, first + row) for row in range(stage.batch_size)]
        sample = torch.stack([windows[i] for i in chosen])
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        lag = int(torch.randint(1, self.config.max_lag + 1, (), generator=generator))
        if stage.max_position is None:
            positions = plain_positions(stage.batch_size, stage.length)
        else:
            positions = anchor_offset_positions(
                stage.batch_size, stage.length, stage.max_position, self.config.max_sink, generator
            )
        return Batch(sample[:, :-1], sample[:, 1:], positions, lag)

    def _window(self, length: int, position: int) -> int:
        """The window at ``position`` of the endless stream of shuffled epochs."""
        count = len(self.windows[length])
        epoch, place = divmod(position, count)
        if self._orders.get(length, (None,))[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._orders[length] = epoch, torch.randperm(count, generator=generator)
        return int(self._orders[length][1][place])
