#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# `generate` takes a cache that already holds the beginning of the prompt, and then reads the rest only. With an
# `assistant_model` the first check of guesses reads the whole prompt a second time, behind the cached beginning: the
# greedy text is another one, without an error or a warning, though assisted decoding promises the same text. It
# is not the assistant's doing: a copy of the model itself as the assistant does the same.
# Who meets it: a chat that keeps its cache from turn to turn, or prompts that share a long cached prefix.
#
# Seen on 2026-11-30 (25 is the prompt of 24 and a guess):
#   plain: text kept, first pass behind the cache of 16 tokens reads 8
#   assisted: text differs, first pass behind the cache of 16 tokens reads 25
#   assisted, no cache: text kept
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON' 2> err.txt || { cat err.txt; exit 1; }
import copy

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.5, **heads)
config.eos_token_id = None
model = LlamaForCausalLM(config).eval()
assistant = copy.deepcopy(model)
prompt = torch.randint(2, 64, (1, 24))
options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
reads = []
model.register_forward_pre_hook(lambda _, args, kwargs: reads.append(kwargs["input_ids"].shape[1]), with_kwargs=True)


@torch.no_grad()
def behind_prefix(**more):
    cache = DynamicCache(config=config)
    model.model(prompt[:, :16], cache=cache, use_cache=True)
    reads.clear()
    return model.generate(prompt, cache=cache, **options, **more)


expected = model.generate(prompt, **options)
for name, more in {"plain": {}, "assisted": {"assistant_model": assistant}}.items():
    kept = torch.equal(behind_prefix(**more), expected)
    print(f"{name}: text {'kept' if kept else 'differs'}, first pass behind the cache of 16 tokens reads {reads[0]}")
    assert kept == (name == "plain") and (reads[0] == 8) == kept
assert torch.equal(model.generate(prompt, assistant_model=assistant, **options), expected)
print("assisted, no cache: text kept")
PYTHON
