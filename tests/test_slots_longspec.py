"""Which token lies in which slot."""

import pytest
import torch

from hf_longspec.modeling.slots_longspec import ring_contents


@pytest.mark.parametrize("ring", [1, 2, 3, 7])
def test_ring_contents_by_filling_a_ring(ring):
    slots = [-1] * ring
    for token in range(25):
        held = ring_contents(torch.tensor([token, 24]), ring)
        assert [max(position, -1) for position in held[0].tolist()] == slots
        assert sorted(held[1].tolist()) == list(range(24 - ring, 24))
        slots[token % ring] = token
