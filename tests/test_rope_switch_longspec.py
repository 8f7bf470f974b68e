"""longrope (phi3): frequencies that change at a length, where plain `generate` drops its cache."""

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from pairs import assert_same
from texts import prompt_of
from transformers import DynamicCache

WINDOW = 8


def phi3_with_switch_at(switch):
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 5.0, 9.0]}
    return tiny_target(
        "phi3",
        head_dim=8,
        max_position_embeddings=128,
        original_max_position_embeddings=switch,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": switch}
        | factors,
    )


@pytest.mark.parametrize("length", [5, 15, 16, 17, 24])
@pytest.mark.parametrize("shape", [(), (1, 1, 1), (4, 16, 16, 16, 16)], ids=str)
def test_longrope_across_its_switch(shape, length):
    target = phi3_with_switch_at(16)
    draft = tiny_draft(target, window=WINDOW, tree_shape=shape)
    assert_same(target, draft, prompt_of(length), max_new_tokens=25)
    assert_same(target, draft, prompt_of(length), max_new_tokens=25, do_sample=True)


@pytest.mark.parametrize("shape", [(), (13, 40)], ids=str)
@pytest.mark.parametrize("prompt", ["padded", "padded to the switch", "holes", "positions", "positions beyond"])
def test_longrope_where_positions_are_not_lengths(shape, prompt):
    """The frequencies change by position, the cache is dropped by length."""
    target = phi3_with_switch_at(16)
    draft = tiny_draft(target, window=WINDOW, tree_shape=shape)
    ids, options = prompt_of(10), {}
    if prompt.startswith("padded"):
        pads = 10 if prompt.endswith("switch") else 4
        ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1)
        options["attention_mask"] = (torch.arange(pads + 10) >= pads).long()[None]
    elif prompt == "holes":
        options["attention_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1, 1]])
    else:
        options["position_ids"] = torch.arange(10)[None] + (20 if prompt.endswith("beyond") else 3)
    assert_same(target, draft, ids, **options)
    assert_same(target, draft, ids, **options, do_sample=True)


@pytest.mark.parametrize("length", [14, 20])
def test_longrope_leaves_a_dropped_cache_to_its_owner(length):
    """Before the switch (14) and within the prefill (20), `generate` goes on with a cache of its own."""
    target = phi3_with_switch_at(16)
    draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))
    caches = []
    for assistant in ({}, {"assistant_model": draft}):
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(prompt_of(length)[:, :5], **{CACHE: cache})
        options = {"max_new_tokens": 25, "return_dict_in_generate": True, "pad_token_id": 0}
        out = target.generate(prompt_of(length), **{CACHE: cache}, **options, **assistant)
        caches.append((cache, out[CACHE]))
    for mine, theirs in zip(caches[1], caches[0], strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        for layer, expected in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [14, 16, 20])
def test_longrope_without_a_cache(length):
    """Plain `generate` reads the whole text each step, at the switch too."""
    target = phi3_with_switch_at(16)
    assert_same(target, tiny_draft(target, window=WINDOW), prompt_of(length), max_new_tokens=12, use_cache=False)


def test_longrope_switch_is_real():
    target = phi3_with_switch_at(16)
    long = target(prompt_of(20)).logits[:, 10]
    short = target(prompt_of(20)[:, :14]).logits[:, 10]
    assert (long - short).abs().max() > 1e-2, "long and short factors give the same logits: nothing is tested"


def test_longrope_beside_other_ranks_is_refused():
    """Near the switch ranks would guess different numbers of levels, and wait for each other for ever."""
    target = phi3_with_switch_at(16)
    with pytest.raises(ValueError, match="ranks that read alike, got synced_gpus with a target of longrope"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), synced_gpus=True, max_new_tokens=3)
