"""Positions of training samples by Anchor-Offset (LongSpec, arXiv 2502.17421, section 3.2).

Short documents cover every position of a long context: the first few tokens of a document, the attention sink at
inference, stay at 0.., and the rest moves up by one random offset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def anchor_offset_positions(positions: Tensor, max_position: int, max_sink: int, rng: np.random.Generator) -> Tensor:
    """Return positions (T,) of a sample whose documents stand at ``positions`` (T,): 0, 1, … within each.

    Each document draws a sink of 0..max_sink tokens and an offset that keeps it below ``max_position``; its positions
    rise by one, except for the jump behind the sink. Raises `ValueError` for a document longer than ``max_position``.
    """
    document = (positions == 0).cumsum(0) - 1
    lengths = document.bincount().numpy()
    if lengths.max() > max_position:
        raise ValueError(f"`max_position` must be at least the longest document, {lengths.max()}, got {max_position}")
    sinks = torch.from_numpy(rng.integers(max_sink + 1, size=len(lengths)))
    offsets = torch.from_numpy(rng.integers(max_position - lengths + 1))
    return torch.where(positions < sinks[document], positions, positions + offsets[document])
