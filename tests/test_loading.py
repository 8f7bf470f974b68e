"""A saved draft is a Hub folder: it loads as remote code without hf_longspec installed, and writes the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_draft, tiny_target
from safetensors import safe_open

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

CLEAN_PROCESS = """
import importlib.abc, json, sys
FORBIDDEN = {"hf_longspec", "modeling"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
draft = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
assert not any(name.partition(".")[0] == "hf_longspec" for name in sys.modules)
ids = torch.arange(2, 12)[None]
out = target.generate(ids, assistant_model=draft, max_new_tokens=20, return_dict_in_generate=True, pad_token_id=0)
print(json.dumps({"class": type(draft).__module__, "tokens": out.sequences.tolist(), "accepted": out.accept_lengths}))
"""


@pytest.fixture(scope="module", params=[None, (7, 2, 11, 3, 5)], ids=["whole vocabulary", "some tokens"])
def saved(tmp_path_factory, request):
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8, tree_shape=(4, 8, 8))
    draft.set_draft_vocab(request.param)
    folder = tmp_path_factory.mktemp("hub")
    target.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")
    return target, draft, folder


def generate(target, draft):
    return target.generate(
        torch.arange(2, 12)[None],
        assistant_model=draft,
        max_new_tokens=20,
        return_dict_in_generate=True,
        pad_token_id=0,
    )


def test_the_folder_holds_the_code_and_nothing_of_the_target(saved):
    target, draft, folder = saved
    sources = {path.name for path in (Path(__file__).parent.parent / "modeling").glob("*_longspec.py")}
    assert {path.name for path in (folder / "draft").glob("*.py")} == sources
    with safe_open(folder / "draft" / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == {
            *(f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
            *(f"cross_attn.q_proj.{kind}" for kind in ("weight", "bias")),
            *(f"{attention}.o_proj.weight" for attention in ("self_attn", "cross_attn")),
            *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
            "input_layernorm.weight",
            "post_self_attention_layernorm.weight",
            "post_cross_attention_layernorm.weight",
            *(["draft_vocab"] if draft.draft_vocab is not None else []),
        }
    config = json.loads((folder / "draft" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_longspec.LongSpecForCausalLM"
    assert config["tree_shape"] == [4, 8, 8]


def test_the_shipped_draft_is_a_whole_hub_folder():
    """Its code files are links to those of modeling/, so that there is one set of files."""
    modeling = Path(__file__).parent.parent / "modeling"
    for folder in (modeling.parent / "hub_configs").iterdir():
        if (folder / "model.safetensors").is_file():
            links = {path.name: path.resolve() for path in folder.glob("*.py")}
            assert links == {path.name: path.resolve() for path in modeling.glob("*_longspec.py")}


def test_loads_as_remote_code_without_the_package(saved, tmp_path):
    target, draft, folder = saved
    expected = generate(target, draft)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, folder / "target", folder / "draft"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["class"].startswith("transformers_modules.")
    assert result["tokens"] == expected.sequences.tolist()
    assert result["accepted"] == expected.accept_lengths


def test_reload_gives_the_same_tokens(saved):
    target, draft, folder = saved
    again = LongSpecForCausalLM.from_pretrained(folder / "draft")
    assert again.config.tree_shape == (4, 8, 8)
    expected, out = generate(target, draft), generate(target, again)
    assert out.sequences.tolist() == expected.sequences.tolist() and out.accept_lengths == expected.accept_lengths
    chain = LongSpecForCausalLM.from_pretrained(folder / "draft", tree_shape=(1, 1))
    assert chain.config.tree_shape == (1, 1)
    assert generate(target, chain).sequences.tolist() == expected.sequences.tolist()


def test_a_draft_follows_its_target_in_dtype(saved):
    target, draft, folder = saved
    half = LongSpecForCausalLM.from_pretrained(folder / "draft", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert generate(target, half).sequences.tolist() == generate(target, draft).sequences.tolist()
    assert half.dtype == target.dtype
