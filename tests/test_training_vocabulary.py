"""Ranking of tokens against a sorted count in plain Python."""

from collections import Counter

import numpy as np
import pytest
import torch

from hf_longspec.training import vocabulary
from hf_longspec.training.vocabulary import frequent_tokens, rank_by_frequency


@pytest.mark.parametrize("part", [1, 7, 1 << 22])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_rank_is_a_sorted_count(part, dtype, monkeypatch):
    monkeypatch.setattr(vocabulary, "PART", part)
    tokens = np.random.default_rng(0).integers(0, 30, 100).astype(dtype)
    counts = Counter(tokens.tolist())
    expected = sorted(range(40), key=lambda token: (-counts[token], token))
    ranked = rank_by_frequency(tokens, 40)
    assert ranked.dtype == torch.int64 and ranked.tolist() == expected


def test_no_text_ranks_by_id():
    assert rank_by_frequency(np.empty(0, np.uint16), 4).tolist() == [0, 1, 2, 3]


def test_token_beyond_the_vocabulary():
    with pytest.raises(ValueError, match="expected token ids below 5, got 7"):
        rank_by_frequency(np.array([1, 7]), 5)


def test_only_learned_tokens_of_the_first_samples_count(monkeypatch):
    """Neither the 1s of a prompt nor the 2s behind what is read, of which there are more."""
    monkeypatch.setattr(vocabulary, "READ", 8)
    ids = torch.tensor([[1, 1, 1, 3], [1, 3, 4, 3], [2, 2, 2, 2]])
    samples = ({"input_ids": row, "loss_mask": row > 1} for row in ids)
    assert frequent_tokens(samples, 5).tolist() == [3, 4, 0, 1, 2]
