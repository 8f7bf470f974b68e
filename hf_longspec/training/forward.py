"""The draft over whole samples at once: each token sees exactly what it would see in a decoding round."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM
from hf_longspec.modeling.target_longspec import BoundTarget

from .attention import lagged_attention, lagged_attention_by_mask, lagged_attention_by_span, windowed_attention
from .batch import Batch
from .documents import LONGEST_MASKED
from .teacher import TargetStates


def draft_hidden(
    draft: LongSpecForCausalLM,
    bound: BoundTarget,
    batch: Batch,
    states: TargetStates,
) -> Tensor:
    """Compute the hidden states (B, T, hidden) that the target's LM head turns into guesses of each next token.

    states: the target's states for the same ``batch``.
    """
    ids, positions, lags, document_ids = batch.input_ids, batch.positions, batch.lags, batch.document_ids

    def cross_attend(query: Tensor) -> Tensor:
        query = bound.rotate(query, bound.angles(query, positions))
        given = query, states.key.to(query.dtype), states.value.to(query.dtype), lags, states.window
        if document_ids is None:
            return lagged_attention(*given)
        if ids.shape[1] <= LONGEST_MASKED:
            return lagged_attention_by_mask(*given, document_ids)
        return lagged_attention_by_span(*given, batch.spans)

    self_attend = partial(windowed_attention, window=draft.config.window, document_ids=document_ids)
    read = None
    if draft.config.target_hidden_state:
        read = draft.read_hidden_state(lagged_states(states.hidden, lags, document_ids))
    return draft.layer(bound.embed(ids), draft.angles(positions), self_attend, cross_attend, read)


def lagged_states(hidden: Tensor, lags: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return at token t the state of token t-lag, (B, T, hidden), lags (B,); zeros where the document begins later."""
    source = torch.arange(hidden.shape[1], device=hidden.device) - lags[:, None]
    known, source = source >= 0, source.clamp(min=0)
    if document_ids is not None:
        known = known & (document_ids.gather(1, source) == document_ids)
    return hidden.gather(1, source[:, :, None].expand_as(hidden)) * known[:, :, None]
