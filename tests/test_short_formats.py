"""bfloat16, float16 and autocast: where the texts part, the target's two best tokens tie within rounding."""

import copy

import pytest
import torch
from helpers import tiny_draft, tiny_target
from texts import OPTIONS, assert_same, prompt_of

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
