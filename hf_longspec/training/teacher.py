"""What training reads off the frozen target: last hidden states, and keys and values of one layer.

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

from .documents import Span


class TargetStates(NamedTuple):
    hidden: Tensor  # (B, T, hidden), what the target's LM head reads
    key: Tensor  # (B, K, T, D), rotated, as the target caches it
    value: Tensor  # (B, K, T, D)
    window: int | None = None  # reach of that layer's queries, if it is a sliding-window layer


class PassThroughLayer(CacheLayerMixin):
    """A cache layer for one forward pass over whole samples: hands keys and values through, keeps them if asked."""

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

    get_max_cache_shape = get_max_length  # its name up to transformers 5.17


class FewLayersCache(Cache):
    """Keeps K/V of the layers `kept` only.

    Memory is one reason. The other: without a cache object, transformers takes positions that jump for packed
    sequences and masks them apart, which Anchor-Offset positions are not.
    """

    def __init__(self, layers: int, kept: Sequence[int]):
        super().__init__(layers=[PassThroughLayer(keep=index in kept) for index in range(layers)])

    @torch.compiler.disable  # or each layer of a target would be compiled for its own place here
    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*args, **kwargs)


def read_target(
    target: PreTrainedModel, layer: int, ids: Tensor, positions: Tensor, masks: Any = None
) -> TargetStates:
    """One forward pass of ``target`` without its LM head over ``ids`` (B, T) at ``positions`` (B, T).

    masks: as `documents.target_masks` makes them, where rows hold several documents.
    """
    return read_layers(target, [layer], ids, positions, masks)[0]


@torch.no_grad()
def read_layers(
    target: PreTrainedModel, layers: Sequence[int], ids: Tensor, positions: Tensor, masks: Any = None
) -> list[TargetStates]:
    """The same of several ``layers``, from the same forward pass."""
    text_config = target.config.get_text_config(decoder=True)
    cache = FewLayersCache(text_config.num_hidden_layers, layers)
    output = target.get_decoder()(
        input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
    )
    return [
        TargetStates(output.last_hidden_state, kept.keys, kept.values, window_of(text_config, layer))
        for layer, kept in ((layer, cache.layers[layer]) for layer in layers)
    ]


@torch.no_grad()
def read_target_in_pieces(
    target: PreTrainedModel, layer: int, ids: Tensor, positions: Tensor, piece: int
) -> TargetStates:
    """The same in forward passes over ``piece`` tokens each, behind a cache of what was read before.

    What the layers make of a piece exists for that piece only; the cache holds keys and values of all layers.
    """
    cache = DynamicCache()  # made without a config it keeps the whole past of sliding layers
    hidden = [
        target.get_decoder()(
            input_ids=part, position_ids=there, past_key_values=cache, use_cache=True
        ).last_hidden_state
        for part, there in zip(ids.split(piece, dim=1), positions.split(piece, dim=1), strict=True)
    ]
    kept = cache.layers[layer]
    window = window_of(target.config.get_text_config(decoder=True), layer)
    return TargetStates(torch.cat(hidden, dim=1), kept.keys, kept.values, window)


def read_target_by_span(
    read: Callable[[Tensor, Tensor], TargetStates], ids: Tensor, positions: Tensor, spans: Sequence[Span]
) -> TargetStates:
    """The documents of a batch one at a time, each by ``read`` (ids, positions), laid side by side as they were."""
    rows: list[list[TargetStates]] = [[] for _ in range(len(ids))]
    for row, start, end in spans:
        rows[row].append(read(ids[row : row + 1, start:end], positions[row : row + 1, start:end]))

    def together(name: str, dim: int) -> Tensor:
        return torch.cat([torch.cat([getattr(states, name) for states in row], dim=dim) for row in rows])

    return TargetStates(together("hidden", 1), together("key", 2), together("value", 2), rows[0][0].window)


def window_of(text_config: PreTrainedConfig, layer: int) -> int | None:
    """Reach of the queries of a sliding-window layer."""
    return text_config.sliding_window if layer_kinds(text_config)[layer] == "sliding" else None
