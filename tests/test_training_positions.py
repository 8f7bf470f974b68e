"""Anchor-Offset positions by their defining properties."""

import pytest
import torch

from hf_longspec.training.positions import anchor_offset_positions, plain_positions


def draw(batch=400, length=12, max_position=40, max_sink=4, seed=0):
    return anchor_offset_positions(batch, length, max_position, max_sink, torch.Generator().manual_seed(seed))


def test_each_row_is_a_sink_and_one_offset():
    positions = draw()
    offsets = positions - plain_positions(*positions.shape)
    for row in offsets.tolist():
        sink = row.count(0) if row[-1] else 0
        assert row == [0] * sink + [row[-1]] * (len(row) - sink)
        assert sink <= 4


def test_all_sinks_and_the_whole_range_are_visited():
    positions = draw(batch=4000)
    offsets = positions - plain_positions(*positions.shape)
    moved = offsets[:, -1] > 0
    assert set((offsets[moved] == 0).sum(-1).tolist()) == {0, 1, 2, 3, 4}
    assert set(offsets[:, -1].tolist()) == set(range(40 - 12 + 1))
    assert positions.min() == 0 and positions.max() == 39
    assert (positions.diff(dim=-1) >= 1).all()


def test_no_room_for_an_offset_gives_plain_positions():
    assert torch.equal(draw(length=40), plain_positions(400, 40))


def test_the_generator_alone_decides():
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="max_position must be at least the sample length 12, got 11"):
        draw(max_position=11)
    with pytest.raises(ValueError, match=r"max_sink must be in 0\.\.12, got 13"):
        draw(max_sink=13)
