"""Both caches against lists of tokens in plain Python, and against what a DynamicCache holds after the same text.

Every token has a serial number, and its keys and values are made of it, so that a cache's contents can be read back.
"""

import math
import random

import pytest
import torch
from helpers import commit
from transformers import AutoConfig, DynamicCache

from hf_longspec.modeling import cache_layers_longspec, cache_longspec
from hf_longspec.modeling.attention_longspec import BACKENDS
from hf_longspec.modeling.cache_layers_longspec import BUCKET
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.draft_window_longspec import DraftWindow
from hf_longspec.modeling.slots_longspec import ring_contents
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths

HEADS, DIM = 2, 3
SLIDING, FULL = 0, 1  # the layers of a Gemma 2 of two layers
WINDOWS = [1, 2, 3, 5, 40]


def states(serials: list[int], layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, K, T, D) of the tokens with these serial numbers in a layer."""
    token = torch.tensor(serials, dtype=torch.float32).reshape(1, 1, -1, 1)
    head = torch.arange(HEADS).reshape(1, -1, 1, 1) / 8
    dim = torch.arange(DIM) / 64
    keys = token + head + dim + 10_000 * (layer + 1)
    return keys, -keys


def states_of_rows(rows: list[list[int]], layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = zip(*(states(row, layer) for row in rows), strict=True)
    return torch.cat(keys), torch.cat(values)


def serials_in(keys: torch.Tensor, values: torch.Tensor, layer: int = 0) -> list[int]:
    """Whose keys and values (1, K, T, D) these are; fails if they are nobody's."""
    serials = (keys[0, 0, :, 0] - 10_000 * (layer + 1)).long().tolist()
    expected = states(serials, layer)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    return serials


def config_of(window: int):
    return AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=window)


def dynamic_cache(window: int, keeps_all: bool) -> DynamicCache:
    """As `generate` makes it, or as a user does who gives no config: then sliding layers keep the whole text."""
    return DynamicCache() if keeps_all else DynamicCache(config=config_of(window))


def speculative_cache(
    window: int, keeps_all: bool = False, reserve: int = 10, tree_size: int = 8, **batch
) -> SpeculativeCache:
    return SpeculativeCache(config_of(window), dynamic_cache(window, keeps_all), reserve, tree_size, **batch)


def append(cache, serials: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return append_rows(cache, [serials])


def append_rows(cache, serials: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [cache.update(*states_of_rows(serials, layer), layer) for layer in (SLIDING, FULL)]


def random_tree(rng: random.Random, nodes: int) -> tuple[list[int], list[int]]:
    """Parents of a random tree, and a random path from its root."""
    parents = [0] + [rng.randrange(node) for node in range(1, nodes)]
    path = [rng.randrange(nodes)]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    return parents, path


def depths_of(parents: list[int]) -> torch.Tensor:
    return node_depths(ancestor_mask(torch.tensor([parents]), len(parents)))


def padded(path: list[int], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([path + [0] * (steps - len(path))]), torch.tensor([len(path)])


def seen_by_nodes(cache: SpeculativeCache, layer: int, row: int = 0) -> list[list[int]]:
    """For each node of the tree just placed in a row, the serial numbers of the prefix tokens it may look at."""
    prefix = cache.layers[layer].prefix(cache.placement)
    batch, nodes = cache.placement.depths.shape
    assert prefix.spans.host == tuple(zip(cache.starts, cache.lengths, strict=True))
    assert list(zip(prefix.spans.starts.tolist(), prefix.spans.ends.tolist(), strict=True)) == list(prefix.spans.host)
    mask = prefix.mask
    if mask is None:
        slot = torch.arange(prefix.key.shape[2])
        mask = (slot >= prefix.spans.starts[:, None, None]) & (slot < prefix.spans.ends[:, None, None])
        mask = mask.expand(-1, nodes, -1)
    assert mask.shape == (batch, nodes, prefix.key.shape[2])
    key, value = prefix.key[row : row + 1], prefix.value[row : row + 1]
    return [
        sorted(serials_in(key[:, :, mask[row, node]], value[:, :, mask[row, node]], layer)) for node in range(nodes)
    ]


def run_round(cache: SpeculativeCache, text: list[int], serials: list[int], parents: list[int], window: int) -> None:
    """Place a tree and check all that its nodes are shown; `text` is what the cache holds, padding as None."""
    run_rounds(cache, [text], [serials], [parents], window)


def run_rounds(
    cache: SpeculativeCache, texts: list[list], serials: list[list[int]], parents: list[list[int]], window: int
) -> None:
    """The same with a text, a tree and its parents for each row of a batch."""
    depths = torch.cat([depths_of(row) for row in parents])
    cache.begin_round(depths)
    for layer in (SLIDING, FULL):
        keys, values = cache.update(*states_of_rows(serials, layer), layer)
        for row, expected in enumerate(serials):
            assert serials_in(keys[row : row + 1], values[row : row + 1], layer) == expected
    for row, text in enumerate(texts):
        full, sliding = (seen_by_nodes(cache, layer, row) for layer in (FULL, SLIDING))
        for node, depth in enumerate(depths[row].tolist()):
            position = len(text) + depth
            near = [token for place, token in enumerate(text) if place > position - window]
            assert full[node] == [token for token in text if token is not None]
            assert sliding[node] == [token for token in near if token is not None]


def assert_holds_the_same(ours: DynamicCache, plain: DynamicCache) -> None:
    assert len(ours.layers) == len(plain.layers)
    for layer, (mine, theirs) in enumerate(zip(ours.layers, plain.layers, strict=True)):
        assert type(mine) is type(theirs)
        assert mine.keys.shape[0] == theirs.keys.shape[0]
        for row in range(mine.keys.shape[0]):
            held, expected = (
                serials_in(its.keys[row : row + 1], its.values[row : row + 1], layer) for its in (mine, theirs)
            )
            assert held == expected
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)


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
            cache.abandon()
            continue
        commit(cache, *padded(path, rng.randrange(len(path), len(parents) + 1)), [len(path)])
        for node in path:
            text.append(tree[node])
            append(stock, [tree[node]])
        assert cache.length == cache.get_seq_length() == len(text)
    if stock_forgets:
        past = dynamic_cache(window, keeps_all)
        cache.hand_back(past)
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


def test_no_two_accepted_nodes_go_to_one_slot(monkeypatch):
    """A scatter may write in any order, so of a path longer than the ring only the end may enter it."""
    moves = []
    monkeypatch.setattr(
        cache_layers_longspec, "move_slots", lambda store, source, target: moves.append((source, target))
    )
    cache = speculative_cache(4)
    append(cache, list(range(9)))
    run_round(cache, list(range(9)), list(range(100, 108)), [0, 0, 1, 2, 3, 4, 5, 6], 4)
    commit(cache, *padded(list(range(7)), 8), [7])
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
    cache.adopt(past)
    assert all(layer.keys is None and layer.values is None for layer in past.layers), "nothing may exist twice"
    assert cache.length == prompt
    assert append(cache, [700, 701])[SLIDING][0].equal(append(stock, [700, 701])[SLIDING][0])
    text += [700, 701]
    run_round(cache, text, [800, 801, 802], [0, 0, 1], window)
    commit(cache, *padded([0, 1], 3), [2])
    append(stock, [800]), append(stock, [801])
    cache.hand_back(past)
    assert_holds_the_same(past, stock)


@pytest.mark.parametrize("keeps_all", [False, True])
def test_hand_back_after_a_failed_round(keeps_all):
    """Layer 0 has placed its tree, layer 1 has not, and the call ends."""
    past, stock = dynamic_cache(5, keeps_all), dynamic_cache(5, keeps_all)
    append(past, [1, 2, 3]), append(stock, [1, 2, 3])
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    cache.adopt(past)
    cache.begin_round(torch.tensor([[0, 1]]))
    cache.update(*states([700, 701], SLIDING), SLIDING)
    cache.abandon()
    cache.hand_back(past)
    assert_holds_the_same(past, stock)


def test_hand_back_after_states_that_did_not_fit():
    """A target that keeps something of an earlier call may read another number of rows than the cache holds."""
    past, stock = dynamic_cache(5, keeps_all=False), dynamic_cache(5, keeps_all=False)
    append(past, list(range(9))), append(stock, list(range(9)))
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    cache.adopt(past)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        append_rows(cache, [[9, 10], [9, 10], [9, 10]])
    cache.hand_back(past)
    assert_holds_the_same(past, stock)


def test_nothing_used_nothing_handed_back():
    past = dynamic_cache(5, keeps_all=False)
    speculative_cache(5).hand_back(past)
    assert past.get_seq_length() == 0
    assert serials_in(*append(past, [3])[FULL], FULL) == [3]


def test_a_dropped_cache_keeps_what_it_had():
    past, successor = (dynamic_cache(5, keeps_all=False) for _ in range(2))
    cache = SpeculativeCache(config_of(5), past, reserve=100, tree_size=8)
    append(cache, list(range(30)))
    cache.drop(successor)
    assert cache.get_seq_length() == 0
    append(cache, [50, 51])
    run_round(cache, [50, 51], [60, 61], [0, 0], 5)
    cache.abandon()
    cache.hand_back(cache.past)
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
    cache.abandon()
    cache.hand_back(past)
    assert_holds_the_same(past, stock)


def test_a_wide_window_that_has_slid_is_taken_over(monkeypatch):
    monkeypatch.setattr(cache_longspec, "LARGEST_RING", 5)
    past, stock = (dynamic_cache(9, keeps_all=False) for _ in range(2))
    for store in (past, stock):
        append(store, list(range(30)))
    cache = SpeculativeCache(config_of(9), past, reserve=100, tree_size=8, longest=50)
    cache.adopt(past)
    assert cache.layers[SLIDING].keys[:, :, :20].count_nonzero() == 0, "forgotten slots hold garbage"
    for store in (cache, stock):
        append(store, [30, 31])
    cache.hand_back(past)
    assert_holds_the_same(past, stock)


def test_nothing_is_copied_within_a_bucket():
    cache = speculative_cache(5, reserve=2 * BUCKET)
    append(cache, list(range(100)))
    where = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    while cache.length + 2 <= 2 * BUCKET:
        cache.begin_round(torch.tensor([[0, 1]]))
        append(cache, [200, 201])
        assert cache.layers[FULL].prefix(cache.placement).key.data_ptr() == where[FULL][0]
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
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=7, num_kv_shared_layers=2, sliding_window=5)
    past = DynamicCache(config=config)
    cache = SpeculativeCache(config, past, reserve=10, tree_size=4)
    assert len(cache.layers) == 7
    assert cache.owners == cache.layers[:5]
    for layer in range(5):
        cache.update(*states([1, 2, 3], layer), layer)
    cache.hand_back(past)
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
        cache.layers[layer].prefix(cache.placement)
    commit(cache, parents[:, :3], parents[:, 0], [2])
    assert cache.length == 14


# --- rows of different lengths ---------------------------------------------------------------------------------------


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
        self.cache.hand_back(past)
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
            batch.cache.abandon()
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
    prefix = batch.cache.layers[FULL].prefix(batch.cache.placement)
    assert prefix.mask is None and prefix.key.data_ptr() == batch.cache.layers[FULL].keys.data_ptr()
    assert prefix.key.is_contiguous() and prefix.value.is_contiguous()


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_adopted_rows_part_and_are_handed_back(window, keeps_all):
    batch = Batch(window, left_padded(0, 4), lead=20, keeps_all=keeps_all)
    past = dynamic_cache(window, keeps_all)
    append_rows(past, batch.held)
    batch.cache = SpeculativeCache(config_of(window), past, reserve=20, tree_size=8, batch=2, lead=20)
    batch.cache.adopt(past)
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
        batch.cache.abandon()
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
    batch.cache.abandon()
    batch.assert_hands_back()


@pytest.mark.parametrize("name", sorted(BACKENDS))
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
                prefix = batch.cache.layers[layer].prefix(batch.cache.placement)
                out, lse = prefix.attend(query, BACKENDS[name], 1e-3, None)
                assert not out.isnan().any() and lse.isfinite().all()
            batch.cache.abandon()
        assert batch.cache.layers[FULL].keys.shape[2] == 4 * BUCKET


def test_spans_cross_to_the_device_once_a_call():
    batch = Batch(5, left_padded(0, 4), lead=20)
    depths = torch.zeros(2, 3, dtype=torch.long)
    first = batch.cache.place(depths).spans
    batch.round(counts=[2, 1], nodes=3)
    second = batch.cache.place(depths + 1).spans
    assert second.host == ((0, 14), (4, 13))
    assert second.ends.tolist() == [14, 13] and second.starts.tolist() == [0, 4]
    assert second.ends.data_ptr() == first.ends.data_ptr(), "a CUDA graph reads them where they were"
    batch.cache.on_device = True
    assert batch.cache.place(depths).spans.host is None


def test_what_layers_have_in_common_is_made_once_a_round_and_device():
    cache = speculative_cache(5, batch=2)
    append_rows(cache, [[1, 2, 3], [4, 5, 6]])
    cache.hide_padding(torch.tensor([[1, 0, 1], [1, 1, 1]]))
    cache.begin_round(torch.zeros(2, 4, dtype=torch.long))
    placement = cache.round_placement
    for layer in (SLIDING, FULL):
        assert cache.layers[layer].prefix(placement).mask is cache.layers[layer].prefix(placement).mask
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
            cache.layers[layer].prefix(cache.placement)
        commit(cache, parents[:, :3], parents[:, 0], counts)
        assert cache.lengths == lengths


@pytest.mark.parametrize("ring", [1, 2, 3, 7])
def test_ring_contents_by_filling_a_ring(ring):
    slots = [-1] * ring
    for token in range(25):
        held = ring_contents(torch.tensor([token, 24]), ring)
        assert [max(position, -1) for position in held[0].tolist()] == slots
        assert sorted(held[1].tolist()) == list(range(24 - ring, 24))
        slots[token % ring] = token


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("prompt", [1, 4, 30])
@pytest.mark.parametrize("padding", [0, 3, 29])
def test_life_of_a_draft_window(window, prompt, padding, seed):
    """Two texts that grow at their own pace, the second's prompt shorter; row b's token p has number 1000·b + p."""
    rng = random.Random(seed)
    tree_size, ends = 6, [prompt, max(prompt - padding, 1)]
    store = DraftWindow(window, tree_size, (2, HEADS, DIM), torch.float32, torch.device("cpu"))
    size = store.nbytes
    assert size == store.keys.untyped_storage().nbytes() + store.values.untyped_storage().nbytes()

    firsts = [max(end - window, 0) for end in ends]
    back = min(window, prompt)
    positions = torch.tensor([range(end - back, end) for end in ends])
    serials = [[1000 * row + p for p in positions[row].tolist()] for row in range(2)]
    store.write(*states_of_rows(serials), positions, positions >= 0)
    store.first = torch.tensor(firsts)
    for _ in range(10):
        parents = [[0] + [rng.randrange(node) for node in range(1, tree_size)] for _ in range(2)]
        ancestry = ancestor_mask(torch.tensor(parents), tree_size)
        depths = node_depths(ancestry)
        tree = [[1000 * row + 500 + node for node in range(tree_size)] for row in range(2)]
        cut = rng.randrange(tree_size + 1)
        for start, end in ((0, cut), (cut, tree_size)):
            store.place(*states_of_rows([row[start:end] for row in tree]), start)
        roots = torch.tensor(ends)
        mask = store.mask(roots[:, None] + depths, roots, ancestry)
        for row in range(2):
            for node in range(tree_size):
                position = ends[row] + int(depths[row, node])
                slots = mask[row, node]
                seen = serials_in(store.keys[row : row + 1, :, slots], store.values[row : row + 1, :, slots])
                near = [1000 * row + p for p in range(firsts[row], ends[row]) if p > position - window]
                above = [tree[row][other] for other in range(tree_size) if ancestry[row, node, other]]
                assert sorted(seen) == near + above
        counts = [rng.randrange(7) for _ in range(2)]  # none: a row that rests
        steps = max(*counts, 1) + rng.randrange(2)
        positions = roots[:, None] + torch.arange(steps)
        real = torch.arange(steps) < torch.tensor(counts)[:, None]
        tokens = [[1000 * row + ends[row] + step for step in range(steps)] for row in range(2)]
        store.write(*states_of_rows(tokens), positions, real)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        assert store.nbytes == size


def test_draft_window_keeps_the_newest_tokens_in_whatever_order_they_are_written():
    """A scatter may write in any order, so no two tokens may go to one slot."""
    store = DraftWindow(2, 1, (1, HEADS, DIM), torch.float32, torch.device("cpu"))
    positions = [14, 13, 12, 11, 10]
    store.write(*states(positions), torch.tensor([positions]), torch.ones(1, 5, dtype=torch.bool))
    assert serials_in(store.keys[:, :, :2], store.values[:, :, :2]) == [14, 13]
