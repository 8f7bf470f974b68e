"""What training reads off the frozen target: last hidden states, and keys and values of one layer.

The LM head is left to the loss, so that logits never exist for all tokens at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from hf_longspec.modeling.configuration_longspec import layer_kinds


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


class OneLayerCache(Cache):
    """Keeps K/V of a single layer.

    Memory is one reason. The other: without a cache object, transformers takes positions that jump for packed
    sequences and masks them apart, which Anchor-Offset positions are not.
    """

    def __init__(self, layers: int, kept: int):
        super().__init__(layers=[PassThroughLayer(keep=index == kept) for index in range(layers)])


@torch.no_grad()
def read_target(target: PreTrainedModel, layer: int, ids: Tensor, positions: Tensor) -> TargetStates:
    """One forward pass of ``target`` without its LM head over ``ids`` (B, T) at ``positions`` (B, T)."""
    decoder = target.get_decoder()
    text_config = target.config.get_text_config(decoder=True)
    cache = OneLayerCache(text_config.num_hidden_layers, layer)
    output = decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    kept = cache.layers[layer]
    window = text_config.sliding_window if layer_kinds(text_config)[layer] == "sliding" else None
    return TargetStates(output.last_hidden_state, kept.keys, kept.values, window)
