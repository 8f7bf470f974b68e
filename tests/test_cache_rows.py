"""A cache of rows of different lengths against lists of tokens, and against what a DynamicCache holds."""

import math
import random

import pytest
import torch
from helpers import commit
from serials import (
    DIM,
    FULL,
    HEADS,
    SLIDING,
    append_rows,
    assert_holds_the_same,
    config_of,
    dynamic_cache,
    random_tree,
    run_rounds,
    seen_by_nodes,
    speculative_cache,
    states_of_rows,
)

from hf_longspec.modeling.cache_layers_longspec import BUCKET
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.fast_choose_longspec import load_backend
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths


class Batch:
    """A cache of several rows and, as lists, what each holds: `shown` has None for padding, `held` its number.

    Token t of row b has serial number 2000·b + t, guesses that were not accepted have others.
    """

    def __init__(self, window: int, masks: list[list[int]], lead: int, keeps_all: bool = False, reserve: int = 10):
        self.window, self.lead, self.rng = window, lead, random.Random(len(masks[0]) + lead)
        self.cache = speculative_cache(window, keeps_all, reserve, batch=len(masks), lead=lead)
        self.held = [[2000 * row + place for place in range(len(mask))] for row, mask in enumerate(masks)]
        self.shown: list[list[int | None]] = [
            [serial if real else None for serial, real in zip(held, mask, strict=True)]
            for held, mask in zip(self.held, masks, strict=True)
        ]
        append_rows(self.cache, self.held)
        self.cache.hide_padding(torch.tensor(masks))

    def round(self, counts: list[int] | None = None, nodes: int | None = None) -> None:
        """A tree for each row, of which `counts` tokens are accepted; any that the lead allows, if not given."""
        nodes = nodes or self.rng.randrange(1, 9)
        parents, paths = zip(*(random_tree(self.rng, nodes) for _ in self.held), strict=True)
        if counts is not None:
            parents = [list(range(-1, nodes - 1)) for _ in self.held]
            parents = [[0, *row[1:]] for row in parents]
            paths = [list(range(count)) for count in counts]
        limit = min(map(len, self.held)) + self.lead
        rests = [counts is None and self.rng.random() < 0.3 for _ in paths]
        room = [0 if rest else limit - len(held) for rest, held in zip(rests, self.held, strict=True)]
        paths = [path[:count] for path, count in zip(paths, room, strict=True)]
        serials = [[1000 + 2000 * row + self.rng.randrange(900) for _ in range(nodes)] for row in range(len(paths))]
        for row, path in enumerate(paths):
            for step, node in enumerate(path):
                serials[row][node] = 2000 * row + len(self.held[row]) + step
        run_rounds(self.cache, self.shown, serials, list(parents), self.window)
        steps = max(1, *map(len, paths)) + self.rng.randrange(2)
        padded_paths = torch.tensor([path + [0] * (steps - len(path)) for path in paths]).view(len(paths), steps)
        counts = [len(path) for path in paths]
        commit(self.cache, padded_paths, torch.tensor(counts), counts)
        for held, shown, path, row in zip(self.held, self.shown, paths, serials, strict=True):
            held += [row[node] for node in path]
            shown += [row[node] for node in path]
        assert self.cache.lengths == [len(held) for held in self.held]
        assert self.cache.length == self.cache.get_seq_length() == max(self.cache.lengths)

    def assert_hands_back(self, keeps_all: bool = False) -> None:
        """What plain decoding leaves that has come as far as the shortest row."""
        past, stock = (dynamic_cache(self.window, keeps_all) for _ in range(2))
        shortest = min(map(len, self.held))
        append_rows(stock, [held[:shortest] for held in self.held])
        self.cache.past = past
        self.cache.hand_back()
        assert_holds_the_same(past, stock)


def left_padded(*pads: int, prompt: int = 12) -> list[list[int]]:
    return [[0] * pad + [1] * (prompt - pad) for pad in pads]


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("lead", [4, 12, 64])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_life_of_a_batch(window, lead, keeps_all):
    """Every row at its own pace, as far ahead as the lead allows, through regrowth."""
    batch = Batch(window, left_padded(0, 4, 229, prompt=230), lead, keeps_all)
    apart = 0
    for _ in range(30):
        batch.round()
        apart = max(apart, max(batch.cache.lengths) - min(batch.cache.lengths))
        if batch.rng.random() < 0.1:
            batch.cache.begin_round(torch.zeros(3, 2, dtype=torch.long))
            append_rows(batch.cache, [[700, 701]] * 3)
            batch.cache.end_round([0] * len(batch.held))
    assert batch.cache.layers[FULL].keys.shape[2] > BUCKET and apart >= min(lead, 9)
    batch.assert_hands_back(keeps_all)


@pytest.mark.parametrize("ahead", [1, 7, 63, 64])
@pytest.mark.parametrize("window", [2, 5, 70])
def test_a_row_as_far_ahead_as_the_lead_allows(window, ahead):
    batch = Batch(window, left_padded(0, 0, 3), lead=64)
    assert batch.cache.layers[SLIDING].ring == window - 1 + 64
    while len(batch.held[1]) < 12 + ahead:
        batch.round(counts=[0, min(8, 12 + ahead - len(batch.held[1])), 1 if len(batch.held[2]) == 12 else 0], nodes=8)
    assert batch.cache.lengths == [12, 12 + ahead, 13]
    batch.round(counts=[0, 0, 0], nodes=8)
    batch.assert_hands_back()


def test_a_row_further_ahead_than_the_lead_has_lost_what_it_would_hand_back():
    """The test before this one can fail."""
    batch = Batch(5, left_padded(0, 0), lead=64)
    batch.lead = 65
    while len(batch.held[1]) < 12 + 65:
        batch.round(counts=[0, min(8, 12 + 65 - len(batch.held[1]))], nodes=8)
    with pytest.raises(AssertionError, match="assert"):
        batch.assert_hands_back()


@pytest.mark.parametrize("window", [2, 40])
def test_a_huge_lead(window):
    batch = Batch(window, left_padded(0, 11, 2), lead=3000)
    for _ in range(60):
        batch.round(counts=[8, 0, 1], nodes=8)
    assert batch.cache.lengths == [12 + 480, 12, 12 + 60]
    batch.round(counts=[0, 8, 0], nodes=8)
    batch.assert_hands_back()


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_padding_of_any_row_is_never_seen(window, keeps_all):
    """To the left, to the right, within; a row without a single token beside one without padding."""
    masks = [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0], [0] * 7]
    batch = Batch(window, masks, lead=30, keeps_all=keeps_all)
    for _ in range(8):
        batch.round()
    assert len(set(batch.cache.lengths)) > 1


def test_padding_to_the_left_needs_no_mask():
    """Where spans say who sees what, a full layer's prefix runs unmasked."""
    batch = Batch(5, left_padded(0, 4, 11), lead=9)
    batch.cache.begin_round(torch.zeros(3, 1, dtype=torch.long))
    assert batch.cache.visible is None and batch.cache.starts == [0, 4, 11]
    prefix = batch.cache.layers[FULL].prefix_of(batch.cache.placement)
    assert prefix.mask is None and prefix.key.data_ptr() == batch.cache.layers[FULL].keys.data_ptr()
    assert prefix.key.is_contiguous() and prefix.value.is_contiguous()


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_adopted_rows_part_and_are_handed_back(window, keeps_all):
    batch = Batch(window, left_padded(0, 4), lead=20, keeps_all=keeps_all)
    past = dynamic_cache(window, keeps_all)
    append_rows(past, batch.held)
    batch.cache = SpeculativeCache(config_of(window), past, reserve=20, tree_size=8, batch=2, lead=20)
    batch.cache.take_over()
    batch.cache.hide_padding(torch.tensor(left_padded(0, 4)))
    assert all(layer.keys is None and layer.values is None for layer in past.layers)
    if not keeps_all:
        batch.shown = [[None] * max(12 - window + 1, 0) + row[max(12 - window + 1, 0) :] for row in batch.shown]
        full = [row[:] for row in batch.held]
        batch.cache.begin_round(torch.zeros(2, 1, dtype=torch.long))
        assert (
            seen_by_nodes(batch.cache, FULL, 0)[0] == full[0] and seen_by_nodes(batch.cache, FULL, 1)[0] == full[1][4:]
        )
        assert seen_by_nodes(batch.cache, SLIDING, 1)[0] == [token for token in batch.shown[1] if token is not None]
        batch.cache.end_round([0] * len(batch.held))
    batch.shown = [
        [None if place < pad else t for place, t in enumerate(row)]
        for pad, row in zip((0, 4), batch.held, strict=True)
    ]
    for _ in range(6):
        batch.round()
    batch.assert_hands_back(keeps_all)


def test_hand_back_after_a_failed_round_of_rows_that_have_parted():
    batch = Batch(5, left_padded(0, 4), lead=20)
    batch.round(counts=[7, 2], nodes=8)
    batch.cache.begin_round(torch.tensor([[0, 1], [0, 1]]))
    batch.cache.update(*states_of_rows([[700, 701], [702, 703]], SLIDING), SLIDING)
    batch.cache.end_round([0] * len(batch.held))
    batch.assert_hands_back()


@pytest.mark.parametrize("name", ["eager", "torch"])
def test_slots_that_were_never_written_are_never_met(monkeypatch, name):
    """A shorter row's unused slots may hold anything: 0 · NaN would be NaN. Through two regrowths."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: empty(self, *size, **kw).fill_(math.nan))
    for pads in ((0, 4, 11), (0,)):
        batch = Batch(5, left_padded(*pads), lead=1000)
        query = torch.randn(len(pads), 4, 3, DIM)
        while batch.cache.length < 2 * BUCKET + 10:
            batch.round(counts=[8, 1, 0][: len(pads)], nodes=8)
            batch.cache.begin_round(torch.zeros(len(pads), 3, dtype=torch.long))
            for layer in (SLIDING, FULL):
                prefix = batch.cache.layers[layer].prefix_of(batch.cache.placement)
                out, lse = load_backend(name).prefix_attention(query, prefix, 1e-3, None)
                assert not out.isnan().any() and lse.isfinite().all()
            batch.cache.end_round([0] * len(batch.held))
        assert batch.cache.layers[FULL].keys.shape[2] == 4 * BUCKET


def test_spans_cross_to_the_device_once_a_call():
    batch = Batch(5, left_padded(0, 4), lead=20)
    depths = torch.zeros(2, 3, dtype=torch.long)
    first = batch.cache.placement_of(depths).spans
    batch.round(counts=[2, 1], nodes=3)
    second = batch.cache.placement_of(depths + 1).spans
    assert second.host == ((0, 14), (4, 13))
    assert second.ends.tolist() == [14, 13] and second.starts.tolist() == [0, 4]
    assert second.ends.data_ptr() == first.ends.data_ptr(), "a CUDA graph reads them where they were"
    batch.cache.on_device = True
    assert batch.cache.placement_of(depths).spans.host is None


def test_what_layers_have_in_common_is_made_once_a_round_and_device():
    cache = speculative_cache(5, batch=2)
    append_rows(cache, [[1, 2, 3], [4, 5, 6]])
    cache.hide_padding(torch.tensor([[1, 0, 1], [1, 1, 1]]))
    cache.begin_round(torch.zeros(2, 4, dtype=torch.long))
    placement = cache.round_placement
    for layer in (SLIDING, FULL):
        assert cache.layers[layer].prefix_of(placement).mask is cache.layers[layer].prefix_of(placement).mask
    assert placement.to(torch.device("cpu")) is placement
    elsewhere = placement.to(torch.device("meta"))
    assert placement.to(torch.device("meta")) is elsewhere
    assert {elsewhere.depths.device.type, elsewhere.visible.device.type, elsewhere.spans.ends.device.type} == {"meta"}
    assert elsewhere.spans.host == placement.spans.host == ((0, 3), (0, 3))


def test_ragged_rounds_read_nothing_back_to_the_host():
    cache = speculative_cache(5, batch=2, lead=9)
    meta = torch.empty(2, HEADS, 12, DIM, device="meta")
    tree = torch.empty(2, HEADS, 4, DIM, device="meta")
    for layer in (SLIDING, FULL):
        cache.update(meta, meta, layer)
    parents = torch.zeros(2, 4, dtype=torch.long, device="meta")
    for counts, lengths in (([2, 1], [14, 13]), ([0, 3], [14, 16])):
        cache.begin_round(node_depths(ancestor_mask(parents, 2)))
        for layer in (SLIDING, FULL):
            cache.update(tree, tree, layer)
            cache.layers[layer].prefix_of(cache.placement)
        commit(cache, parents[:, :3], parents[:, 0], counts)
        assert cache.lengths == lengths
