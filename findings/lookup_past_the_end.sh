#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# Since 5.24 assisted decoding may run over a static cache, which `generate` makes as long as the text may become. An
# assistant model guesses no further than the text may go. Prompt lookup does: a guess near the end is longer than the
# tokens that are left, and writing its keys and values is an IndexError. (Not run on a GPU, where writes out of bounds
# are assertions of the device.) With a `max_cache_len` of `prompt_lookup_num_tokens` more it is right.
# Who meets it: whoever speeds up prompt lookup by `cache_implementation="static"` on a text that repeats itself.
#
# Seen on 2026-11-30:
#   prompt lookup, static cache: IndexError: index_copy_(): index 69 is out of bounds for dimension 2 with size 69
#   assistant, static cache: text kept
#   prompt lookup, static cache, 10 tokens more: text kept
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON' 2> err.txt || { cat err.txt; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **heads)
config.eos_token_id = None
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(2, 64, (1, 20)).repeat(1, 2)
options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
static, lookup = {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 10}

expected = model.generate(prompt, **options)
for name, more, right in (
    ("prompt lookup, static cache", lookup, False),
    ("assistant, static cache", {"assistant_model": model}, True),
    ("prompt lookup, static cache, 10 tokens more", lookup | {"max_cache_len": 80}, True),
):
    try:
        text = model.generate(prompt, **options, **static, **more)
    except IndexError as error:
        print(f"{name}: IndexError: {error}")
        assert not right
    else:
        assert right and torch.equal(text, expected)
        print(f"{name}: text kept")
PYTHON
