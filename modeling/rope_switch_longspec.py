"""RopeSwitch: the one length at which a longrope target (phi3) changes its rotary frequencies.

Up to `original_max_position_embeddings` tokens such a target uses one set of frequencies, beyond it another. No tree
may stand on both sides, and where plain `generate` reads the text anew at the switch, so must we.
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


class RopeSwitch:
    """Tell how a call has to respect the switch of its target; a target without one asks for nothing."""

    def __init__(self, target: PreTrainedModel, model_kwargs: dict[str, Any]):
        """model_kwargs: those of the call, for the attention mask and the positions of the prompt."""
        self.target = target
        self.last_short = last_short_length(target)
        self.options = {name: model_kwargs[name] for name in ("output_hidden_states",) if name in model_kwargs}
        self.step = 1 if model_kwargs.get("use_cache", True) else None  # tokens that plain `generate` reads each step
        self.mask, self.positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")

    def levels(self, root_positions: Tensor, cache: SpeculativeCache) -> int | None:
        """Return how many levels below roots at `root_positions` (B,) may be guessed; None: any number.

        The frequencies change by position, the cache is dropped by length; padding sets the two apart.
        """
        if self.last_short is None:
            return None
        places = (int(root_positions.max()), cache.length)  # a batch has the frequencies of its largest position
        limits = [self.last_short - 1 - place for place in places if place < self.last_short]
        return min(limits, default=None)

    def drops_cache(self, text: Text, cache: SpeculativeCache) -> bool:
        """Tell whether plain `generate` would drop its cache before it reads the newest token of `text`."""
        if self.last_short is None or text.lengths[0] <= self.last_short or cache.length > self.last_short:
            return False
        return self._inputs(text.sequences, cache).get(CACHE) is None

    def read_anew(self, text: Text, cache: SpeculativeCache) -> Any:
        """Read what plain `generate` reads anew of `text` into the emptied cache. Returns the target's outputs.

        That is the whole text; with a cache, transformers 5.17 forgets the text here, and we with it.
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
