"""Stock assisted decoding behaves after our import exactly as before it, and our door is hung in once."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_draft, tiny_target
from transformers.generation import GenerationMixin

SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
if sys.argv[1] == "after":
    import hf_longspec.modeling.modeling_longspec
def model(seed, layers):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()
target, small = model(0, 3), model(1, 1)
ids, results = torch.arange(2, 12)[None], []
def record(**options):
    torch.manual_seed(2)
    try:
        out = target.generate(ids, max_new_tokens=12, **options)
        results.append([out.tolist(), torch.rand(1).item()])
    except (ValueError, TypeError) as error:
        results.append(str(error))
record(assistant_model=small)
record(assistant_model=small, do_sample=True)
record(prompt_lookup_num_tokens=3)
record(assistant_early_exit=1)
record(assistant_model=small, num_return_sequences=2, do_sample=True)
record(assistant_model=small, cache_implementation="static")
record(num_beams=2)
record(assistant_model=model(1, 1).double(), tokenizer=None)
print(json.dumps(results))
"""


def test_same_results_before_and_after_our_import(tmp_path):
    outputs = []
    for when in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, when], capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    assert isinstance(outputs[0][0], list) and isinstance(outputs[0][2], list), (
        "the stock assistants did not run at all"
    )


def test_installing_twice_wraps_once():
    from hf_longspec.modeling.interface_longspec import install_door

    wrapped = GenerationMixin._assisted_decoding
    install_door()
    assert GenerationMixin._assisted_decoding is wrapped
    assert not hasattr(wrapped._longspec_original, "_longspec_original")


def test_remote_and_pip_classes_share_one_door(tmp_path):
    """A remote-code class and the pip class in one process: both decode, the door stays wrapped once."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=(4, 8))
    draft.save_pretrained(tmp_path)
    wrapped = GenerationMixin._assisted_decoding
    remote_class = get_class_from_dynamic_module("modeling_longspec.LongSpecForCausalLM", tmp_path)
    remote = remote_class.from_pretrained(tmp_path)
    assert type(remote) is not type(draft)
    assert GenerationMixin._assisted_decoding is wrapped
    ids = torch.arange(2, 9)[None]
    expected = target.generate(ids, max_new_tokens=9, pad_token_id=0).tolist()
    for one in (draft, remote, draft):
        assert target.generate(ids, assistant_model=one, max_new_tokens=9, pad_token_id=0).tolist() == expected


@pytest.mark.parametrize("order", ["ours first", "stock first"])
def test_stock_and_our_assistants_alternate(order):
    target, small = tiny_target("llama"), tiny_target("llama", num_hidden_layers=1)
    draft = tiny_draft(target, tree_shape=(4, 8))
    ids = torch.arange(2, 9)[None]
    expected = target.generate(ids, max_new_tokens=9, pad_token_id=0).tolist()
    for assistant in [draft, small, draft] if order == "ours first" else [small, draft, small]:
        assert target.generate(ids, assistant_model=assistant, max_new_tokens=9, pad_token_id=0).tolist() == expected
