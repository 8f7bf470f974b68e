"""Positions that end, frequencies that change at a length (longrope), and caches that are dropped there (phi3)."""

import pytest
import torch
from helpers import CACHE, quick_or_slow, tiny_draft, tiny_target
from observation import TOLERANCE, contents
from pairs import assert_same
from texts import prompt_of
from transformers import AutoModelForCausalLM, DynamicCache

from hf_longspec.evaluation.tiny_models import randomized, tiny_config, tiny_model
from hf_longspec.modeling.positions_longspec import Positions, table_size

WINDOW = 8
# Families whose table of positions has 256 rows in the tiny model.
TABLES = ["gpt2", "gpt-sw3", "gpt_bigcode", "opt", "biogpt", "ctrl", "whisper"]


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


def test_longrope_that_turns_its_keys_anew_is_refused_without_a_cache():
    """Where no cache is dropped at the switch, as phi3 does it, keys that are kept keep the short frequencies."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24} | factors
    target = tiny_target("llama", max_position_embeddings=128, rope_parameters=rope)
    draft = tiny_draft(target, window=WINDOW)
    options = {"max_new_tokens": 40, "pad_token_id": 0, "assistant_model": draft}
    with pytest.raises(ValueError, match="expected use_cache=True with longrope across its switch"):
        target.generate(prompt_of(16), use_cache=False, **options)
    assert_same(target, draft, prompt_of(16), max_new_tokens=40)
    assert_same(target, draft, prompt_of(9), max_new_tokens=4, use_cache=False)


def test_longrope_switch_is_real():
    target = phi3_with_switch_at(16)
    long = target(prompt_of(20)).logits[:, 10]
    short = target(prompt_of(20)[:, :14]).logits[:, 10]
    assert (long - short).abs().max() > 1e-2, "long and short factors give the same logits: nothing is tested"


def test_longrope_beside_other_ranks_is_refused():
    """Near the switch ranks would guess different numbers of levels, and wait for each other for ever."""
    target = phi3_with_switch_at(16)
    with pytest.raises(ValueError, match="ranks that read alike, got synced_gpus with a text that may cross"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), synced_gpus=True, max_new_tokens=3)


# --- a cache that is dropped, whatever the rope ----------------------------------------------------------------------


def phi_without_longrope(family):
    config = tiny_config(family)
    config.original_max_position_embeddings = 16
    return randomized(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), 0)


@pytest.mark.parametrize("family", quick_or_slow(["phi3", "phi4_multimodal", "phimoe"], ["phi3"]))
@pytest.mark.parametrize("shape", [(), (1, 1, 1), (4, 8, 8)], ids=str)
def test_a_cache_is_dropped_with_any_rope(family, shape):
    """Text, hidden states and cache are those of plain `generate`, which reads the text anew behind 16 tokens."""
    target = phi_without_longrope(family)
    draft = tiny_draft(target, window=WINDOW, tree_shape=shape)
    options = {"max_new_tokens": 20, "pad_token_id": 0, "return_dict_in_generate": True, "output_hidden_states": True}
    for rows, lengths in ((1, (5, 15, 16, 17)), (2, (9,))):
        for length in lengths:
            ids = torch.cat([prompt_of(length, seed=seed) for seed in range(rows)])
            plain, ours = (target.generate(ids, **options, **own) for own in ({}, {"assistant_model": draft}))
            assert ours.sequences.tolist() == plain.sequences.tolist()
            torch.testing.assert_close(contents(ours.hidden_states), contents(plain.hidden_states), **TOLERANCE)
            for layer, expected in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
                torch.testing.assert_close(layer.keys, expected.keys, **TOLERANCE)
                torch.testing.assert_close(layer.values, expected.values, **TOLERANCE)


def test_rows_go_together_only_where_a_cache_may_be_dropped():
    target = phi_without_longrope("phi3")
    assert [Positions(target, {}, longest).by_length for longest in (16, 17)] == [False, True]


def test_graphs_outlive_a_dropped_cache(captures):
    target = phi_without_longrope("phi3")
    draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))
    for length in (9, 9, 5):
        assert_same(target, draft, prompt_of(length))
    assert captures and all(captures)


# --- a table that ends -----------------------------------------------------------------------------------------------


def padded_batch(length):
    """Two rows, one padded, that come to the end of the table at different times."""
    ids = torch.cat([prompt_of(length, seed=seed) for seed in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    return ids * mask, {"attention_mask": mask}


@pytest.mark.parametrize("family", quick_or_slow(TABLES, ["gpt2", "opt"]))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 8, 8, 8)], ids=str)
def test_no_node_stands_beyond_a_table(family, shape):
    """The last token of a text is read by nobody, so a text of 257 tokens needs 256 positions."""
    target = tiny_model(family)
    assert table_size(target) == 256
    draft = tiny_draft(target, tree_shape=shape)
    for length, longest in ((245, 256), (255, 256), (250, 257)):
        assert_same(target, draft, prompt_of(length), max_new_tokens=longest - length)
    ids, options = padded_batch(250)
    assert_same(target, draft, ids, max_new_tokens=7, **options)
    for own in ({}, {"assistant_model": draft}):
        with pytest.raises(IndexError, match="out of"):
            target.generate(prompt_of(250), max_new_tokens=8, pad_token_id=0, **own)


@pytest.mark.parametrize("end", range(13))
def test_a_text_that_ends_before_the_table_may_have_been_longer(end):
    target = tiny_model("gpt2")
    options = {"max_new_tokens": 50, "eos_token_id": end, "pad_token_id": 0}
    try:
        plain = target.generate(prompt_of(245), **options).tolist()
    except IndexError:
        plain = None
    draft = tiny_draft(target, tree_shape=(4, 8, 8, 8))
    if plain is not None:
        assert target.generate(prompt_of(245), assistant_model=draft, **options).tolist() == plain


def test_the_users_own_positions_end_earlier():
    target = tiny_model("gpt2")
    positions = torch.arange(10)[None] + 235
    assert_same(target, tiny_draft(target), prompt_of(10), position_ids=positions, max_new_tokens=12)


def test_graphs_up_to_the_end_of_a_table(captures):
    target = tiny_model("gpt2")
    target.config.pad_token_id = None  # or each forward looks for padding, on the host
    draft = tiny_draft(target, tree_shape=(4, 8, 8))
    for length in (225, 235, 225):
        assert_same(target, draft, prompt_of(length), max_new_tokens=256 - length)
    assert captures and all(captures)


def test_levels_by_hand():
    table = Positions(tiny_model("gpt2"), {}, 300)
    assert [table.levels(4, place, place) for place in (0, 251, 252, 254, 255, 256, 300)] == [4, 4, 3, 1, 0, 0, 0]
    switch = Positions(phi3_with_switch_at(16), {}, 100)
    places = ((11, 11), (12, 11), (11, 12), (15, 3), (16, 16))
    assert [switch.levels(4, *place) for place in places] == [4, 3, 3, 0, 4]
    assert Positions(tiny_target("llama"), {}, 600).levels(4, 600, 600) == 4


def test_ranks_may_not_part_near_the_end_of_a_table():
    target = tiny_model("gpt2")
    with pytest.raises(ValueError, match="ranks that read alike, got synced_gpus with a text that may cross"):
        target.generate(prompt_of(250), assistant_model=tiny_draft(target), synced_gpus=True, max_length=256)
