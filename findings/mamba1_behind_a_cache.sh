#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU, reference kernels (neither mamba_ssm nor causal_conv1d is installed).
#
# A Mamba-1 model that is given several tokens behind a filled cache forgets its state: the scan over several tokens
# begins from zero, without an error or a warning. One token at a time is right, and so are Mamba-2 and attention.
# Who meets it: a second turn of a chat on a kept cache, prefill in chunks, and any scheme that checks several guessed
# tokens in one forward pass. These must feed such models one token at a time, or refuse them.
#
# Seen on 2026-11-30, largest difference to one pass over the whole text:
#   mamba          9 tokens, then 7 at once: 2e-03   then 1 at a time: 5e-07
#   falcon_mamba   9 tokens, then 7 at once: 2e-01   then 1 at a time: 7e-07
#   mamba2         9 tokens, then 7 at once: 7e-07   then 1 at a time: 7e-07
#   llama          9 tokens, then 7 at once: 6e-08   then 1 at a time: 6e-08
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
SHAPES = {"mamba": {}, "falcon_mamba": {}, "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}, "llama": HEADS}


@torch.no_grad()
def read(model, *pieces):
    """Logits of all pieces, each read behind the cache of those before."""
    cache, logits = None, []
    for piece in pieces:
        out = model(piece, cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


for kind, shape in SHAPES.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **shape)).eval()
    ids = torch.randint(64, (1, 16))
    whole = read(model, ids)
    at_once = (read(model, ids[:, :9], ids[:, 9:]) - whole).abs().max().item()
    singly = (read(model, ids[:, :9], *ids[:, 9:].split(1, dim=1)) - whole).abs().max().item()
    print(f"{kind:14} 9 tokens, then 7 at once: {at_once:.0e}   then 1 at a time: {singly:.0e}")
    assert singly < 1e-5, kind
    assert (at_once > 1e-4) == (kind in ("mamba", "falcon_mamba")), kind
PYTHON
