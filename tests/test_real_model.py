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

pytestmark = pytest.mark.slow
PACKAGE = Path(hf_longspec.__file__).parent
DRAFT = PACKAGE / "hub_configs" / NAME
NEW_TOKENS = 128


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


def test_float32_equality_over_twenty_prompts(tokens):
    target, draft = load(torch.float32, tree_shape=(3, 4, 4, 4))
    rounds = []
    for index, inputs in enumerate(prompts(tokens, 20, 800)):
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9} if index % 4 == 3 else {"do_sample": False}
        options = sampling | {"max_new_tokens": NEW_TOKENS, "seed": index}
        plain = side_by_side.run(target, inputs, **options)
        ours = side_by_side.run(target, inputs, draft, **options)
        assert ours.tokens == plain.tokens, f"prompt {index}"
        rounds += ours.accept_lengths
    assert sum(rounds) / len(rounds) > 2, "the trained draft hardly guesses anything"


def test_bfloat16_parts_only_at_ties(tokens):
    target, draft = load(torch.bfloat16, tree_shape=(3, 4, 4, 4))
    for inputs in prompts(tokens, 6, 600):
        options = {"max_new_tokens": 64, "do_sample": False}
        plain = side_by_side.run(target, inputs, **options)
        ours = side_by_side.run(target, inputs, draft, **options)
        verdict = side_by_side.judge(target, inputs, plain.tokens, ours.tokens)
        assert verdict.equal or verdict.tie, verdict
