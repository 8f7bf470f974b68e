"""Anchor-Offset positions by their defining properties."""

import numpy as np
import pytest
import torch

from hf_longspec.training.positions import anchor_offset_positions


def draw(lengths=(12,), max_position=40, max_sink=4, seed=0):
    """Original and moved positions of documents of these lengths in one sample."""
    plain = torch.cat([torch.arange(length) for length in lengths])
    return plain, anchor_offset_positions(plain, max_position, max_sink, np.random.default_rng(seed))


def test_each_document_is_a_sink_and_one_offset():
    lengths = (12, 1, 7, 30)
    for seed in range(50):
        plain, moved = draw(lengths, seed=seed)
        for offsets in (moved - plain).split(lengths):
            row = offsets.tolist()
            sink = row.count(0) if row[-1] else 0
            assert row == [0] * sink + [row[-1]] * (len(row) - sink)
            assert sink <= 4


def test_all_sinks_and_the_whole_range_are_visited():
    plain, moved = draw((12,) * 4000)
    offsets = (moved - plain).view(-1, 12)
    shifted = offsets[:, -1] > 0
    assert set((offsets[shifted] == 0).sum(-1).tolist()) == {0, 1, 2, 3, 4}
    assert set(offsets[:, -1].tolist()) == set(range(40 - 12 + 1))
    assert moved.min() == 0 and moved.max() == 39
    assert (moved.view(-1, 12).diff(dim=-1) >= 1).all()


def test_no_room_for_an_offset_gives_plain_positions():
    plain, moved = draw((40, 40))
    assert torch.equal(plain, moved)


def test_the_generator_alone_decides():
    assert torch.equal(draw(seed=3)[1], draw(seed=3)[1])
    assert not torch.equal(draw(seed=3)[1], draw(seed=4)[1])


def test_a_document_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="`max_position` must be at least the longest document, 12, got 11"):
        draw(max_position=11)
