#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# A model's own attention function, registered unchanged under another name, gives other logits: the function's name
# decides how masks are made, and a name without a mask function of its own gets none. The eager function then sees the
# future; the sdpa function, which is causal without a mask, sees the padding and is right for a single row, so that a
# test without padding finds nothing. No error, no warning.
# Who meets it: whoever wraps an attention function (to time it, log it, swap a kernel) by `AttentionInterface.register`
# alone. `AttentionMaskInterface.register` under the same name mends it.
#
# Seen on 2026-11-30, largest difference of the logits to the built-in name's:
#   eager by another name: 1e+01 without padding, 1e+01 with it; with its mask function 0e+00, 0e+00
#   sdpa by another name: 0e+00 without padding, 1e+01 with it; with its mask function 0e+00, 0e+00
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

torch.manual_seed(0)
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.5, **heads)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(2, 64, (2, 24))
padded = torch.ones_like(ids)
padded[0, :5] = 0


@torch.no_grad()
def logits(name, mask=None):
    model.set_attn_implementation(name)
    return model(ids, attention_mask=mask).logits[:, 6:]


def difference(name, other):
    return [(logits(name, mask) - logits(other, mask)).abs().max().item() for mask in (None, padded)]


for name, function in {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}.items():
    AttentionInterface.register(f"my_{name}", function)
    bare = difference(name, f"my_{name}")
    AttentionMaskInterface.register(f"my_{name}", ALL_MASK_ATTENTION_FUNCTIONS[name])
    masked = difference(name, f"my_{name}")
    print(f"{name} by another name: {bare[0]:.0e} without padding, {bare[1]:.0e} with it;", end=" ")
    print(f"with its mask function {masked[0]:.0e}, {masked[1]:.0e}")
    assert bare[1] > 0.1 and (bare[0] > 0.1 if name == "eager" else bare[0] == 0)
    assert masked == [0, 0]
PYTHON
