"""Teacher-forced agreement: how often the target's next token is among the draft's first guesses, by lag and position.

The cheap stand-in for the accept length while training: no tree, no decoding, one forward pass over held-out text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

from .data import TokenWindows
from .forward import draft_hidden
from .positions import plain_positions
from .teacher import read_target


@torch.no_grad()
def measure_agreement(
    target: PreTrainedModel,
    draft: LongSpecForCausalLM,
    tokens: np.ndarray,
    length: int,
    windows: int,
    lags: Sequence[int],
    top: int = 4,
    edges: Sequence[int] = (1024, 4096),
) -> list[dict[str, Any]]:
    """One record a lag and stretch of positions (cut at ``edges``), over ``windows`` evenly spread windows.

    ``first`` is the share of tokens where the draft's best guess is the target's, ``top…`` where one of the best is.
    """
    bound = draft.bind(target)
    data = TokenWindows(tokens, length)
    cuts = [0, *(edge for edge in edges if edge < length), length]
    hits = torch.zeros(len(lags), length, 2, dtype=torch.float64)
    chosen = np.linspace(0, len(data) - 1, min(windows, len(data)), dtype=int)
    for index in chosen:
        ids = data[int(index)][None, :-1].to(bound.device)
        positions = plain_positions(1, length).to(bound.device)
        states = read_target(target, bound.layer, ids, positions)
        best = torch.cat([bound.logits(part).argmax(-1) for part in states.hidden.split(1024, dim=1)], dim=1)
        for row, lag in enumerate(lags):
            hidden = draft_hidden(draft, bound, ids, positions, states, lag).to(states.hidden.dtype)
            parts = zip(hidden.split(1024, dim=1), best.split(1024, dim=1), strict=True)
            found = torch.cat([bound.logits(part).topk(top).indices == goal[..., None] for part, goal in parts], dim=1)
            hits[row] += torch.stack([found[0, :, 0], found[0].any(-1)], dim=-1).cpu()
    hits /= len(chosen)
    return [
        {"lag": lag, "from": start, "to": end, "first": first, f"top{top}": several}
        for row, lag in enumerate(lags)
        for start, end in zip(cuts[:-1], cuts[1:], strict=True)
        for first, several in [hits[row, start:end].mean(0).tolist()]
    ]
