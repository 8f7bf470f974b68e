"""SpeculativeCache: the target's cache of one call, written in place.

A prefill appends, a round has its tree behind the prefix and `commit` moves the accepted path next to it. Shapes do
not depend on values and lengths live on the device, so that a round can be captured in a CUDA graph. Knows nothing of
models; attention reads the prefix it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from .attention_longspec import Spans
from .cache_layers_longspec import FullLayer, Placement, SharedLayer, SlidingLayer
from .configuration_longspec import layer_kinds
from .memory_longspec import Memory
from .slots_longspec import Move, move_slots

# Tokens. A ring takes its memory at once, and some windows (phi3: 262,144) are wider than any text.
LARGEST_RING = 16_384


class SpeculativeCache(Cache):
    """The target's cache of one call; see the module docstring.

    Outside a round, `update` appends. Between `begin_round` and `commit` it hands the tree's own keys and values back:
    the attention over them puts them where `layers[i].tree_slots` says; the prefix is read through `layers[i].prefix`.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        past: DynamicCache,
        reserve: int,
        tree_size: int,
        longest: int | None = None,
        batch: int = 1,
        lead: int = 0,
    ):
        """An empty cache with the layers of `past`.

        reserve: tokens to have room for; tree_size: nodes of the largest tree; longest: tokens that text and tree can
        reach at most, if that is known: a sliding window that is no shorter never slides; lead: how many tokens a row
        may be ahead of the shortest one.
        """
        self.past = past  # the cache that `hand_back` fills
        self.tree_size = tree_size
        self.placement: Placement | None = None
        self.starts = [0] * batch
        self.visible: Tensor | None = None
        self.on_device = False  # whether the lengths of rounds shall be read on the device only, as CUDA graphs do
        self._committed: list[int] | None = None
        self.bounds: Tensor | None = None  # see `bounds_on`
        window = getattr(text_config, "sliding_window", None) or 0
        layers: list = []
        types = getattr(text_config, "layer_types", None) or [None] * text_config.num_hidden_layers
        for index, kind in enumerate(layer_kinds(text_config)):
            keeps_all = index >= len(past.layers) or not getattr(past.layers[index], "is_sliding", False)
            if kind == "shared":
                owners = [i for i, layer in enumerate(layers) if not isinstance(layer, SharedLayer)]
                layers.append(SharedLayer(max(owner for owner in owners if types[owner] == types[index])))
            elif kind == "full" or (longest is not None and longest <= window):
                layers.append(FullLayer(reserve))
            elif keeps_all or window > LARGEST_RING:
                layers.append(FullLayer(reserve, window))
            else:
                layers.append(SlidingLayer(past.layers[index].sliding_window, tree_size, lead))
        super().__init__(layers=layers)
        self.owners: list[FullLayer | SlidingLayer] = [layer for layer in layers if not isinstance(layer, SharedLayer)]

    def __bool__(self) -> bool:
        """As the cache it stands for: phi3 asks, and a `DynamicCache()` that nothing was put into is false."""
        return len(self.past) > 0 or self.length > 0

    def owner(self, layer_idx: int) -> FullLayer | SlidingLayer:
        """The layer whose keys and values layer `layer_idx` of the target attends to."""
        layer = self.layers[layer_idx]
        return self.layers[layer.owner] if isinstance(layer, SharedLayer) else layer

    def borrow(self, memory: list[Memory]) -> None:
        """Lie in the `memory` of another cache where that fits; else it is given up before anything is allocated."""
        if len(memory) == len(self.owners) and all(
            layer.takes(spare) and len(spare[0]) == len(self.starts)
            for layer, spare in zip(self.owners, memory, strict=True)
        ):
            for layer, spare in zip(self.owners, memory, strict=True):
                layer.spare = spare

    @property
    def memory(self) -> list[Memory]:
        """Of the layers that have some."""
        return [(layer.keys, layer.values) for layer in self.owners if layer.is_initialized]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row that the cache holds."""
        return self._committed or [self.owners[0].length] * len(self.starts)

    @property
    def length(self) -> int:
        """That of the longest row."""
        return max(self.lengths)

    @property
    def round_placement(self) -> Placement:
        """Where the tree of the present round lies."""
        assert self.placement is not None, "no round has begun"
        return self.placement

    @torch.compiler.disable  # it writes in place at lengths that change with every call
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.placement is not None:
            return key_states, value_states
        assert len(set(self.lengths)) == 1, "rows of different lengths cannot be appended to"
        self._committed = self.bounds = None
        return self.layers[layer_idx].update(key_states, value_states)

    def bounds_on(self, device: torch.device) -> Tensor:
        """(2, B): where the spans of the rows start and end. They cross once a call; `commit` keeps them up there."""
        if self.bounds is None:
            self.bounds = torch.tensor([self.starts, self.lengths], device=device)
        return self.bounds

    def place(self, depths: Tensor) -> Placement:
        """The placement of nodes at `depths` (B, T) behind what the cache holds."""
        starts, ends = self.bounds_on(depths.device)
        host = None if self.on_device else tuple(zip(self.starts, self.lengths, strict=True))
        return Placement(Spans(starts, ends, host, {}), self.visible, depths, {})

    def hide_padding(self, mask: Tensor) -> None:
        """Attend only to indices where `mask` (B, P), an attention mask of the prompt, is one."""
        self.starts = mask.long().argmax(dim=1).tolist()  # read once a call
        index = torch.arange(mask.shape[1], device=mask.device)
        behind = index >= torch.tensor(self.starts, device=mask.device)[:, None]
        self.visible = None if bool((mask.bool() == behind).all()) else mask.bool()

    def make_room(self) -> bool:
        """Room for a tree behind the longest row in all layers. Returns whether any of them had to move its memory."""
        needed = self.length + self.tree_size
        short = [layer for layer in self.owners if layer.is_initialized and needed > layer.capacity]
        for layer in short:
            layer.ensure(needed)
        return bool(short)

    def begin_round(self, depths: Tensor) -> None:
        """Until `committed` or `abandon`, what comes is a tree whose nodes have these depths (B, T)."""
        for layer in self.owners:
            layer.ensure(self.length + depths.shape[1])
        self.placement = self.place(depths)

    def commit(self, path: Tensor, counts: Tensor, move: Move = move_slots) -> None:
        """Keep the nodes `path[:, :count]`, (B, P) with counts (B,), as the next tokens of each row; drop the rest.

        move: how the stores of a layer are written. Work of the device alone; `committed` tells the host.
        """
        placement = self.round_placement
        for layer in self.owners:
            device = layer.keys.device
            layer.commit(path.to(device), counts.to(device), placement.to(device), move)
        placement.spans.ends.add_(counts)

    def committed(self, emitted: list[int]) -> None:
        """`emitted`: the counts of the `commit` before."""
        self._committed = [length + count for length, count in zip(self.lengths, emitted, strict=True)]
        longest = max(self._committed)
        for layer in self.owners:
            layer.length = longest
        self.placement = None

    def abandon(self) -> None:
        """Leave a round without keeping anything of its tree."""
        self.placement = None

    def drop(self, successor: DynamicCache) -> None:
        """Where plain `generate` drops its cache and starts another: `past` keeps what it has, `successor` follows."""
        self.hand_back(self.past)
        self.past = successor
        self._committed = self.bounds = None
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
        """Give `past` what plain decoding would have left in it: all rows as long as the shortest."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SharedLayer) or not layer.is_initialized:
                continue
            while index >= len(past.layers):
                past.layers.append(past.layer_class_to_replicate())
            theirs = past.layers[index]
            if not theirs.is_initialized:
                theirs.lazy_initialization(layer.keys, layer.values)
            layer.length = min(self._committed or [layer.length])
            keys, values = layer.stored()
            if getattr(theirs, "is_sliding", False):
                kept = slice(1 - theirs.sliding_window, None) if theirs.sliding_window > 1 else slice(None)
                keys, values = keys[:, :, kept], values[:, :, kept]
            theirs.keys, theirs.values = keys, values
            if hasattr(theirs, "cumulative_length"):
                theirs.cumulative_length = layer.length
