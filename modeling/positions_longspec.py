"""Positions: where a target's positions end or change their meaning. No tree may stand across such a place.

A table of positions (gpt2, opt) has a last one. A longrope target (phi3) turns its queries and keys by one set of
frequencies up to `original_max_position_embeddings` tokens and by another beyond. And phi3, whatever its rope, drops
its cache behind that length and reads the text anew: so must we.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .cache_longspec import SpeculativeCache
from .interface_longspec import CACHE
from .text_longspec import Text


def last_short_length(target: PreTrainedModel) -> int | None:
    """Return the longest text that a longrope target reads with its short frequencies; None for other targets."""
    parameters = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return parameters["original_max_position_embeddings"] if parameters.get("rope_type") == "longrope" else None


def table_size(target: PreTrainedModel) -> int | None:
    """Return how many positions a target has in a table; None for one that turns by any angle."""
    if any(name.endswith("rotary_emb") for name, _ in target.get_decoder().named_modules()):
        return None
    config = target.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)


class Positions:
    """Tell how a call has to respect the positions of its target; most targets ask for nothing."""

    def __init__(self, target: PreTrainedModel, model_kwargs: dict[str, Any], longest: int):
        """model_kwargs: of the call, for the prompt's attention mask and positions; longest: length of text and tree.

        kept: the longest text whose cache the target does not drop; None if the text will not be longer.
        """
        self.target = target
        self.last_short, self.table = last_short_length(target), table_size(target)
        kept = getattr(target.config, "original_max_position_embeddings", None)
        self.kept = kept if kept is not None and kept < longest else None
        self.by_length = self.last_short is not None or self.kept is not None  # and rows have to be of one length
        self.differ = self.by_length or (self.table is not None and self.table < longest)  # for ranks of other lengths
        self.options = {name: model_kwargs[name] for name in ("output_hidden_states",) if name in model_kwargs}
        self.step = 1 if model_kwargs.get("use_cache", True) else None  # tokens that plain `generate` reads each step
        # without a cache plain `generate` turns all keys anew beyond the switch, also where no cache is dropped
        self.rereads = self.step is None and self.kept is None and (self.last_short or longest) < longest
        self.mask, self.positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")

    def levels(self, most: int, position: int, length: int) -> int:
        """Return how many levels, `most` or fewer, may be guessed below roots of which the last is at `position`.

        length: of the cache, by which it is dropped; frequencies change by position, and padding sets the two apart.
        """
        places = ((self.last_short, position), (self.kept, length))  # a batch has the frequencies of its last position
        limits = [end - 1 - place for end, place in places if end is not None and place < end]
        if self.table is not None:
            limits.append(max(self.table - 1 - position, 0))  # a root beyond the table fails as in plain decoding
        return min([most, *limits])

    def within(self, positions: Tensor, stopped: Tensor) -> Tensor:
        """Return positions (B, T) of which those of rows that have stopped (B,) are in the table, unread."""
        if self.table is None:
            return positions
        return torch.where(stopped[:, None], positions.clamp(max=self.table - 1), positions)

    def drops_cache(self, text: Text, cache: SpeculativeCache) -> bool:
        """Tell whether plain `generate` would drop its cache before it reads the newest token of `text`."""
        if self.kept is None or text.lengths[0] <= self.kept or cache.length > self.kept:
            return False
        return self._inputs(text.sequences, cache).get(CACHE) is None

    def read_anew(self, text: Text, cache: SpeculativeCache) -> Any:
        """Read what plain `generate` reads anew of `text` into the emptied cache. Returns the target's outputs.

        That is the whole text without a cache, and from transformers 5.18 on; 5.17 forgets the text, and we with it.
        """
        inputs = self._inputs(text.sequences, cache)
        cache.restart(DynamicCache(config=self.target.config.get_text_config(decoder=True)))
        return self.target(**inputs | {CACHE: cache} | self.options, return_dict=True)

    def _inputs(self, ids: Tensor, cache: SpeculativeCache) -> dict:
        mask, positions = self.mask, self.positions
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
        if positions is not None:
            behind = torch.arange(1, 1 + ids.shape[1] - positions.shape[1], device=positions.device)
            positions = torch.cat([positions, positions[:, -1:] + behind], dim=1)
        own = {CACHE: cache, "use_cache": True, "attention_mask": mask, "position_ids": positions}
        return self.target.prepare_inputs_for_generation(ids, next_sequence_length=self.step, **own)
