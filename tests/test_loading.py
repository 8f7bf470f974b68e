"""A saved draft is a Hub folder: it loads as remote code without hf_longspec installed, and writes the same tokens."""

import ast
import importlib.metadata
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny_draft, tiny_target
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation import GenerationMixin

from hf_longspec import LongSpecForCausalLM
from hf_longspec.modeling.configuration_longspec import PUBLIC, RELEASES

HUB_CONFIGS = Path(__file__).parents[1] / "hub_configs"
SOURCES = {path.name for path in HUB_CONFIGS.with_name("modeling").glob("*_longspec.py")}
AUTO_MAP = {
    "AutoConfig": "configuration_longspec.LongSpecConfig",
    "AutoModel": "modeling_longspec.LongSpecForCausalLM",
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
import copy, pickle
import torch
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
options = {"max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0}
for folder in sys.argv[2:]:
    draft = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(draft)
    draft = copy.deepcopy(pickle.loads(pickle.dumps(draft)))
    torch.save(draft, "draft.pt")
    draft = torch.load("draft.pt", weights_only=False)
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
    assert config["transformers_range"] == list(RELEASES)


def test_a_shipped_draft_loads_with_the_package(tmp_path):
    """By its class and by the Auto class, with `trust_remote_code` or without; saved, it is a whole Hub folder."""
    shipped = [path.parent for path in HUB_CONFIGS.glob("*/model.safetensors")]
    assert {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"} <= {folder.name for folder in shipped}
    for folder in shipped:
        draft = LongSpecForCausalLM.from_pretrained(folder)
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is LongSpecForCausalLM
        assert type(AutoModel.from_pretrained(folder)) is LongSpecForCausalLM
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


KEYWORDS = (
    {"attn_implementation": "sdpa"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "flex_attention"},
    {"attn_implementation": "kernels-community/flash-attn2"},
    {"attn_implementation": {"": "sdpa"}},
    {"experts_implementation": "grouped_mm"},
    {"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}},
)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
def test_keywords_that_the_target_is_loaded_with_are_taken(saved, keywords):
    """They mean nothing to a draft, which attends by its backend."""
    target, draft, folder = saved
    for kind in (LongSpecForCausalLM, AutoModelForCausalLM):
        again = kind.from_pretrained(folder / "draft", **keywords)
        assert generate(target, again).accept_lengths == generate(target, draft).accept_lengths


def test_a_folder_of_another_model_is_left_alone(saved, tmp_path):
    """Of two models in one folder neither could be loaded. A folder that holds the target's tokenizer will do."""
    target, draft, _ = saved
    target.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="in a folder of its own, got .*, which holds a model of type 'llama'"):
        draft.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="in a folder of its own, got .*, which holds a PEFT adapter"):
        draft.save_pretrained(tmp_path)
    draft.save_pretrained(tmp_path / "draft")
    draft.save_pretrained(tmp_path / "draft")


# --- other releases of transformers ---------------------------------------------------------------------------------

UNKNOWN = "5.99.1"
KNOWN = f"this draft's code knows transformers {RELEASES[0]} to {RELEASES[1]}, got "


@pytest.fixture
def load(all_saved, tmp_path):
    """Load a draft's classes by its own code, which is run anew, under a version of transformers."""

    def load(monkeypatch, version):
        folder = all_saved["whole vocabulary"][2] / "draft"
        copy = shutil.copytree(folder, tmp_path / f"draft_{len(list(tmp_path.iterdir()))}_{tmp_path.name}")
        monkeypatch.setattr(transformers, "__version__", version)
        config = get_class_from_dynamic_module("configuration_longspec.LongSpecConfig", copy)
        return config, get_class_from_dynamic_module("modeling_longspec.LongSpecForCausalLM", copy), copy

    return load


def renamed(name, before, after):
    """A method of `generate` with one argument under another name."""
    step = getattr(GenerationMixin, name)
    made = lambda *args, **kwargs: step(*args, **kwargs)  # noqa: E731
    parameters = inspect.signature(step).parameters.values()
    named = [one.replace(name=after) if one.name == before else one for one in parameters]
    made.__signature__ = inspect.Signature(named)
    return made


def without(*names):
    """All methods of `generate` that name one of the private attributes, made to name it no more."""

    def remove(patch):
        for step, function in list(vars(GenerationMixin).items()):
            inner = inspect.unwrap(function)
            if set(names) & set(getattr(getattr(inner, "__code__", None), "co_names", ())):
                patch.setattr(GenerationMixin, step, lambda self: None)

    return remove


CHANGES = {
    "a step is gone": (lambda p: p.delattr(GenerationMixin, "_prefill"), "GenerationMixin._prefill is gone"),
    "an argument has another name": (
        lambda p: p.setattr(GenerationMixin, "_prefill", renamed("_prefill", "model_kwargs", "kwargs")),
        "GenerationMixin._prefill is gone or takes other arguments",
    ),
    "the door has another name": (
        lambda p: p.delattr(GenerationMixin, "_assisted_decoding"),
        "GenerationMixin._assisted_decoding is gone",
    ),
    "a mark has another name": (without("_is_user_defined"), "`generate` sets no _is_user_defined"),
    "a public name is gone": (
        lambda p: p.delattr(transformers.activations, "ACT2FN"),
        "transformers.activations has no ACT2FN",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_newer_transformers_that_changed_what_the_code_builds_on(load, monkeypatch, change):
    """One line, before anything else fails; it prefers an installed package that knows this transformers."""
    make, told = CHANGES[change]
    with monkeypatch.context() as patch:
        make(patch)
        with pytest.raises(ImportError) as error:
            load(patch, UNKNOWN)
        patch.setattr(importlib.metadata, "requires", lambda name: ["torch", "transformers<6,>=5.20"])
        with pytest.raises(ImportError, match="import hf_longspec before you load the draft") as preferred:
            load(patch, UNKNOWN)
    line = str(error.value)
    assert line.startswith(f"{KNOWN}{UNKNOWN}, where {told}") and "\n" not in line
    assert line.endswith("; pip install -U hf-longspec, or re-export the draft with it")
    assert str(preferred.value).startswith(f"{KNOWN}{UNKNOWN}, where {told}")


def test_a_newer_transformers_that_changed_nothing_warns_once_and_serves(all_saved, load, monkeypatch):
    told = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text: told.append(text))
    with monkeypatch.context() as patch:
        _, kind, folder = load(patch, UNKNOWN)
        target, draft, _ = all_saved["whole vocabulary"]
        out = generate(target, kind.from_pretrained(folder))
    assert out.accept_lengths == generate(target, draft).accept_lengths
    assert told == [
        f"{KNOWN}{UNKNOWN}, which still has all that the code builds on. Should something fail: "
        "pip install -U hf-longspec, or re-export the draft with it"
    ]


@pytest.mark.parametrize("version", ["5.16.1", "4.57.6"])
def test_an_older_transformers_is_refused(load, monkeypatch, version):
    with pytest.raises(ImportError) as error:
        load(monkeypatch, version)
    assert str(error.value) == f"{KNOWN}{version}; pip install -U transformers"


@pytest.mark.parametrize("version", ["5.17.0", "5.17.0.dev0", "5.24.9"])
def test_patches_of_known_releases_are_known(load, monkeypatch, version):
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text: pytest.fail(text))
    load(monkeypatch, version)


def test_a_folder_of_before_says_the_range_of_the_code_that_runs(all_saved, tmp_path):
    folder = shutil.copytree(all_saved["whole vocabulary"][2] / "draft", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    for before in (None, ["5.30", "5.40"]):
        config = {name: value for name, value in config.items() if name != "transformers_range"}
        (folder / "config.json").write_text(json.dumps(config | ({"transformers_range": before} if before else {})))
        draft = LongSpecForCausalLM.from_pretrained(folder)
        assert draft.config.transformers_range == RELEASES
        draft.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["transformers_range"] == list(RELEASES)


def test_the_code_takes_from_transformers_what_its_table_says():
    taken: dict[str, set[str]] = {}
    for path in HUB_CONFIGS.with_name("modeling").glob("*_longspec.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                taken.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert {module: set(names.split()) for module, names in PUBLIC.items()} == taken


def test_the_code_knows_the_releases_that_the_package_asks_for():
    pyproject = HUB_CONFIGS.with_name("pyproject.toml").read_text()
    major, minor = RELEASES[1].split(".")
    assert f'"transformers>={RELEASES[0]},<{major}.{int(minor) + 1}"' in pyproject
    ci = HUB_CONFIGS.with_name(".ci").joinpath("run").read_text()
    assert all(f"\nmake_at {release} " in ci for release in RELEASES)
