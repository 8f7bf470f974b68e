"""The draft over whole samples at once, seeing for every token exactly what it would see in a decoding round."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM
from hf_longspec.modeling.target_longspec import BoundTarget

from .attention import lagged_attention, windowed_attention
from .teacher import TargetStates


def draft_hidden(
    draft: LongSpecForCausalLM, bound: BoundTarget, ids: Tensor, positions: Tensor, states: TargetStates, lag: int
) -> Tensor:
    """Hidden states (B, T, hidden) that the target's LM head turns into guesses of each next token.

    ``ids`` and ``positions`` are (B, T), those that ``states`` were made from.
    """

    def cross_attend(query: Tensor) -> Tensor:
        query = bound.rotate(query, bound.angles(query, positions))
        return lagged_attention(query, states.key.to(query.dtype), states.value.to(query.dtype), lag, states.window)

    self_attend = partial(windowed_attention, window=draft.config.window)
    return draft.layer(bound.embed(ids), draft.angles(positions), self_attend, cross_attend)
