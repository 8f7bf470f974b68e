"""Acceptance by context length: the places of the prompts, the numbers of a bucket, and the command."""

import json

import pytest
import torch
from helpers import tiny_draft, tiny_target

from hf_longspec.evaluation import acceptance, report


class Letters:
    """A tokenizer whose tokens are the letters a … m."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) - ord("a") for letter in text if "a" <= letter <= "m"]}


def test_prompts_of_all_lengths_end_at_the_same_places():
    tokens = torch.arange(1000)
    ends = acceptance.places(tokens, longest=100, count=4)
    assert ends == [100, 400, 700, 1000]
    with pytest.raises(ValueError, match="at least 2000 tokens, got 1000"):
        acceptance.places(tokens, longest=2000, count=4)


def test_text_is_read_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.py").write_text("cd")
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "ignored.bin").write_text("mmm")
    single = tmp_path / "single.xyz"
    single.write_text("e")
    assert acceptance.read_tokens([tmp_path / "b", tmp_path / "a.txt", single], Letters()).tolist() == [2, 3, 0, 1, 4]
    assert acceptance.read_tokens([tmp_path], Letters()).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected files, or folders with .py"):
        acceptance.read_tokens([tmp_path / "none"], Letters())


def test_a_bucket_counts_what_the_runs_did():
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8, tree_shape=(13, 40))
    tokens = torch.randint(2, 13, (200,))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    buckets = list(acceptance.measure(target, draft, tokens, [20, 50], 3, compare=True, **options))
    assert [bucket.context for bucket in buckets] == [20, 50]
    for bucket in buckets:
        assert (bucket.equal, bucket.ties, bucket.different) == (3, 0, 0)  # float32
        assert 1.5 <= bucket.lowest <= bucket.accept_length <= bucket.highest <= 3
        assert bucket.draft_state_bytes == draft.state_bytes and bucket.speed_up > 0
        assert json.loads(json.dumps(bucket.as_dict()))["context"] == bucket.context
    assert report.acceptance_table(buckets).row_count == 2
    alone = next(acceptance.measure(target, draft, tokens, [20, 50], 3, **options))
    assert alone.accept_length == buckets[0].accept_length and alone.speed_up is None
