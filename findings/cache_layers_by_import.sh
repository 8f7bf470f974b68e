#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# Whether `DynamicCache(config=config)` works depends on what was imported before. Three families keep the layers of
# their cache in their own modeling file, whose import registers them; before it, the same config ends in a KeyError of
# the layer's kind. `AutoConfig` does not import that file, loading the model does.
# Who meets it: whoever looks at a cache's layers to learn what a model is like before it loads weights, such as a
# planner of memory, a check of compatibility, or a server that makes caches in a process without the model. They must
# load the model first, or take a KeyError for "a layer of its own".
#
# Seen on 2026-11-30:
#   minimax_m3_vl_text   by its config alone: KeyError 'minimax_m3_sparse'             with the modeling file: served
#   deepseek_v4          by its config alone: KeyError 'heavily_compressed_attention'  with the modeling file: served
#   unlimited_ocr_text   by its config alone: KeyError 'reference_sliding_attention'   with the modeling file: served
#   lfm2_moe             by its config alone: served                                   with the modeling file: served
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
bin/python - << 'PYTHON'
import importlib

from transformers import AutoConfig, DynamicCache

SPARSE = {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]}
KINDS = {"minimax_m3_vl_text": SPARSE, "deepseek_v4": {}, "unlimited_ocr_text": {}, "lfm2_moe": {}}


def outcome(config):
    try:
        return "served" if DynamicCache(config=config).layers else "no layers"
    except KeyError as error:
        return f"KeyError {error}"


for kind, fields in KINDS.items():
    config = AutoConfig.for_model(kind, **fields)
    alone = outcome(config)
    importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    after = outcome(config)
    print(f"{kind:20} by its config alone: {alone:40} with the modeling file: {after}")
    assert after == "served" and alone.startswith("served" if kind == "lfm2_moe" else "KeyError"), kind
PYTHON
