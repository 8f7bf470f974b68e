"""Positions of training samples. Anchor-Offset (LongSpec, arXiv 2502.17421, section 3.2) shows a short document every
position of a long context: its first few tokens stay at 0.., as the attention sink they are at inference, and the rest
moves up by one random offset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def anchor_offset_positions(positions: Tensor, max_position: int, max_sink: int, rng: np.random.Generator) -> Tensor:
    """Positions (T,) of a sample whose documents stand at ``positions`` (T,): 0, 1, … within each.

    Each document draws a sink of 0..max_sink tokens and an offset that keeps it below ``max_position``; its positions
    rise by one, but for the jump behind the sink. Raises `ValueError` for a document that is longer than that.
    """
    document = (positions == 0).cumsum(0) - 1
    lengths = document.bincount().numpy()
    if lengths.max() > max_position:
        raise ValueError(f"`max_position` must be at least the longest document, {lengths.max()}, got {max_position}")
    sinks = torch.from_numpy(rng.integers(max_sink + 1, size=len(lengths)))
    offsets = torch.from_numpy(rng.integers(max_position - lengths + 1))
    return torch.where(positions < sinks[document], positions, positions + offsets[document])
