"""Memory of a call: the draft's state has the same bytes at any context, and nothing else grows but one cache."""

import contextlib
import gc
import weakref

import pytest
import torch
from helpers import quick_or_slow, tiny_draft, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_longspec.modeling import fast_engine_longspec, text_longspec
from hf_longspec.modeling.cache_layers_longspec import BUCKET
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.candidate_generator_longspec import DraftWindow
from hf_longspec.modeling.sampling_longspec import Noise

WINDOW, SHAPE, NEW = 16, (4, 8, 8), 40


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages made under it that are alive, and their peak since `restart`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = self.storages((args, kwargs))  # a view of a weight is not new
        for key, storage in self.storages(result).items():
            if key not in given and key not in self.known:
                self.note(storage)
        return result

    def storages(self, values):
        tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    def note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


class Probe(BaseStreamer):
    """Live bytes when each token arrives, and the peak since the one before."""

    def __init__(self, live):
        self.live, self.held, self.peaks = live, [], []

    def put(self, value):
        self.held.append(self.live.now)
        self.peaks.append(self.live.peak)
        self.live.peak = self.live.now

    def end(self):
        pass


def decode(target, draft, context, batch=1):
    """Bytes held while decoding after `context` tokens, their peak, and the bytes of one cache of that length."""
    ids = torch.randint(2, 13, (batch, context), generator=torch.Generator().manual_seed(0))
    draft.release()
    with LiveBytes() as live:
        probe = Probe(live)
        target.generate(ids, assistant_model=draft, max_new_tokens=NEW, streamer=probe, pad_token_id=0)
    config = target.config
    capacity = -(-(context + NEW + 1 + sum(SHAPE)) // BUCKET) * BUCKET
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * capacity * batch
    # the prompt, then the token of the prefill, then those of the rounds
    return min(probe.held[2:]), max(probe.peaks[3:]), cache


@pytest.mark.parametrize("reads", quick_or_slow([False, True], [True]), ids=["", "hidden state"])
def test_a_call_holds_one_cache_and_a_constant(reads):
    target = tiny_target("llama", max_position_embeddings=8192)
    draft = tiny_draft(target, window=WINDOW, tree_shape=SHAPE, target_hidden_state=reads)
    over, above = [], []
    for context in (1024, 7168):
        held, peak, cache = decode(target, draft, context)
        text = 8 * 2 * (context + NEW)  # the ids, and their copy while one more is appended
        over.append(held - cache)
        above.append(peak - held - text)
        assert 0 <= over[-1] - draft.state_bytes <= text + 64 * 1024
    # nothing but the cache and the text itself has grown with the context
    assert abs(over[1] - over[0]) <= 8 * 3 * 6144
    assert above[1] <= above[0] + 8 * 6144


def test_a_batch_holds_one_cache_and_a_constant_for_each_row():
    target = tiny_target("llama", max_position_embeddings=8192)
    draft = tiny_draft(target, window=WINDOW, tree_shape=SHAPE)
    batch, over = 3, []
    for context in (1024, 4096):
        held, peak, cache = decode(target, draft, context, batch)
        text = 8 * 3 * batch * (context + NEW)
        over.append(held - cache)
        assert 0 <= over[-1] - batch * draft.state_bytes <= text + batch * 64 * 1024
        assert peak - held <= text + batch * 256 * 1024  # what a round computes: no cache is copied
    assert over[1] - over[0] <= 8 * 3 * batch * 3072


@pytest.mark.parametrize("drawn", [False, True])
def test_noise_is_held_for_no_more_steps_than_the_lead(monkeypatch, drawn):
    """Rows get ahead of each other as far as they may; an answer is many leads long."""
    held, lead = [], 12
    original = Noise.draw_until

    def counted(self, step, vocab):
        original(self, step, vocab)
        held.append(len(self.draws))

    monkeypatch.setattr(Noise, "draw_until", counted)
    monkeypatch.setattr(text_longspec, "LEAD", lead)
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: drawn)
    target = tiny_target("llama")
    draft = tiny_draft(target, window=WINDOW, tree_shape=SHAPE)
    ids = torch.randint(2, 13, (4, 9), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": True, "temperature": 0.3, "max_new_tokens": 120, "pad_token_id": 0, "eos_token_id": 7}
    target.generate(ids, assistant_model=draft, **options)
    nodes = 1 + sum(SHAPE)
    assert held and max(held) <= lead + nodes + drawn * (len(SHAPE) + 1)


def test_plain_generate_holds_more_at_its_peak():
    """The instrument sees what it should: stock decoding copies the cache of a layer at every step."""
    target = tiny_target("llama", max_position_embeddings=8192)
    draft = tiny_draft(target, window=WINDOW, tree_shape=SHAPE)
    peaks = []
    for assistant in ({}, {"assistant_model": draft}):
        with LiveBytes() as live:
            probe = Probe(live)
            target.generate(torch.full((1, 4096), 5), max_new_tokens=8, streamer=probe, pad_token_id=0, **assistant)
        peaks.append(max(probe.peaks[3:]) - min(probe.held[2:]))
    one_layers_keys = 2 * 16 * 4 * 4096
    assert peaks[0] > 0.9 * one_layers_keys > 4 * peaks[1]


@pytest.mark.parametrize("window, tree", [(16, (4, 8, 8)), (512, (4, 16, 16, 16, 16)), (8, ()), (8, (3,))])
def test_state_bytes_is_what_a_window_occupies(window, tree):
    target = tiny_target("llama")
    draft = tiny_draft(target, window=window, tree_shape=tree)
    inner = 1 + sum(tree[:-1])
    state = DraftWindow(window, inner, (1, 2, 16), torch.float32, torch.device("cpu"))
    assert draft.state_bytes == state.nbytes
    batch = DraftWindow(window, inner, (5, 2, 16), torch.float32, torch.device("cpu"))
    assert batch.nbytes == 5 * draft.state_bytes


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_nothing_for_the_garbage_collector(monkeypatch, fails):
    """A cache of a long context in a cycle of references would hold its memory until Python looks for cycles."""
    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=(4, 8))
    caches = []
    create = SpeculativeCache.__init__

    def watched(self, *args, **kwargs):
        create(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    def criterion(input_ids, scores, **kwargs):
        assert not fails or input_ids.shape[1] < 12
        return torch.zeros(len(input_ids), dtype=torch.bool)

    monkeypatch.setattr(SpeculativeCache, "__init__", watched)
    gc.disable()
    try:
        with contextlib.suppress(AssertionError):
            target.generate(
                torch.arange(2, 9)[None],
                assistant_model=draft,
                max_new_tokens=20,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        assert [cache() for cache in caches] == [None, None]  # of the probe, and of the call
    finally:
        gc.enable()


@pytest.mark.parametrize("family", quick_or_slow(["llama", "mistral"], ["llama"]))
def test_no_round_leaves_tensors_to_the_garbage_collector(family):
    """Padding inside a prompt is a mask of each round; on a GPU its memory would be missed at once."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=WINDOW, tree_shape=SHAPE, attention_backend="eager", cuda_graphs=False)
    ids = torch.randint(2, 13, (1, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    left = []
    gc.collect()
    gc.disable()
    try:
        for tokens in (8, 8, 32):
            with LiveBytes() as live:
                target.generate(ids, attention_mask=mask, assistant_model=draft, max_new_tokens=tokens, pad_token_id=0)
            left.append(live.now)
    finally:
        gc.enable()
    assert left[2] <= left[1], f"bytes left of calls of 8, 8 and 32 tokens: {left}"
