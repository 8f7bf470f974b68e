"""Documents that lie side by side in one sample: where each begins and ends, and what keeps them apart.

Short samples keep their shape, so that kernels are chosen and compiled once, and a mask says which tokens see each
other. For long samples such a mask is too large, and their documents are taken one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from hf_longspec.modeling.interface_longspec import CACHE

# The length of the longest samples with a mask, which takes batch × length² bytes (16 MiB a sample).
LONGEST_MASKED = 4096


# A document: (row of the batch, first token, token behind the last). A plain tuple: `Trainer` rebuilds containers.
Span = tuple[int, int, int]


def spans_of(document_ids: Tensor) -> list[Span]:
    """Return all documents of a batch, in order; document_ids: (B, T), equal and adjacent for a document's tokens."""
    spans: list[Span] = []
    for row, ids in enumerate(document_ids):
        starts = [0, *((ids[1:] != ids[:-1]).nonzero()[:, 0] + 1).tolist(), len(ids)]
        spans += [(row, start, end) for start, end in zip(starts[:-1], starts[1:], strict=True)]
    return spans


def positions_within(document_ids: Tensor) -> Tensor:
    """Return the positions 0, 1, … within each document, (B, T) like document_ids."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - index.where(is_start, 0).cummax(dim=1).values


def target_masks(target: PreTrainedModel, document_ids: Tensor) -> Any:
    """Make the target's own mask, or one for each type of layer, so that tokens see only tokens of their document.

    transformers makes masks from positions that start again with each document. Anchor-Offset wants other positions,
    so the mask is made from the former and the forward pass is given the latter.
    Raises `ValueError` for an implementation of attention that takes no masks.
    """
    config = target.config.get_text_config(decoder=True)
    like = torch.empty(*document_ids.shape, 0, dtype=target.dtype, device=document_ids.device)
    masks = create_masks_for_generate(
        config=config,
        inputs_embeds=like,
        attention_mask=None,
        position_ids=positions_within(document_ids),
        **{CACHE: None},
    )
    if any(mask is None for mask in (masks.values() if isinstance(masks, dict) else [masks])):
        raise ValueError(
            "several documents in a short sample need a target whose attention takes masks: expected "
            f"`target.attn_implementation` sdpa, eager or flex_attention, got {config._attn_implementation}"
        )
    return masks
