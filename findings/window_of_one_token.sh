#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# A sliding layer's cache keeps the last `sliding_window - 1` tokens by the slice `[-sliding_window + 1 :]`. With a
# window of one token that is `[0:]`, and the cache keeps them all. The prompt is still read with each token alone, but
# behind it one token at a time meets a mask of one column, or none, and attends to the whole text. A cache without a
# config (`DynamicCache()`) masks by position and gives what a window of one token means.
# Who meets it: whoever tries the smallest window in a test. flex attention raises.
#
# Seen on 2026-11-30, tokens cached of 12, and difference to one pass over the whole text:
#   window 1, own cache        holds 12   differs by 3e-01
#   window 1, DynamicCache()   holds 12   differs by 1e-07
#   window 2, own cache        holds  1   differs by 6e-08
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

for window, own in ((1, True), (1, False), (2, True)):
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **SMALL, **HEADS, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(64, (1, 12))
    cache = DynamicCache(config=config) if own else DynamicCache()
    with torch.no_grad():
        logits = [model(piece, cache=cache).logits for piece in (ids[:, :8], *ids[:, 8:].split(1, dim=1))]
        differ = (torch.cat(logits, dim=1) - model(ids, use_cache=False).logits).abs().max().item()
    held, name = cache.layers[0].keys.shape[2], "own cache" if own else "DynamicCache()"
    print(f"window {window}, {name:16} holds {held:2}   differs by {differ:.0e}")
    wrong = window == 1 and own
    assert (differ > 1e-3) == wrong and held == (1 if window == 2 else 12)
PYTHON
