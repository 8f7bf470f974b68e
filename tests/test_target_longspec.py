"""What a draft borrows from its target, against what the target itself does in a forward pass, family by family."""

import pytest
import torch
from helpers import FAMILIES, tiny_draft, tiny_target
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_longspec import LongSpecConfig
from hf_longspec.evaluation.tiny_models import tiny_model
from hf_longspec.evaluation.tiny_overrides import OVERRIDES, _mrope
from hf_longspec.modeling.target_longspec import check_fit

IDS = torch.tensor([[3, 5, 7, 2, 11, 4, 9]])
POSITIONS = torch.tensor([[0, 1, 2, 17, 18, 40, 301]])


def rope(rope_type: str, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


LONGROPE = {"hidden_size": 64}  # its check of the factors takes the head dimension from here
FACTORS = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [3.0] * 8}
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, yarn": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    "llama, llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "phi3, partial": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope, short": ("phi3", LONGROPE | rope(**FACTORS, original_max_position_embeddings=400)),
    "phi3, longrope, long": ("phi3", LONGROPE | rope(**FACTORS, original_max_position_embeddings=64)),
}


def attention_calls(target) -> dict[int, tuple[torch.nn.Module, tuple, dict]]:
    """The call of each layer's attention module in a forward pass: module, arguments, keyword arguments."""
    calls, hooks = {}, []
    for module in target.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            note = lambda module, *inputs: calls.update({module.layer_idx: (module, *inputs)})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    target(IDS, position_ids=POSITIONS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


class Query:
    """An attention function that keeps the query it is given."""

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.seen = query
        return torch.zeros_like(query).transpose(1, 2), None


def own_queries(target, monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer its queries (B, H, T, D) as the target hands them to attention, and the same without rotation.

    For the latter, the attention module is called again with the angles' cosines all one and sines all zero.
    """
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "keep the query", keep := Query())
    target.set_attn_implementation("keep the query")
    queries = []
    for _, (module, args, kwargs) in sorted(attention_calls(target).items()):
        module(*args, **kwargs)
        rotated = keep.seen
        cos, sin = kwargs["position_embeddings"]
        module(*args, **kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
        queries.append((rotated, keep.seen))
    return queries


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_queries_turn_as_the_targets_own(variant, monkeypatch):
    family, overrides = VARIANTS[variant]
    target = tiny_target(family, **overrides)
    queries = own_queries(target, monkeypatch)
    assert len(queries) == 4
    for layer, (rotated, plain) in enumerate(queries):
        bound = tiny_draft(target, target_layer=layer).bind(target)
        assert bound.layer == layer
        torch.testing.assert_close(bound.rotate(plain, bound.angles(plain, POSITIONS)), rotated)


@pytest.mark.parametrize("variant", ["llama", "cohere", "glm4", "gpt_oss", "phi3, partial", "gemma3_text", "smollm3"])
@torch.no_grad()
def test_rotation_in_bfloat16_rounds_as_the_targets_own(variant, monkeypatch):
    family, overrides = VARIANTS[variant]
    target = tiny_target(family, **overrides).bfloat16()
    bound = tiny_draft(target).bind(target)
    assert bound.dtype == torch.bfloat16
    rotated, plain = own_queries(target, monkeypatch)[3]
    turned = bound.rotate(plain, bound.angles(plain, POSITIONS))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotated)


@pytest.mark.parametrize(
    "family, layer, turns",
    [
        ("llama", 3, True),
        ("cohere2", 2, True),  # sliding
        ("cohere2", 3, False),  # full
        ("exaone4", 0, True),
        ("exaone4", 3, False),
        ("smollm3", 2, True),
        ("smollm3", 3, False),  # every fourth layer
        ("gemma3_text", 0, True),
        ("gemma3_text", 3, True),
    ],
)
@torch.no_grad()
def test_which_layers_turn_at_all(family, layer, turns):
    target = tiny_target(family, **({"sliding_window_pattern": 4} if family == "cohere2" else {}))
    query = torch.randn(1, 4, 7, 16)
    bound = tiny_draft(target, target_layer=layer).bind(target)
    turned = bound.rotate(query, bound.angles(query, POSITIONS))
    assert torch.equal(turned[:, :, 0], query[:, :, 0])  # position 0
    assert torch.equal(turned, query) is not turns


@torch.no_grad()
def test_plain_query_is_the_projections_output(monkeypatch):
    """The derivation above itself: without rotation a Llama's query is what `q_proj` puts out."""
    target = tiny_target("llama")
    outputs = []
    target.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *call: outputs.append(call[2]))
    rotated, plain = own_queries(target, monkeypatch)[2]
    assert torch.equal(plain, outputs[-1].view(1, 7, 4, 16).transpose(1, 2))
    assert not torch.equal(plain, rotated)


def first_layer_input(target, **inputs) -> torch.Tensor:
    seen = []
    hook = (
        target.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    target(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_are_what_the_first_layer_sees(family):
    target = tiny_target(family)
    bound = tiny_draft(target).bind(target)
    assert torch.equal(bound.embed(IDS), first_layer_input(target, input_ids=IDS))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_of_the_users_own_are_scaled_as_the_target_does(family):
    target = tiny_target(family)
    embeds = torch.randn(1, 5, 32)
    seen = first_layer_input(target, inputs_embeds=embeds.clone())
    assert torch.equal(tiny_draft(target).bind(target).scale(embeds), seen)


@pytest.mark.parametrize(
    "family, overrides",
    [(family, {}) for family in FAMILIES]
    + [("cohere", {"logit_scale": 0.3}), ("cohere2", {"logit_scale": 0.3}), ("granite", {"logits_scaling": 7.0})]
    + [("gemma2", {"final_logit_softcapping": 0.5}), ("gemma2", {"final_logit_softcapping": None})],
)
@torch.no_grad()
def test_logits_are_the_targets_own(family, overrides):
    target = tiny_target(family, **overrides)
    bound = tiny_draft(target).bind(target)
    hidden = target.get_decoder()(IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(bound.logits(hidden), target(IDS, use_cache=False).logits)


@torch.no_grad()
def test_embedding_and_head_are_called_as_modules():
    """So that adapters, hooks and quantized layers stay in force."""
    target = tiny_target("llama")
    bound = tiny_draft(target).bind(target)
    hidden = torch.randn(1, 2, 32)
    embeds, logits = bound.embed(IDS), bound.logits(hidden)
    for module in (target.get_input_embeddings(), target.get_output_embeddings()):
        module.register_forward_hook(lambda module, args, output: 3 * output)
    assert torch.equal(bound.embed(IDS), 3 * embeds)
    assert torch.equal(bound.logits(hidden), 3 * logits)


# --- fit -----------------------------------------------------------------------------------------------------------


def draft_config(**fields) -> LongSpecConfig:
    return LongSpecConfig.from_target(tiny_target("llama").config, **fields)


@pytest.mark.parametrize(
    "name, value, theirs",
    [
        ("vocab_size", 14, 13),
        ("hidden_size", 64, 32),
        ("num_key_value_heads", 4, 2),
        ("head_dim", 32, 16),
        ("target_num_hidden_layers", 5, 4),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, r"\{.*10000\.0.*\}"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, r"\{.*'default'.*\}"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            r"\{.*10000\.0.*\}",
        ),
    ],
)
def test_misfit_is_named(name, value, theirs):
    with pytest.raises(ValueError, match=rf"does not fit the target:\n  {name}: draft has .*, target has {theirs}$"):
        check_fit(draft_config(**{name: value}), tiny_target("llama"))


def test_every_misfit_is_named():
    with pytest.raises(ValueError, match=r"vocab_size: .*\n  hidden_size: .*\n  target_num_hidden_layers: ") as error:
        check_fit(draft_config(vocab_size=14, hidden_size=8, target_num_hidden_layers=9), tiny_target("llama"))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        {"rope_type": "default", "rope_theta": 10000.0, "type": "default"},
        {"rope_type": "default", "rope_theta": 10000},
    ],
)
def test_the_same_rope_in_other_words_fits(rope_parameters):
    check_fit(draft_config(rope_parameters=rope_parameters), tiny_target("llama"))


def test_number_of_query_heads_is_the_drafts_own_affair():
    check_fit(draft_config(num_attention_heads=8, intermediate_size=7, window=3), tiny_target("llama"))


def test_layer_without_keys_of_its_own_is_refused():
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=7, num_kv_shared_layers=2)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="target_layer: draft has 6, target has no keys and values of its own there"):
        check_fit(LongSpecConfig.from_target(config, target_layer=6), target)
    check_fit(LongSpecConfig.from_target(config), target)


def test_target_outside_the_attention_interface_is_refused():
    config = GPTNeoConfig(vocab_size=13, hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=4)
    target = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="needs a target whose layers hold an attention module .*, got GPTNeoModel"):
        tiny_draft(target).bind(target)


@pytest.mark.parametrize("sections", [[2, 2], [1, 1, 1, 1], [2, 1, 1]], ids=str)
def test_three_axes_of_positions_whatever_the_sections(monkeypatch, sections):
    """transformers has three axes of positions, and turns section i of the angles by axis i mod 3."""
    monkeypatch.setitem(OVERRIDES, "qwen2_vl", {"text_config": _mrope(*sections)})
    target = tiny_model("qwen2_vl")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    draft = tiny_draft(target, window=8)
    assert torch.equal(target.generate(IDS, **options), target.generate(IDS, assistant_model=draft, **options))


def test_an_axis_for_each_section():
    """hunyuan_vl has as many axes as sections: four, where all other families have three."""
    target = tiny_model("hunyuan_vl")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    draft = tiny_draft(target, window=8)
    assert torch.equal(target.generate(IDS, **options), target.generate(IDS, assistant_model=draft, **options))
