"""Memory of a layer's keys and values, and whether that of another call will do."""

from __future__ import annotations

import torch
from torch import Tensor

Memory = tuple[Tensor, Tensor]  # keys and values of a layer, (B, K, slots, D)


def empty_stores(spare: Memory | None, keys: Tensor, values: Tensor, slots: int) -> Memory:
    """Stores of `slots` for states like `keys` and `values` (B, K, T, D); in `spare`, with its slots, if it fits.

    Zeros, not garbage or what another call left: a masked slot still meets the weights, and 0 · NaN is NaN.
    """
    states = (keys, values)
    if spare is not None and all(_fits(own, like, slots) for own, like in zip(spare, states, strict=True)):
        return spare[0].zero_(), spare[1].zero_()
    shapes = [(*like.shape[:2], slots, like.shape[3]) for like in states]
    return keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])


def _fits(spare: Tensor, states: Tensor, slots: int) -> bool:
    alike = spare.shape[:2] == states.shape[:2] and spare.shape[3] == states.shape[3] and spare.shape[2] >= slots
    # what was made in inference mode may not be written to outside of it
    forbidden = spare.is_inference() and not torch.is_inference_mode_enabled()
    return alike and (spare.dtype, spare.device) == (states.dtype, states.device) and not forbidden
