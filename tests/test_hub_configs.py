"""The entries of hub_configs/ against the numbers of their targets, derived apart from our classes."""

import json

import pytest
import torch
import yaml
from published_format import DRAFTS, HUB_CONFIGS, TARGETS, UNUSED, published_shapes, write_config
from safetensors import safe_open
from transformers import AutoConfig

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.hub.card import About, card_faults, draft_card
from hf_longspec.hub.published import PUBLISHED
from hf_longspec.modeling.modeling_longspec import rope_frequencies

GUESSES_AMONG = {"qwen2.5-coder-0.5b-instruct": 49152, "qwen2.5-coder-1.5b-instruct": 49152}  # tokens, of 151,936
READS_LAYER = {  # and the last hidden state
    "smollm2-135m-instruct": 23,
    "qwen2.5-coder-0.5b-instruct": 16,
    "qwen2.5-coder-1.5b-instruct": 23,
}


@pytest.fixture(params=TARGETS)
def name(request):
    return request.param


def on_meta(config: LongSpecConfig) -> LongSpecForCausalLM:
    with torch.device("meta"):
        return LongSpecForCausalLM(config)


def test_there_is_an_entry_for_each_target():
    assert {path.parent.name for path in HUB_CONFIGS.glob("*/config.json")} == set(TARGETS)
    assert {draft.folder: (draft.repo_id, draft.target) for draft in PUBLISHED} == DRAFTS


def test_draft_has_the_published_names_and_shapes(name):
    draft = on_meta(LongSpecConfig.from_pretrained(HUB_CONFIGS / name))
    expected = {key: shape for key, shape in published_shapes(TARGETS[name]).items() if key not in UNUSED}
    if name in GUESSES_AMONG:
        expected["draft_vocab"] = (GUESSES_AMONG[name],)
    if name in READS_LAYER:
        hidden = TARGETS[name]["hidden_size"]
        expected |= {"hidden_layernorm.weight": (hidden,), "hidden_proj.weight": (hidden, hidden)}
    assert {key: tuple(tensor.shape) for key, tensor in draft.state_dict().items()} == expected
    assert all(tensor.device.type == "meta" for tensor in draft.parameters())
    weights = HUB_CONFIGS / name / "model.safetensors"
    if weights.exists():
        with safe_open(weights, "pt") as stored:
            assert {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()} == expected


def test_config_is_made_from_its_target_and_recipe(name, tmp_path):
    config = LongSpecConfig.from_pretrained(HUB_CONFIGS / name)
    target = AutoConfig.from_pretrained(write_config(tmp_path, TARGETS[name]))
    trained = yaml.safe_load((HUB_CONFIGS / name / "recipe.yaml").read_text())["draft"]
    expected = LongSpecConfig.from_target(target, **trained["config"], draft_vocab_size=trained.get("vocab")).to_dict()
    differing = {key for key, value in config.to_dict().items() if expected.get(key) != value}
    assert differing <= {"architectures", "auto_map", "dtype", "_name_or_path"}
    layers = TARGETS[name]["num_hidden_layers"]
    assert config.target_layer == READS_LAYER.get(name, layers - 1)
    assert config.target_hidden_state == (name in READS_LAYER)
    assert config.draft_vocab_size == GUESSES_AMONG.get(name)
    window = 513 if name in DRAFTS else 512  # what each was trained with
    assert (config.window, config.final_norm, config.tree_shape) == (window, False, "auto")


def test_angles_are_those_of_the_target(name):
    target = TARGETS[name]
    half = target["hidden_size"] // target["num_attention_heads"] // 2
    factor = target.get("rope_scaling", {"factor": 1.0})["factor"]
    speeds = [target.get("rope_theta", 10000.0) ** (-i / half) / factor for i in range(half)]
    frequencies, scaling = rope_frequencies(LongSpecConfig.from_pretrained(HUB_CONFIGS / name))
    assert scaling == 1.0 and frequencies[half:].tolist() == pytest.approx(speeds, rel=1e-6)


def test_config_is_of_a_draft_whose_code_is_the_packages(name):
    """`save_pretrained` and `hf-longspec export` write the code files, and `auto_map`, which names them."""
    config = json.loads((HUB_CONFIGS / name / "config.json").read_text())
    assert config["architectures"] == ["LongSpecForCausalLM"] and config["model_type"] == "longspec"
    assert "auto_map" not in config and not list((HUB_CONFIGS / name).glob("*.py"))
    assert config["dtype"] == ("float16" if name in DRAFTS else "bfloat16")


def test_card_names_its_sources(name):
    about = About.load(HUB_CONFIGS / name / "card.json")
    assert about.base_model.split("/")[1].lower() == name
    if name in DRAFTS:
        repo, target = DRAFTS[name]
        assert about.base_model == target and about.source.repo_id == repo
        assert f"hf-longspec convert {repo} --target {target}" in about.source.note
        assert about.license == ("mit" if name == "longchat-13b-16k" else "unknown")  # whose page was read
        assert about.datasets == ["sail/longspec-data"] and "float16" not in about.source.format
    else:
        assert about.source is None and about.license == "apache-2.0"
    card = draft_card(LongSpecConfig.from_pretrained(HUB_CONFIGS / name), about, [])
    # what only an evaluation can tell is all that is missing
    assert all("evaluation" in fault or "vocabulary" in fault for fault in card_faults(card))
