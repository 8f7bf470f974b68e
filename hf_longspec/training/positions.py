"""Positions of training samples. Anchor-Offset (LongSpec, arXiv 2502.17421, section 3.2) shows a short sample every
position of a long context: its first few tokens stay at 0.., as the attention sink they are at inference, and the rest
moves up by one random offset.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_positions(batch: int, length: int) -> Tensor:
    """0..length-1 for each row: (batch, length)."""
    return torch.arange(length).expand(batch, length)


def anchor_offset_positions(
    batch: int, length: int, max_position: int, max_sink: int, generator: torch.Generator
) -> Tensor:
    """Positions (batch, length) that rise along each row and stay below ``max_position``.

    Each row draws a sink of 0..max_sink tokens and an offset of 0..max_position-length from ``generator``.
    """
    if max_position < length:
        raise ValueError(f"max_position must be at least the sample length {length}, got {max_position}")
    if not 0 <= max_sink <= length:
        raise ValueError(f"max_sink must be in 0..{length}, got {max_sink}")
    sinks = torch.randint(max_sink + 1, (batch, 1), generator=generator)
    offsets = torch.randint(max_position - length + 1, (batch, 1), generator=generator)
    positions = plain_positions(batch, length)
    return torch.where(positions < sinks, positions, positions + offsets)
