"""Wrong input: one clear error that names what was expected and what came, before any work, the target unchanged."""

import functools

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GPTJConfig,
    GPTNeoConfig,
    MambaConfig,
    StaticCache,
    T5Config,
)
from transformers.generation.streamers import BaseStreamer

from hf_longspec.modeling.configuration_longspec import LongSpecConfig
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

IDS = torch.arange(2, 9)[None]
TOKENS = {"vocab_size": 13, "bos_token_id": 1, "eos_token_id": None}


@pytest.fixture(scope="module")
def llama():
    return tiny_target("llama")


@pytest.fixture
def no_forward(llama, monkeypatch):
    """Fails the test if the target is run at all, once it is known; checks that it is left as it was."""
    llama.generate(IDS, assistant_model=tiny_draft(llama), max_new_tokens=1)

    def forward(*args, **kwargs):
        raise AssertionError("the target was run")

    monkeypatch.setattr(type(llama), "forward", forward)
    before = llama.config.to_dict(), llama.config._attn_implementation
    yield
    assert (llama.config.to_dict(), llama.config._attn_implementation) == before


def test_a_draft_for_another_target_names_every_mismatch(llama, no_forward):
    other = tiny_target("llama", vocab_size=17, hidden_size=64, num_key_value_heads=4, num_hidden_layers=3, head_dim=8)
    draft = tiny_draft(other)
    with pytest.raises(ValueError, match="vocab_size: draft has 17, target has 13") as error:
        llama.generate(IDS, assistant_model=draft)
    for line in (
        "hidden_size: draft has 64",
        "num_key_value_heads: draft has 4",
        "target_num_hidden_layers: draft has 3",
    ):
        assert line in str(error.value)
    assert "head_dim: draft has 8, target has 16" in str(error.value)


def test_a_draft_with_another_rope_is_refused(llama, no_forward):
    draft = tiny_draft(llama, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ValueError, match=r"rope_parameters: draft has .*500000.*, target has .*10000"):
        llama.generate(IDS, assistant_model=draft)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("tree_shape", (4, 0, 2), "at least 1, got 0 at level 2"),
        ("tree_shape", (14,), "at most 1 parents × 13 tokens = 13 nodes, got 14"),
        ("tree_shape", (2, 27), "at most 2 parents × 13 tokens = 26 nodes, got 27"),
        ("tree_shape", (2, -1), "at least 1, got -1"),
        ("tree_shape", "4,8", "tuple of integers"),
        ("tree_shape", (2.0,), "tuple of integers"),
        ("tree_shape", 4, "tuple of integers"),
        ("window", -5, "`window` must be a positive integer, got -5"),
        ("window", 0, "`window` must be a positive integer, got 0"),
        ("verify_tokens", 0, "None or a positive integer, got 0"),
        ("attention_backend", "flash", "must be one of .* got 'flash'"),
        ("target_layer", 4, r"must be in 0\.\.3, got 4"),
        ("target_layer", None, r"must be in 0\.\.3, got None"),
        ("target_layer", 1.0, r"must be in 0\.\.3, got 1\.0"),
        ("target_num_hidden_layers", "4", "`target_num_hidden_layers` must be a positive integer, got '4'"),
    ],
)
def test_options_set_on_a_loaded_draft(llama, no_forward, field, value, message):
    draft = tiny_draft(llama)
    setattr(draft.config, field, value)
    with pytest.raises(ValueError, match=message):
        llama.generate(IDS, assistant_model=draft)
    with pytest.raises(ValueError, match=message):
        LongSpecConfig.from_target(llama.config, **{field: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "needs num_beams=1, got num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "needs num_beams=1, got num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "LongSpec draft or prompt_lookup_num_tokens, got both"),
        ({"assistant_early_exit": 2}, "LongSpec draft or assistant_early_exit, got both"),
        ({"prompt_lookup_num_tokens": 0}, "LongSpec draft or prompt_lookup_num_tokens, got both"),
        ({"dola_layers": "high"}, "LongSpec draft or dola_layers, got both, dola_layers='high'"),
        ({"cache_implementation": "quantized"}, "cache_implementation None, 'dynamic', .*, got 'quantized'"),
        ({"cache_implementation": "offloaded"}, "got 'offloaded'"),
        (
            {"use_cache": False, "prefill_chunk_size": 4},
            "expected use_cache=True .* prefill_chunk_size, got use_cache",
        ),
        (
            {"output_attentions": True, "return_dict_in_generate": True},
            "no attention weights, got output_attentions=True",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_of_the_call(llama, no_forward, options, message):
    draft = tiny_draft(llama)
    with pytest.raises(ValueError, match=message):
        llama.generate(IDS, assistant_model=draft, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    "option, value, instead",
    [
        ("num_beams", 4, 1),
        ("output_attentions", True, False),
        ("prompt_lookup_num_tokens", 3, None),
        ("dola_layers", "high", None),
    ],
)
def test_options_of_the_targets_own_generation_config(option, value, instead):
    """As generation_config.json of a model may have them: the message says where they are and what to set."""
    target = tiny_target("llama")
    draft, plain = tiny_draft(target), target.generate(IDS, max_new_tokens=4, do_sample=False)
    setattr(target.generation_config, option, value)
    message = f"{option}={value!r}, as target.generation_config has it: set {option} = {instead} there"
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        target.generate(IDS, assistant_model=draft, max_new_tokens=4)
    with pytest.raises(ValueError) as error:  # the call's own, which the target's may equal by chance
        target.generate(
            IDS, assistant_model=draft, max_new_tokens=4, **{option: 2 if option == "num_beams" else value}
        )
    assert option in str(error.value)
    setattr(target.generation_config, option, instead)
    assert target.generate(IDS, assistant_model=draft, max_new_tokens=4).tolist() == plain.tolist()


def test_a_beam_search_of_the_targets_own_is_overridden_by_the_call():
    target = tiny_target("llama")
    target.generation_config.num_beams = 4
    plain = target.generate(IDS, max_new_tokens=4, num_beams=1)
    assert (
        target.generate(IDS, assistant_model=tiny_draft(target), max_new_tokens=4, num_beams=1).tolist()
        == plain.tolist()
    )


@pytest.mark.parametrize("rows, tree, served", [(3, (4, 8), False), (3, (3, 9), True), (5, (4, 8), True)])
def test_a_pruned_lm_head(rows, tree, served):
    """With fewer rows than the vocabulary has tokens: a tree that needs more is refused."""
    target = tiny_target("llama")
    target.lm_head = torch.nn.Linear(32, rows, bias=False)
    draft, options = tiny_draft(target, tree_shape=tree), {"max_new_tokens": 8, "pad_token_id": 0}
    plain = target.generate(IDS, **options)
    if served:
        assert target.generate(IDS, assistant_model=draft, **options).tolist() == plain.tolist()
        return
    told = "level 1 can have at most 1 parents × 3 tokens of the target's LM head = 3 nodes, got 4"
    with pytest.raises(ValueError, match=told):
        target.generate(IDS, assistant_model=draft, **options)


def offloaded(draft, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(draft)


def loaded_on_the_disk(draft, tmp_path):
    pytest.importorskip("accelerate")
    draft.save_pretrained(tmp_path / "draft")
    return LongSpecForCausalLM.from_pretrained(tmp_path / "draft", device_map={"": "disk"}, offload_folder=tmp_path)


def spread(draft, tmp_path):
    draft.hf_device_map = {"mlp": 0, "self_attn": 1}


def quantized(draft, tmp_path):
    draft.quantization_method = "bitsandbytes"


@pytest.mark.parametrize(
    "change, got",
    [
        (offloaded, "accelerate offloads or spreads over devices; load it without device_map"),
        (loaded_on_the_disk, "accelerate offloads or spreads over devices; load it without device_map"),
        (spread, "accelerate offloads or spreads over devices; load it without device_map"),
        (quantized, "bitsandbytes quantized; load it without quantization_config"),
    ],
)
def test_a_draft_that_cannot_be_moved(llama, no_forward, tmp_path, change, got):
    draft = tiny_draft(llama)
    draft = change(draft, tmp_path) or draft
    with pytest.raises(
        ValueError, match=f"moves a draft to its target's device and number format, got one that {got}"
    ):
        llama.generate(IDS, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"output_attentions": True}], ids=str)
def test_options_of_a_batch(llama, no_forward, options):
    """A batch is refused nothing else than one prompt is, and for the same reason."""
    draft, messages = tiny_draft(llama), []
    for ids in (IDS, IDS.repeat(3, 1)):
        with pytest.raises(ValueError, match="LongSpec('s attention makes no| needs)") as error:
            llama.generate(ids, assistant_model=draft, max_new_tokens=4, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("rows, prompts", [(1, 2), (3, 2), (2, 1)])
def test_a_cache_of_another_batch_is_refused(llama, rows, prompts):
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(IDS[:, :4].repeat(rows, 1), **{CACHE: cache})
    held = [layer.keys.clone() for layer in cache.layers]
    message = f"expected {CACHE} of the prompts' batch size {prompts}, got {rows}"
    with pytest.raises(ValueError, match=message):
        llama.generate(IDS.repeat(prompts, 1), assistant_model=tiny_draft(llama), **{CACHE: cache})
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, held, strict=True))


def test_a_target_that_is_split_over_devices_is_refused(llama, no_forward, monkeypatch):
    monkeypatch.setattr(type(llama), "tp_size", 2, raising=False)
    with pytest.raises(ValueError, match="does not serve tensor-parallel targets, got tp_size=2"):
        llama.generate(IDS, assistant_model=tiny_draft(llama), max_new_tokens=4)


def test_activated_lora_is_refused(llama, no_forward):
    def adapt(module, args, alora_offsets=None):
        raise AssertionError("not before the checks")

    layer = llama.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_pre_hook(functools.partial(adapt, alora_offsets=[3]))
    try:
        with pytest.raises(
            ValueError, match="does not serve activated LoRA, got a prompt with alora_invocation_tokens"
        ):
            llama.generate(IDS, assistant_model=tiny_draft(llama), max_new_tokens=4)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "needs num_beams=1"),  # before anything is allocated
        ({"use_cache": False, "prefill_chunk_size": 4}, "expected use_cache=True"),  # once inputs are known
    ],
)
def test_the_reader_of_a_streamer_is_told_the_end(llama, no_forward, options, message):
    class Reader(BaseStreamer):
        ended = 0

        def put(self, value):
            pass

        def end(self):
            self.ended += 1

    reader = Reader()
    with pytest.raises(ValueError, match=message):
        llama.generate(IDS, assistant_model=tiny_draft(llama), max_new_tokens=4, streamer=reader, **options)
    assert reader.ended == 1


def test_a_static_cache_object_is_refused(llama, no_forward):
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with pytest.raises(ValueError, match=f"expected {CACHE}=DynamicCache, got a StaticCache"):
        llama.generate(IDS, assistant_model=tiny_draft(llama), **{CACHE: cache})


def test_a_cache_that_is_not_to_be_used_is_refused(llama, no_forward):
    with pytest.raises(ValueError, match="expected use_cache=True beside a cache"):
        llama.generate(IDS, assistant_model=tiny_draft(llama), use_cache=False, **{CACHE: DynamicCache()})


def test_positions_that_jump_without_a_cache_are_refused_where_they_are_taken_for_several_texts(llama):
    options = {"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8]]), "max_new_tokens": 16, "pad_token_id": 0}
    one_text, plain = (llama.generate(IDS, use_cache=kept, **options).tolist() for kept in (True, False))
    if one_text == plain:  # before transformers 5.18
        assert llama.generate(IDS, assistant_model=tiny_draft(llama), use_cache=False, **options).tolist() == plain
        return
    with pytest.raises(ValueError, match="expected use_cache=True beside position_ids that jump"):
        llama.generate(IDS, assistant_model=tiny_draft(llama), use_cache=False, **options)


def test_an_encoder_decoder_target_is_refused(llama):
    config = T5Config(vocab_size=13, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    target = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="decoder-only target, got the encoder–decoder T5ForConditionalGeneration"):
        target.generate(IDS, assistant_model=tiny_draft(llama))
    with pytest.raises(ValueError, match="decoder-only target, got the encoder–decoder 't5'"):
        LongSpecConfig.from_target(config)


def test_a_stateful_target_is_refused(llama):
    config = MambaConfig(vocab_size=13, hidden_size=32, num_hidden_layers=2, state_size=4)
    target = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="key/value caches, got the stateful MambaForCausalLM"):
        target.generate(IDS, assistant_model=tiny_draft(llama))
    with pytest.raises(ValueError, match="standard per-layer key/value caches, got 'mamba'"):
        LongSpecConfig.from_target(config)


def test_dynamic_ntk_is_refused(llama):
    target = tiny_target("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="RoPE depends on the length, got rope_type 'dynamic'"):
        LongSpecConfig.from_target(target.config)
    with pytest.raises(ValueError, match="RoPE depends on the length"):
        target.generate(IDS, assistant_model=tiny_draft(llama))


def test_a_window_of_one_token_is_refused(no_forward):
    """Plain `generate` keeps the whole text there, and what it attends to depends on the implementation."""
    target = tiny_target("mistral", sliding_window=1)
    draft = tiny_draft(tiny_target("mistral", sliding_window=2))
    with pytest.raises(ValueError, match="does not serve sliding_window=1, got 'mistral'"):
        target.generate(IDS, assistant_model=draft)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            GPTNeoConfig(hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=4, **TOKENS),
            "attention module that uses transformers' attention interface, got GPTNeoModel",
        ),
        (  # uses the interface since transformers 5.24
            GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **TOKENS),
            "attention module that uses .* got GPTJModel|does not know how GPTJAttention rotates its queries",
        ),
    ],
    ids=["gpt_neo", "gptj"],
)
def test_a_target_that_draft_or_interface_does_not_know_is_refused(config, message):
    target = AutoModelForCausalLM.from_config(config)
    implementation = target.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        target.generate(IDS, assistant_model=LongSpecForCausalLM(LongSpecConfig.from_target(target.config)))
    assert target.config._attn_implementation == implementation


@pytest.mark.parametrize("method", ["forward", "generate", "__call__"])
def test_a_draft_alone_says_how_it_is_used(llama, method):
    with pytest.raises(ValueError, match=r"target.generate\(\*\*inputs, assistant_model=draft\)"):
        getattr(tiny_draft(llama), method)(IDS)


def test_an_assistant_tokenizer_is_refused(llama, no_forward):
    with pytest.raises(ValueError, match="shares the target's tokenizer, got assistant_tokenizer"):
        llama.generate(IDS, assistant_model=tiny_draft(llama), tokenizer=object(), assistant_tokenizer=object())


def test_a_target_in_training_mode_that_draws_or_forgets_is_refused():
    target = tiny_target("llama", attention_dropout=0.5)
    draft = tiny_draft(target)
    target.train()
    with pytest.raises(
        ValueError, match=r"needs target.eval\(\), got a target in training mode with dropout in 'model"
    ):
        target.generate(IDS, assistant_model=draft, max_new_tokens=4)
    target = tiny_target("llama")
    getattr(target, "activation_checkpointing_enable", target.gradient_checkpointing_enable)()
    target.train()
    options = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    plain = target.generate(IDS, **options).tolist()
    if plain == target.eval().generate(IDS, **options).tolist():  # transformers 5.24 keeps the cache
        assert target.train().generate(IDS, assistant_model=draft, **options).tolist() == plain
    else:
        target.generate(IDS, assistant_model=draft, **options)  # it is probed again in training mode
        with pytest.raises(ValueError, match="got none, as where a target trains with gradient checkpointing"):
            target.train().generate(IDS, assistant_model=draft, **options)
    for ready in (target.eval(), tiny_target("llama").train()):
        ready.generate(IDS, assistant_model=draft, max_new_tokens=4, pad_token_id=0)


def test_virtual_tokens_of_peft_are_refused(llama):
    class PromptTuned:  # what peft does for the time of a call
        class active_peft_config:
            is_prompt_learning = True

        def prepare_inputs_for_generation(self, *args, **kwargs):
            raise AssertionError("not before the checks")

    llama.prepare_inputs_for_generation = PromptTuned().prepare_inputs_for_generation
    try:
        with pytest.raises(ValueError, match="does not serve virtual tokens, got a target with PEFT prompt learning"):
            llama.generate(IDS, assistant_model=tiny_draft(llama), max_new_tokens=4)
    finally:
        del llama.prepare_inputs_for_generation


@pytest.mark.parametrize(
    "family, message",
    [
        ("diffllama", "attends once a layer to the keys and values it caches, got DiffLlama"),
        ("jetmoe", "attends once a layer to the keys and values it caches, got JetMoeAttention"),
        ("gpt2", r"cached keys and values of \(heads, dimension\) \(2, 16\), got \(4, 8\) and \(4, 8\)"),
    ],
)
def test_targets_that_do_not_attend_to_what_they_cache_are_refused(family, message):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}}.get(family, {})
    target = tiny_target(family, **sizes)
    implementation = target.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        target.generate(IDS, assistant_model=tiny_draft(target), max_new_tokens=9, pad_token_id=0)
    assert target.config._attn_implementation == implementation
