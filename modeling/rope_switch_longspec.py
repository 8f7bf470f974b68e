"""RopeSwitch: the one length at which a longrope target (phi3) changes its rotary frequencies.

Up to `original_max_position_embeddings` tokens such a target uses one set of frequencies, beyond it another. No tree
may stand on both sides, and where plain `generate` reads the text anew at the switch, so must we.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache_longspec import SpeculativeCache


class RopeSwitch:
    def __init__(self, target: PreTrainedModel):
        parameters = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        longrope = parameters.get("rope_type") == "longrope"
        self.target = target
        self.last_short = parameters["original_max_position_embeddings"] if longrope else None

    def levels(self, cache: SpeculativeCache) -> int | None:
        """How many levels below a root at index `cache.length` lie on its side of the switch; None: any number."""
        if self.last_short is None or cache.length >= self.last_short:
            return None
        return self.last_short - 1 - cache.length

    def drops_cache(self, ids: Tensor, cache: SpeculativeCache) -> bool:
        """Whether plain `generate` would throw the cache away before it reads the newest token of `ids` (1, L)."""
        if self.last_short is None or ids.shape[1] <= self.last_short or cache.length > self.last_short:
            return False
        return self._inputs(ids, cache).get("past_key_values") is None

    def rebuild(self, ids: Tensor, root_position: Tensor, cache: SpeculativeCache) -> Tensor:
        """Read what plain `generate` reads anew of `ids` (1, L) into the emptied cache; its last logits (1, vocab).

        That is all of `ids` from transformers 5.18 on; 5.17 forgets the text here, and we with it.
        """
        behind = torch.arange(1 - ids.shape[1], 1, device=root_position.device)
        inputs = self._inputs(ids, cache, position_ids=root_position[:, None] + behind)
        cache.clear()
        outputs = self.target(**inputs | {"past_key_values": cache}, return_dict=True)
        return outputs.logits[:, -1]

    def _inputs(self, ids: Tensor, cache: SpeculativeCache, **kwargs: Tensor) -> dict:
        return self.target.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, use_cache=True, **kwargs
        )
