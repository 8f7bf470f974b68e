"""LongSpecConfig: what it takes over from a target of each family, what it refuses, and what JSON gives back."""

import json

import pytest
import torch
from helpers import FAMILIES, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_longspec import LongSpecConfig
from hf_longspec.modeling.configuration_longspec import (
    CPU_TREE,
    default_target_layer,
    layer_kinds,
    main_rope_parameters,
)


def family_config(family: str, **overrides):
    return AutoConfig.for_model(family, **(SHAPE | FAMILIES.get(family, {}) | overrides))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_takes_the_targets_shape(family):
    target = family_config(family)
    config = LongSpecConfig.from_target(target)
    expected = SHAPE | {name: FAMILIES[family][name] for name in SHAPE.keys() & FAMILIES[family].keys()}
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == expected[name]
    assert config.max_position_embeddings == 512
    assert config.target_model_type == family
    assert config.target_num_hidden_layers == 4
    assert (config.target_layer, config.num_hidden_layers) == (3, 1)
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(target, name)


@pytest.mark.parametrize(
    "family, fields, expected",
    [
        ("llama", {}, {"hidden_act": "silu", "intermediate_size": 48, "mlp_bias": False, "rms_norm_eps": 1e-6}),
        ("llama", {"mlp_bias": True, "rms_norm_eps": 1e-5}, {"mlp_bias": True, "rms_norm_eps": 1e-5}),
        ("gemma", {}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma2", {}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3]}),
    ],
)
def test_from_target_takes_over(family, fields, expected):
    config = LongSpecConfig.from_target(family_config(family, **fields))
    assert {name: getattr(config, name) for name in expected} == expected


def test_from_target_takes_a_model_a_folder_and_a_name(tmp_path):
    config = family_config("llama")
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    expected = LongSpecConfig.from_target(config, window=7).to_dict()
    for target in (model, tmp_path, str(tmp_path)):
        assert LongSpecConfig.from_target(target, window=7).to_dict() == expected
    with pytest.raises(ValueError, match="expected a target's config, model, folder or name, got a NoneType"):
        LongSpecConfig.from_target(None)


def test_head_dim_and_kv_heads_that_a_config_leaves_out():
    fields = {"vocab_size": 13, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LongSpecConfig.from_target(AutoConfig.for_model("gpt_neox", **fields))
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)


def test_fields_override_the_targets():
    config = LongSpecConfig.from_target(family_config("llama"), window=7, intermediate_size=5, tree_shape=(2, 3))
    assert (config.window, config.intermediate_size, config.tree_shape) == (7, 5, (2, 3))


def test_defaults():
    config = LongSpecConfig.from_target(family_config("llama", vocab_size=100))
    assert (config.window, config.tree_shape, config.verify_tokens) == (512, "auto", None)
    assert (config.attention_backend, config.final_norm, config.profile) == ("auto", False, False)


def test_the_default_tree_is_that_of_the_device(tmp_path):
    """A tree that is set, the default of another device too, is the tree everywhere."""
    config = LongSpecConfig.from_target(family_config("llama", vocab_size=100))
    cpu, others = torch.device("cpu"), [torch.device(name) for name in ("cuda:1", "mps", "xpu")]
    large = (4, 16, 16, 16, 16)
    assert config.tree_on(cpu) == CPU_TREE and all(config.tree_on(device) == large for device in others)
    config.save_pretrained(tmp_path)
    assert LongSpecConfig.from_pretrained(tmp_path).tree_on(cpu) == CPU_TREE
    for tree in (large, CPU_TREE, (), [2, 2]):
        config.tree_shape = tree
        config.save_pretrained(tmp_path)
        for device in (cpu, *others):
            assert config.tree_on(device) == LongSpecConfig.from_pretrained(tmp_path).tree_on(device) == tuple(tree)


def test_text_config_of_a_model_of_several_modalities():
    text = {name: value for name, value in SHAPE.items() if value is not None}
    target = AutoConfig.for_model("gemma3", text_config=text | {"num_hidden_layers": 8})
    config = LongSpecConfig.from_target(target)
    assert (config.hidden_size, config.target_num_hidden_layers, config.target_layer) == (32, 8, 5)
    assert config.target_model_type == "gemma3_text"


# --- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields, kinds, layer",
    [
        ("llama", {}, "full full full full", 3),
        ("mistral", {}, "sliding sliding sliding sliding", 3),
        ("mistral", {"sliding_window": None}, "full full full full", 3),
        ("gemma2", {}, "sliding full sliding full", 3),
        ("gemma2", {"num_hidden_layers": 5}, "sliding full sliding full sliding", 3),
        ("cohere2", {"sliding_window_pattern": 3, "num_hidden_layers": 5}, "sliding sliding full sliding sliding", 2),
        ("gpt_oss", {}, "sliding full sliding full", 3),
        (
            "gemma3n_text",
            {"num_hidden_layers": 7, "num_kv_shared_layers": 2},
            "sliding sliding sliding sliding full shared shared",
            4,
        ),
    ],
)
def test_layer_kinds_and_the_layer_to_look_at(family, fields, kinds, layer):
    config = family_config(family, **fields)
    assert layer_kinds(config) == kinds.split()
    assert default_target_layer(config) == layer
    assert LongSpecConfig.from_target(config).target_layer == layer


def test_layer_kinds_are_those_of_the_cache():
    for family in FAMILIES:
        config = family_config(family)
        sliding = [layer.is_sliding for layer in DynamicCache(config=config).layers]
        assert layer_kinds(config) == ["sliding" if slides else "full" for slides in sliding]


# --- RoPE ----------------------------------------------------------------------------------------------------------


def test_rope_of_the_full_layers():
    layers = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = family_config("gemma3_text", rope_parameters=layers)
    parameters = main_rope_parameters(config)
    assert {name: parameters[name] for name in layers["full_attention"]} == layers["full_attention"]
    parameters["rope_theta"] = 0.0
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6, "the target's own must not be shared"


def test_partial_rotation_is_kept():
    parameters = main_rope_parameters(family_config("phi"))
    assert parameters["partial_rotary_factor"] == 0.5


def test_target_without_rope_gets_the_default():
    config = AutoConfig.for_model("gpt2", vocab_size=13, n_embd=32, n_layer=2, n_head=4)
    assert main_rope_parameters(config) == {"rope_type": "default", "rope_theta": 10_000.0}


# --- refusals ------------------------------------------------------------------------------------------------------

# transformers makes a cache with such a layer only once the family's modeling file was imported: else a KeyError
SPARSE = ["minimax_m3_sparse", "full_attention"]


@pytest.mark.parametrize(
    "config, message",
    [
        (AutoConfig.for_model("t5"), "decoder-only target, got the encoder–decoder 't5'"),
        (AutoConfig.for_model("mamba"), "standard per-layer key/value caches, got 'mamba' with"),
        (AutoConfig.for_model("jamba"), "standard per-layer key/value caches, got 'jamba' with"),
        (AutoConfig.for_model("llama4_text"), "chunked attention, got 'llama4_text'"),
        (
            AutoConfig.for_model("minimax_m3_vl_text", num_hidden_layers=2, layer_types=SPARSE),
            "caches, got 'minimax_m3",
        ),
        (
            AutoConfig.for_model("opt", hidden_size=32, word_embed_proj_dim=16),
            "embeddings of width 32, got 'opt' with 16",
        ),
        (
            family_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "RoPE depends on the length, got rope_type 'dynamic'",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_target_that_cannot_be_served(config, message):
    with pytest.raises(ValueError, match=message):
        LongSpecConfig.from_target(config)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("vocab_size", 0, "`vocab_size` must be a positive integer, got 0"),
        ("hidden_size", -1, "`hidden_size` must be a positive integer, got -1"),
        ("intermediate_size", 0, "`intermediate_size` must be a positive integer, got 0"),
        ("num_attention_heads", 0, "`num_attention_heads` must be a positive integer, got 0"),
        ("num_key_value_heads", 0, "`num_key_value_heads` must be a positive integer, got 0"),
        ("head_dim", 0, "`head_dim` must be a positive integer, got 0"),
        ("window", 0, "`window` must be a positive integer, got 0"),
        ("window", True, "`window` must be a positive integer, got True"),
        ("window", 2.0, r"`window` must be a positive integer, got 2\.0"),
        ("num_key_value_heads", 3, "multiple of `num_key_value_heads`, got 4 and 3"),
        ("target_layer", 4, r"`target_layer` must be in 0\.\.3, got 4"),
        ("target_layer", -1, r"`target_layer` must be in 0\.\.3, got -1"),
        ("attention_backend", "sdpa", r"must be one of \('auto', 'eager', 'torch', .*'flash_attn_3'\), got 'sdpa'"),
        ("verify_tokens", 0, "`verify_tokens` must be None or a positive integer, got 0"),
        ("verify_tokens", True, "`verify_tokens` must be None or a positive integer, got True"),
        ("verify_tokens", 1.5, r"`verify_tokens` must be None or a positive integer, got 1\.5"),
        ("tree_shape", (0,), "widths must be at least 1, got 0 at level 1"),
        ("tree_shape", (2, -3), "widths must be at least 1, got -3 at level 2"),
        ("tree_shape", (2, 2.0), r"must be .auto. or a tuple of integers, one width a level, got \(2, 2\.0\)"),
        ("tree_shape", (True,), r"must be .auto. or a tuple of integers, one width a level, got \(True,\)"),
        ("tree_shape", "44", "must be .auto. or a tuple of integers, one width a level, got '44'"),
        ("tree_shape", 4, "must be .auto. or a tuple of integers, one width a level, got 4"),
        ("tree_shape", (14,), "level 1 can have at most 1 parents × 13 tokens = 13 nodes, got 14"),
        ("tree_shape", (3, 40), "level 2 can have at most 3 parents × 13 tokens = 39 nodes, got 40"),
    ],
)
def test_field_that_cannot_be_meant(field, value, message):
    with pytest.raises(ValueError, match=message):
        LongSpecConfig.from_target(family_config("llama"), **({"tree_shape": (2,)} | {field: value}))
    config = LongSpecConfig.from_target(family_config("llama"), tree_shape=(2,))
    with pytest.raises(ValueError, match=message):
        setattr(config, field, value)
        config.check()


# --- options and JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("tree_shape", (1, 1, 1, 1)),
        ("tree_shape", [3, 3]),
        ("tree_shape", ()),
        ("tree_shape", (13, 169)),
        ("verify_tokens", 1),
        ("verify_tokens", None),
        ("attention_backend", "eager"),
        ("attention_backend", "torch"),
        ("profile", True),
    ],
)
def test_option_of_a_loaded_draft(field, value):
    config = LongSpecConfig.from_target(family_config("llama"), tree_shape=(2,))
    setattr(config, field, value)
    config.check()
    assert getattr(config, field) == value


def test_round_trip_through_json(tmp_path):
    fields = {"tree_shape": (2, 5, 5), "verify_tokens": 9, "attention_backend": "eager", "window": 33}
    config = LongSpecConfig.from_target(family_config("gemma3_text", eos_token_id=[2, 3]), **fields)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tree_shape"] == [2, 5, 5]
    again = LongSpecConfig.from_pretrained(tmp_path)
    assert isinstance(again.tree_shape, tuple)
    volatile = {"_name_or_path", "transformers_version"}
    before, after = ({k: v for k, v in c.to_dict().items() if k not in volatile} for c in (config, again))
    assert before == after
    assert LongSpecConfig.from_pretrained(tmp_path, tree_shape=(3,)).tree_shape == (3,)


def test_file_with_nonsense_in_it_is_refused_on_loading(tmp_path):
    LongSpecConfig.from_target(family_config("llama"), tree_shape=(2,)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tree_shape": [2, 0]}))
    with pytest.raises(ValueError, match="widths must be at least 1, got 0 at level 2"):
        LongSpecConfig.from_pretrained(tmp_path)
