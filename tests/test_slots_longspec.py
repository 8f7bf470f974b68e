"""Which token lies in which slot."""

import pytest
import torch
from helpers import interpreted

from hf_longspec.modeling.backends_longspec import load_backend
from hf_longspec.modeling.slots_longspec import move_slots, ring_contents


@pytest.mark.parametrize("ring", [1, 2, 3, 7])
def test_ring_contents_by_filling_a_ring(ring):
    slots = [-1] * ring
    for token in range(25):
        held = ring_contents(torch.tensor([token, 24]), ring)
        assert [max(position, -1) for position in held[0].tolist()] == slots
        assert sorted(held[1].tolist()) == list(range(24 - ring, 24))
        slots[token % ring] = token


@pytest.mark.parametrize("move", [move_slots, pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("dim, value_dim", [(4, 4), (6, 5)])
def test_moves_read_before_they_write(move, dim, value_dim):
    """Steps go where other nodes of the path were; the reference is one element after another."""
    if move == "triton":
        move = load_backend("triton").move
    torch.manual_seed(0)
    # as a cache of larger memory has them: rows and heads are further apart than they are long
    keys, values = torch.randn(2, 3, 20, dim)[:, :, :12], torch.randn(2, 3, 15, value_dim)[:, :, :12]
    source, target = torch.tensor([[4, 5, 9], [6, 7, 8]]), torch.tensor([[3, 4, 5], [5, 6, 7]])
    expected = []
    for store in (keys, values):
        moved = store.clone()
        for row in range(2):
            for begin, end in zip(source[row].tolist(), target[row].tolist(), strict=True):
                moved[row, :, end] = store[row, :, begin]
        expected.append(moved)
    move(keys, values, source, target)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
