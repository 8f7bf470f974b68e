"""The layers of a SpeculativeCache: where a target's keys and values lie, prefix and tree.

Each layer appends in a prefill, says where prefix and tree of a round lie, and moves the accepted path next to the
prefix in `commit`. Writes are in place; lengths come as tensors on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention_longspec import Prefix, Spans
from .memory_longspec import Memory, empty_stores
from .slots_longspec import Move, ring_contents

BUCKET = 256  # tokens; capacities are multiples of this
SLACK = 4  # memory of another call may be so many times what is needed: an eager attention reads all of it


class Placement(NamedTuple):
    """Where nodes at `depths` (B, T) of a tree lie: each row's behind the tokens of its prefix.

    spans: each row's prefix, from its first index that is no padding to its length; visible: (B, P) bool, false where
    one of the first P indices is padding, None if all padding lies before the spans; shared: what layers have in
    common, made once a round.
    """

    spans: Spans
    visible: Tensor | None
    depths: Tensor
    shared: dict[Any, Any]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, for all layers that ask under `key`."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def to(self, device: torch.device) -> Placement:
        """The same for a layer on another device than most are on."""
        if self.depths.device == device:
            return self
        return self.once(device, lambda: self._moved(device))

    def _moved(self, device: torch.device) -> Placement:
        visible = None if self.visible is None else self.visible.to(device)
        return Placement(self.spans.to(device), visible, self.depths.to(device), {})


class FullLayer(CacheLayerMixin):
    """All keys and values of a layer, (B, K, capacity, D), with room for a tree behind the prefix.

    `window` is set where a sliding layer keeps its whole past, as in a `DynamicCache` made without a config.
    """

    is_sliding = False

    def __init__(self, reserve: int, window: int | None = None):
        super().__init__()
        self.reserve = reserve  # tokens to have room for: prompt, first answer tokens, tree
        self.window = window
        self.length = 0
        self.spare: Memory | None = None

    def takes(self, spare: Memory) -> bool:
        """Whether the memory of another call has about the size that is needed here."""
        return _bucket(self.reserve) <= spare[0].shape[2] <= SLACK * _bucket(self.reserve)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = _bucket(max(self.reserve, key_states.shape[2]))
        self.keys, self.values = empty_stores(self.spare, key_states, value_states, capacity)
        self.spare, self.is_initialized = None, True

    @property
    def capacity(self) -> float:
        """How many tokens there is room for."""
        return self.keys.shape[2]

    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` tokens. Doubling: a long answer copies the cache a logarithmic number of times."""
        if self.is_initialized and capacity > self.keys.shape[2]:
            size = _bucket(max(capacity, 2 * self.keys.shape[2]))
            self.keys = _regrown(self.keys, size, self.length)
            self.values = _regrown(self.values, size, self.length)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) in place; returns all keys and values as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.ensure(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.stored()

    def stored(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the text so far, (B, K, length, D), as views."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def tree_slots(self, at: Placement) -> Tensor:
        """(B,): where a tree begins, in slots."""
        return at.spans.ends

    def prefix(self, at: Placement) -> Prefix:
        if self.window is None and at.visible is None:
            return Prefix(self.keys, self.values, at.spans, None)
        spans, mask = at.once(("full", self.window), lambda: (self._spans(at), self._mask(at)))
        return Prefix(self.keys, self.values, spans, mask)

    def _spans(self, at: Placement) -> Spans:
        """What any node of a row may see."""
        if self.window is None:
            return at.spans
        reach = self.window - 1
        host = at.spans.host
        return Spans(
            torch.maximum(at.spans.starts, at.spans.ends - reach),
            at.spans.ends,
            None if host is None else tuple((max(start, end - reach), end) for start, end in host),
            {},
        )

    def _mask(self, at: Placement) -> Tensor:
        index = torch.arange(self.keys.shape[2], device=self.keys.device).expand(len(at.depths), 1, -1)
        mask = (index >= at.spans.starts[:, None, None]) & (index < at.spans.ends[:, None, None])
        if self.window is not None:
            mask = mask & (index > _too_far(at, self.window))
        return (mask & _seen(index, at.visible)).expand(-1, at.depths.shape[1], -1)

    def commit(self, path: Tensor, counts: Tensor, at: Placement, move: Move) -> None:
        if path.shape[1] == 1:  # a root lies where it is kept
            return
        # steps beyond `counts` land behind the new prefix, where the next tree overwrites them
        move(self.keys, self.values, *at.once("path", lambda: _path_slots(at, path)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class SlidingLayer(CacheLayerMixin):
    """The last keys and values of a sliding-window layer as a ring, and the tree of a round behind it.

    Token i of the text lies in slot i mod ring. The ring holds `window − 1` tokens and `lead` more: so many may a row
    be ahead of the shortest one, whose length a cache is cut to in the end. Memory does not depend on the context.
    """

    is_sliding = True
    capacity = math.inf  # tokens; the oldest are forgotten

    def __init__(self, window: int, tree_size: int, lead: int = 0):
        super().__init__()
        self.window, self.tree_size = window, tree_size
        self.ring = max(window - 1, 1) + lead
        self.length = 0
        self.spare: Memory | None = None

    def takes(self, spare: Memory) -> bool:
        """Whether the memory of another call has the size that is needed here."""
        return spare[0].shape[2] == self.ring + self.tree_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = empty_stores(self.spare, key_states, value_states, self.ring + self.tree_size)
        self.spare, self.is_initialized = None, True

    def ensure(self, capacity: int) -> None:
        """A ring never grows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D); returns the window's tokens in the order of the text with the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stored()
        end = self.length + key_states.shape[2]
        kept = min(self.ring, key_states.shape[2])
        slots = self._slots(end, kept)
        self.keys[:, :, slots] = key_states[:, :, -kept:]
        self.values[:, :, slots] = value_states[:, :, -kept:]
        self.length = end  # last: states that do not fit leave the layer as it was
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The window's keys and values in the order of the text, as copies."""
        slots = self._slots(self.length, min(self.length, self.window - 1))
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _slots(self, end: int, count: int) -> Tensor:
        return torch.arange(end - count, end, device=self.keys.device) % self.ring

    def tree_slots(self, at: Placement) -> Tensor:
        return at.once(("tree", self.ring), lambda: torch.full_like(at.spans.ends, self.ring))

    def prefix(self, at: Placement) -> Prefix:
        spans, mask = at.once(("sliding", self.window, self.ring), lambda: (self._spans(at), self._mask(at)))
        return Prefix(self.keys, self.values, spans, mask)

    def _spans(self, at: Placement) -> Spans:
        """The whole ring: what it holds, in no order, is told by the mask."""
        ends = torch.full_like(at.spans.ends, self.ring)
        return Spans(torch.zeros_like(ends), ends, ((0, self.ring),) * len(ends), {})

    def _mask(self, at: Placement) -> Tensor:
        held = ring_contents(at.spans.ends, self.ring)[:, None]  # (B, 1, ring)
        starts = at.spans.starts[:, None, None]
        return (held > _too_far(at, self.window)) & (held >= starts) & _seen(held, at.visible)

    def commit(self, path: Tensor, counts: Tensor, at: Placement, move: Move) -> None:
        move(self.keys, self.values, *at.once(("path", self.ring), lambda: self._path_slots(path, counts, at)))

    def _path_slots(self, path: Tensor, counts: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Where the ring has the nodes of `path` (B, P), and where it is to have them.

        Only accepted nodes may enter the ring, and of a path longer than the ring only its end: every other step moves
        a tree slot onto itself.
        """
        steps = torch.arange(path.shape[1], device=path.device)
        enters = (steps < counts[:, None]) & (steps >= counts[:, None] - self.ring)
        source = self.ring + path
        return source, torch.where(enters, (at.spans.ends[:, None] + steps) % self.ring, source)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window


class SharedLayer:
    """Stands where a layer attends to the keys and values of layer `owner` and stores none."""

    is_sliding = False
    is_initialized = False
    supports_early_init = False

    def __init__(self, owner: int):
        self.owner = owner


def _path_slots(at: Placement, path: Tensor) -> tuple[Tensor, Tensor]:
    """Where a full layer has the nodes of `path` (B, P) below the root, and where it is to have them: (B, P − 1)."""
    ends = at.spans.ends[:, None]
    return ends + path[:, 1:], ends + torch.arange(1, path.shape[1], device=path.device)


def _seen(index: Tensor, visible: Tensor | None) -> Tensor:
    """(B, 1, S) bool: which cache indices (B, 1, S) are no padding."""
    if visible is None:
        return torch.ones_like(index, dtype=torch.bool)
    prompt = visible.shape[1]
    return visible.gather(1, index[:, 0].clamp(0, prompt - 1))[:, None] | (index >= prompt)


def _too_far(at: Placement, window: int) -> Tensor:
    """(B, T, 1): the last position that is out of a node's sliding window."""
    return (at.spans.ends[:, None] + at.depths - window)[:, :, None]


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


def _regrown(old: Tensor, capacity: int, length: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    new[:, :, :length] = old[:, :, :length]
    return new
