"""SpeculativeCache: the target's cache of one call, written in place.

A prefill appends, a round places its tree behind the prefix and `commit` moves the accepted path next to it. Shapes do
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

# Tokens. A ring takes its memory at once, and some windows (phi3: 262,144) are wider than any text.
LARGEST_RING = 16_384


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
        batch: int = 1,
        lead: int = 0,
    ):
        """An empty cache with the layers of `past`.

        reserve: tokens to have room for; tree_size: nodes of the largest tree; longest: tokens that text and tree can
        reach at most, if that is known: a sliding window that is no shorter never slides; lead: how many tokens a row
        may be ahead of the shortest one.
        """
        self.past = past  # the cache that `hand_back` fills
        self.placement: Placement | None = None
        self.starts = [0] * batch
        self.visible: Tensor | None = None
        self._committed: list[int] | None = None
        self._spans: Spans | None = None
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
                layers.append(SlidingLayer(past.layers[index].sliding_window, tree_size, lead))
        super().__init__(layers=layers)

    @property
    def owners(self) -> list[FullLayer | SlidingLayer]:
        return [layer for layer in self.layers if not isinstance(layer, SharedLayer)]

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

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if self.placement is None:
            self._spans = None
            return layer.update(key_states, value_states)
        layer.place_tree(key_states, value_states, self.placement.to(key_states.device))
        return key_states, value_states

    def place(self, depths: Tensor) -> Placement:
        """The placement of nodes at `depths` (B, T) behind what the cache holds."""
        if self._spans is None:  # once a round: they cross to the device
            self._spans = Spans.of(list(zip(self.starts, self.lengths, strict=True)), depths.device)
        return Placement(self._spans, self.visible, depths, {})

    def hide_padding(self, mask: Tensor) -> None:
        """Attend only to indices where `mask` (B, P), an attention mask of the prompt, is one."""
        self.starts = mask.long().argmax(dim=1).tolist()  # read once a call
        index = torch.arange(mask.shape[1], device=mask.device)
        behind = index >= torch.tensor(self.starts, device=mask.device)[:, None]
        self.visible = None if bool((mask.bool() == behind).all()) else mask.bool()

    def begin_round(self, depths: Tensor) -> None:
        """Until `commit` or `abandon`, `update` places a tree whose nodes have these depths (B, T)."""
        for layer in self.owners:
            layer.ensure(self.length + depths.shape[1])
        self.placement = self.place(depths)

    def commit(self, path: Tensor, counts: Tensor, emitted: list[int]) -> None:
        """Keep the nodes `path[:, :count]`, (B, P) with counts (B,), as the next tokens of each row; drop the rest.

        emitted: `counts` on the host.
        """
        placement = self.round_placement
        self._committed = [length + count for length, count in zip(self.lengths, emitted, strict=True)]
        self._spans = None
        for layer in self.owners:
            device = layer.keys.device
            layer.commit(path.to(device), counts.to(device), placement.to(device))
            layer.length = max(self._committed)
        self.placement = None

    def abandon(self) -> None:
        """Leave a round without keeping anything of its tree."""
        self.placement = None

    def drop(self, successor: DynamicCache) -> None:
        """Where plain `generate` drops its cache and starts another: `past` keeps what it has, `successor` follows."""
        self.hand_back(self.past)
        self.past = successor
        self._committed = self._spans = None
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
