"""The two caches of a call: SpeculativeCache for the target, DraftWindow for the draft.

`SpeculativeCache` writes in place: a prefill appends, a round places its tree behind the prefix and `commit` moves
the accepted path next to it. Shapes do not depend on values and lengths live on the device, so that a round can be
captured in a CUDA graph. Knows nothing of models; attention reads the prefix it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .configuration_longspec import layer_kinds

BUCKET = 256  # tokens; capacities are multiples of this
LARGEST_RING = (
    16_384  # tokens; a ring takes its memory at once, and some windows (phi3: 262,144) are wider than any text
)


class Placement(NamedTuple):
    """Where nodes at `depths` (B, T) of a tree lie: behind the `length` tokens of the prefix.

    lengths: (B,) int64 on the device; length: the same on the host, for kernels that want a slice;
    start: first cache index that is not padding; visible: (B, P) bool, false where one of the first P indices is
    padding, None if all padding lies before `start`.
    """

    lengths: Tensor
    length: int
    start: int
    visible: Tensor | None
    depths: Tensor


class Prefix(NamedTuple):
    """What a layer holds of the prefix: key, value (B, K, S, D), and where each node may look, None for everywhere."""

    key: Tensor
    value: Tensor
    mask: Tensor | None  # (B, T, S) bool


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

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = _bucket(max(self.reserve, key_states.shape[2]))
        self.keys = key_states.new_empty(*key_states.shape[:2], capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], capacity, value_states.shape[3])
        # what an adopted sliding layer has forgotten: a masked slot still meets the weights, and 0 · NaN is NaN
        self.keys[:, :, : self.length] = self.values[:, :, : self.length] = 0
        self.is_initialized = True

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

    def place_tree(self, key_states: Tensor, value_states: Tensor, at: Placement) -> None:
        slots = at.lengths[:, None] + torch.arange(key_states.shape[2], device=self.keys.device)
        _write(self.keys, slots, key_states)
        _write(self.values, slots, value_states)

    def prefix(self, at: Placement) -> Prefix:
        held = slice(at.start, at.length)
        mask = None
        if self.window is not None or at.visible is not None:
            index = torch.arange(at.start, at.length, device=self.keys.device).expand(len(at.lengths), 1, -1)
            mask = index >= at.start if self.window is None else index > _too_far(at, self.window)
            mask = mask & _seen(index, at.visible)
            mask = mask.expand(-1, at.depths.shape[1], -1)
        return Prefix(self.keys[:, :, held], self.values[:, :, held], mask)

    def commit(self, path: Tensor, counts: Tensor, at: Placement) -> None:
        # steps beyond `counts` land behind the new prefix, where the next tree overwrites them
        source = at.lengths[:, None] + path
        target = at.lengths[:, None] + torch.arange(path.shape[1], device=path.device)
        _move(self.keys, source, target)
        _move(self.values, source, target)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class SlidingLayer(CacheLayerMixin):
    """The last `window − 1` keys and values of a sliding-window layer as a ring, and the tree of a round behind it.

    Token i of the text lies in slot i mod (window − 1). Memory does not depend on the context.
    """

    is_sliding = True

    def __init__(self, window: int, tree_size: int):
        super().__init__()
        self.window, self.tree_size = window, tree_size
        self.ring = max(window - 1, 1)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.ring + self.tree_size
        # zeros, not garbage: a masked slot still meets the weights, and 0 · NaN is NaN
        self.keys = key_states.new_zeros(*key_states.shape[:2], slots, key_states.shape[3])
        self.values = value_states.new_zeros(*value_states.shape[:2], slots, value_states.shape[3])
        self.is_initialized = True

    def ensure(self, capacity: int) -> None:
        """A ring never grows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D); returns the window's tokens in the order of the text with the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stored()
        self.length += key_states.shape[2]
        kept = min(self.ring, key_states.shape[2])
        slots = self._slots(kept)
        self.keys[:, :, slots] = key_states[:, :, -kept:]
        self.values[:, :, slots] = value_states[:, :, -kept:]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The window's keys and values in the order of the text, as copies."""
        slots = self._slots(min(self.length, self.window - 1))
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _slots(self, last: int) -> Tensor:
        return torch.arange(self.length - last, self.length, device=self.keys.device) % self.ring

    def place_tree(self, key_states: Tensor, value_states: Tensor, at: Placement) -> None:
        nodes = slice(self.ring, self.ring + key_states.shape[2])
        self.keys[:, :, nodes] = key_states
        self.values[:, :, nodes] = value_states

    def prefix(self, at: Placement) -> Prefix:
        held = ring_contents(at.lengths, self.ring)[:, None]  # (B, 1, ring)
        mask = (held > _too_far(at, self.window)) & (held >= at.start) & _seen(held, at.visible)
        return Prefix(self.keys[:, :, : self.ring], self.values[:, :, : self.ring], mask)

    def commit(self, path: Tensor, counts: Tensor, at: Placement) -> None:
        # Only accepted nodes may enter the ring, and of a path longer than the ring only its end:
        # every other step moves a tree slot onto itself.
        steps = torch.arange(path.shape[1], device=path.device)
        enters = (steps < counts[:, None]) & (steps >= counts[:, None] - self.ring)
        source = self.ring + path
        target = torch.where(enters, (at.lengths[:, None] + steps) % self.ring, source)
        _move(self.keys, source, target)
        _move(self.values, source, target)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window


class SharedLayer:
    """Stands where a layer attends to another layer's keys and values and stores none."""

    is_sliding = False
    is_initialized = False
    supports_early_init = False


class SpeculativeCache(Cache):
    """The target's cache of one call; see the module docstring.

    Outside a round, `update` appends. Between `begin_round` and `commit` it places the tree and hands the tree's own
    keys and values back; the prefix is read through `layers[i].prefix`.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        past: DynamicCache,
        reserve: int,
        tree_size: int,
        longest: int | None = None,
    ):
        """An empty cache with the layers of `past`.

        reserve: tokens to have room for; tree_size: nodes of the largest tree; longest: tokens that text and tree can
        reach at most, if that is known: a sliding window that is no shorter never slides.
        """
        self.past = past  # the cache that `hand_back` fills
        self.placement: Placement | None = None
        self.start = 0
        self.visible: Tensor | None = None
        window = getattr(text_config, "sliding_window", None) or 0
        layers: list = []
        for index, kind in enumerate(layer_kinds(text_config)):
            keeps_all = index >= len(past.layers) or not getattr(past.layers[index], "is_sliding", False)
            if kind == "shared":
                layers.append(SharedLayer())
            elif kind == "full" or (longest is not None and longest <= window):
                layers.append(FullLayer(reserve))
            elif keeps_all or window > LARGEST_RING:
                layers.append(FullLayer(reserve, window))
            else:
                layers.append(SlidingLayer(past.layers[index].sliding_window, tree_size))
        super().__init__(layers=layers)

    @property
    def owners(self) -> list[FullLayer | SlidingLayer]:
        return [layer for layer in self.layers if not isinstance(layer, SharedLayer)]

    @property
    def length(self) -> int:
        return self.owners[0].length

    @property
    def round_placement(self) -> Placement:
        """Where the tree of the present round lies."""
        assert self.placement is not None, "no round has begun"
        return self.placement

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if self.placement is None:
            return layer.update(key_states, value_states)
        layer.place_tree(key_states, value_states, self.placement)
        return key_states, value_states

    def place(self, depths: Tensor) -> Placement:
        """The placement of nodes at `depths` (B, T) behind what the cache holds."""
        lengths = torch.full((depths.shape[0],), self.length, device=depths.device)
        return Placement(lengths, self.length, self.start, self.visible, depths)

    def hide_padding(self, mask: Tensor) -> None:
        """Attend only to indices where `mask` (B, P), an attention mask of the prompt, is one."""
        self.start = int(mask.any(dim=0).long().argmax())  # read once a call
        self.visible = None if bool(mask[:, self.start :].all()) else mask.bool()

    def begin_round(self, depths: Tensor) -> None:
        """Until `commit` or `abandon`, `update` places a tree whose nodes have these depths (B, T)."""
        for layer in self.owners:
            layer.ensure(self.length + depths.shape[1])
        self.placement = self.place(depths)

    def commit(self, path: Tensor, counts: Tensor, emitted: int) -> None:
        """Keep the nodes `path[:, :count]`, (B, P) with counts (B,), as the next tokens of the prefix; drop the rest.

        emitted: `counts` on the host (batch 1).
        """
        placement = self.round_placement
        for layer in self.owners:
            layer.commit(path, counts, placement)
            layer.length += emitted
        self.placement = None

    def abandon(self) -> None:
        """Leave a round without keeping anything of its tree."""
        self.placement = None

    def drop(self, successor: DynamicCache) -> None:
        """Where plain `generate` drops its cache and starts another: `past` keeps what it has, `successor` follows."""
        self.hand_back(self.past)
        self.past = successor
        for layer in self.owners:
            layer.length, layer.is_initialized = 0, False  # the memory is the old cache's now

    def adopt(self, past: DynamicCache) -> None:
        """Take over what a cache holds, layer by layer, so that no more than one layer exists twice."""
        for ours, theirs in zip(self.layers, past.layers, strict=False):
            if isinstance(ours, SharedLayer):
                continue
            if getattr(theirs, "is_initialized", False) and theirs.get_seq_length() > 0:
                ours.length = theirs.get_seq_length() - theirs.keys.shape[2]
                ours.lazy_initialization(theirs.keys, theirs.values)
                ours.update(theirs.keys, theirs.values)
                theirs.keys = theirs.values = None

    def hand_back(self, past: DynamicCache) -> None:
        """Give `past` what plain decoding would have left in it."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SharedLayer) or not layer.is_initialized:
                continue
            while index >= len(past.layers):
                past.layers.append(past.layer_class_to_replicate())
            theirs = past.layers[index]
            if not theirs.is_initialized:
                theirs.lazy_initialization(layer.keys, layer.values)
            keys, values = layer.stored()
            if getattr(theirs, "is_sliding", False):
                kept = slice(1 - theirs.sliding_window, None) if theirs.sliding_window > 1 else slice(None)
                keys, values = keys[:, :, kept], values[:, :, kept]
            theirs.keys, theirs.values = keys, values
            if hasattr(theirs, "cumulative_length"):
                theirs.cumulative_length = layer.length


class DraftWindow:
    """The draft's own keys and values: a ring of the last `window` tokens and the inner nodes of one tree.

    Token i of the text lies in slot i mod `window`; then one slot that swallows writes of padding; then the tree.
    The number of bytes does not depend on the context.
    """

    def __init__(
        self, window: int, tree_size: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ):
        """shape: (B, K, D)."""
        batch, heads, dim = shape
        self.window = window
        self.tree_start = window + 1
        self.keys = torch.zeros(batch, heads, self.tree_start + tree_size, dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.first = 0  # position of the earliest token it was ever given

    def write(self, key: Tensor, value: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Store keys and values (B, K, T, D) of tokens at `positions` (B, T): of more than the window holds, the last.

        real: (B, T), false where a row is padding; without it, T ≤ window.
        """
        slots = positions % self.window
        if real is not None:
            # two writes to one slot would come in any order
            oldest = positions.masked_fill(~real, -1).amax(dim=1, keepdim=True) - self.window
            slots = torch.where(real & (positions > oldest), slots, self.window)
        _write(self.keys, slots, key)
        _write(self.values, slots, value)

    def place(self, key: Tensor, value: Tensor, first_node: int) -> None:
        """Store keys and values (B, K, T, D) of the tree nodes `first_node`, `first_node` + 1, …"""
        slots = slice(self.tree_start + first_node, self.tree_start + first_node + key.shape[2])
        self.keys[:, :, slots] = key
        self.values[:, :, slots] = value

    def mask(self, positions: Tensor, root_position: Tensor, ancestry: Tensor) -> Tensor:
        """(B, T, slots) bool: what nodes at `positions` (B, T) may see when the root stands at `root_position` (B,).

        ancestry: (B, T, tree_size), true for a node itself and its ancestors.
        """
        held = ring_contents(root_position, self.window)[:, None]  # (B, 1, window)
        ring = (held >= self.first) & (held > positions[:, :, None] - self.window)
        padding = torch.zeros_like(ring[:, :, :1])
        return torch.cat([ring, padding, ancestry], dim=-1)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def ring_contents(lengths: Tensor, ring: int) -> Tensor:
    """(B, ring) int64: the text position each slot holds after `lengths` (B,) tokens; negative where none came yet."""
    slot = torch.arange(ring, device=lengths.device)
    last = lengths[:, None] - 1
    return last - (last - slot) % ring


def _seen(index: Tensor, visible: Tensor | None) -> Tensor:
    """(B, 1, S) bool: which cache indices (B, 1, S) are no padding."""
    if visible is None:
        return torch.ones_like(index, dtype=torch.bool)
    prompt = visible.shape[1]
    return visible.gather(1, index[:, 0].clamp(0, prompt - 1))[:, None] | (index >= prompt)


def _too_far(at: Placement, window: int) -> Tensor:
    """(B, T, 1): the last position that is out of a node's sliding window."""
    return (at.lengths[:, None] + at.depths - window)[:, :, None]


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


def _regrown(old: Tensor, capacity: int, length: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
    new[:, :, :length] = old[:, :, :length]
    return new


def _rows(slots: Tensor) -> Tensor:
    return torch.arange(slots.shape[0], device=slots.device)[:, None]


def _write(store: Tensor, slots: Tensor, states: Tensor) -> None:
    """store (B, K, S, D)[b, :, slots[b, t]] = states (B, K, T, D)[b, :, t]."""
    store[_rows(slots), :, slots] = states.transpose(1, 2).to(store.dtype)


def _move(store: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots `source` (B, P) to slots `target` (B, P); all are read before any is written."""
    store[_rows(target), :, target] = store[_rows(source), :, source]
