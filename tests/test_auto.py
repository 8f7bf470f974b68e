"""Trees chosen while decoding, and copies: the text is that of plain `generate`, whatever is chosen."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import CACHE, VOCAB, quick_or_slow, tiny_draft, tiny_target
from observation import differences, observe
from probes import Streamed
from texts import prompt_of
from transformers import DynamicCache
from tree_cases import rest_slow

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.evaluation.tiny_models import tiny_model
from hf_longspec.modeling import choice_longspec
from hf_longspec.modeling.choice_longspec import Chooser
from hf_longspec.modeling.tree_longspec import TreeForm

FIELDS = {
    "auto": {"tree_shape": "auto"},
    "auto without copies": {"tree_shape": "auto", "copy_tokens": 0},
    "a tree and copies": {"tree_shape": (2, 3), "copy_tokens": 6},
    "copies": {"tree_shape": (), "copy_tokens": 6},
    "a pruned tree and copies": {"tree_shape": (4, 8), "copy_tokens": 10, "verify_tokens": 8},
    "copies, few nodes": {"tree_shape": (2, 2, 2), "copy_tokens": 9, "verify_tokens": 3},
}
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 6},
    "penalties": {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 4, "top_p": 0.9},
}
PAIRS = [(name, setting) for name in FIELDS for setting in SETTINGS]
QUICK = [("auto", "penalties"), ("a pruned tree and copies", "sampled"), ("copies, few nodes", "greedy")]


@pytest.fixture(scope="module")
def llama():
    return tiny_target("llama")


@pytest.fixture(params=["by phases", "ahead"])
def engine(request, monkeypatch):
    """Rounds phase by phase, and ahead of the host with tapes in the place of graphs."""
    if request.param == "ahead":
        request.getfixturevalue("captures")
        monkeypatch.setattr(choice_longspec, "LEAST", 0.0)  # as on a GPU: a graph asks the host for nothing
    return request.param


def repeating(batch: int, length: int = 24) -> torch.Tensor:
    """Return prompts in which the same few tokens come again."""
    part = torch.randint(2, VOCAB, (batch, 6), generator=torch.Generator().manual_seed(batch))
    return part.repeat(1, -(-length // 6))[:, :length]


def assert_same(target, draft, seed=3, **options):
    """Compare all that a call gives and leaves; returns what the call with a draft gave."""
    case = type("Case", (), {"log": []})
    calls = [
        observe(target, lambda generate, case: generate(**options), case, seed, **assistant)
        for assistant in ({}, {"assistant_model": draft})
    ]
    assert differences(*calls) == []
    return calls[1]


@pytest.mark.parametrize("name, setting", rest_slow(PAIRS, QUICK))
@pytest.mark.parametrize("batch", [1, 3])
def test_text_and_generator(llama, engine, batch, name, setting):
    draft = tiny_draft(llama, **FIELDS[name])
    ids = repeating(batch)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :5] = 0
    for seed in range(2):
        assert_same(
            llama, draft, seed, input_ids=ids, attention_mask=mask, max_new_tokens=40, pad_token_id=0,
            eos_token_id=[7], **SETTINGS[setting],
        )  # fmt: skip


@pytest.mark.parametrize("family", quick_or_slow(["mistral", "gemma3_text", "gpt_oss", "qwen3", "phi3"], ["mistral"]))
@pytest.mark.parametrize("name", quick_or_slow(FIELDS, ["auto", "a tree and copies"]))
def test_families(family, name):
    target = tiny_target(family)
    draft = tiny_draft(target, **FIELDS[name])
    for batch in (1, 2):
        assert_same(target, draft, input_ids=repeating(batch), max_new_tokens=40, pad_token_id=0, do_sample=True)


@pytest.mark.parametrize("name", FIELDS)
def test_turns_over_one_cache(llama, name):
    draft, ids = tiny_draft(llama, **FIELDS[name]), repeating(1)
    caches = [DynamicCache(config=llama.config), DynamicCache(config=llama.config)]
    for turn in range(3):
        texts = [
            llama.generate(
                ids, assistant_model=assistant, max_new_tokens=14, pad_token_id=0, do_sample=False,
                return_dict_in_generate=True, **{CACHE: cache},
            )
            for assistant, cache in ((None, caches[0]), (draft, caches[1]))
        ]  # fmt: skip
        assert torch.equal(texts[0].sequences, texts[1].sequences)
        for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys)
        ids = torch.cat([texts[0].sequences, repeating(1, 6 + turn)], dim=1)


@pytest.mark.parametrize("name", FIELDS)
def test_near_the_end_of_a_table(name):
    target = tiny_model("gpt2")  # of 256 positions
    draft = tiny_draft(target, **FIELDS[name])
    for new in (14, 30):
        assert_same(target, draft, input_ids=repeating(1, 256 - new), max_new_tokens=new, pad_token_id=0)


@pytest.mark.parametrize("name", FIELDS)
def test_embeddings_as_prompts(llama, name):
    draft = tiny_draft(llama, **FIELDS[name])
    embeds = llama.get_input_embeddings()(repeating(2)).detach()
    assert_same(llama, draft, inputs_embeds=embeds, max_new_tokens=30, pad_token_id=0)


def test_copies_are_taken(llama, engine):
    """Beyond the last level of the draft's tree, and beyond the first round in which they were there."""
    draft = tiny_draft(llama, tree_shape=(2,), copy_tokens=9)
    text = llama.generate(repeating(1), max_new_tokens=60, pad_token_id=0)
    out = llama.generate(
        text, assistant_model=draft, max_new_tokens=60, pad_token_id=0, return_dict_in_generate=True, do_sample=False
    )
    assert max(out.accept_lengths[0]) > 3 and sum(out.accept_lengths[0]) == 59
    assert set(out.trees[0]) == {TreeForm((2,), 9)} and len(out.trees[0]) == len(out.accept_lengths[0])


def test_a_choice_at_random_changes_no_text(llama, engine, monkeypatch):
    dice = random.Random(0)
    monkeypatch.setattr(Chooser, "_choose", lambda self: self._take(dice.choice(self.ladder)))
    for name in ("auto", "auto without copies"):
        draft = tiny_draft(llama, **FIELDS[name])
        seen = set()
        for seed in range(4):
            for setting in SETTINGS.values():
                out = assert_same(
                    llama, draft, seed, input_ids=repeating(1), max_new_tokens=40, pad_token_id=0, **setting
                )
                del out
        trees = llama.generate(
            repeating(1), assistant_model=draft, max_new_tokens=60, pad_token_id=0, return_dict_in_generate=True
        ).trees[0]
        seen |= set(trees)
        assert len(seen) > 2


def test_streamer_and_criteria(llama):
    draft, log = tiny_draft(llama), []
    draft.config.tree_shape = "auto"
    expected = llama.generate(prompt_of(9), max_new_tokens=20, pad_token_id=0)
    llama.generate(prompt_of(9), assistant_model=draft, max_new_tokens=20, pad_token_id=0, streamer=Streamed(log))
    assert torch.equal(
        llama.generate(prompt_of(9), assistant_model=draft, max_new_tokens=20, pad_token_id=0), expected
    )


# --- without a layer -------------------------------------------------------------------------------------------------


def test_a_draft_without_a_layer(llama, engine, tmp_path):
    draft = LongSpecForCausalLM.without_layer(llama)
    assert sum(weight.numel() for weight in draft.parameters()) == 0
    for batch in (1, 3):
        for setting in SETTINGS.values():
            assert_same(llama, draft, input_ids=repeating(batch), max_new_tokens=40, pad_token_id=0, **setting)
    text = llama.generate(repeating(1), max_new_tokens=60, pad_token_id=0)
    options = {"max_new_tokens": 60, "pad_token_id": 0, "return_dict_in_generate": True}
    draft.config.copy_tokens, draft.config.tree_shape = 12, ()
    assert max(llama.generate(text, assistant_model=draft, **options).accept_lengths[0]) > 2
    draft.save_pretrained(tmp_path)
    loaded = LongSpecForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, loaded.config.copy_tokens) == (0, 12)
    calls = [llama.generate(text, assistant_model=each, **options) for each in (draft, loaded)]
    assert calls[0].accept_lengths == calls[1].accept_lengths


BAD = [
    ({"tree_shape": "best"}, "`tree_shape` must be"),
    ({"copy_tokens": -1}, "`copy_tokens` must be"),
    ({"copy_tokens": True}, "`copy_tokens` must be"),
    ({"acceptance": (2,)}, "`acceptance` must be"),
    ({"acceptance": ()}, "`acceptance` must be"),
    ({"acceptance": 0.5}, "`acceptance` must be"),
    ({"acceptance": "high"}, "`acceptance` must be"),
    ({"num_hidden_layers": 2}, "`num_hidden_layers` must be"),
    ({"num_hidden_layers": 0, "tree_shape": (2,)}, "a draft without a layer"),
]


@pytest.mark.parametrize("fields, message", BAD, ids=str)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        LongSpecConfig(**fields)


def test_fields_are_kept(tmp_path):
    LongSpecConfig(copy_tokens=5, acceptance=(0.5, 0.25)).save_pretrained(tmp_path)
    loaded = LongSpecConfig.from_pretrained(tmp_path)
    assert (loaded.tree_shape, loaded.copy_tokens, loaded.acceptance) == ("auto", 5, (0.5, 0.25))
    assert LongSpecConfig(tree_shape=None).tree_shape == "auto", "as drafts of before have it"
