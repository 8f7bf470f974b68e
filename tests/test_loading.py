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
from transformers import AutoModelForCausalLM

from hf_longspec import LongSpecForCausalLM

HUB_CONFIGS = Path(__file__).parents[1] / "hub_configs"
SOURCES = {path.name for path in HUB_CONFIGS.with_name("modeling").glob("*_longspec.py")}
AUTO_MAP = {
    "AutoConfig": "configuration_longspec.LongSpecConfig",
    "AutoModelForCausalLM": "modeling_longspec.LongSpecForCausalLM",
}
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
options = {"max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0}
for folder in sys.argv[2:]:
    draft = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not any(name.partition(".")[0] == "hf_longspec" for name in sys.modules)
    out = target.generate(torch.arange(2, 12)[None], assistant_model=draft, **options)
    print(json.dumps([type(draft).__module__, out.sequences.tolist(), out.accept_lengths]))
"""
VOCABULARIES = {"whole vocabulary": None, "some tokens": (7, 2, 11, 3, 5)}


@pytest.fixture(scope="module")
def all_saved(tmp_path_factory):
    """Of each vocabulary the target, a draft, and the folder of both."""
    pairs = {}
    for name, vocabulary in VOCABULARIES.items():
        target = tiny_target("llama")
        draft = tiny_draft(target, window=8, tree_shape=(4, 8, 8))
        draft.set_draft_vocab(vocabulary)
        folder = tmp_path_factory.mktemp("hub")
        target.save_pretrained(folder / "target")
        draft.save_pretrained(folder / "draft")
        pairs[name] = target, draft, folder
    return pairs


@pytest.fixture(params=VOCABULARIES)
def saved(all_saved, request):
    return all_saved[request.param]


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
    assert {path.name for path in (folder / "draft").glob("*.py")} == SOURCES
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
    assert config["auto_map"] == AUTO_MAP
    assert config["tree_shape"] == [4, 8, 8]


def test_a_shipped_draft_loads_with_the_package(tmp_path):
    """By its class and by the Auto class, with `trust_remote_code` or without; saved, it is a whole Hub folder."""
    shipped = [path.parent for path in HUB_CONFIGS.glob("*/model.safetensors")]
    assert {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"} <= {folder.name for folder in shipped}
    for folder in shipped:
        draft = LongSpecForCausalLM.from_pretrained(folder)
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is LongSpecForCausalLM
        assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is LongSpecForCausalLM
    draft.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == SOURCES
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_loads_as_remote_code_without_the_package(all_saved, tmp_path):
    folders = [folder for _, _, folder in all_saved.values()]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, folders[0] / "target", *(folder / "draft" for folder in folders)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(folders) :]
    for line, (target, draft, _) in zip(lines, all_saved.values(), strict=True):
        expected = generate(target, draft)
        module, tokens, accepted = json.loads(line)
        assert module.startswith("transformers_modules.")
        assert tokens == expected.sequences.tolist() and accepted == expected.accept_lengths


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
