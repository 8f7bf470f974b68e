"""Targets and drafts are shared: by threads, processes, several drafts or targets, by the call behind one cut off."""

import copy
import multiprocessing
import pickle
import random
import sys
import threading

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache

OPTIONS = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": False}


def prompt_of(length, seed=0):
    return torch.randint(2, 13, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def eager_switching():
    """Threads take turns so often that every call is cut in the middle of its forwards."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*calls):
    """What each call returned or raised, all of them running at once."""
    results = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_threads_on_one_target(family, eager_switching):
    """Two with drafts of different shape, one without: texts as each writes them alone."""
    target = tiny_target(family)
    drafts = [tiny_draft(target, window=8, tree_shape=(4, 8, 8)), None, tiny_draft(target, window=5, seed=3)]
    lengths = [5, 17, 30]
    alone = [target.generate(prompt_of(length), **OPTIONS).tolist() for length in lengths]
    implementation = target.config._attn_implementation

    def texts(draft):
        assistant = {} if draft is None else {"assistant_model": draft}
        return [target.generate(prompt_of(length), **OPTIONS, **assistant).tolist() for length in lengths]

    assert in_threads(*(lambda draft=draft: texts(draft) for draft in drafts)) == [alone] * 3
    assert target.config._attn_implementation == implementation
    assert AttentionInterface._longspec.switched == {}


def test_threads_share_a_draft(eager_switching):
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8)
    alone = [target.generate(prompt_of(length), **OPTIONS).tolist() for length in (5, 17)]
    calls = [
        lambda length=length: target.generate(prompt_of(length), assistant_model=draft, **OPTIONS).tolist()
        for length in (5, 17)
    ]
    assert in_threads(*calls) == alone


def test_threads_share_a_draft_over_targets_of_two_formats(eager_switching):
    """The draft is cast for one target while the other's call runs: that call has the draft as it began with it."""
    targets = [tiny_target("llama"), tiny_target("llama").to(torch.float64)]
    draft = tiny_draft(targets[0], window=8, tree_shape=(2, 2))
    alone = [target.generate(prompt_of(9), **OPTIONS).tolist() for target in targets]

    def texts(target):
        return [target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist() for _ in range(3)]

    texts_of = in_threads(*(lambda target=target: texts(target) for target in targets))
    assert texts_of == [[text] * 3 for text in alone]
    assert draft._engines.calls == 0 and all(p.dtype == draft.dtype for p in draft.parameters())


def test_a_call_within_a_call_casts_no_draft_under_it():
    target, other = tiny_target("llama"), tiny_target("llama").to(torch.float64)
    draft = tiny_draft(target, window=8, tree_shape=(2, 2))
    options, inner = OPTIONS | {"max_new_tokens": 4}, []

    def processor(ids, scores):
        inner.append(other.generate(prompt_of(5), assistant_model=draft, **options).tolist())
        return scores

    text = target.generate(prompt_of(9), assistant_model=draft, logits_processor=[processor], **options)
    assert text.tolist() == target.generate(prompt_of(9), **options).tolist() and draft.dtype == torch.float32
    assert inner == [other.generate(prompt_of(5), **options).tolist()] * 4


def in_a_round(target, act, at=2):
    """Call `act` once in another thread, in the middle of the target's `at`-th forward of a round."""
    rounds = []

    def hook(module, inputs, output):
        if AttentionInterface._longspec.attention.get() is not None:
            rounds.append(None)
            if len(rounds) == at:
                handle.remove()
                thread = threading.Thread(target=act)
                thread.start()
                thread.join()

    handle = target.model.layers[1].register_forward_hook(hook)


def test_an_attention_set_while_another_thread_is_in_a_round_stays():
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8)
    text = target.generate(prompt_of(9), **OPTIONS).tolist()
    in_a_round(target, lambda: target.set_attn_implementation("eager"))
    assert target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist() == text
    assert target.config._attn_implementation == "eager"
    assert AttentionInterface._longspec.switched == {}
    assert target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist() == text
    assert target.config._attn_implementation == "eager"


def test_what_is_copied_or_pickled_during_a_round_has_the_targets_own_attention():
    target = tiny_target("llama")
    made = []

    def act():
        assert target.config._attn_implementation != "sdpa"
        folded = pickle.dumps(target)
        made.extend([copy.deepcopy(target), pickle.loads(folded), copy.deepcopy(target.config)])
        assert b"longspec|" not in folded

    in_a_round(target, act)
    target.generate(prompt_of(9), assistant_model=tiny_draft(target), **OPTIONS)
    configs = [getattr(one, "config", one) for one in made]
    assert [(type(one._attn_implementation), one._attn_implementation) for one in configs] == [(str, "sdpa")] * 3


def assert_same(target, draft, length=9):
    plain = target.generate(prompt_of(length), **OPTIONS)
    assert target.generate(prompt_of(length), assistant_model=draft, **OPTIONS).tolist() == plain.tolist()


def test_two_drafts_take_turns_on_one_target():
    target = tiny_target("llama")
    drafts = [tiny_draft(target, window=8), tiny_draft(target, seed=5, window=3, tree_shape=(2, 2, 2), target_layer=1)]
    for draft in drafts * 2:
        assert_same(target, draft)


def test_one_draft_takes_turns_on_targets_that_fit():
    targets = [tiny_target("llama"), tiny_target("llama", seed=9), tiny_target("qwen2"), tiny_target("llama")]
    targets[3].to(torch.float64)
    draft = tiny_draft(targets[0], window=8)
    for target in targets * 2:
        assert_same(target, draft)
        assert draft.dtype == target.dtype


def test_a_target_that_does_not_fit_is_refused_in_between():
    target, other = tiny_target("llama"), tiny_target("llama", hidden_size=64)
    draft = tiny_draft(target, window=8)
    assert_same(target, draft)
    with pytest.raises(ValueError, match="hidden_size: draft has 32, target has 64"):
        other.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    assert_same(target, draft)
    assert_same(other, tiny_draft(other))


# Copies, other processes, changed weights


def test_copies():
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8)
    assert_same(target, draft)
    both = (target, draft)
    for twins in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), (copy.copy(target), copy.copy(draft))):
        for one, other in (twins, (target, twins[1]), (twins[0], draft)):
            assert_same(one, other)


@pytest.mark.parametrize("vocab", [None, 9])
def test_weights_that_change_between_calls(vocab):
    """Nothing that a call has kept is older than the weights of the next."""
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8, draft_vocab_size=vocab)
    others = tiny_target("llama", seed=5).state_dict(), tiny_draft(target, seed=6, draft_vocab_size=vocab).state_dict()
    head = torch.nn.Parameter(torch.randn_like(target.lm_head.weight))
    changes = [
        lambda: target.load_state_dict(others[0]),
        lambda: draft.load_state_dict(others[1]),
        lambda: target.model.layers[3].mlp.down_proj.weight.data.mul_(3),
        lambda: setattr(target.lm_head, "weight", head),
        lambda: target.to(torch.float64),
        lambda: target.to(torch.float32),
        lambda: draft.to(torch.bfloat16),
    ]
    texts = []
    for change in changes:
        change()
        assert_same(target, draft)
        texts.append(str(target.generate(prompt_of(9), **OPTIONS).tolist()))
    assert len(set(texts)) == 3, "the changes change nothing: nothing is tested"


def write(target, draft, sender):
    torch.set_num_threads(1)
    sender.send(target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_other_processes(method):
    """While and behind calls of their own, two children and their parent write the same text."""
    target = tiny_target("llama")
    draft = tiny_draft(target, window=8)
    expected = target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist()
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    children = [context.Process(target=write, args=(target, draft, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    assert_same(target, draft)
    assert [receiver.recv() for receiver, _ in pipes] == [expected] * 2
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


class InterruptedAt(TorchDispatchMode):
    """Control-C at the `at`-th tensor operation; counts them."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt("control-C")
        return func(*args, **(kwargs or {}))


def state_of(target):
    """All that a call could leave changed, apart from weights."""
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in target.modules()]
    shared = AttentionInterface._longspec
    return {
        "config": target.config.to_dict(),
        "generation config": target.generation_config.to_dict(),
        "attention": target.config._attn_implementation,
        "training": [module.training for module in target.modules()],
        "hooks": hooks,
        "attributes": set(vars(target)),
        "rounds": shared.attention.get(),
        "switched": dict(shared.switched),
    }


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_after_an_interrupt_anywhere_the_target_is_as_it_was(family):
    target = tiny_target(family)
    draft = tiny_draft(target, window=8, tree_shape=(4, 8))
    options = OPTIONS | {"max_new_tokens": 12, "assistant_model": draft}
    target.generate(prompt_of(9), **options)  # probes the target, once
    before = state_of(target)
    with InterruptedAt() as operations:
        text = target.generate(prompt_of(9), **options).tolist()
    places = random.Random(0).sample(range(1, operations.count), 20)
    for place in places:
        with pytest.raises(KeyboardInterrupt, match="control-C"), InterruptedAt(place):
            target.generate(prompt_of(9), **options)
        assert state_of(target) == before
    assert target.generate(prompt_of(9), **options).tolist() == text


class Fails:
    """A forward that raises when its module is called for the `at`-th time. No hook, for these are probed."""

    def __init__(self, module, at):
        self.module, self.forward, self.at, self.count = module, module.forward, at, 0
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("out of memory")
        return self.forward(*args, **kwargs)

    def remove(self):
        del self.module.forward


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_cache_outlives_a_round_that_failed(family):
    """Whether draft or target fails, at its first layer or its last: the user goes on with what was written."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=8, tree_shape=(4, 8))
    first, ids = prompt_of(7), torch.cat([prompt_of(7), prompt_of(4, seed=1)], dim=1)
    places = {
        "draft": draft.mlp,
        "first layer": target.get_decoder().layers[0].mlp,
        "last layer": target.get_decoder().layers[-1].self_attn.o_proj,
        "head": target.get_output_embeddings(),
    }
    text = target.generate(ids, max_new_tokens=20, pad_token_id=0)
    target.generate(ids, max_new_tokens=1, pad_token_id=0, assistant_model=draft)  # probes the target, once
    for name, module in places.items():
        for at in (2, 3, 6):
            cache = DynamicCache(config=target.config)
            with torch.no_grad():
                target(first, **{CACHE: cache}, use_cache=True)
            fails = Fails(module, at)
            with pytest.raises(RuntimeError, match="out of memory"):
                target.generate(ids, **{CACHE: cache}, assistant_model=draft, max_new_tokens=20, pad_token_id=0)
            fails.remove()
            held = {layer.get_seq_length() for layer in cache.layers}
            assert len(held) == 1 and ids.shape[1] <= min(held) < text.shape[1], name
            for assistant in ({}, {"assistant_model": draft}):
                so_far = text[:, : cache.get_seq_length() + 1]
                options = {"max_length": so_far.shape[1] + 2, "pad_token_id": 0, CACHE: cache}
                options["attention_mask"] = torch.ones_like(so_far)  # the text has pad tokens of its own
                rest = target.generate(so_far, **options, **assistant)
                assert rest.tolist() == text[:, : rest.shape[1]].tolist(), name
