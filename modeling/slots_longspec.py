"""Slots of a key or value store (B, K, S, D): written and moved by index, without a look at the values of the indices.

Shapes never depend on values, so all of this can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def write_slots(store: Tensor, slots: Tensor, states: Tensor) -> None:
    """store (B, K, S, D)[b, :, slots[b, t]] = states (B, K, T, D)[b, :, t]."""
    store.scatter_(2, slots[:, None, :, None].expand_as(states), states.to(store.dtype))


def move_slots(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots `source` (B, P) of both stores to slots `target` (B, P); all are read before any is written."""
    for store in (keys, values):
        shape = -1, store.shape[1], -1, store.shape[3]
        store.scatter_(2, _everywhere(target, shape), store.gather(2, _everywhere(source, shape)))


def _everywhere(slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Slots (B, P), the same ones in all heads and dimensions."""
    return slots[:, None, :, None].expand(shape)


Move = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def ring_contents(lengths: Tensor, ring: int) -> Tensor:
    """(B, ring) int64: the text position each slot holds after `lengths` (B,) tokens; negative where none came yet."""
    slot = torch.arange(ring, device=lengths.device)
    last = lengths[:, None] - 1
    return last - (last - slot) % ring
