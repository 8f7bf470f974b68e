"""The shipped draft on the real SmolLM2-135M-Instruct, over held-out text: equality, ties, state, acceptance.

The text is the demo's prompt, source code of NetworkX, which no training text of the draft contains.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_longspec
from hf_longspec.demo.weights import NAME, smollm2_folder
from hf_longspec.evaluation import side_by_side

PACKAGE = Path(hf_longspec.__file__).parent
DRAFT = PACKAGE / "hub_configs" / NAME
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def tokens():
    text = (PACKAGE / "demo" / "prompt.txt").read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(smollm2_folder())(text, return_tensors="pt").input_ids[0]


def load(dtype, **options):
    target = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype)
    return target, AutoModelForCausalLM.from_pretrained(DRAFT, dtype=dtype, trust_remote_code=True, **options)


def prompts(tokens, count, longest):
    """`count` prompts of growing length that end all over the text."""
    for index in range(count):
        length = 16 + (longest - 16) * index // count
        end = length + (len(tokens) - length) * (index * 7 % count) // count
        yield {"input_ids": tokens[end - length : end][None], "attention_mask": torch.ones(1, length).long()}


def equal_texts(tokens, count, longest, chosen):
    """`chosen` of `count` prompts."""
    target, draft = load(torch.float32, tree_shape=(3, 4, 4, 4))
    rounds = []
    for index, inputs in list(enumerate(prompts(tokens, count, longest)))[chosen]:
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9} if index % 4 == 3 else {"do_sample": False}
        options = sampling | {"max_new_tokens": NEW_TOKENS, "seed": index}
        plain = side_by_side.run(target, inputs, **options)
        ours = side_by_side.run(target, inputs, draft, **options)
        assert ours.tokens == plain.tokens, f"prompt {index}"
        rounds += ours.accept_lengths
    assert sum(rounds) / len(rounds) > 2, "the trained draft hardly guesses anything"


def test_float32_equality_over_three_prompts(tokens):
    equal_texts(tokens, 3, 300, slice(None))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 4))
def test_float32_equality_over_twenty_prompts(tokens, first):
    equal_texts(tokens, 20, 800, slice(first, first + 4))


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_float32_equality_of_a_batch(tokens, do_sample):
    """Prompts of other lengths in one batch, whose rows end at their own times."""
    target, draft = load(torch.float32, tree_shape=(3, 4, 4, 4))
    rows = [inputs["input_ids"][0] for inputs in prompts(tokens, 5, 300)]
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=2) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    options = {"max_new_tokens": 32, "do_sample": do_sample, "pad_token_id": 2}

    def text(**more):
        torch.manual_seed(5)
        return target.generate(ids, attention_mask=mask, **options, **more)[:, longest:].tolist()

    # as the end of a text, the token that ends most rows at places of their own
    free = text(eos_token_id=None)
    end = max({token for row in free for token in row}, key=lambda token: len(first_places(free, token)))
    assert len(first_places(free, end)) > 2, "all rows end together: too little is tested"
    assert text(eos_token_id=end, assistant_model=draft) == text(eos_token_id=end)
    assert text(eos_token_id=None, assistant_model=draft) == free


def first_places(rows, token):
    return {row.index(token) for row in rows if token in row}


@pytest.mark.slow
def test_bfloat16_parts_only_at_ties(tokens):
    target, draft = load(torch.bfloat16, tree_shape=(3, 4, 4, 4))
    for inputs in prompts(tokens, 3, 300):
        options = {"max_new_tokens": 32, "do_sample": False}
        plain = side_by_side.run(target, inputs, **options)
        ours = side_by_side.run(target, inputs, draft, **options)
        verdict = side_by_side.judge(target, inputs, plain.tokens, ours.tokens)
        assert verdict.equal or verdict.tie, verdict
