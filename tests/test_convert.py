"""Synthetic checkpoints in the published format, made into our drafts, and those that do not fit their target."""

import json

import pytest
import torch
from conversions import CONFIG, assert_refused, command, convert, published_folders
from published_format import (
    DRAFTS,
    TARGETS,
    UNUSED,
    published_shapes,
    random_weights,
    tiny,
    write_checkpoint,
    write_config,
)
from safetensors.torch import save_file
from transformers import AutoConfig

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.hub import convert as conversion
from hf_longspec.hub.published import draft_config, published_draft, weight_mismatches
from hf_longspec.hub.weight_files import sha256


@pytest.fixture
def folders(tmp_path):
    return published_folders(tmp_path)


@pytest.mark.parametrize("pickled, shards", [(False, 1), (True, 1), (False, 3), (True, 2)])
@pytest.mark.parametrize("name", DRAFTS)
def test_all_published_drafts(name, pickled, shards, tmp_path):
    config = tiny(TARGETS[name])
    weights = random_weights(config)
    source = write_checkpoint(tmp_path / "published", config, weights, pickled=pickled, shards=shards)
    write_config(tmp_path / "target", config)
    record = convert(tmp_path)

    draft = LongSpecForCausalLM.from_pretrained(tmp_path / "draft", dtype="auto")
    assert draft.dtype == torch.float16
    ours = draft.state_dict()
    assert set(ours) == set(weights) - UNUSED
    assert all(torch.equal(ours[key], weights[key]) for key in ours)
    fields = draft.config
    assert (fields.window, fields.tree_shape, fields.target_layer) == (513, "auto", 1)
    assert (fields.head_dim, fields.final_norm, fields.mlp_bias) == (8, False, False)
    assert fields.rope_parameters.get("factor") == config.get("rope_scaling", {}).get("factor")
    assert (draft.config.target_model_type, draft.config.rms_norm_eps) == (
        config["model_type"],
        config["rms_norm_eps"],
    )

    files = sorted(path for path in source.iterdir() if path.suffix in (".bin", ".safetensors"))
    assert record.files == {path.name: sha256(path) for path in files} and len(files) == shards
    assert (
        set(record.unused) == UNUSED
        and record.source_dtypes == ["float16"]
        and (record.source_revision, record.target_revision) == (None, None)
    )
    written = json.loads((tmp_path / "draft" / conversion.RECORD).read_text())
    assert written["files"] == record.files and written["target"] == str(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "published", "target"]


@pytest.mark.parametrize("name", DRAFTS)
def test_real_shapes(name, tmp_path):
    """Of all six, on the meta device: what the format has and what our layer expects agree."""
    config = draft_config(AutoConfig.from_pretrained(write_config(tmp_path, TARGETS[name])))
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in LongSpecForCausalLM(config).state_dict().items()}
        checkpoint = {key: torch.empty(shape) for key, shape in published_shapes(TARGETS[name]).items()}
    assert weight_mismatches({key: tuple(tensor.shape) for key, tensor in checkpoint.items()}, expected) == []


def test_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # the example of FIPS 180-2
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_number_formats(folders, dtype):
    convert(folders, dtype=dtype)
    ours = LongSpecForCausalLM.from_pretrained(folders / "draft", dtype="auto").state_dict()
    for name, tensor in random_weights(CONFIG).items():
        if name in ours:
            assert torch.equal(ours[name], tensor.to(getattr(torch, dtype)))


def test_command_says_what_it_did(folders):
    result = command(folders, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "model.safetensors" in lines[0] and "float16" in lines[0]
    assert lines[1] == "not used: " + ", ".join(sorted(UNUSED))
    assert lines[-1].startswith("written: ") and "bfloat16" in lines[-1] and len(lines) == 3


def test_empty_folder_is_taken(folders):
    (folders / "draft").mkdir()
    convert(folders)
    assert (folders / "draft" / "model.safetensors").is_file()


def test_safetensors_come_before_pickles(folders):
    torch.save({"broken": torch.ones(1)}, folders / "published" / "pytorch_model.bin")
    assert list(convert(folders).files) == ["model.safetensors"]


def test_known_drafts():
    assert published_draft("sail/longspec-QwQ-32B-Preview").target == "Qwen/QwQ-32B-Preview"
    assert published_draft("Qwen/QwQ-32B-Preview") is None


# what does not fit


def test_every_wrong_weight_is_listed(folders):
    weights = random_weights(CONFIG)
    del weights["mlp.up_proj.weight"]
    weights["self_attn.q_proj.bias"] = torch.ones(3)
    weights["norm.weight"] = torch.ones(CONFIG["hidden_size"])  # a final norm would change what is computed
    weights["self_attn.o_proj.bias"] = torch.ones(CONFIG["hidden_size"])
    save_file(weights, folders / "published" / "model.safetensors")
    assert_refused(folders, "(?s)mlp.up_proj.weight: missing.*q_proj.bias: expected.*norm.weight: not known")
    lines = command(folders).stderr.splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "mlp.up_proj.weight: missing",
        "self_attn.q_proj.bias: expected (32,), got (3,)",
        "norm.weight: not known",
        "self_attn.o_proj.bias: not known",
    ]


def test_an_ordinary_model_is_not_listed_at_length(folders):
    weights = {f"model.layers.{index}.mlp.gate_proj.weight": torch.ones(2) for index in range(100)}
    save_file(weights, folders / "published" / "model.safetensors")
    assert_refused(folders, r"(?s)is no published draft for .*: missing.*and 92 more$")  # of 16 and 100


def test_older_rotary_constants_are_not_used(folders):
    name = "self_attn.rotary_emb.inv_freq"
    save_file(random_weights(CONFIG) | {name: torch.ones(4)}, folders / "published" / "model.safetensors")
    assert name in convert(folders).unused


@pytest.mark.parametrize(
    "other, mismatch",
    [
        (tiny(TARGETS["longchat-7b-v1.5-32k"]), r"rope_parameters: draft has .*4\.0.*, target has .*8\.0"),
        (CONFIG | {"rope_scaling": None}, "rope_parameters: draft has .*linear.*, target has .*default"),
        (tiny(TARGETS["qwq-32b-preview"]), "target_model_type: draft has llama, target has qwen2"),
        (CONFIG | {"rms_norm_eps": 1e-6}, "rms_norm_eps: draft has 1e-05, target has 1e-06"),
        (CONFIG | {"hidden_act": "gelu"}, "hidden_act: draft has silu, target has gelu"),
        (CONFIG | {"num_hidden_layers": 3}, "target_num_hidden_layers: draft has 2, target has 3"),
        (CONFIG | {"vocab_size": 102}, "vocab_size: draft has 101, target has 102"),
        (CONFIG | {"mlp_bias": True}, "mlp_bias: draft has False, target has True"),
    ],
)
def test_wrong_target(folders, other, mismatch):
    write_config(folders / "target", other)
    assert_refused(folders, f"(?s)published is no draft for .*target:\n.*{mismatch}")


def test_target_of_another_family(folders):
    other = {name: value for name, value in CONFIG.items() if name != "rope_scaling"} | {"model_type": "mistral"}
    write_config(folders / "target", other)
    assert_refused(
        folders, "target .*target: published drafts are for llama and qwen2 models, got model type 'mistral'"
    )


def test_sources_that_are_no_published_draft(folders):
    write_config(folders / "published", {"model_type": "gpt2"})
    assert_refused(
        folders, "draft .*published: published drafts are for llama and qwen2 models, got model type 'gpt2'"
    )
    LongSpecConfig().save_pretrained(folders / "published")
    assert_refused(folders, "is in our format already, there is nothing to convert$")


@pytest.mark.parametrize("window, told", [(512, '; set "window": 513 in its .*json, where it has 512'), (513, "")])
def test_drafts_that_were_converted_before(folders, window, told):
    """With one key too few; only `conversion.json` tells them from drafts that were trained with this window."""
    convert(folders, out="earlier")
    config = folders / "earlier" / "config.json"
    config.write_text(config.read_text().replace('"window": 513', f'"window": {window}'))
    assert_refused(folders, f"is in our format already, there is nothing to convert{told}$", source="earlier")


def test_numbers_that_a_format_cannot_hold(folders):
    weights = random_weights(CONFIG, torch.bfloat16)
    weights["mlp.up_proj.weight"][0, 0] = 1e5  # float16 ends at 65,504
    save_file(weights, folders / "published" / "model.safetensors")
    assert_refused(folders, "numbers that are not finite in torch.float16, in mlp.up_proj.weight")
    convert(folders, dtype="bfloat16")


def test_packed_weights(folders):
    weights = random_weights(CONFIG)
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folders / "published" / "model.safetensors")
    assert_refused(folders, "expected weights in float16, bfloat16, float32, got torch.int8")
