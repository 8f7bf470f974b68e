"""The layers of a SpeculativeCache: where a target's keys and values lie, prefix and tree.

A layer appends while the prompt is read, tells where prefix and tree of a round lie, and moves the accepted path next
to the prefix at the round's end. Writes are in place; lengths of a round are tensors on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention_longspec import Memo, Move, Prefix, Span, Spans, ring_contents

BUCKET = 256  # tokens; capacities are multiples of this
SLACK = 4  # stores of another call may be so many times as large as needed: an eager attention reads all slots


class Stores(NamedTuple):
    """Memory for the keys and the values of a layer, each (B, K, slots, D)."""

    keys: Tensor
    values: Tensor


class Placement(NamedTuple):
    """Where the nodes of a tree lie: those of each row behind the tokens of its prefix.

    spans: each row's prefix, from its first index that is no padding to its length; layers share what they derive in
        `spans.memo`.
    visible: (B, P) bool, false where one of the first P indices is padding; None if all padding lies before the spans.
    depths: (B, T), of the nodes.
    """

    spans: Spans
    visible: Tensor | None
    depths: Tensor

    def to(self, device: torch.device) -> Placement:
        """Return the placement on the device of a layer that does not lie where most layers lie."""
        if self.depths.device == device:
            return self
        return self.spans.memo.once(device, lambda: self._moved(device))

    def _moved(self, device: torch.device) -> Placement:
        visible = None if self.visible is None else self.visible.to(device)
        return Placement(self.spans.to(device), visible, self.depths.to(device))


class FullLayer(CacheLayerMixin):
    """Keep all keys and values of a layer, (B, K, capacity, D), with room for a tree behind the prefix.

    `window` is set where a sliding layer keeps its whole past, as in a `DynamicCache` made without a config.
    """

    is_sliding = False

    def __init__(self, reserve: int, window: int | None = None):
        super().__init__()
        self.reserve = reserve  # tokens to have room for: prompt, first answer tokens, tree
        self.window = window
        self.length = 0
        self.spare: Stores | None = None  # of another call, to be used again

    def accepts(self, spare: Stores) -> bool:
        """Tell whether the stores of another call have about the size needed here."""
        return _bucket(self.reserve) <= spare.keys.shape[2] <= SLACK * _bucket(self.reserve)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = _bucket(max(self.reserve, key_states.shape[2]))
        self.keys, self.values = empty_stores(self.spare, key_states, value_states, capacity)
        self.spare, self.is_initialized = None, True

    @property
    def capacity(self) -> float:
        """The number of tokens that there is room for."""
        return self.keys.shape[2]

    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` tokens, by doubling: a long answer copies the cache a few times only."""
        if self.is_initialized and capacity > self.keys.shape[2]:
            size = _bucket(max(capacity, 2 * self.keys.shape[2]))
            self.keys, self.values = _regrown(self.keys, size), _regrown(self.values, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) in place; returns all keys and values as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.ensure(end)
        self.keys, self.values = widened(self.keys, key_states), widened(self.values, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.stored()

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the text so far, (B, K, length, D), as views."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def tree_slots(self, placement: Placement) -> Tensor:
        """Return the slot (B,) where each row's tree begins."""
        return placement.spans.ends

    def prefix_of(self, placement: Placement) -> Prefix:
        """Return the prefix that the nodes of a round attend to."""
        spans, memo, window = placement.spans, placement.spans.memo, self.window
        if window is None and placement.visible is None:
            return Prefix(self.keys, self.values, spans, None)
        mask = memo.once(("mask", window), lambda: self._mask(placement))
        if window is not None:  # a memo that held its own spans would be freed by the garbage collector only
            spans = memo.once(("spans", window), lambda: self._within_reach(spans, window - 1))
        return Prefix(self.keys, self.values, spans, mask)

    @staticmethod
    def _within_reach(spans: Spans, reach: int) -> Spans:
        """Return the slots that any node of a row may see."""
        host = None
        if spans.host is not None:
            host = tuple(Span(max(span.start, span.end - reach), span.end) for span in spans.host)
        return Spans(torch.maximum(spans.starts, spans.ends - reach), spans.ends, host, Memo())

    def _mask(self, placement: Placement) -> Tensor:
        spans, depths = placement.spans, placement.depths
        index = torch.arange(self.keys.shape[2], device=self.keys.device).expand(len(depths), 1, -1)
        mask = (index >= spans.starts[:, None, None]) & (index < spans.ends[:, None, None])
        if self.window is not None:
            mask = mask & (index > _too_far(placement, self.window))
        return (mask & _seen(index, placement.visible)).expand(-1, depths.shape[1], -1)

    def keep_path(self, path: Tensor, counts: Tensor, placement: Placement, move: Move) -> None:
        """Move the nodes `path[:, :count]` of each row, path (B, P) and counts (B,), next to the prefix."""
        if path.shape[1] == 1:  # a root lies where it is kept
            return
        # steps beyond `counts` land behind the new prefix, where the next tree overwrites them
        slots = placement.spans.memo.once("path", lambda: _path_slots(placement, path))
        move(self.keys, self.values, slots.source, slots.target)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class SlidingLayer(CacheLayerMixin):
    """Keep the last keys and values of a sliding-window layer in a ring, and the tree of a round behind the ring.

    Token i of the text lies in slot i mod ring. The ring holds `window − 1` tokens and `lead` more: the number of
    tokens that a row may be ahead of the shortest row, to whose length the cache is cut in the end. The memory does
    not depend on the context.
    """

    is_sliding = True
    capacity = math.inf  # tokens; the oldest are forgotten

    def __init__(self, window: int, tree_size: int, lead: int = 0):
        super().__init__()
        self.window, self.tree_size = window, tree_size
        self.ring = max(window - 1, 1) + lead
        self.length = 0
        self.spare: Stores | None = None

    def accepts(self, spare: Stores) -> bool:
        """Tell whether the stores of another call have the size needed here."""
        return spare.keys.shape[2] == self.ring + self.tree_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = empty_stores(self.spare, key_states, value_states, self.ring + self.tree_size)
        self.spare, self.is_initialized = None, True

    def ensure(self, capacity: int) -> None:
        """Do nothing: a ring never grows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D); returns the window's tokens in the order of the text with the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stored()
        end = self.length + key_states.shape[2]
        kept = min(self.ring, key_states.shape[2])
        slots = self._slots(end, kept)
        self.keys, self.values = widened(self.keys, key_states), widened(self.values, value_states)
        self.keys[:, :, slots] = key_states[:, :, -kept:].to(self.keys.dtype)
        self.values[:, :, slots] = value_states[:, :, -kept:].to(self.values.dtype)
        self.length = end  # last: states that do not fit leave the layer as it was
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the window's keys and values in the order of the text, as copies."""
        slots = self._slots(self.length, min(self.length, self.window - 1))
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _slots(self, end: int, count: int) -> Tensor:
        return torch.arange(end - count, end, device=self.keys.device) % self.ring

    def tree_slots(self, placement: Placement) -> Tensor:
        """Return the slot (B,) where each row's tree begins: right behind the ring."""
        ends = placement.spans.ends
        return placement.spans.memo.once(("tree slots", self.ring), lambda: torch.full_like(ends, self.ring))

    def prefix_of(self, placement: Placement) -> Prefix:
        """Return the prefix that the nodes of a round attend to: the whole ring, masked by what each slot holds."""
        key = "sliding", self.window, self.ring
        spans, mask = placement.spans.memo.once(key, lambda: (self._spans(placement), self._mask(placement)))
        return Prefix(self.keys, self.values, spans, mask)

    def _spans(self, placement: Placement) -> Spans:
        ends = torch.full_like(placement.spans.ends, self.ring)
        return Spans(torch.zeros_like(ends), ends, (Span(0, self.ring),) * len(ends), Memo())

    def _mask(self, placement: Placement) -> Tensor:
        held = ring_contents(placement.spans.ends, self.ring)[:, None]  # (B, 1, ring)
        starts = placement.spans.starts[:, None, None]
        return (held > _too_far(placement, self.window)) & (held >= starts) & _seen(held, placement.visible)

    def keep_path(self, path: Tensor, counts: Tensor, placement: Placement, move: Move) -> None:
        """Move the nodes `path[:, :count]` of each row, path (B, P) and counts (B,), into the ring."""
        key = "path", self.ring
        slots = placement.spans.memo.once(key, lambda: self._path_slots(path, counts, placement))
        move(self.keys, self.values, slots.source, slots.target)

    def _path_slots(self, path: Tensor, counts: Tensor, placement: Placement) -> PathSlots:
        """Return the slots of a path (B, P) before and after a round.

        Only accepted nodes may enter the ring, and only the end of a path longer than the ring: every other step moves
        a tree slot onto itself.
        """
        steps = torch.arange(path.shape[1], device=path.device)
        enters = (steps < counts[:, None]) & (steps >= counts[:, None] - self.ring)
        source = self.ring + path
        return PathSlots(source, torch.where(enters, (placement.spans.ends[:, None] + steps) % self.ring, source))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window


class SharedLayer:
    """Stand for a layer that attends to the keys and values of layer `owner` and stores none."""

    is_sliding = False
    is_initialized = False
    supports_early_init = False

    def __init__(self, owner: int):
        self.owner = owner


class PathSlots(NamedTuple):
    """The slots of a path, each (B, steps): where a round left the nodes, and where the text is to have them."""

    source: Tensor
    target: Tensor


def _path_slots(placement: Placement, path: Tensor) -> PathSlots:
    """Return the slots in a full layer of the steps of a path (B, P) below the root."""
    ends = placement.spans.ends[:, None]
    return PathSlots(ends + path[:, 1:], ends + torch.arange(1, path.shape[1], device=path.device))


def _seen(index: Tensor, visible: Tensor | None) -> Tensor:
    """Return (B, 1, S) bool: which cache indices (B, 1, S) are no padding."""
    if visible is None:
        return torch.ones_like(index, dtype=torch.bool)
    prompt = visible.shape[1]
    return visible.gather(1, index[:, 0].clamp(0, prompt - 1))[:, None] | (index >= prompt)


def _too_far(placement: Placement, window: int) -> Tensor:
    """Return (B, T, 1): the last position beyond each node's sliding window."""
    return (placement.spans.ends[:, None] + placement.depths - window)[:, :, None]


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


def widened(store: Tensor, states: Tensor) -> Tensor:
    """Return `store` in a format that holds `states` as well: autocast and what came before it may differ."""
    return store.to(torch.promote_types(store.dtype, states.dtype))


def compacted(states: Tensor) -> Tensor:
    """Return `states` in memory that they fill, or as they are where there is no room to copy them."""
    if states.untyped_storage().nbytes() == states.nbytes:
        return states
    try:
        return states.clone()
    except torch.OutOfMemoryError:
        return states


def _regrown(old: Tensor, capacity: int) -> Tensor:
    """Return a store with more slots; all of the old ones are copied, as the device may be ahead of the host."""
    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def empty_stores(spare: Stores | None, keys: Tensor, values: Tensor, slots: int) -> Stores:
    """Make stores of `slots` for states like `keys` and `values` (B, K, T, D), in the memory of `spare` if it fits.

    Filled with zeros, not with what memory or another call holds: a masked slot still meets the weights, and 0 · NaN
    is NaN.
    """
    states = (keys, values)
    if spare is not None and all(_fits(own, like, slots) for own, like in zip(spare, states, strict=True)):
        return Stores(spare.keys.zero_(), spare.values.zero_())
    shapes = [(*like.shape[:2], slots, like.shape[3]) for like in states]
    return Stores(keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]))


def _fits(spare: Tensor, states: Tensor, slots: int) -> bool:
    alike = spare.shape[:2] == states.shape[:2] and spare.shape[3] == states.shape[3] and spare.shape[2] >= slots
    # what was made in inference mode may not be written to outside of it
    forbidden = spare.is_inference() and not torch.is_inference_mode_enabled()
    return alike and (spare.dtype, spare.device) == (states.dtype, states.device) and not forbidden
