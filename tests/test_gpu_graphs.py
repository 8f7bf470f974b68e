"""CUDA graphs: captured once for all calls of a kind, the same text, and eager launches where that is impossible."""

import gc
import threading
import weakref

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from probes import Stops

from hf_longspec.modeling import fast_graphs_longspec

pytestmark = pytest.mark.gpu


def prompt_of(length, batch=1):
    return torch.randint(2, 13, (batch, length), generator=torch.Generator().manual_seed(length)).cuda()


@pytest.fixture
def captures(monkeypatch):
    """The outcome of every attempt to capture a phase."""
    outcomes = []
    capture = fast_graphs_longspec.Graphs._capture

    def watched(self, *inputs):
        outcomes.append(capture(self, *inputs))
        return outcomes[-1]

    monkeypatch.setattr(fast_graphs_longspec.Graphs, "_capture", watched)
    return outcomes


def assert_same(target, draft, ids, **options):
    options = {"max_new_tokens": 40, "pad_token_id": 0} | options
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(3)
        texts.append(target.generate(ids, **options, **assistant).tolist())
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "cohere2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_phases_are_captured_once(family, batch, captures):
    """Whatever prompts and lengths; where the sampler differs, only the phase that draws is captured anew."""
    target = tiny_target(family).cuda()
    draft = tiny_draft(target, tree_shape=(4, 8, 8))
    for length, new in ((9, 40), (30, 12), (3, 60)):
        assert_same(target, draft, prompt_of(length, batch), max_new_tokens=new)
    moe = family == "gpt_oss"  # whose experts may ask the host how many tokens they get
    first = 1 if batch == 1 else 4  # a whole round, or its phases
    assert captures == [True] * first or (moe and not all(captures)), captures
    for count, options in enumerate(({}, {"repetition_penalty": 1.3}, {}), start=first + 1):
        for length in (9, 20):
            assert_same(target, draft, prompt_of(length, batch), do_sample=True, **options)
        assert captures == [True] * count or moe


def test_no_graphs_where_they_are_not_wanted(captures):
    target = tiny_target("llama").cuda()
    assert_same(target, tiny_draft(target, cuda_graphs=False), prompt_of(9))
    assert captures == []


def test_a_cache_that_moves_is_captured_anew(captures):
    """700 tokens are more than a call makes room for at first."""
    target = tiny_target("llama", max_position_embeddings=2048).cuda()
    draft = tiny_draft(target, tree_shape=(13, 60))
    assert_same(target, draft, prompt_of(9, 2), max_new_tokens=700)
    assert len(captures) > 4 and all(captures)
    count = len(captures)
    assert_same(target, draft, prompt_of(9, 2), max_new_tokens=700)
    assert len(captures) == count, "what has grown is kept"


def test_one_draft_for_several_targets_trees_and_batches():
    targets = [tiny_target("llama", seed=seed).cuda() for seed in (0, 5)]
    draft = tiny_draft(targets[0])
    for shape in ((4, 8), (1, 1, 1), (), (13, 60)):
        draft.config.tree_shape = shape
        for target in targets:
            for batch in (1, 4):
                assert_same(target, draft, prompt_of(11, batch), max_new_tokens=12)


def test_what_cannot_be_captured_runs_without(captures):
    """A forward that asks the host in its middle."""
    target = tiny_target("llama").cuda()
    target.model.layers[1].register_forward_hook(lambda module, inputs, output: float(output.sum()) and None)
    assert_same(target, tiny_draft(target), prompt_of(9))
    assert captures.count(False) == 1 and captures.index(False) == len(captures) - 1
    # torch's own random numbers are not lost by a capture that fails
    assert_same(target, tiny_draft(target), prompt_of(9), do_sample=True)
    torch.rand(3, device="cuda")


def test_asked_for_by_name_and_not_to_be_had():
    target = tiny_target("phi3").cuda()
    draft = tiny_draft(target, cuda_graphs=True)
    target.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be had here: the frequencies of longrope"):
        draft.check_engine(target, torch.device("cuda"), False)


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_a_draft_keeps_the_same_memory_from_call_to_call():
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    held = []
    for length in (9, 9, 30, 3):
        assert_same(target, draft, prompt_of(length), max_new_tokens=20)
        held.append(allocated())
    assert held[1] == held[2] == held[3]


@pytest.mark.parametrize("how", ["release", "delete", "fail", "return the cache"])
def test_memory_is_given_back(how):
    target = tiny_target("llama").cuda()
    options = {"max_new_tokens": 20, "pad_token_id": 0}
    draft = tiny_draft(target)
    assert_same(target, draft, prompt_of(9))  # libraries keep memory of their own
    draft.release()
    base = allocated()
    assert_same(target, draft, prompt_of(9))
    assert allocated() > base
    if how == "release":
        draft.release()
    elif how == "fail":
        with pytest.raises(KeyboardInterrupt, match="stop"):
            target.generate(prompt_of(9), assistant_model=draft, streamer=Stops(9), **options)
    elif how == "return the cache":
        target.generate(prompt_of(9), assistant_model=draft, return_dict_in_generate=True, **options)
    else:
        weights = sum(parameter.numel() * 4 for parameter in draft.parameters())
        del draft
        assert allocated() <= base - weights
        return
    assert allocated() == base
    assert_same(target, draft, prompt_of(9))


@pytest.mark.parametrize("at", [2, 3, 4, 9])
def test_a_call_after_one_that_was_cut_off(at):
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    for _ in range(2):
        assert_same(target, draft, prompt_of(9))
        with pytest.raises(KeyboardInterrupt, match="stop"):
            target.generate(prompt_of(9), assistant_model=draft, streamer=Stops(at), max_new_tokens=20, pad_token_id=0)
    assert_same(target, draft, prompt_of(9), do_sample=True)


def test_returned_caches_between(captures):
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    caches = []
    for _ in range(2):
        assert_same(target, draft, prompt_of(9))
        out = target.generate(
            prompt_of(9), assistant_model=draft, return_dict_in_generate=True, max_new_tokens=20, pad_token_id=0
        )
        caches.append((out[CACHE], [layer.keys.clone() for layer in out[CACHE].layers]))
    assert_same(target, draft, prompt_of(20))
    for cache, keys in caches:
        assert all(torch.equal(layer.keys, held) for layer, held in zip(cache.layers, keys, strict=True))
    assert captures == [True] * 3


def test_changed_weights(captures):
    """In place they need no capture; elsewhere they do."""
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    texts = [assert_same(target, draft, prompt_of(9))]
    target.load_state_dict({name: value * 1.3 for name, value in target.state_dict().items()})
    texts.append(assert_same(target, draft, prompt_of(9)))
    assert captures == [True]
    target.load_state_dict({name: value * 1.3 for name, value in target.state_dict().items()}, assign=True)
    texts.append(assert_same(target, draft, prompt_of(9)))
    assert captures == [True] * 2 and texts[0] != texts[1] != texts[2]


def test_targets_take_turns_and_may_go(captures):
    targets = [tiny_target("llama", seed=seed).cuda() for seed in (0, 5)]
    draft = tiny_draft(targets[0])
    for target in targets * 2:
        assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 4
    del target
    gone = weakref.ref(targets[1]), weakref.ref(targets[1].lm_head.weight)
    del targets[1]
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    others = [torch.full((512,), float("nan"), device="cuda") for _ in range(2000)]  # where its weights were
    assert_same(targets[0], draft, prompt_of(9))
    del others


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_switched_between_calls(captures):
    peft = pytest.importorskip("peft")
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    base = assert_same(target, draft, prompt_of(9))
    config = {"r": 4, "init_lora_weights": False}
    wrapped = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj", "v_proj"], **config))
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["k_proj", "down_proj"], **config))
    wrapped.cuda().eval()
    first = assert_same(wrapped, draft, prompt_of(9))
    assert assert_same(wrapped, draft, prompt_of(9)) == first and len(captures) == 2
    wrapped.set_adapter("second")
    second = assert_same(wrapped, draft, prompt_of(9))
    with wrapped.disable_adapter():
        assert assert_same(wrapped, draft, prompt_of(9)) == base
    wrapped.set_adapter("default")
    assert assert_same(wrapped, draft, prompt_of(9)) == first
    wrapped.merge_adapter()
    assert_same(wrapped, draft, prompt_of(9))
    wrapped.unmerge_adapter()
    assert_same(wrapped, draft, prompt_of(9))
    assert len({str(text) for text in (base, first, second)}) == 3 and all(captures)


def test_other_streams(captures):
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    for stream in [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.default_stream()]:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):
                assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 3


def test_nothing_of_an_earlier_call_is_seen(captures):
    for family in ("llama", "mistral"):
        target = tiny_target(family).cuda()
        draft = tiny_draft(target)
        assert_same(target, draft, prompt_of(9))
        for keys, values in draft._engines.kept.memory:
            keys.fill_(float("nan")), values.fill_(float("inf"))
        assert_same(target, draft, prompt_of(9))
    assert captures == [True] * 2


def test_threads_share_a_draft():
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target)
    plain = [target.generate(prompt_of(length), max_new_tokens=60, pad_token_id=0).tolist() for length in (9, 17)]
    texts: dict[int, list] = {}

    def work(index):
        ids = prompt_of((9, 17)[index])
        for _ in range(6):
            out = target.generate(ids, assistant_model=draft, max_new_tokens=60, pad_token_id=0)
            texts.setdefault(index, []).append(out.tolist())

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: [plain[index]] * 6 for index in (0, 1)}


def test_phases_are_timed_by_events():
    target = tiny_target("llama").cuda()
    draft = tiny_draft(target, profile=True)
    for shape in ((4, 8, 8), ()):
        draft.config.tree_shape = shape
        out = target.generate(
            prompt_of(9), assistant_model=draft, max_new_tokens=40, return_dict_in_generate=True, pad_token_id=0
        )
        assert set(out.phase_seconds) == {"prefill", "grow", "verify", "accept", "commit"}
        assert all(second >= 0 for seconds in out.phase_seconds.values() for second in seconds)


def test_two_threads_on_one_target():
    target = tiny_target("llama").cuda()
    drafts = [tiny_draft(target), tiny_draft(target, seed=7)]
    plain = [target.generate(prompt_of(length), max_new_tokens=60, pad_token_id=0).tolist() for length in (9, 17)]
    texts: dict[int, list] = {}

    def work(index):
        ids = prompt_of((9, 17)[index])
        for _ in range(5):
            out = target.generate(ids, assistant_model=drafts[index], max_new_tokens=60, pad_token_id=0)
            texts.setdefault(index, []).append(out.tolist())

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: [plain[index]] * 5 for index in (0, 1)}
