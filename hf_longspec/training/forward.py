"""The draft over whole samples at once, seeing for every token exactly what it would see in a decoding round."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM
from hf_longspec.modeling.target_longspec import BoundTarget

from .attention import lagged_attention, lagged_attention_by_mask, lagged_attention_by_span, windowed_attention
from .documents import LONGEST_MASKED, Span
from .teacher import TargetStates


def draft_hidden(
    draft: LongSpecForCausalLM,
    bound: BoundTarget,
    ids: Tensor,
    positions: Tensor,
    states: TargetStates,
    lags: Tensor,
    document_ids: Tensor | None = None,
    spans: Sequence[Span] = (),
) -> Tensor:
    """Hidden states (B, T, hidden) that the target's LM head turns into guesses of each next token.

    ``ids`` and ``positions`` are (B, T), those that ``states`` were made from; so are ``document_ids`` (B, T) and
    their ``spans``, given where a row holds several documents. lags: (B,), see `lagged_attention`.
    """

    def cross_attend(query: Tensor) -> Tensor:
        query = bound.rotate(query, bound.angles(query, positions))
        given = query, states.key.to(query.dtype), states.value.to(query.dtype), lags, states.window
        if document_ids is None:
            return lagged_attention(*given)
        if ids.shape[1] <= LONGEST_MASKED:
            return lagged_attention_by_mask(*given, document_ids)
        return lagged_attention_by_span(*given, spans)

    self_attend = partial(windowed_attention, window=draft.config.window, document_ids=document_ids)
    return draft.layer(bound.embed(ids), draft.angles(positions), self_attend, cross_attend)
