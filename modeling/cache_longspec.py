"""SpeculativeCache: the target's cache of one call, written in place.

Reading the prompt appends; a round writes its tree behind the prefix, and `commit` moves the accepted path next to the
prefix. Shapes do not depend on values and lengths live on the device, so that a round can be captured in a CUDA graph.
A call goes through the cache as `reuse`, `take_over`, then `make_room`, `begin_round`, `commit`, `end_round` for each
round, then `hand_back`. Knows nothing of models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from .attention_longspec import Memo, Move, Span, Spans, move_slots
from .cache_layers_longspec import FullLayer, Placement, SharedLayer, SlidingLayer, Stores, compacted, widened
from .configuration_longspec import layer_kinds

# Tokens. A ring takes its memory at once, and some windows (phi3: 262,144) are wider than any text.
LARGEST_RING = 16_384


class SpeculativeCache(Cache):
    """The target's cache of one call; see the module docstring.

    Outside a round, `update` appends. Between `begin_round` and `end_round`, `update` returns the tree's own keys and
    values: hybrid attention writes them where `tree_slots` of the layer says and reads the prefix by `prefix_of`.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        past: Cache,
        reserve: int,
        tree_size: int,
        longest: int | None = None,
        batch: int = 1,
        lead: int = 0,
    ):
        """Make an empty cache with the layers of `past`.

        reserve: tokens to have room for. tree_size: nodes of the largest tree. lead: tokens that a row may be ahead of
        the shortest row. longest: the largest length of text and tree, if known: a window of that size never slides.
        """
        self.past = past  # the cache of the user, which `hand_back` fills
        self.tree_size, self.longest = tree_size, longest
        self.ahead = 0  # tokens that rounds of which the host does not know yet may have kept
        self.placement: Placement | None = None
        self.starts = [0] * batch  # of each row, the first index that is no padding
        self.visible: Tensor | None = None  # see `Placement`
        self.on_device = False  # whether rounds read the lengths on the device only, as CUDA graphs do
        self._row_lengths: list[int] | None = None  # None while all rows are as long as the layers say
        self.bounds: Tensor | None = None  # see `bounds_on`
        window = getattr(text_config, "sliding_window", None) or 0
        layers: list = []
        types = getattr(text_config, "layer_types", None) or [None] * text_config.num_hidden_layers
        for index, kind in enumerate(layer_kinds(text_config)):
            # the window of a static cache holds one token more than a ring
            keeps_all = index >= len(past.layers) or not isinstance(past.layers[index], DynamicSlidingWindowLayer)
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
        """Answer as the cache of the user would: phi3 asks, and an empty `DynamicCache()` is false."""
        return len(self.past) > 0 or self.length > 0

    def owner(self, layer_idx: int) -> FullLayer | SlidingLayer:
        """Return the layer whose keys and values layer `layer_idx` of the target attends to."""
        layer = self.layers[layer_idx]
        return self.layers[layer.owner] if isinstance(layer, SharedLayer) else layer

    def reuse(self, memory: list[Stores]) -> None:
        """Use the stores of an earlier cache if all of them fit; else they are freed before anything is allocated."""
        if len(memory) == len(self.owners) and all(
            layer.accepts(spare) and len(spare.keys) == len(self.starts)
            for layer, spare in zip(self.owners, memory, strict=True)
        ):
            for layer, spare in zip(self.owners, memory, strict=True):
                layer.spare = spare

    @property
    def memory(self) -> list[Stores]:
        """The stores of the layers that have some."""
        return [Stores(layer.keys, layer.values) for layer in self.owners if layer.is_initialized]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row in the cache."""
        return self._row_lengths or [self.owners[0].length] * len(self.starts)

    @property
    def length(self) -> int:
        """The number of tokens of the longest row."""
        return max(self.lengths)

    @property
    def round_placement(self) -> Placement:
        """The placement of the present round's tree."""
        assert self.placement is not None, "no round has begun"
        return self.placement

    @torch.compiler.disable  # it writes in place at lengths that change with every call
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.placement is not None:
            return key_states, value_states
        assert len(set(self.lengths)) == 1, "rows of different lengths cannot be appended to"
        self._row_lengths = self.bounds = None
        return self.layers[layer_idx].update(key_states, value_states)

    def bounds_on(self, device: torch.device) -> Tensor:
        """Return (2, B), the starts and ends of the rows' spans: sent once a call, then kept up by `commit`."""
        if self.bounds is None:
            self.bounds = torch.tensor([self.starts, self.lengths], device=device)
        return self.bounds

    def placement_of(self, depths: Tensor) -> Placement:
        """Return the placement of nodes at `depths` (B, T) behind the cached tokens."""
        starts, ends = self.bounds_on(depths.device)
        host = None if self.on_device else tuple(map(Span, self.starts, self.lengths))
        return Placement(Spans(starts, ends, host, Memo()), self.visible, depths)

    def hide_padding(self, mask: Tensor) -> None:
        """Attend only to indices where `mask` (B, P), the attention mask of the prompt, is one."""
        self.starts = mask.long().argmax(dim=1).tolist()  # read once a call
        index = torch.arange(mask.shape[1], device=mask.device)
        behind = index >= torch.tensor(self.starts, device=mask.device)[:, None]
        self.visible = None if bool((mask.bool() == behind).all()) else mask.bool()

    def make_room(self) -> bool:
        """Make room for a tree behind the longest row. Returns whether the stores of any layer had to move."""
        needed = self.length + self.ahead + self.tree_size
        needed = needed if self.longest is None else min(needed, self.longest)
        short = [layer for layer in self.owners if layer.is_initialized and needed > layer.capacity]
        for layer in short:
            layer.ensure(needed)
        return bool(short)

    def begin_round(self, depths: Tensor) -> None:
        """Take what comes until `end_round` for a tree whose nodes have these depths (B, T)."""
        for layer in self.owners:
            layer.ensure(self.length + depths.shape[1])
        self.placement = self.placement_of(depths)

    def commit(self, path: Tensor, counts: Tensor, move: Move = move_slots) -> None:
        """Keep the nodes `path[:, :count]`, path (B, P) and counts (B,), as each row's next tokens; drop the others.

        move: how the stores of a layer are written. Only the device works here; `end_round` tells the host.
        """
        placement = self.round_placement
        for layer in self.owners:
            device = layer.keys.device
            layer.keep_path(path.to(device), counts.to(device), placement.to(device), move)
        placement.spans.ends.add_(counts)

    def end_round(self, counts: list[int]) -> None:
        """Leave the round, in which `commit` kept `counts` nodes of each row."""
        self._row_lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        longest = max(self._row_lengths)
        for layer in self.owners:
            layer.length = longest
        self.placement = None

    def restart(self, successor: Cache) -> None:
        """Start empty where plain `generate` drops its cache for `successor`: `past` keeps what it has."""
        self.hand_back()
        self.compact()
        self.past = successor
        self._row_lengths = self.bounds = None
        for layer in self.owners:
            layer.length = 0

    def take_over(self) -> None:
        """Take over what `past` holds, layer by layer, so that no more than one layer exists twice."""
        for ours, theirs in zip(self.layers, self.past.layers, strict=False):
            if isinstance(ours, SharedLayer):
                continue
            if getattr(theirs, "is_initialized", False) and theirs.get_seq_length() > 0:
                ours.length = theirs.get_seq_length() - theirs.keys.shape[2]
                ours.lazy_initialization(theirs.keys, theirs.values)
                ours.update(theirs.keys, theirs.values)
                theirs.keys = theirs.values = None

    def compact(self) -> None:
        """Let what `hand_back` gave own no more memory than it fills, so that a saved or copied cache has no reserve.

        Tensor by tensor: no more than one exists twice.
        """
        for ours, theirs in zip(self.layers, self.past.layers, strict=False):
            if ours.is_initialized:
                ours.is_initialized = False
                theirs.keys, ours.keys = compacted(theirs.keys), None
                theirs.values, ours.values = compacted(theirs.values), None

    def hand_back(self) -> None:
        """Give `past` what plain decoding would have left there: all rows as long as the shortest."""
        past = self.past
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SharedLayer) or not layer.is_initialized:
                continue
            while index >= len(past.layers):
                past.layers.append(past.layer_class_to_replicate())
            theirs = past.layers[index]
            if not theirs.is_initialized:
                theirs.lazy_initialization(layer.keys, layer.values)
            layer.length = min(self._row_lengths or [layer.length])
            keys, values = layer.stored()
            if isinstance(theirs, StaticLayer):  # made by `generate` for this call, and empty
                theirs.update(keys, values)
                continue
            if getattr(theirs, "is_sliding", False):
                kept = slice(1 - theirs.sliding_window, None) if theirs.sliding_window > 1 else slice(None)
                keys, values = keys[:, :, kept], values[:, :, kept]
            if theirs.values is not None:  # new: before transformers 5.24 it takes values in the format of the keys
                values = widened(values, theirs.values)
            theirs.keys, theirs.values = keys, values
            if hasattr(theirs, "cumulative_length"):
                theirs.cumulative_length = layer.length
