"""Which tokens a draft should guess among: those that text like its target's is mostly made of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PART = 1 << 22  # tokens counted at a time: counting widens them to 64 bits


def rank_by_frequency(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """All token ids (vocab_size,) int64, most frequent first in ``tokens`` (N,); of equals the smaller id is first.

    The first N of them are a vocabulary for `LongSpecForCausalLM.set_draft_vocab`. Raises `ValueError` for tokens
    beyond the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), PART):
        part = np.bincount(tokens[start : start + PART], minlength=vocab_size)
        if len(part) > vocab_size:
            raise ValueError(f"expected token ids below {vocab_size}, got {len(part) - 1}")
        counts += part
    return torch.from_numpy(np.argsort(-counts, kind="stable"))
