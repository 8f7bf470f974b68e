"""Which token lies in which slot."""

import pytest
import torch
from level_cases import check_moves

from hf_longspec.modeling.attention_longspec import move_slots, ring_contents


@pytest.mark.parametrize("ring", [1, 2, 3, 7])
def test_ring_contents_by_filling_a_ring(ring):
    slots = [-1] * ring
    for token in range(25):
        held = ring_contents(torch.tensor([token, 24]), ring)
        assert [max(position, -1) for position in held[0].tolist()] == slots
        assert sorted(held[1].tolist()) == list(range(24 - ring, 24))
        slots[token % ring] = token


@pytest.mark.parametrize("dim, value_dim", [(4, 4), (6, 5)])
def test_moves_read_before_they_write(dim, value_dim):
    check_moves(move_slots, dim, value_dim)
