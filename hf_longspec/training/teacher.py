"""States that training reads from the frozen target: last hidden states, and keys and values of one layer.

The LM head is left to the loss, so that logits never exist for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from hf_longspec.modeling.configuration_longspec import layer_kinds
from hf_longspec.modeling.interface_longspec import CACHE

from .documents import Span


class TargetStates(NamedTuple):
    hidden: Tensor  # (B, T, hidden), what the target's LM head reads
    key: Tensor  # (B, K, T, D), rotated, as the target caches it
    value: Tensor  # (B, K, T, D)
    window: int | None = None  # reach of the layer's queries, if the layer has a sliding window


class PassThroughLayer(CacheLayerMixin):
    """Cache layer for one forward pass over whole samples: return keys and values as given, and keep them if asked."""

    is_sliding = False

    def __init__(self, keep: bool):
        super().__init__()
        self.keep = keep

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers up to 5.17 may hand over the queries' positions instead of their number
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the method's name up to transformers 5.17


class FewLayersCache(Cache):
    """Keep K/V of the layers `kept` only.

    Few layers save memory. A cache object is needed because transformers without one takes positions that jump for
    packed sequences and masks them apart; Anchor-Offset positions jump within one sequence.
    """

    def __init__(self, layers: int, kept: Sequence[int]):
        super().__init__(layers=[PassThroughLayer(keep=index in kept) for index in range(layers)])

    @torch.compiler.disable  # else each layer of a target would be compiled for its own index in the cache
    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*args, **kwargs)


def read_target(
    target: PreTrainedModel, layer: int, ids: Tensor, positions: Tensor, masks: Any = None
) -> TargetStates:
    """Run ``target`` once, without its LM head, over ``ids`` (B, T) at ``positions`` (B, T).

    masks: as `documents.target_masks` makes them, where rows hold several documents.
    """
    return read_layers(target, [layer], ids, positions, masks)[0]


@torch.no_grad()
def read_layers(
    target: PreTrainedModel, layers: Sequence[int], ids: Tensor, positions: Tensor, masks: Any = None
) -> list[TargetStates]:
    """Read several ``layers`` from one forward pass; the arguments are otherwise as in `read_target`."""
    text_config = target.config.get_text_config(decoder=True)
    cache = FewLayersCache(text_config.num_hidden_layers, layers)
    output = target.get_decoder()(
        input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=True, **{CACHE: cache}
    )
    return [
        TargetStates(output.last_hidden_state, kept.keys, kept.values, window_of(text_config, layer))
        for layer, kept in ((layer, cache.layers[layer]) for layer in layers)
    ]


@torch.no_grad()
def read_target_in_pieces(
    target: PreTrainedModel, layer: int, ids: Tensor, positions: Tensor, piece: int
) -> TargetStates:
    """Read as `read_target` does, in forward passes over ``piece`` tokens each, behind a cache of the tokens before.

    The activations of a piece exist for this piece only; the cache holds keys and values of all layers.
    """
    cache = DynamicCache()  # without a config this cache keeps the whole past of sliding layers
    hidden = [
        target.get_decoder()(input_ids=part, position_ids=there, use_cache=True, **{CACHE: cache}).last_hidden_state
        for part, there in zip(ids.split(piece, dim=1), positions.split(piece, dim=1), strict=True)
    ]
    kept = cache.layers[layer]
    window = window_of(target.config.get_text_config(decoder=True), layer)
    return TargetStates(torch.cat(hidden, dim=1), kept.keys, kept.values, window)


def read_target_by_span(
    read: Callable[[Tensor, Tensor], TargetStates], ids: Tensor, positions: Tensor, spans: Sequence[Span]
) -> TargetStates:
    """Read documents one at a time by ``read`` (ids, positions), and lay the states side by side as in the batch."""
    rows: list[list[TargetStates]] = [[] for _ in range(len(ids))]
    for row, start, end in spans:
        rows[row].append(read(ids[row : row + 1, start:end], positions[row : row + 1, start:end]))

    def together(name: str, dim: int) -> Tensor:
        return torch.cat([torch.cat([getattr(states, name) for states in row], dim=dim) for row in rows])

    return TargetStates(together("hidden", 1), together("key", 2), together("value", 2), rows[0][0].window)


def window_of(text_config: PreTrainedConfig, layer: int) -> int | None:
    """Return the reach of the queries of a sliding-window layer; None for any other layer."""
    return text_config.sliding_window if layer_kinds(text_config)[layer] == "sliding" else None
