"""The draft's module: its rotary angles against the target's, its parameters, what it refuses to do alone."""

import pytest
import torch
from helpers import tiny_draft, tiny_target

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.modeling.engine_longspec import Engine
from hf_longspec.modeling.fast_engine_longspec import FastEngine
from hf_longspec.modeling.modeling_longspec import engine_class, rotate_half_pairs

POSITIONS = torch.tensor([[0, 1, 2, 17, 63, 300, 511]])


def rope(rope_type: str, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.1] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama", rope("default", rope_theta=500.0)),
        ("llama", rope("linear", factor=4.0)),
        ("llama", rope("llama3", **LLAMA3)),
        ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=64)),
        ("phi", {}),
        ("glm4", {}),
        ("gpt_neox", {}),
        ("gemma3_text", {}),
        ("phi3", {"hidden_size": 64} | rope("longrope", **LONGROPE)),
    ],
)
@torch.no_grad()
def test_angles_are_those_of_the_targets_full_layers(family, overrides):
    target = tiny_target(family, **overrides)
    rotary = target.get_decoder().rotary_emb
    options = {"layer_type": "full_attention"} if family == "gemma3_text" else {}
    cos, sin = rotary(torch.zeros(1), POSITIONS, **options)
    ours = tiny_draft(target).angles(POSITIONS)
    sign = torch.ones(sin.shape[-1])
    sign[: len(sign) // 2] = -1
    assert torch.equal(ours[0][:, 0], cos) and torch.equal(ours[1][:, 0], sign * sin)


@pytest.mark.parametrize(
    "overrides",
    [
        rope("default"),
        rope("linear", factor=4.0),
        rope("llama3", **LLAMA3),
        rope("yarn", factor=8.0, original_max_position_embeddings=64),
        rope("longrope", **LONGROPE),
    ],
    ids=["default", "linear", "llama3", "yarn", "longrope"],
)
def test_angles_of_a_loaded_draft(overrides, tmp_path):
    """`from_pretrained` builds it on the meta device."""
    draft = tiny_draft(tiny_target("llama", **overrides))
    draft.save_pretrained(tmp_path)
    for loaded, saved in zip(
        LongSpecForCausalLM.from_pretrained(tmp_path).angles(POSITIONS), draft.angles(POSITIONS), strict=True
    ):
        assert torch.equal(loaded, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_draft_of_broken_weights_is_not_saved(tmp_path, value):
    draft = tiny_draft(tiny_target("llama"))
    draft.set_draft_vocab([3, 4, 5, 6])
    draft.bfloat16().save_pretrained(tmp_path / "good")
    torch.nn.init.constant_(draft.cross_attn.q_proj.bias[3:4], value)
    with pytest.raises(ValueError, match=r"with finite weights only, got NaN or infinity in cross_attn.q_proj.bias$"):
        draft.save_pretrained(tmp_path / "bad")
    given = draft.state_dict() | {"cross_attn.q_proj.bias": torch.zeros(draft.cross_attn.q_proj.bias.shape)}
    draft.save_pretrained(tmp_path / "given", state_dict=given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "good"]


@pytest.mark.parametrize("dims", [8, 4])
def test_rotation_is_a_complex_product(dims):
    """Pairs are (i, i + dims/2); what lies beyond the rotary dimensions stays."""
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, dims // 2)
    both = torch.cat([-angles, angles], dim=-1)
    turned = rotate_half_pairs(x, both.cos(), both.sin())
    for pair in range(dims // 2):
        before = torch.complex(x[..., pair], x[..., pair + dims // 2])
        after = torch.complex(turned[..., pair], turned[..., pair + dims // 2])
        torch.testing.assert_close(after, before * torch.exp(1j * angles[..., pair]))
    assert torch.equal(turned[..., dims:], x[..., dims:])


def test_angles_stay_float32_when_the_draft_is_cast():
    draft = tiny_draft(tiny_target("llama"))
    before = draft.angles(POSITIONS)
    draft = draft.to(torch.bfloat16)
    assert draft.dtype == torch.bfloat16
    for old, new in zip(before, draft.angles(POSITIONS), strict=True):
        assert new.dtype == torch.float32 and torch.equal(new, old)


def test_parameters_are_named_as_in_the_published_checkpoints():
    names = set(tiny_draft(tiny_target("llama")).state_dict())
    projections = {f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")}
    cross = {"cross_attn.q_proj.weight", "cross_attn.q_proj.bias", "cross_attn.o_proj.weight"}
    mlp = {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    norms = {
        "input_layernorm.weight",
        "post_self_attention_layernorm.weight",
        "post_cross_attention_layernorm.weight",
    }
    assert names == projections | {"self_attn.o_proj.weight"} | cross | mlp | norms
    assert set(tiny_draft(tiny_target("llama"), final_norm=True).state_dict()) - names == {"norm.weight"}
    reading = set(tiny_draft(tiny_target("llama"), target_hidden_state=True).state_dict())
    assert reading - names == {"hidden_layernorm.weight", "hidden_proj.weight"}


def test_shapes_follow_the_config():
    config = LongSpecConfig.from_target(tiny_target("llama").config, num_attention_heads=6, head_dim=10, mlp_bias=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in LongSpecForCausalLM(config).state_dict().items()}
    assert shapes["self_attn.q_proj.weight"] == shapes["cross_attn.q_proj.weight"] == (60, 32)
    assert shapes["self_attn.k_proj.weight"] == shapes["self_attn.v_proj.weight"] == (20, 32)
    assert shapes["self_attn.o_proj.weight"] == shapes["cross_attn.o_proj.weight"] == (32, 60)
    assert shapes["mlp.gate_proj.bias"] == (48,) and shapes["mlp.down_proj.bias"] == (32,)


@torch.no_grad()
def test_window_is_filled_with_what_the_layer_computes():
    draft = tiny_draft(tiny_target("llama"))
    embeds = torch.randn(1, 7, 32)
    seen = []

    def self_attend(query, key, value):
        seen.append((key, value))
        return torch.zeros_like(query)

    draft.layer(embeds, draft.angles(POSITIONS), self_attend, torch.zeros_like)
    for ours, theirs in zip(draft.window_kv(embeds, POSITIONS), seen[0], strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_state_is_added_behind_the_self_attention_and_zeros_add_nothing():
    draft = tiny_draft(tiny_target("llama"), target_hidden_state=True)
    embeds, state, seen = torch.randn(1, 7, 32), torch.randn(1, 7, 32), []

    def cross_attend(query):
        seen.append(query)
        return torch.zeros_like(query)

    def layer(read):
        return draft.layer(
            embeds, draft.angles(POSITIONS), lambda query, *_: torch.zeros_like(query), cross_attend, read
        )

    assert torch.equal(layer(draft.read_hidden_state(torch.zeros_like(state))), layer(None))
    layer(draft.read_hidden_state(state))
    root = state.pow(2).mean(-1, keepdim=True).add(draft.config.rms_norm_eps).rsqrt()
    x = embeds + (state * root * draft.hidden_layernorm.weight) @ draft.hidden_proj.weight.T
    query = draft.cross_attn.q_proj(draft.post_self_attention_layernorm(x))
    torch.testing.assert_close(seen[-1].transpose(1, 2).flatten(2), query)
    assert draft.read_hidden_state(None) is None
    assert tiny_draft(tiny_target("llama")).read_hidden_state(state) is None


def test_generation_config_for_programs_that_read_it():
    draft = tiny_draft(tiny_target("llama", eos_token_id=[2, 3]))
    tokens = {"eos_token_id": [2, 3], "pad_token_id": 0, "bos_token_id": 1}
    assert tokens.items() <= draft.generation_config.to_dict().items()


def test_draft_cannot_run_alone():
    draft = tiny_draft(tiny_target("llama"))
    for call in (draft, draft.generate):
        with pytest.raises(
            ValueError, match=r"cannot run alone; .* target\.generate\(\*\*inputs, assistant_model=draft"
        ):
            call(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_the_engine_is_the_plain_one_only_where_nothing_else_is_asked_for(backend):
    plain = {"attention_backend": backend, "cuda_graphs": False}
    assert engine_class(LongSpecConfig(**plain)) is Engine
    for more in (
        {"attention_backend": "auto"},
        {"cuda_graphs": "auto"},
        {"cuda_graphs": True},
        {"compile_target": True},
    ):
        assert engine_class(LongSpecConfig(**(plain | more))) is FastEngine
