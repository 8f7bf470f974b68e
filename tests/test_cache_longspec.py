"""The cache of a target against lists of tokens, and against what a DynamicCache holds after the same text."""

import random

import pytest
import torch
from helpers import commit
from serials import (
    DIM,
    FULL,
    HEADS,
    SLIDING,
    WINDOWS,
    append,
    append_rows,
    assert_holds_the_same,
    config_of,
    dynamic_cache,
    padded,
    random_tree,
    run_round,
    serials_in,
    speculative_cache,
    states,
)
from transformers import AutoConfig, DynamicCache

from hf_longspec.modeling import cache_longspec
from hf_longspec.modeling.cache_layers_longspec import BUCKET
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_life_of_a_cache(window, keeps_all, seed):
    """Chunks, rounds, given-up rounds and single tokens; the text outgrows its bucket twice."""
    rng = random.Random(seed)
    cache = speculative_cache(window, keeps_all)
    stock = dynamic_cache(window, keeps_all)
    text: list[int] = []
    fresh = iter(range(10_000))
    stock_forgets = window > 1 or keeps_all  # with a window of one token the stock layer keeps them all
    while len(text) < 2 * BUCKET + 20:
        if not text or rng.random() < 0.3:  # a chunk
            chunk = [next(fresh) for _ in range(rng.choice([1, 2, window, 90]))]
            assert cache.get_seq_length() == len(text)
            for layer in (SLIDING, FULL):
                if stock_forgets or layer == FULL:
                    assert cache.get_mask_sizes(len(chunk), layer) == stock.get_mask_sizes(len(chunk), layer)
            returned, expected = append(cache, chunk), append(stock, chunk)
            before = {SLIDING: text if keeps_all else text[max(len(text) - window + 1, 0) :], FULL: text}
            for layer in (SLIDING, FULL):
                assert serials_in(*returned[layer], layer) == before[layer] + chunk
                if stock_forgets or layer == FULL:
                    assert torch.equal(returned[layer][0], expected[layer][0])
            text += chunk
        parents, path = random_tree(rng, rng.randrange(1, 9))
        tree = [next(fresh) for _ in parents]
        run_round(cache, text, tree, parents, window)
        if rng.random() < 0.1:
            cache.end_round([0])
            continue
        commit(cache, *padded(path, rng.randrange(len(path), len(parents) + 1)), [len(path)])
        for node in path:
            text.append(tree[node])
            append(stock, [tree[node]])
        assert cache.length == cache.get_seq_length() == len(text)
    if stock_forgets:
        past = dynamic_cache(window, keeps_all)
        cache.past = past
        cache.hand_back()
        assert_holds_the_same(past, stock)
        assert torch.equal(append(past, [9999])[SLIDING][0], append(stock, [9999])[SLIDING][0])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("prompt", [1, 2, 7, 50])
def test_committed_path_longer_than_the_window(window, prompt):
    cache = speculative_cache(window)
    text = list(range(prompt))
    append(cache, text)
    chain = list(range(100, 108))
    run_round(cache, text, chain, [0, 0, 1, 2, 3, 4, 5, 6], window)
    commit(cache, *padded(list(range(7)), 8), [7])
    run_round(cache, text + chain[:7], [200, 201], [0, 0], window)


def test_no_two_accepted_nodes_go_to_one_slot():
    """A scatter may write in any order, so of a path longer than the ring only the end may enter it."""
    moves = []
    cache = speculative_cache(4)
    append(cache, list(range(9)))
    run_round(cache, list(range(9)), list(range(100, 108)), [0, 0, 1, 2, 3, 4, 5, 6], 4)
    cache.commit(*padded(list(range(7)), 8), lambda keys, values, source, target: moves.append((source, target)))
    assert moves
    for source, target in moves:
        moved = target[source != target].tolist()
        assert len(set(moved)) == len(moved)


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize(
    "attention_mask",
    [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [1, 0, 0, 1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]],
)
@pytest.mark.parametrize("window", [2, 5, 40])
def test_padding_is_never_seen(window, attention_mask, keeps_all):
    cache = speculative_cache(window, keeps_all)
    append(cache, list(range(10)))
    cache.hide_padding(torch.tensor([attention_mask]))
    text = [token if real else None for token, real in enumerate(attention_mask)]
    for start in (100, 200, 300):
        tree = list(range(start, start + 5))
        run_round(cache, text, tree, [0, 0, 0, 1, 3], window)
        commit(cache, *padded([0, 1, 3], 5), [3])
        text += [tree[0], tree[1], tree[3]]


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("window", [2, 3, 5, 40])
@pytest.mark.parametrize("prompt", [1, 4, 50])
def test_adopt_takes_over_what_a_cache_holds(window, keeps_all, prompt):
    past, stock = dynamic_cache(window, keeps_all), dynamic_cache(window, keeps_all)
    text = list(range(prompt))
    append(past, text), append(stock, text)
    cache = SpeculativeCache(config_of(window), past, reserve=100, tree_size=8)
    cache.take_over()
    assert all(layer.keys is None and layer.values is None for layer in past.layers), "nothing may exist twice"
    assert cache.length == prompt
    assert append(cache, [700, 701])[SLIDING][0].equal(append(stock, [700, 701])[SLIDING][0])
    text += [700, 701]
    run_round(cache, text, [800, 801, 802], [0, 0, 1], window)
    commit(cache, *padded([0, 1], 3), [2])
    append(stock, [800]), append(stock, [801])
    cache.past = past
    cache.hand_back()
    assert_holds_the_same(past, stock)


@pytest.mark.parametrize("keeps_all", [False, True])
def test_hand_back_after_a_failed_round(keeps_all):
    """Layer 0 has placed its tree, layer 1 has not, and the call ends."""
    past, stock = dynamic_cache(5, keeps_all), dynamic_cache(5, keeps_all)
    append(past, [1, 2, 3]), append(stock, [1, 2, 3])
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    cache.take_over()
    cache.begin_round(torch.tensor([[0, 1]]))
    cache.update(*states([700, 701], SLIDING), SLIDING)
    cache.hand_back()
    assert_holds_the_same(past, stock)


def test_hand_back_after_states_that_did_not_fit():
    """A target that keeps something of an earlier call may read another number of rows than the cache holds."""
    past, stock = dynamic_cache(5, keeps_all=False), dynamic_cache(5, keeps_all=False)
    append(past, list(range(9))), append(stock, list(range(9)))
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    cache.take_over()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        append_rows(cache, [[9, 10], [9, 10], [9, 10]])
    cache.past = past
    cache.hand_back()
    assert_holds_the_same(past, stock)


def test_nothing_used_nothing_handed_back():
    past = dynamic_cache(5, keeps_all=False)
    cache = speculative_cache(5)
    cache.past = past
    cache.hand_back()
    assert past.get_seq_length() == 0
    assert serials_in(*append(past, [3])[FULL], FULL) == [3]


def test_a_dropped_cache_keeps_what_it_had():
    past, successor = (dynamic_cache(5, keeps_all=False) for _ in range(2))
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    append(cache, list(range(30)))
    cache.restart(successor)
    assert cache.get_seq_length() == 0
    append(cache, [50, 51])
    run_round(cache, [50, 51], [60, 61], [0, 0], 5)
    cache.hand_back()
    expected = [dynamic_cache(5, keeps_all=False) for _ in range(2)]
    append(expected[0], list(range(30)))
    append(expected[1], [50, 51])
    assert_holds_the_same(past, expected[0])
    assert_holds_the_same(successor, expected[1])


@pytest.mark.parametrize("window, longest", [(40, 40), (cache_longspec.LARGEST_RING + 1, None)])
def test_a_window_wider_than_the_text_takes_no_memory_of_its_own(window, longest):
    """Phi-3's window is 262,144 tokens: a ring of that size would not fit anywhere."""
    past, stock = (dynamic_cache(window, keeps_all=False) for _ in range(2))
    cache = SpeculativeCache(config_of(window), past, reserve=20, tree_size=8, longest=longest)
    for store in (cache, stock):
        append(store, list(range(12)))
    assert cache.layers[SLIDING].keys.shape[2] == BUCKET
    run_round(cache, list(range(12)), [60, 61], [0, 0], window)
    cache.hand_back()
    assert_holds_the_same(past, stock)


def test_a_wide_window_that_has_slid_is_taken_over(monkeypatch):
    monkeypatch.setattr(cache_longspec, "LARGEST_RING", 5)
    past, stock = (dynamic_cache(9, keeps_all=False) for _ in range(2))
    for store in (past, stock):
        append(store, list(range(30)))
    cache = SpeculativeCache(config_of(9), past, reserve=100, tree_size=8, longest=50)
    cache.take_over()
    assert cache.layers[SLIDING].keys[:, :, :20].count_nonzero() == 0, "forgotten slots hold garbage"
    for store in (cache, stock):
        append(store, [30, 31])
    cache.past = past
    cache.hand_back()
    assert_holds_the_same(past, stock)


def test_nothing_is_copied_within_a_bucket():
    cache = speculative_cache(5, reserve=2 * BUCKET)
    append(cache, list(range(100)))
    where = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    while cache.length + 2 <= 2 * BUCKET:
        cache.begin_round(torch.tensor([[0, 1]]))
        append(cache, [200, 201])
        assert cache.layers[FULL].prefix_of(cache.placement).key.data_ptr() == where[FULL][0]
        commit(cache, *padded([0, 1], 2), [2])
    keys, values = cache.layers[FULL].stored()
    assert (keys.data_ptr(), values.data_ptr()) == where[FULL]
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == where


def test_a_long_answer_copies_the_cache_a_logarithmic_number_of_times():
    cache = speculative_cache(5)
    sizes = []
    for token in range(10 * BUCKET):
        append(cache, [token])
        sizes.append(cache.layers[FULL].keys.shape[2])
    assert len(set(sizes)) == 5  # 1, 2, 4, 8 and 16 buckets
    assert all(size <= 2 * max(token + 1, BUCKET) for token, size in enumerate(sizes))
    assert serials_in(*cache.layers[FULL].stored(), FULL) == list(range(10 * BUCKET))


def test_reserve_is_allocated_once():
    cache = speculative_cache(5, reserve=3 * BUCKET - 7)
    append(cache, [0])
    assert cache.layers[FULL].keys.shape == (1, HEADS, 3 * BUCKET, DIM)


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_layer_never_grows(window):
    cache = speculative_cache(window, tree_size=8)
    layer = cache.layers[SLIDING]
    for _ in range(40):
        append(cache, list(range(37)))
        assert layer.keys.shape == layer.values.shape == (1, HEADS, max(window - 1, 1) + 8, DIM)


def test_layers_without_keys_of_their_own():
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=5, sliding_window=5)
    past = DynamicCache(config=config)
    cache = SpeculativeCache(config, past, reserve=10, tree_size=4)
    assert len(cache.layers) == 10
    assert cache.owners == cache.layers[:5]
    # of its type the last layer that owns keys; every fifth layer is a full one
    owners = [3, 3, 3, 3, 4]
    assert [cache.owner(layer) for layer in range(5, 10)] == [cache.layers[owner] for owner in owners]
    for layer in range(5):
        cache.update(*states([1, 2, 3], layer), layer)
    cache.past = past
    cache.hand_back()
    for layer in range(5):
        assert serials_in(past.layers[layer].keys, past.layers[layer].values, layer) == [1, 2, 3]


def test_rounds_read_nothing_back_to_the_host():
    """On the meta device a value that is read back is an error: shapes depend on shapes alone."""
    cache = speculative_cache(5)
    meta = torch.empty(1, HEADS, 12, DIM, device="meta")
    tree = torch.empty(1, HEADS, 4, DIM, device="meta")
    for layer in (SLIDING, FULL):
        cache.update(meta, meta, layer)
    parents = torch.zeros(1, 4, dtype=torch.long, device="meta")
    cache.begin_round(node_depths(ancestor_mask(parents, 2)))
    for layer in (SLIDING, FULL):
        cache.update(tree, tree, layer)
        cache.layers[layer].prefix_of(cache.placement)
    commit(cache, parents[:, :3], parents[:, 0], [2])
    assert cache.length == 14
