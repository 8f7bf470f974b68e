"""What a draft keeps of a call for the next one: nothing captured twice, nothing stale, all given back.

CUDA graphs are played from tapes here, see tapes.py.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import CACHE, quick_or_slow, tiny_draft, tiny_target
from probes import Stops
from texts import prompt_of
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from hf_longspec.modeling import cache_layers_longspec, call_longspec, fast_engine_longspec
from hf_longspec.modeling.cache_layers_longspec import BUCKET, SLACK
from hf_longspec.modeling.engine_longspec import Engine, Engines
from hf_longspec.modeling.fast_engine_longspec import FastEngine
from hf_longspec.modeling.fast_graphs_longspec import Graphs, Settled

SHAPE = (4, 8, 8)


def assert_same(target, draft, ids, seed=3, own_cache=False, **options):
    """Text of plain and assisted `generate`; returns it."""
    options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False} | options
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(seed)
        own = {CACHE: DynamicCache()} if own_cache else {}
        out = target.generate(ids, **options, **own, **assistant)
        texts.append(out.sequences.tolist() if options.get("return_dict_in_generate") else out.tolist())
    assert texts[0] == texts[1]
    return texts[0]


def batch_of(*lengths):
    longest = max(lengths)
    ids = torch.stack([prompt_of(longest, seed=length)[0] for length in lengths])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture
def pair():
    target = tiny_target("llama", max_position_embeddings=4096)
    return target, tiny_draft(target, tree_shape=SHAPE)


# --- the next call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    quick_or_slow(["llama", "mistral", "gemma3_text", "gemma2", "cohere2", "granite"], ["llama", "gemma3_text"]),
)
@pytest.mark.parametrize("shape", quick_or_slow([SHAPE, (1, 1, 1), ()], [SHAPE, ()]))
def test_calls_of_one_shape_are_captured_once(captures, monkeypatch, family, shape):
    """Whatever their prompts, lengths and samplers; only the drawing is captured anew where the sampler differs."""
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    target = tiny_target(family)
    draft = tiny_draft(target, tree_shape=shape)
    for count, length in enumerate((9, 30, 3, 9)):
        assert_same(target, draft, prompt_of(length), max_new_tokens=(20, 5, 30, 20)[count])
        assert len(captures) == 1, "a whole round"
    drawn = [{"temperature": 0.7}, {"repetition_penalty": 1.3}, {"temperature": 0.7}]
    for count, options in enumerate(drawn, start=2):
        for length in (4, 17):
            assert_same(target, draft, prompt_of(length), do_sample=True, **options)
            assert all(captures) and len(captures) == count
    assert_same(target, draft, prompt_of(12))
    assert len(captures) == 4, "the largest logits are found as before"


@pytest.mark.parametrize("family", quick_or_slow(["llama", "mistral", "gemma3_text"], ["llama", "gemma3_text"]))
def test_batches_of_one_size_are_captured_once(captures, family):
    """Rows of other lengths, padding before and within, ends of text at other places."""
    target = tiny_target(family)
    draft = tiny_draft(target, tree_shape=SHAPE)
    for lengths in ((9, 4, 17), (20, 20, 20), (3, 30, 5)):
        for eos in (5, 7):
            assert_same(target, draft, **batch_of(*lengths), eos_token_id=eos)
    assert captures == [True] * 4
    holes = batch_of(12, 12, 7)
    holes["attention_mask"][:, 8] = 0
    assert_same(target, draft, **holes)
    holes["attention_mask"][0, 3] = 0
    assert_same(target, draft, **holes)
    assert captures == [True] * 8, "no end of text, and a mask of the prompt"


def test_nothing_is_captured_where_graphs_are_not_wanted(captures, pair):
    """Rounds between others that are captured, too."""
    target, draft = pair
    for wanted, expected in ((False, 0), (True, 1), (False, 1)):
        draft.config.cuda_graphs = wanted
        assert_same(target, draft, prompt_of(9), max_new_tokens=9)
        assert len(captures) == expected


def test_padding_that_follows_is_part_of_a_round(captures, pair):
    target, draft = pair
    for options in ({}, {"return_dict_in_generate": True, "output_scores": True}, {}):
        assert_same(target, draft, **batch_of(9, 4), eos_token_id=5, **options)
    assert all(captures) and len(captures) >= 8


def test_memory_is_used_again(pair):
    target, draft = pair
    places = []
    for length in (9, 200, 40):
        assert_same(target, draft, prompt_of(length))
        places.append([keys.data_ptr() for keys, _ in draft._engines.kept.memory])
    assert places[0] == places[1] == places[2] and len(places[0]) == 4


def test_memory_that_has_grown_is_kept(captures, monkeypatch, pair):
    target, draft = pair
    monkeypatch.setattr(call_longspec, "HEADROOM", 20)
    assert_same(target, draft, prompt_of(200), max_new_tokens=80)
    grown = draft._engines.kept.memory[0][0]
    assert len(captures) == 2 and grown.shape[2] == 2 * BUCKET
    assert_same(target, draft, prompt_of(200), max_new_tokens=80)
    assert len(captures) == 2 and draft._engines.kept.memory[0][0] is grown


def test_memory_much_too_large_is_given_up(monkeypatch, pair):
    target, draft = pair
    assert_same(target, draft, prompt_of(1500))
    large = draft._engines.kept.memory[0][0].shape[2]
    assert_same(target, draft, prompt_of(9))
    small = draft._engines.kept.memory[0][0].shape[2]
    assert small == BUCKET and large > SLACK * small
    monkeypatch.setattr(cache_layers_longspec, "SLACK", 1)
    assert_same(target, draft, prompt_of(400))
    assert draft._engines.kept.memory[0][0].shape[2] == 2 * BUCKET


def test_nothing_of_an_earlier_call_is_seen(captures):
    """Not even what is no number: a masked slot still meets the weights."""
    for family in ("llama", "mistral", "gemma3_text"):
        target = tiny_target(family)
        draft = tiny_draft(target, tree_shape=SHAPE)
        expected = assert_same(target, draft, prompt_of(9))
        workspace = draft._engines.kept
        for keys, values in workspace.memory:
            keys.fill_(float("nan")), values.fill_(float("inf"))
        for tensor in torch.utils._pytree.tree_leaves(workspace.settled.state):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        assert assert_same(target, draft, prompt_of(9)) == expected
        assert len(captures) == 1
        captures.clear()


# --- what is captured anew -------------------------------------------------------------------------------------------


def other_tree(target, draft):
    draft.config.tree_shape = (2, 2)


def fewer_tokens_verified(target, draft):
    draft.config.verify_tokens = 5


def other_backend(target, draft):
    draft.config.attention_backend = "eager"


def new_weights_elsewhere(target, draft):
    target.load_state_dict({name: value * 1.3 for name, value in target.state_dict().items()}, assign=True)


def new_weights_of_the_draft(target, draft):
    draft.mlp.up_proj.weight = torch.nn.Parameter(draft.mlp.up_proj.weight * 2)


def another_scaling(target, draft):
    for layer in target.model.layers:
        layer.self_attn.scaling *= 2


def another_option_of_the_target(target, draft):
    target.config.logits_scaling = 3.0  # which the draft's logits follow


def a_layer_in_training(target, draft):
    target.model.layers[2].train()


def guesses_among_few_tokens(target, draft):
    draft.set_draft_vocab([7, 2, 12, 3, 9])


CHANGES = [other_tree, fewer_tokens_verified, other_backend, new_weights_elsewhere, new_weights_of_the_draft]
CHANGES += [another_scaling, another_option_of_the_target, a_layer_in_training, guesses_among_few_tokens]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_captured(captures, pair, change):
    target, draft = pair
    assert_same(target, draft, prompt_of(9))
    change(target, draft)
    for _ in range(2):
        assert_same(target, draft, prompt_of(9))
        assert captures == [True] * 2


def test_weights_changed_in_place_need_no_capture(captures, pair):
    target, draft = pair
    texts = [assert_same(target, draft, prompt_of(9))]
    target.load_state_dict({name: value * 1.3 for name, value in target.state_dict().items()})
    texts.append(assert_same(target, draft, prompt_of(9)))
    assert texts[0] != texts[1] and captures == [True]


def test_rows_of_a_changed_head_are_captured(captures, pair):
    """A draft of few tokens keeps a copy of their rows, and takes another where the head has changed."""
    target, draft = pair
    draft.set_draft_vocab([7, 2, 12, 3, 9])
    assert_same(target, draft, prompt_of(9))
    with torch.no_grad():
        target.lm_head.weight.mul_(-1)
    assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 2


def test_targets_take_turns(captures):
    targets = [tiny_target("llama", seed=seed) for seed in (0, 5)]
    draft = tiny_draft(targets[0], tree_shape=SHAPE)
    for target in targets * 2:
        for batch in (1, 3):
            assert_same(target, draft, prompt_of(9).repeat(batch, 1))
    assert captures == [True] * 20, "a whole round, or its four phases"


def test_a_hook_may_do_what_it_likes(captures, pair):
    target, draft = pair
    factor = [1.0]
    target.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * factor[0])
    texts = []
    for factor[0] in (1.0, 3.0):
        texts.append(assert_same(target, draft, prompt_of(9)))
    assert texts[0] != texts[1] and captures == [True] * 2


def test_a_forward_that_asks_the_host_is_tried_once_a_call(captures, pair):
    target, draft = pair
    hook = target.model.layers[1].register_forward_hook(lambda module, inputs, output: float(output.sum()) and None)
    for _ in range(2):
        assert_same(target, draft, prompt_of(9))
    assert captures == [False] * 2
    hook.remove()
    assert_same(target, draft, prompt_of(9))
    assert captures[2:] == [True]


def test_arguments_of_a_users_own_reach_a_replay(captures, pair):
    """They lie elsewhere in each call; the user's own tensor is left alone."""

    class Biased(type(pair[0])):
        def forward(self, *args, bias=None, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits if bias is None else outputs.logits + bias
            return outputs

    target, draft = Biased(pair[0].config).eval(), pair[1]
    target.load_state_dict(pair[0].state_dict())
    biases = [8 * torch.randn(13) for _ in range(3)]
    before = [bias.clone() for bias in biases]
    texts = [assert_same(target, draft, prompt_of(9), bias=bias) for bias in biases]
    assert texts[0] != texts[1] != texts[2] and captures == [True]
    assert all(torch.equal(*both) for both in zip(biases, before, strict=True))
    assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 2


def test_inside_inference_mode_and_out_of_it(captures, pair):
    target, draft = pair
    for inside in (False, True, True, False):
        with torch.inference_mode(inside):
            assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 3


# --- whose memory it is ----------------------------------------------------------------------------------------------


def test_a_cache_that_is_returned_has_memory_of_its_own(captures, pair):
    target, draft = pair
    options = {"max_new_tokens": 20, "pad_token_id": 0, "assistant_model": draft}
    assert_same(target, draft, prompt_of(9))
    kept = draft._engines.kept.memory[0][0].data_ptr()
    out = target.generate(prompt_of(9), return_dict_in_generate=True, **options)
    assert captures == [True], "memory and graphs serve it"
    assert out[CACHE].layers[0].keys.data_ptr() != kept and draft._engines.kept is None
    held = [(layer.keys.clone(), layer.values.clone()) for layer in out[CACHE].layers]
    for length in (9, 20):
        assert_same(target, draft, prompt_of(length))
    for layer, (keys, values) in zip(out[CACHE].layers, held, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_cache_passed_in_between(captures, pair):
    target, draft = pair
    for own in (False, True, False, True):
        assert_same(target, draft, prompt_of(9), own_cache=own)
        assert (draft._engines.kept is None) is own


@pytest.mark.parametrize("at", [2, 3, 4, 9])
def test_a_call_that_was_cut_off_leaves_nothing(captures, pair, at):
    target, draft = pair
    for _ in range(2):
        assert_same(target, draft, prompt_of(9))
        with pytest.raises(KeyboardInterrupt, match="stop"):
            target.generate(prompt_of(9), assistant_model=draft, streamer=Stops(at), max_new_tokens=20, pad_token_id=0)
        assert draft._engines.kept is None
    assert_same(target, draft, prompt_of(9))


def test_a_call_within_a_call_has_memory_of_its_own(captures, pair):
    """As two threads on one draft have."""
    target, draft = pair
    inner = []

    def call(ids, scores):
        if ids.shape[1] == 15:
            inner.append(assert_same(target, draft, prompt_of(30), max_new_tokens=8))
        return scores

    alone = assert_same(target, draft, prompt_of(30), max_new_tokens=8)
    for _ in range(2):
        assert_same(target, draft, prompt_of(9), logits_processor=LogitsProcessorList([call]))
    assert inner == [alone] * 4


def test_criteria_of_a_users_own(captures, pair):
    target, draft = pair
    for at in (14, 20):
        stop = StoppingCriteriaList([lambda ids, scores, at=at, **kwargs: torch.tensor([ids.shape[1] >= at])])
        assert_same(target, draft, prompt_of(9), stopping_criteria=stop)
    assert captures == [True] * 4


def test_a_call_that_is_refused_leaves_the_next_one_its_memory(captures, pair):
    target, draft = pair
    assert_same(target, draft, prompt_of(9))
    kept = draft._engines.kept
    draft.config.attention_backend = "flash_attn_2"
    with pytest.raises(ValueError, match="attention_backend='flash_attn_2' cannot run here"):
        target.generate(prompt_of(9), assistant_model=draft, max_new_tokens=4, pad_token_id=0)
    draft.config.attention_backend = "auto"
    assert draft._engines.kept is kept
    assert_same(target, draft, prompt_of(9))
    assert captures == [True]


# --- how long it lives -----------------------------------------------------------------------------------------------


def references(workspace):
    return [weakref.ref(keys) for keys, _ in workspace.memory] + [weakref.ref(workspace)]


def test_all_is_given_back_when_asked_for(captures, pair):
    target, draft = pair
    assert_same(target, draft, prompt_of(9))
    held = references(draft._engines.kept)
    gc.disable()  # nothing is left to the garbage collector
    try:
        draft.release()
        assert [reference() for reference in held] == [None] * 5
    finally:
        gc.enable()
    assert_same(target, draft, prompt_of(9))


def test_a_deleted_draft_takes_its_workspace_along(captures):
    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=SHAPE)
    assert_same(target, draft, prompt_of(9))
    held = references(draft._engines.kept)
    del draft
    gc.collect()
    assert [reference() for reference in held] == [None] * 5


def test_a_deleted_target_is_not_kept_alive(captures):
    targets = [tiny_target("llama"), tiny_target("llama", seed=5)]
    draft = tiny_draft(targets[0], tree_shape=SHAPE)
    assert_same(targets[0], draft, prompt_of(9))
    gone = weakref.ref(targets[0])
    del targets[0]
    gc.collect()
    assert gone() is None
    assert_same(targets[0], draft, prompt_of(9))
    assert captures == [True] * 2


def test_a_copy_of_a_draft_begins_without(captures, pair):
    target, draft = pair
    assert_same(target, draft, prompt_of(9))
    for other in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert other._engines is not draft._engines and other._engines.kept is None
        assert_same(target, other, prompt_of(9))
    assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 3


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_one_workspace_is_nobody_elses():
    engines, cpu = Engines(), torch.device("cpu")
    first = engines.take(FastEngine, cpu)
    assert isinstance(first, FastEngine)
    engines.keep(first)
    assert engines.take(FastEngine, cpu) is first
    second = engines.take(FastEngine, cpu)
    assert second is not first
    engines.keep(second)
    engines.keep(first)
    assert engines.take(FastEngine, cpu) is first and engines.take(FastEngine, cpu) not in (first, second)
    engines.keep(first)
    assert type(engines.take(Engine, cpu)) is Engine and engines.kept is None, "another kind of engine"
    first.stream = 7
    engines.keep(first)
    assert engines.take(FastEngine, cpu) is not first, "what another stream works on"


def test_settle_writes_over_what_is_alike():
    settled = Settled()
    first = {"a": torch.arange(3), "b": (torch.zeros(2, 2), None, 5)}
    ours = settled.put("x", first)
    assert torch.equal(ours["a"], first["a"]) and ours["a"] is not first["a"]
    again = settled.put("x", {"a": torch.tensor([7, 8, 9]), "b": (torch.ones(2, 2), None, 5)})
    assert again is ours and ours["a"].tolist() == [7, 8, 9] and ours["b"][0].tolist() == [[1, 1], [1, 1]]
    assert first["a"].tolist() == [0, 1, 2]
    others = [{"a": torch.arange(4)}, {"a": torch.arange(3)}, {"a": torch.arange(3).int()}, {"a": None}]
    for other in others:
        held = settled.state["x"]
        assert settled.put("x", other) is not held


def test_graphs_are_forgotten_where_anything_differs():
    settled, graphs = Settled(), Graphs()
    settled.put("x", torch.arange(3))
    graphs.require((("a", 1), settled.location))
    graphs.captured[test_settle_writes_over_what_is_alike] = None
    graphs.require((("a", 1), settled.location))
    assert graphs.captured
    settled.put("x", torch.arange(4))
    graphs.require((("a", 1), settled.location))
    assert not graphs.captured
    graphs.captured[test_settle_writes_over_what_is_alike] = None
    graphs.require((("a", 2), settled.location))
    assert not graphs.captured
