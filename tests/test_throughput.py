"""Throughput of batches: the padded prompts, what is counted, and the ties of rows."""

import json

import pytest
import torch
from helpers import tiny_draft, tiny_target

from hf_longspec.evaluation import report, throughput


def test_prompts_of_a_batch_are_padded_on_the_left():
    tokens = torch.arange(100, 200)
    inputs = throughput.padded_prompts(tokens, context=8, batch=3, pad=7)
    assert inputs["input_ids"].tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 107],
        [146, 147, 148, 149, 150, 151, 152, 153],
        [7, 193, 194, 195, 196, 197, 198, 199],
    ]
    assert inputs["attention_mask"].tolist() == [[1] * 8, [1] * 8, [0] + [1] * 7]
    with pytest.raises(ValueError, match="at least 101 tokens, got 100"):
        throughput.padded_prompts(tokens, context=101, batch=2, pad=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_counted(dtype):
    target = tiny_target("llama").to(dtype)
    draft = tiny_draft(target, window=8, tree_shape=(13, 40), profile=True)
    tokens = torch.randint(2, 13, (200,))
    result = throughput.measure(target, draft, tokens, 20, 4, max_new_tokens=12, repeats=1)
    assert result.equal + result.ties + result.different == 4
    assert (result.equal == 4) or dtype == torch.bfloat16
    assert result.different == 0 and 1.2 <= result.accept_length <= 3
    assert result.tokens_per_second == pytest.approx(4 * 12 / result.seconds)
    assert result.speed_up == pytest.approx(result.tokens_per_second / result.plain_tokens_per_second)
    assert set(result.phase_seconds) == {"prefill", "grow", "verify", "accept", "commit", "host"}
    assert json.loads(json.dumps(result.as_dict()))["batch"] == 4
    assert report.throughput_table([result]).row_count == 1


def test_a_row_that_differs_is_told():
    """A draft whose texts are changed behind its back."""
    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=(2,))
    honest = draft.assisted_decoding

    class Liar:
        def __getattr__(self, name):
            return getattr(draft, name)

        def assisted_decoding(self, *args, **kwargs):
            output = honest(*args, **kwargs)
            output.sequences[1, -1] = (output.sequences[1, -1] + 1) % 13
            return output

    result = throughput.measure(target, Liar(), torch.randint(2, 13, (99,)), 9, 3, max_new_tokens=6, repeats=1)
    assert (result.equal, result.ties, result.different) == (2, 0, 1)
