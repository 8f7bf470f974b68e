"""A call of `generate` without and with a draft: all that comes out must be the same."""

import torch


def pair(target, draft, ids, seed=7, **options):
    """Return sequences of plain and assisted `generate` under one seed, and the generator's next number after each."""
    options = {"max_new_tokens": 24, "pad_token_id": 0, **options}
    torch.manual_seed(seed)
    plain, after_plain = target.generate(ids, **options), torch.rand(1)
    torch.manual_seed(seed)
    ours, after_ours = target.generate(ids, assistant_model=draft, **options), torch.rand(1)
    return plain, ours, after_plain, after_ours


def assert_same(target, draft, ids, **options):
    plain, ours, after_plain, after_ours = pair(target, draft, ids, **options)
    assert plain.tolist() == ours.tolist()
    assert after_plain == after_ours, "the random generator was left in another state"
