"""Texts of a target, without and with a draft."""

import torch

OPTIONS = {"max_new_tokens": 12, "pad_token_id": 0}


def prompt_of(length, seed=0):
    return torch.randint(2, 13, (1, length), generator=torch.Generator().manual_seed(seed))


def texts(target, lengths=(5, 19), **options):
    """Return a greedy and a sampled text for each prompt length."""
    found = []
    for length in lengths:
        for do_sample in (False, True):
            torch.manual_seed(7)
            found.append(target.generate(prompt_of(length), do_sample=do_sample, **(OPTIONS | options)).tolist())
    return found


def assert_same(target, draft, **options):
    """Assert that plain and assisted texts are the same, and return them."""
    plain = texts(target, **options)
    assert texts(target, assistant_model=draft, **options) == plain
    return plain
