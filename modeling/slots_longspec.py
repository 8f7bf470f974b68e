"""Slots of a key or value store (B, K, S, D): written and moved by index, without a look at the values of the indices.

Shapes never depend on values, so all of this can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_slots(store: Tensor, slots: Tensor, states: Tensor) -> None:
    """store (B, K, S, D)[b, :, slots[b, t]] = states (B, K, T, D)[b, :, t]."""
    store.scatter_(2, slots[:, None, :, None].expand_as(states), states.to(store.dtype))


def move_slots(store: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots `source` (B, P) to slots `target` (B, P); all are read before any is written."""
    store[_rows(target), :, target] = store[_rows(source), :, source]


def ring_contents(lengths: Tensor, ring: int) -> Tensor:
    """(B, ring) int64: the text position each slot holds after `lengths` (B,) tokens; negative where none came yet."""
    slot = torch.arange(ring, device=lengths.device)
    last = lengths[:, None] - 1
    return last - (last - slot) % ring


def _rows(slots: Tensor) -> Tensor:
    return torch.arange(slots.shape[0], device=slots.device)[:, None]
