"""Tokens by serial number, from which keys and values are made, so that a cache's contents can be read back."""

import random

import torch
from transformers import AutoConfig, DynamicCache

from hf_longspec.modeling.attention_longspec import Nodes, store_nodes
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths

HEADS, DIM = 2, 3
SLIDING, FULL = 0, 1  # the layers of a Gemma 2 of two layers
WINDOWS = [1, 2, 3, 5, 40]


def states(serials: list[int], layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (1, K, T, D) of the tokens with these serial numbers in a layer."""
    token = torch.tensor(serials, dtype=torch.float32).reshape(1, 1, -1, 1)
    head = torch.arange(HEADS).reshape(1, -1, 1, 1) / 8
    dim = torch.arange(DIM) / 64
    keys = token + head + dim + 10_000 * (layer + 1)
    return keys, -keys


def states_of_rows(rows: list[list[int]], layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = zip(*(states(row, layer) for row in rows), strict=True)
    return torch.cat(keys), torch.cat(values)


def serials_in(keys: torch.Tensor, values: torch.Tensor, layer: int = 0) -> list[int]:
    """Return the serial numbers of tokens from their keys and values (1, K, T, D); fail if these are no token's."""
    serials = (keys[0, 0, :, 0] - 10_000 * (layer + 1)).long().tolist()
    expected = states(serials, layer)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    return serials


def config_of(window: int):
    return AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=window)


def dynamic_cache(window: int, keeps_all: bool) -> DynamicCache:
    """Make a cache as `generate` does, or without a config, as a user may: then sliding layers keep the whole text."""
    return DynamicCache() if keeps_all else DynamicCache(config=config_of(window))


def speculative_cache(
    window: int, keeps_all: bool = False, reserve: int = 10, tree_size: int = 8, **batch
) -> SpeculativeCache:
    return SpeculativeCache(config_of(window), dynamic_cache(window, keeps_all), reserve, tree_size, **batch)


def append(cache, serials: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return append_rows(cache, [serials])


def append_rows(cache, serials: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [add(cache, states_of_rows(serials, layer), layer) for layer in (SLIDING, FULL)]


def add(cache, states: tuple[torch.Tensor, torch.Tensor], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Add text to the cache, or in a round a tree, stored where the attention over it stores it."""
    keys, values = cache.update(*states, layer)
    at = getattr(cache, "placement", None)
    if at is not None:
        its = cache.layers[layer]
        store_nodes(Nodes(keys, values, None, its.tree_slots(at)), its.prefix_of(at))
    return keys, values


def random_tree(rng: random.Random, nodes: int) -> tuple[list[int], list[int]]:
    """Return parents of a random tree, and a random path from its root."""
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
    """Return, for each node of the tree just placed in a row, the serial numbers of the prefix tokens that it sees."""
    prefix = cache.layers[layer].prefix_of(cache.placement)
    batch, nodes = cache.placement.depths.shape
    assert list(zip(prefix.spans.starts.tolist(), prefix.spans.ends.tolist(), strict=True)) == list(prefix.spans.host)
    slot = torch.arange(prefix.key.shape[2])
    mask = (slot >= prefix.spans.starts[:, None, None]) & (slot < prefix.spans.ends[:, None, None])
    mask = mask.expand(-1, nodes, -1)
    if prefix.mask is not None:
        assert prefix.mask.shape[:2] == (batch, nodes) and prefix.mask.shape[2] >= max(prefix.spans.ends)
        mask = mask.clone()
        mask[:, :, : prefix.mask.shape[2]] &= prefix.mask
    key, value = prefix.key[row : row + 1], prefix.value[row : row + 1]
    return [
        sorted(serials_in(key[:, :, mask[row, node]], value[:, :, mask[row, node]], layer)) for node in range(nodes)
    ]


def run_round(cache: SpeculativeCache, text: list[int], serials: list[int], parents: list[int], window: int) -> None:
    """Place a tree and check all that its nodes see; `text` is what the cache holds, padding as None."""
    run_rounds(cache, [text], [serials], [parents], window)


def run_rounds(
    cache: SpeculativeCache, texts: list[list], serials: list[list[int]], parents: list[list[int]], window: int
) -> None:
    """Place trees and check all that their nodes see: a text, a tree and its parents for each row of a batch."""
    depths = torch.cat([depths_of(row) for row in parents])
    cache.begin_round(depths)
    for layer in (SLIDING, FULL):
        keys, values = add(cache, states_of_rows(serials, layer), layer)
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
