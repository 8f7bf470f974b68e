"""`generate(assistant_model=draft)` writes what plain `generate` writes: the main promise, on tiny random targets.

Random drafts are right seldom, so the vocabulary is tiny (13) and the trees wide: paths of every length occur.
"""

import copy
import io
import pickle

import pytest
import torch
from helpers import CACHE, quick_or_slow, tiny_draft, tiny_target
from observation import TOLERANCE, contents
from pairs import assert_same
from texts import prompt_of
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

from hf_longspec.evaluation.tiny_models import tiny_model
from hf_longspec.modeling.candidate_generator_longspec import LongSpecCandidateGenerator
from hf_longspec.modeling.configuration_longspec import CPU_TREE
from hf_longspec.modeling.tree_longspec import TreeForm

WINDOW = 8
SHAPES = [(), (1, 1, 1, 1), (2, 3), (4, 8, 8, 8), (4, 16, 16, 16, 16)]
LENGTHS = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
SAMPLERS = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "repetition_penalty": {"do_sample": True, "repetition_penalty": 1.3},
    "greedy, repetition_penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
# every shape with every length, in pairs spread over the families
PAIRS = [(SHAPES[(i + i // 6) % 5], LENGTHS[i % 6]) for i in range(30)]
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "cohere",
    "cohere2",
    "smollm3",
    "gpt_oss",
    "granite",
    "glm4",
    "qwen3_moe",
    "starcoder2",
    "exaone4",
]
# These six meet all pairs and samplers, and each kind of layer.
QUICK_FAMILIES = ["llama", "gemma2", "gemma3_text", "gpt_oss"]
# And every sampler is tried on a chain or on a tree, greedy picks on both.
QUICK_SAMPLERS = {
    (1, 1, 1, 1): ["greedy", "top_k", "min_p", "repetition_penalty"],
    (4, 8, 8, 8): ["greedy", "temperature", "top_p", "greedy, repetition_penalty"],
}


@pytest.fixture(scope="module")
def llama():
    return tiny_target("llama")


@pytest.mark.parametrize("family", quick_or_slow(FAMILIES, QUICK_FAMILIES))
def test_equal_to_plain_generate_for_every_family(family):
    target = tiny_target(family)
    draft = tiny_draft(target, window=WINDOW)
    offset = FAMILIES.index(family)
    for index in range(8):
        draft.config.tree_shape, length = PAIRS[(offset * 8 + index) % len(PAIRS)]
        draft.config.attention_backend = ("eager", "auto")[index % 2]
        sampler = SAMPLERS["greedy"] if index % 4 < 2 else list(SAMPLERS.values())[1 + (offset + index) % 6]
        assert_same(target, draft, prompt_of(length, seed=index), **sampler)
    draft.config.tree_shape = (13, 80, 80)  # holds every next token, and about half of the pairs
    options = {"max_new_tokens": 40, "do_sample": True, "pad_token_id": 0}
    assert_same(target, draft, prompt_of(9), **options)
    out = target.generate(prompt_of(9), assistant_model=draft, return_dict_in_generate=True, **options)
    accepted = out.accept_lengths[0]
    assert min(accepted[:-1]) >= 2 and max(accepted) >= 3, "too little was accepted: the test would prove nothing"
    assert sum(accepted) == 39


def test_hidden_states_with_a_dimension_ahead_of_the_rows():
    """gemma3n keeps several hidden states of each token."""
    target = tiny_model("gemma3n_text")
    ids = torch.cat([prompt_of(9, seed=seed) for seed in range(3)])
    options = {"max_new_tokens": 20, "pad_token_id": 0, "output_hidden_states": True, "return_dict_in_generate": True}
    plain = target.generate(ids, **options)
    ours = target.generate(ids, assistant_model=tiny_draft(target, tree_shape=(13, 100)), **options)
    assert max(map(max, ours.accept_lengths)) > 1 and len({len(row) for row in ours.accept_lengths}) > 1
    assert plain.hidden_states[1][0].shape[1:3] == (3, 1)
    torch.testing.assert_close(contents(ours.hidden_states), contents(plain.hidden_states), **TOLERANCE)


@pytest.mark.parametrize(
    "shape, sampler",
    [
        pytest.param(
            shape,
            sampler,
            id=f"{shape}-{sampler}",
            marks=() if sampler in QUICK_SAMPLERS.get(shape, ()) else pytest.mark.slow,
        )
        for shape in SHAPES
        for sampler in SAMPLERS
    ],
)
def test_every_sampler_on_every_tree(llama, shape, sampler):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=shape)
    for length in LENGTHS:
        assert_same(llama, draft, prompt_of(length), **SAMPLERS[sampler])


def test_a_tree_that_is_set_is_verified_whole(llama):
    draft, read = tiny_draft(llama, window=WINDOW, tree_shape="auto"), []
    large = (4, 16, 16, 16, 16)
    hook = llama.model.register_forward_hook(lambda *call: read.append(call[-1][0].shape[1]))
    for shape, nodes in ((CPU_TREE, 1 + sum(CPU_TREE)), (large, 1 + sum(large))):
        draft.config.tree_shape = shape
        read.clear()
        out = llama.generate(prompt_of(11), assistant_model=draft, max_new_tokens=12, return_dict_in_generate=True)
        assert set(read[read.index(11) + 1 :]) == {nodes}  # a target's first call probes it before the prompt
        assert max(out.accept_lengths[0]) <= 1 + len(shape)
        assert set(out.trees[0]) == {TreeForm(shape)}
        assert draft.state_bytes == 2 * 4 * 8 * 4 * (WINDOW + 2 + nodes - 1 - shape[-1])
    hook.remove()


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_pruned_trees(llama, size):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8, 8), verify_tokens=size)
    assert_same(llama, draft, prompt_of(11))
    assert_same(llama, draft, prompt_of(11), do_sample=True)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 11])
def test_max_new_tokens_inside_a_path(llama, new_tokens):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 16, 16, 16, 16))
    assert_same(llama, draft, prompt_of(5), max_new_tokens=new_tokens)
    assert_same(llama, draft, prompt_of(5), max_new_tokens=None, max_length=5 + new_tokens)


def test_eos_at_every_place_of_a_path(llama):
    """Every token the model writes is made the EOS once: the first one, inside a path, at its end."""
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 16, 16, 16, 16))
    ids = prompt_of(6)
    places = set()
    for eos in range(13):
        assert_same(llama, draft, ids, eos_token_id=eos)
        if eos % 3 == 0:
            assert_same(llama, draft, ids, eos_token_id=[eos, (eos + 5) % 13], do_sample=True)
        out = llama.generate(
            ids,
            assistant_model=draft,
            eos_token_id=eos,
            max_new_tokens=24,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        places.add("first" if not out.accept_lengths[0] else min(out.accept_lengths[0][-1], 2))
    assert {"first", 1, 2} <= places


def test_cache_is_left_as_plain_generate_leaves_it():
    for family in ("llama", "mistral", "gemma3_text"):
        target = tiny_target(family)
        draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))
        options = {"max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0}
        plain = target.generate(prompt_of(9), **options)[CACHE]
        ours = target.generate(prompt_of(9), assistant_model=draft, **options)[CACHE]
        assert type(ours) is type(plain) and len(ours.layers) == len(plain.layers)
        for layer, expected in zip(ours.layers, plain.layers, strict=True):
            assert layer.get_seq_length() == expected.get_seq_length() == 28
            torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_returned_owns_no_more_memory_than_it_fills(family, rows):
    """Or a saved, pickled or copied output would take the room along that rounds write into."""
    target = tiny_target(family)
    options = {"max_new_tokens": 20, "pad_token_id": 0, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    outputs = []
    for own in ({}, {"assistant_model": tiny_draft(target)}):
        passed = DynamicCache(config=target.config)
        out = target.generate(prompt_of(9).repeat(rows, 1), **options, **own, **{CACHE: passed})
        assert out[CACHE] is passed
        outputs.append(out)
    plain, ours = outputs
    assert saved_bytes(ours[CACHE]) <= saved_bytes(plain[CACHE])
    assert saved_bytes(ours.sequences) <= saved_bytes(plain.sequences)
    for name in ("scores", "logits", "hidden_states"):
        assert saved_bytes(ours[name]) <= saved_bytes(plain[name]), name
    for twin in (copy.deepcopy(ours[CACHE]), pickle.loads(pickle.dumps(ours[CACHE]))):
        for layer, expected in zip(twin.layers, ours[CACHE].layers, strict=True):
            assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def saved_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_cache_passed_in_is_continued_over_turns(family, with_config):
    target = tiny_target(family)
    draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))

    def chat(**assistant):
        cache = DynamicCache(config=target.config) if with_config else DynamicCache()
        ids, texts = prompt_of(7), []
        for turn in range(4):
            ids = target.generate(ids, **{CACHE: cache}, max_new_tokens=6, pad_token_id=0, **assistant)
            texts.append(ids.tolist())
            ids = torch.cat([ids, prompt_of(3, seed=turn)], dim=1)
        return texts

    assert chat() == chat(assistant_model=draft)


def test_chunked_prefill_and_left_padding(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    assert_same(llama, draft, prompt_of(29), prefill_chunk_size=8)
    sliding = tiny_target("mistral")
    sliding_draft = tiny_draft(sliding, window=WINDOW, tree_shape=(4, 8, 8))
    assert_same(sliding, sliding_draft, prompt_of(29), prefill_chunk_size=8)
    for target, its_draft in ((llama, draft), (sliding, sliding_draft)):
        for pads in (1, 3, 9):
            ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), prompt_of(5)], dim=1)
            mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)], dim=1)
            assert_same(target, its_draft, ids, attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_padding_inside_the_prompt(family):
    """A mask with holes, as plain `generate` makes it from pad tokens in the text."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))
    for holes in ([4], [0, 1, 5, 6], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]):
        mask = torch.ones(1, 15, dtype=torch.long)
        mask[0, holes] = 0
        assert_same(target, draft, prompt_of(15), attention_mask=mask)


def test_prompts_given_as_embeddings(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    embeds = llama.get_input_embeddings()(prompt_of(12)).detach()
    plain = llama.generate(inputs_embeds=embeds, max_new_tokens=20, pad_token_id=0)
    ours = llama.generate(inputs_embeds=embeds, max_new_tokens=20, pad_token_id=0, assistant_model=draft)
    assert plain.tolist() == ours.tolist()
    from_ids = llama.generate(prompt_of(12), max_new_tokens=20, pad_token_id=0)
    assert ours[0].tolist() == from_ids[0, 12:].tolist()


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_have_plain_shapes_and_values(llama, do_sample):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 15}
    options |= {"do_sample": do_sample, "repetition_penalty": 1.2, "pad_token_id": 0}
    torch.manual_seed(3)
    plain = llama.generate(prompt_of(9), **options)
    torch.manual_seed(3)
    ours = llama.generate(prompt_of(9), assistant_model=draft, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == 15
        for mine, theirs in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert sum(ours.accept_lengths[0]) == 14


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_draft_that_fails_leaves_a_whole_cache(monkeypatch, call):
    """Its rings would have moved on, but not their lengths."""
    target = tiny_target("mistral")
    past, calls = DynamicCache(config=target.config), iter(range(1, 100))
    original = LongSpecCandidateGenerator.advance

    def advance(*args):
        if next(calls) == call:
            raise MemoryError("no room")
        original(*args)

    monkeypatch.setattr(LongSpecCandidateGenerator, "advance", advance)
    options = {"max_new_tokens": 24, "pad_token_id": 0}
    draft = tiny_draft(target, tree_shape=(13, 80, 80))
    with pytest.raises(MemoryError, match="no room"):
        target.generate(prompt_of(9), assistant_model=draft, **{CACHE: past}, **options)
    text, expected = target.generate(prompt_of(9), **options), DynamicCache(config=target.config)
    assert past.get_seq_length() >= 9
    with torch.no_grad():
        target(text[:, : past.get_seq_length()], **{CACHE: expected})
    for layer, other in zip(past.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, **TOLERANCE)
        torch.testing.assert_close(layer.values, other.values, **TOLERANCE)


class Recorder:
    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ends += 1


def test_streamer_gets_the_prompt_and_then_token_by_token(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    plain, ours = Recorder(), Recorder()
    llama.generate(prompt_of(6), max_new_tokens=12, streamer=plain, pad_token_id=0)
    llama.generate(prompt_of(6), max_new_tokens=12, streamer=ours, assistant_model=draft, pad_token_id=0)
    assert ours.tokens == plain.tokens and ours.ends == plain.ends == 1


def test_criteria_are_asked_before_a_token_is_streamed(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    orders = []
    for assistant in ({}, {"assistant_model": draft}):
        order = []

        class Streamed(Recorder):
            def put(self, value, order=order):
                order.append("streamed")

        class Asked(StoppingCriteria):
            def __call__(self, input_ids, scores, order=order, **kwargs):
                order.append("asked")
                return torch.zeros(1, dtype=torch.bool)

        options = {"streamer": Streamed(), "stopping_criteria": [Asked()], "max_new_tokens": 5, "pad_token_id": 0}
        llama.generate(prompt_of(6), **options, **assistant)
        orders.append(order)
    assert orders[0] == orders[1] and len(orders[0]) == 11


class Biased(LlamaForCausalLM):
    """A target whose forward takes one more argument, of use in every step."""

    def forward(self, *args, bias=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits if bias is None else outputs.logits + bias
        return outputs


def test_arguments_of_the_targets_own_forward_reach_every_step(llama):
    target = Biased(llama.config).eval()
    target.load_state_dict(llama.state_dict())
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    bias = 8 * torch.randn(13)
    assert_same(target, draft, prompt_of(6), bias=bias)
    plain, biased = (target.generate(prompt_of(6), max_new_tokens=9, pad_token_id=0, bias=b) for b in (None, bias))
    assert plain.tolist() != biased.tolist()


def test_the_target_is_told_nothing_that_plain_generate_keeps_from_it(llama):
    """Such as the assistant: accelerate's hooks would move it along to the device of every layer."""
    told = []
    llama.register_forward_pre_hook(lambda module, args, kwargs: told.append(set(kwargs)), with_kwargs=True)
    llama.generate(prompt_of(9), max_new_tokens=8)
    plain = told.copy()
    draft = tiny_draft(llama)
    llama.generate(prompt_of(9), assistant_model=draft, max_new_tokens=8)  # probes a target with this hook
    told.clear()
    llama.generate(prompt_of(9), assistant_model=draft, max_new_tokens=8)
    assert told[0] == plain[0]
    assert set.union(*told[1:]) <= set.union(*plain[1:])


def test_a_sliding_window_wider_than_the_text():
    target = tiny_target("mistral", sliding_window=300)
    draft = tiny_draft(target, window=WINDOW, tree_shape=(4, 8, 8))
    assert_same(target, draft, prompt_of(9))
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0}
    plain = target.generate(prompt_of(9), **options)[CACHE]
    ours = target.generate(prompt_of(9), assistant_model=draft, **options)[CACHE]
    for layer, expected in zip(ours.layers, plain.layers, strict=True):
        assert layer.cumulative_length == expected.cumulative_length
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-5)


def test_a_text_that_outgrows_a_sliding_window():
    """Prompt and tree are within it, the answer is not."""
    target = tiny_target("mistral", sliding_window=14)
    assert_same(target, tiny_draft(target, window=WINDOW, tree_shape=(2, 2)), prompt_of(9), max_new_tokens=48)


def test_a_cast_under_inference_mode_leaves_the_draft_trainable(llama):
    draft = tiny_draft(llama).to(torch.bfloat16)
    with torch.inference_mode():
        llama.generate(prompt_of(6), max_new_tokens=4, assistant_model=draft, pad_token_id=0)
    assert draft.dtype == torch.float32
    draft.mlp(torch.randn(1, 3, 32)).sum().backward()
    assert draft.mlp.up_proj.weight.grad is not None


class StopAfter(StoppingCriteria):
    """Stops behind the second occurrence of a token and records every length it was asked at."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, 6:] == self.token).sum(-1) >= 2


class Memory(LogitsProcessor):
    """A processor with state that expects to be called once per emitted token, in order."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores - (len(self.lengths) % 3) * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])


def test_custom_criteria_and_stateful_processors_are_asked_once_per_token(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 16, 16))
    for token in range(2, 13):
        runs = []
        for assistant in ({}, {"assistant_model": draft}):
            stop, memory = StopAfter(token), Memory()
            out = llama.generate(
                prompt_of(6),
                max_new_tokens=30,
                stopping_criteria=[stop],
                logits_processor=LogitsProcessorList([memory]),
                pad_token_id=0,
                **assistant,
            )
            runs.append((out.tolist(), stop.lengths, memory.lengths))
        assert runs[0] == runs[1]


def test_state_after_the_call(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8, 8))
    before = (llama.config.to_dict(), llama.config._attn_implementation, llama.training)
    llama.generate(prompt_of(6), max_new_tokens=12, assistant_model=draft, pad_token_id=0)
    assert (llama.config.to_dict(), llama.config._attn_implementation, llama.training) == before


class Interrupt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == 14:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_state_after_an_interrupted_call(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 16, 16))
    implementation = llama.config._attn_implementation
    left = []
    for assistant in ({}, {"assistant_model": draft}):
        cache = DynamicCache(config=llama.config)
        torch.manual_seed(5)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(
                prompt_of(6),
                max_new_tokens=12,
                stopping_criteria=[Interrupt()],
                **{CACHE: cache},
                do_sample=True,
                pad_token_id=0,
                **assistant,
            )
        left.append((torch.rand(1).item(), cache.get_seq_length()))
    assert left[0] == left[1] and left[0][1] == 13
    assert llama.config._attn_implementation == implementation
    assert_same(llama, draft, prompt_of(6))


def test_profile_reports_every_phase(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(2, 2), profile=True)
    out = llama.generate(
        prompt_of(6), max_new_tokens=8, assistant_model=draft, return_dict_in_generate=True, pad_token_id=0
    )
    rounds = len(out.accept_lengths[0])
    counts = {"prefill": 1, "grow": rounds, "verify": rounds, "accept": rounds, "commit": rounds}
    assert {phase: len(seconds) for phase, seconds in out.phase_seconds.items()} == counts
    assert all(second > 0 for seconds in out.phase_seconds.values() for second in seconds)


def test_generation_config_object(llama):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8))
    config = GenerationConfig(max_new_tokens=9, do_sample=True, top_k=4, pad_token_id=0)
    torch.manual_seed(0)
    plain = llama.generate(prompt_of(6), generation_config=config)
    torch.manual_seed(0)
    assert llama.generate(prompt_of(6), generation_config=config, assistant_model=draft).tolist() == plain.tolist()


@pytest.mark.parametrize("own", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_how_a_models_own_generation_config_keeps_its_cache(own, llama, monkeypatch):
    draft = tiny_draft(llama, window=WINDOW, tree_shape=(4, 8))
    for name, value in own.items():
        monkeypatch.setattr(llama.generation_config, name, value)
    assert_same(llama, draft, prompt_of(6))
    options = {"max_new_tokens": 9, "pad_token_id": 0, "return_dict_in_generate": True}
    plain, ours = (llama.generate(prompt_of(6), **options, **by) for by in ({}, {"assistant_model": draft}))
    assert type(plain.get(CACHE)) is type(ours.get(CACHE))


@pytest.mark.parametrize("weights", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("shape, verified", [((4, 8, 8), 7), ((1, 1, 1), 2), ((2, 2, 2, 2), 5)], ids=str)
def test_a_draft_that_diverged_changes_no_text(weights, shape, verified):
    target = tiny_target("llama")
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        draft = tiny_draft(target, tree_shape=shape, verify_tokens=verified)
        draft.get_submodule(part).weight.data.fill_(weights)
        assert_same(target, draft, prompt_of(9))
        assert_same(target, draft, prompt_of(9).expand(3, -1), do_sample=True)


CALLS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "rows that end": {"eos_token_id": [3, 5]},
    "a penalty": {"repetition_penalty": 1.3, "do_sample": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_default_format_changes_no_text(default, call, llama):
    draft = tiny_draft(llama, draft_vocab_size=9)
    torch.set_default_dtype(default)
    try:
        for rows in (1, 3):
            assert_same(llama, draft, prompt_of(9).repeat(rows, 1), **CALLS[call])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_another_default_device_changes_no_text(family, call):
    """A tensor on "meta" holds no numbers, so one that names no device shows."""
    target = tiny_target(family)
    draft = tiny_draft(target, target_hidden_state=family == "llama")
    prompts, mask = prompt_of(9).repeat(3, 1), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0

    class Streamer:
        def put(self, value):
            assert value.device.type == "cpu"

        def end(self):
            pass

    texts = []
    for own in ({}, {"assistant_model": draft}):
        options = {"max_new_tokens": 24, "pad_token_id": 0} | CALLS[call] | own
        torch.manual_seed(7)
        torch.set_default_device("meta")
        try:
            batch = target.generate(prompts, attention_mask=mask, **options)
            draft.set_draft_vocab(range(9))
            cache = DynamicCache(config=target.config)
            alone = target.generate(prompts[:1], streamer=Streamer(), **{CACHE: cache}, **options)
        finally:
            torch.set_default_device(None)
            draft.set_draft_vocab(None)
        texts.append((batch.tolist(), alone.tolist()))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("pad", [-1, 13])
@pytest.mark.parametrize("returns", [False, True], ids=["text", "cache too"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_padding_that_no_model_can_embed(pad, returns, do_sample, llama):
    """Rows of different speed reach the longest length in different rounds; behind a row's end stands the padding."""
    ids = torch.cat([prompt_of(9, seed=seed) for seed in range(4)])
    options = {"max_new_tokens": 24, "do_sample": do_sample, "return_dict_in_generate": returns}
    for shape in ((1, 1, 1), (4, 8, 8)):
        draft = tiny_draft(llama, tree_shape=shape)
        for end in (99, 3):  # 99 never comes
            texts = []
            for own in ({"pad_token_id": 0}, {"pad_token_id": pad, "assistant_model": draft}):
                torch.manual_seed(7)
                out = llama.generate(ids, eos_token_id=end, **options, **own)
                texts.append((out.sequences if returns else out)[:, 9:])
            plain, ours = texts
            ends = plain == end
            assert ours.tolist() == plain.masked_fill(ends.cumsum(dim=1) > ends, pad).tolist()


def test_ids_of_32_bits(llama, draft):
    """Plain `generate` returns its own tokens' format, whatever the prompt's."""
    for rows in (1, 3):
        ids = prompt_of(9).repeat(rows, 1).int()
        plain = llama.generate(ids, max_new_tokens=12, pad_token_id=0)
        ours = llama.generate(ids, max_new_tokens=12, pad_token_id=0, assistant_model=draft)
        assert ours.dtype == plain.dtype == torch.int64 and ours.tolist() == plain.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 2])
def test_long_answers(family, rows):
    """2,500 new tokens: caches grow several times, windows slide, noise is drawn and forgotten."""
    target = tiny_target(family, max_position_embeddings=4096)
    draft = tiny_draft(target, tree_shape=(4, 8, 8))
    ids = torch.cat([prompt_of(9, seed=seed) for seed in range(rows)])
    assert_same(target, draft, ids, max_new_tokens=2500, do_sample=rows == 2)
