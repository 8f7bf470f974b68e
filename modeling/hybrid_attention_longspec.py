"""Hybrid attention in a layer of the target: what a round's forward does in place of the target's own attention.

The tree's keys and values come from the layer, the prefix from our cache, and the backend attends to both. Knows
caches and backends, and attention modules by `layer_idx` only.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_longspec import Nodes
from .cache_layers_longspec import Placement
from .cache_longspec import SpeculativeCache
from .engine_longspec import Backend
from .interface_longspec import Attend


class Round(NamedTuple):
    """What the attention of one verification forward works on.

    ancestors: (B, T, T) bool, see `ancestor_mask`; seen: filled with the index of every layer that attended.
    """

    cache: SpeculativeCache
    ancestors: Tensor
    backend: Backend
    seen: set[int]

    @property
    def attend(self) -> Attend:
        """The attention function of this round, as transformers calls it."""
        return partial(hybrid_attention, self)

    def check(self, target: Any) -> None:
        """Raise `ValueError` unless every layer attended through transformers' attention interface."""
        expected = set(range(len(self.cache.layers)))
        if self.seen != expected:
            raise ValueError(
                f"{type(target).__name__} does not follow transformers' attention interface: expected it to attend "
                f"through it in layers {sorted(expected)}, it did in {sorted(self.seen)}"
            )


def hybrid_attention(
    state: Round,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend from a tree to prefix and tree: query (B, H, T, D), key and value (B, K, T, D), all of the tree.

    Returns (B, T, H, D) in the query's dtype and no weights. Raises `ValueError` for layers that attend twice or to
    other keys and values than the cache holds.
    """
    first = module.layer_idx not in state.seen
    state.seen.add(module.layer_idx)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = state.cache.owner(module.layer_idx)
    placement = state.cache.round_placement.to(layer.keys.device)
    prefix = layer.prefix_of(placement).to(query.device)
    shapes = [states.shape[1::2] for states in (prefix.key, prefix.value)]  # heads and dimension
    if not first or [states.shape[1::2] for states in (key, value)] != shapes:
        raise ValueError(
            "LongSpec needs a target that attends once a layer to the keys and values it caches, got "
            f"{type(module).__name__}, which does otherwise"
        )
    mask = tree_mask(state, state.cache.round_placement.to(query.device), layer.window)
    owns = layer is state.cache.layers[module.layer_idx]
    nodes = Nodes(key, value, mask, layer.tree_slots(placement) if owns else None)
    with torch.autocast(query.device.type, enabled=False):  # or the products of float32 would be rounded
        return state.backend.attention(query, prefix, nodes, scaling, softcap, s_aux), None


def tree_mask(state: Round, placement: Placement, window: int | None) -> Tensor:
    """Return (B, T, T) bool: a node sees itself and its ancestors, in a sliding layer those within its window."""
    key, depths = ("tree mask", window), placement.depths
    return placement.spans.memo.once(key, lambda: _tree_mask(state.ancestors, depths, window))


def _tree_mask(ancestors: Tensor, depths: Tensor, window: int | None) -> Tensor:
    ancestors = ancestors.to(depths.device)
    if window is None:
        return ancestors
    apart = depths[:, :, None] - depths[:, None, :]
    return ancestors & (apart < window)
