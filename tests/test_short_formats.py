"""bfloat16, float16, autocast and float64: where the texts part, the target's two best tokens tie within rounding."""

import copy

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from observation import contents
from texts import OPTIONS, assert_same, prompt_of
from transformers import DynamicCache

LONG = OPTIONS | {"max_new_tokens": 20}
QUICK = {("llama", torch.bfloat16)}


def assert_parts_only_at_ties(target, draft, within=torch.no_grad):
    """Rule of short formats: where two greedy texts part, the two tokens tie within the rounding of that format.

    How far such a format rounds is measured against the same weights in float64, at the place where they part.
    """
    precise = copy.deepcopy(target).double()
    parted = 0
    for length in range(3, 19):
        ids = prompt_of(length, seed=length)
        with within():
            plain = target.generate(ids, do_sample=False, **LONG)[0]
            ours = target.generate(ids, do_sample=False, assistant_model=draft, **LONG)[0]
        if plain.tolist() == ours.tolist():
            continue
        parted += 1
        place = int((plain != ours).nonzero()[0])
        with torch.no_grad():
            exact = precise(plain[None, :place]).logits[0, -1]
        with torch.no_grad(), within():
            rounded = target(plain[None, :place]).logits[0, -1].double()
        error = (exact - rounded).abs().max()
        assert (exact[plain[place]] - exact[ours[place]]).abs() <= 4 * error, f"parted at {place} without a tie"
    assert parted < 16


@pytest.mark.parametrize(
    "family, dtype",
    [
        pytest.param(family, dtype, marks=() if (family, dtype) in QUICK else pytest.mark.slow, id=f"{family}-{dtype}")
        for family in ("llama", "gemma2", "mistral")
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_short_formats_part_at_ties_only(family, dtype):
    target = tiny_target(family).to(dtype)
    draft = tiny_draft(target, window=8)
    assert_parts_only_at_ties(target, draft)
    assert draft.dtype == dtype


def test_autocast():
    llama = tiny_target("llama")
    draft = tiny_draft(llama, window=8)
    assert_parts_only_at_ties(llama, draft, within=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same(llama, draft)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_autocast_leaves_a_cache_in_plain_formats(family):
    """Which formats these are depends on transformers; a cache may have been filled in others."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=8)
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    for first, second in ((True, True), (False, True), (True, False)):
        formats = []
        for own in ({}, {"assistant_model": draft}):
            cache = DynamicCache(config=target.config)
            with torch.autocast("cpu", torch.bfloat16, enabled=first):
                ids = target.generate(prompt_of(9), **options, **own, **{CACHE: cache})
            with torch.autocast("cpu", torch.bfloat16, enabled=second):
                target.generate(ids, **options, **own, **{CACHE: cache})
            formats.append([(layer.keys.dtype, layer.values.dtype) for layer in cache.layers])
        assert formats[0] == formats[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # the eager attention of others rounds to float32 itself
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_float64_is_computed_in_float64(family, backend):
    target = tiny_target(family).double()
    draft = tiny_draft(target, window=8, attention_backend=backend)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "return_dict_in_generate": True, "output_hidden_states": True}
    plain, ours = (target.generate(prompt_of(9), **options, **own) for own in ({}, {"assistant_model": draft}))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(contents(ours.hidden_states), contents(plain.hidden_states), **close)
    for layer, expected in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, **close)
        torch.testing.assert_close(layer.values, expected.values, **close)
