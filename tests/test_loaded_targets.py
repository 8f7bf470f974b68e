"""Targets as people load and set them: offloaded, compiled, under other attention, in other modes and configs."""

import warnings

import pytest
import torch
from helpers import quick_or_slow, tiny_draft, tiny_target
from texts import OPTIONS, assert_same, prompt_of, texts
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from hf_longspec.modeling.target_longspec import bind

# Where the weights lie


@pytest.mark.parametrize("how", ["dispatched", "cpu offload", "disk offload", "device map"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_weights(llama, draft, tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    base, target = texts(llama), llama
    places = {
        name: "cpu" for name in ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    }
    if how == "dispatched":
        accelerate.dispatch_model(target, places, force_hooks=True)
    elif how == "cpu offload":
        accelerate.cpu_offload(target, torch.device("cpu"))
    elif how == "disk offload":
        accelerate.disk_offload(target, tmp_path / "offload", torch.device("cpu"))
    else:
        del places["model.layers"]
        llama.save_pretrained(tmp_path / "target")
        places |= {f"model.layers.{index}": ("cpu", "disk")[index % 2] for index in range(4)}
        target = AutoModelForCausalLM.from_pretrained(
            tmp_path / "target", device_map=places, offload_folder=tmp_path / "offload"
        )
    last = target.model.layers[3].self_attn.q_proj.weight
    assert last.is_meta == (how != "dispatched")
    assert bind(draft.config, target).device == torch.device("cpu")
    mask = torch.ones_like(prompt_of(5))
    assert assert_same(target, draft) == base
    assert assert_same(target, draft, lengths=(5,), attention_mask=mask) == base[:2]
    mask[0, 1] = 0
    assert_same(target, draft, lengths=(5,), attention_mask=mask)
    assert next(draft.parameters()).device == torch.device("cpu")


# Compiled, and other attention


COMPILED = {
    "forward": lambda target: setattr(target, "forward", torch.compile(target.forward, backend="eager")),
    "module in place": lambda target: target.compile(backend="eager"),
    "layers in place": lambda target: [layer.compile(backend="eager") for layer in target.model.layers],
}


@pytest.mark.parametrize("how", quick_or_slow([*COMPILED, "wrapper"], ["layers in place", "wrapper"]))
def test_compiled_targets(how):
    llama = tiny_target("llama", num_hidden_layers=2)
    draft = tiny_draft(llama, window=8)
    options = {"lengths": (9,), "max_new_tokens": 6}
    base = texts(llama, **options)
    torch.compiler.reset()
    target = torch.compile(llama, backend="eager") if how == "wrapper" else llama
    COMPILED.get(how, lambda target: None)(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert assert_same(target, draft, **options) == base
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    target = tiny_target("gemma3_text", num_hidden_layers=2)  # a sliding layer and a full one
    draft = tiny_draft(target, window=8)
    target.set_attn_implementation(implementation)
    assert_same(target, draft, lengths=(9,), max_new_tokens=6)
    assert target.config._attn_implementation == implementation


# Heads, modes and configs


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("phi", {}),  # a head with a bias
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
    ids=str,
)
def test_heads(family, fields):
    target = tiny_target(family, **fields)
    head = target.get_output_embeddings()
    tied = fields.get("tie_word_embeddings", target.config.tie_word_embeddings)
    assert (head.weight is target.get_input_embeddings().weight) == tied
    if family == "phi":
        torch.nn.init.normal_(head.bias)
    assert_same(target, tiny_draft(target, window=8))


def test_training_mode_is_kept(llama, draft):
    assert_same(llama.train(), draft)
    assert all(module.training for module in llama.modules())


def test_gradient_checkpointing(llama, draft):
    base = texts(llama)
    getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)()
    assert assert_same(llama.eval(), draft) == base
    if texts(llama.train()) == base:  # transformers 5.24 keeps the cache
        assert_same(llama, draft)
        return
    with pytest.raises(ValueError, match="got none, as where a target trains with gradient checkpointing"):
        llama.generate(prompt_of(5), assistant_model=draft, **OPTIONS)


def test_bare_generation_config(llama, draft):
    llama.generation_config = GenerationConfig()
    for ids in (prompt_of(5), prompt_of(17)):
        plain = llama.generate(ids)
        assert llama.generate(ids, assistant_model=draft).tolist() == plain.tolist()
        assert plain.shape[1] == ids.shape[1] + 20


def test_pad_token_is_the_eos_token(llama, draft):
    for token in range(0, 13, 2):
        llama.generation_config = GenerationConfig(eos_token_id=token, pad_token_id=token)
        assert_same(llama, draft, lengths=(9,), pad_token_id=token)


def test_beyond_the_position_embeddings_with_the_same_warnings(caplog):
    target = tiny_target("llama", max_position_embeddings=32)
    draft = tiny_draft(target, window=8)
    said = []
    logging.set_verbosity_warning()  # whatever a test before asked for
    for assistant in ({}, {"assistant_model": draft}):
        logging.warning_once.cache_clear()
        caplog.clear()
        texts(target, lengths=(25, 50), **assistant)
        said.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
    assert said[0] == said[1] and "exceeded the model's predefined maximum length (32)" in said[0][0]
    assert_same(target, draft, lengths=(25, 50))


def test_resized_embeddings(llama, draft):
    """A draft belongs to a vocabulary: one made before is refused, one made behind writes the same text."""
    llama.resize_token_embeddings(16, mean_resizing=False)
    with pytest.raises(ValueError, match="vocab_size: draft has 13, target has 16"):
        llama.generate(prompt_of(5), assistant_model=draft, **OPTIONS)
    padded = OPTIONS | {"pad_token_id": 15}
    for fields in ({}, {"draft_vocab_size": 13}):
        assert_same(llama, tiny_draft(llama, **fields), **padded)
    llama.resize_token_embeddings(13, mean_resizing=False)
    assert_same(llama, draft)


def test_inference_mode_and_frozen_weights(llama, draft):
    base = texts(llama)
    with torch.inference_mode():
        assert assert_same(llama, draft) == base
    llama.requires_grad_(False)
    assert assert_same(llama, draft) == base
    with torch.enable_grad():
        assert not llama.generate(prompt_of(5), assistant_model=draft, **OPTIONS).requires_grad


def test_deterministic_algorithms(llama, draft):
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(llama, draft)
        sliding = tiny_target("mistral")
        assert_same(sliding, tiny_draft(sliding, window=8))
    finally:
        torch.use_deterministic_algorithms(False)
