"""The tokens that a draft should guess among: the most frequent ones in text like its target's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART = 1 << 22  # tokens counted at a time: counting widens them to 64 bits
READ = 1 << 24  # tokens of the samples that are counted


def frequent_tokens(samples: Iterable[Mapping[str, Any]], vocab_size: int) -> Tensor:
    """Rank all token ids (vocab_size,) by the first samples of a run, which hold the sources by their weights.

    Only tokens that are learned count: no prompts, no filling.
    """
    parts: list[np.ndarray] = []
    read = 0
    for sample in samples:
        parts.append(sample["input_ids"][sample["loss_mask"]].numpy())
        read += len(sample["input_ids"])
        if read >= READ:
            break
    return rank_by_frequency(np.concatenate(parts), vocab_size)


def rank_by_frequency(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """Return all token ids (vocab_size,) int64, most frequent in ``tokens`` (N,) first, of equals the smaller.

    The first ids, however many, are a vocabulary for `LongSpecForCausalLM.set_draft_vocab`. Raises `ValueError` for
    tokens beyond the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), PART):
        part = np.bincount(tokens[start : start + PART], minlength=vocab_size)
        if len(part) > vocab_size:
            raise ValueError(f"expected token ids below {vocab_size}, got {len(part) - 1}")
        counts += part
    return torch.from_numpy(np.argsort(-counts, kind="stable"))
