"""Rounds ahead of the host: they end where plain `generate` ends, change nothing behind it, and leave all as it does.

CUDA graphs are played from tapes here, see tapes.py.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import CACHE, VOCAB, quick_or_slow, tiny_draft, tiny_target
from observation import differences, observe
from probes import Streamed
from texts import prompt_of
from transformers import DynamicCache, StoppingCriteriaList

from hf_longspec.evaluation.tiny_models import tiny_model
from hf_longspec.modeling import call_longspec, choice_longspec, fast_engine_longspec
from hf_longspec.modeling.choice_longspec import Chooser
from hf_longspec.modeling.fast_ahead_longspec import Ends, Flights, up_to_the_end
from hf_longspec.modeling.verification_longspec import Accepted, Walk

SHAPE = (4, 8, 8)


@pytest.fixture
def flights(captures, monkeypatch):
    """Return what is launched and landed: "up" and the numbers of tokens."""
    seen = []
    launch, land = Flights.launch, Flights.land

    def launched(self, *inputs):
        seen.append("up")
        launch(self, *inputs)

    def landed(self, call):
        outcome = land(self, call)
        seen.append(outcome.counts[0])
        return outcome

    monkeypatch.setattr(Flights, "launch", launched)
    monkeypatch.setattr(Flights, "land", landed)
    return seen


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", max_position_embeddings=512)


def assert_same(target, draft, ids, seed=3, **options):
    """Compare all that can be seen of a plain and an assisted call; returns the assisted call's."""
    options = {"max_new_tokens": 20, "pad_token_id": 0, "input_ids": ids} | options
    calls = [
        observe(target, lambda generate, case: generate(**options), SimpleNamespace(log=[]), seed, **assistant)
        for assistant in ({}, {"assistant_model": draft})
    ]
    assert differences(*calls) == []
    return calls[1]


@pytest.mark.parametrize("shape", [SHAPE, (13, 13), ()])
@pytest.mark.parametrize("length", quick_or_slow(range(1, 24), [1, 2, 3, 4, 5, 9, 17]))
def test_no_round_begins_behind_the_last_length(flights, target, shape, length):
    draft = tiny_draft(target, tree_shape=shape)
    assert_same(target, draft, prompt_of(9), max_new_tokens=length)
    ups, counts = flights.count("up"), [count for count in flights if count != "up"]
    assert ups == len(counts) and sum(counts) == length - 1 and all(counts)


def test_one_round_is_ahead(flights, target):
    draft = tiny_draft(target, tree_shape=())
    for _ in range(2):
        flights.clear()
        assert_same(target, draft, prompt_of(9), max_new_tokens=7)
        assert flights == ["up", "up", 1, "up", 1, "up", 1, "up", 1, "up", 1, 1]


@pytest.mark.parametrize("eos", quick_or_slow(range(VOCAB), [3, 5, 9]))
@pytest.mark.parametrize("more", [{}, {"return_dict_in_generate": True}, {"eos_token_id": [5, 9]}])
def test_an_end_of_text_within_a_path(flights, target, eos, more):
    """A round that was launched meanwhile writes nothing, and the cache that is returned has no more than plain's."""
    draft = tiny_draft(target, tree_shape=(13, 13))
    for start in range(3):
        flights.clear()
        assert_same(target, draft, prompt_of(9, seed=start), max_new_tokens=40, **{"eos_token_id": eos} | more)
        counts = [count for count in flights if count != "up"]
        assert len(counts) <= flights.count("up") <= len(counts) + 1 and all(counts)


def test_an_end_of_text_that_is_the_first_token(flights, target):
    draft = tiny_draft(target, tree_shape=SHAPE)
    first = int(target.generate(prompt_of(9), max_new_tokens=1, pad_token_id=0)[0, -1])
    assert_same(target, draft, prompt_of(9), eos_token_id=first)
    assert flights == []


def test_a_cache_of_the_user(flights, target):
    """Over two turns; the second begins behind what the first has written."""
    draft, turns = tiny_draft(target, tree_shape=SHAPE), []
    for assistant in ({}, {"assistant_model": draft}):
        cache, ids, texts = DynamicCache(), prompt_of(9), []
        for _ in range(2):
            ids = target.generate(ids, max_new_tokens=12, pad_token_id=0, **{CACHE: cache}, **assistant)
            texts.append((ids.tolist(), [layer.keys.clone() for layer in cache.layers]))
        turns.append(texts)
    for plain, ours in zip(*turns, strict=True):
        assert plain[0] == ours[0]
        for mine, theirs in zip(plain[1], ours[1], strict=True):
            torch.testing.assert_close(mine, theirs)
    assert flights.count("up") > 4


def test_stores_that_grow_below_a_round(flights, monkeypatch):
    """The device has kept more than the host knows when they are copied."""
    monkeypatch.setattr(call_longspec, "HEADROOM", 20)
    target = tiny_target("llama", max_position_embeddings=2048)
    draft = tiny_draft(target, tree_shape=(13, 13))
    for seed in range(3):
        assert_same(target, draft, prompt_of(215 + seed), max_new_tokens=80)
    assert flights


def test_scores_that_are_no_distribution(flights, target):
    """The same error at the same token, with the cache and the generator where plain decoding leaves them."""
    draft = tiny_draft(target, tree_shape=())

    class Wrong(type(target)):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            length = kwargs[CACHE].get_seq_length() if kwargs.get(CACHE) is not None else 0
            outputs.logits = torch.where(outputs.logits.argmax(-1, keepdim=True) == 5, torch.nan, outputs.logits)
            return outputs if length >= 0 else None

    wrong = Wrong(target.config).eval()
    wrong.load_state_dict(target.state_dict())
    for seed in range(4):
        found = assert_same(wrong, draft, prompt_of(9, seed=seed), do_sample=True, max_new_tokens=60)
    assert found is not None


@pytest.mark.parametrize("at", [0, 2, 5])
def test_an_interrupt(flights, monkeypatch, target, at):
    """The user's cache is as long as the text that the host has seen, and the next call is right."""
    draft, cache = tiny_draft(target, tree_shape=SHAPE), DynamicCache()
    expected = target.generate(prompt_of(9), max_new_tokens=20, pad_token_id=0)
    land, landed = Flights.land, []

    def interrupted(self, call):
        if len(landed) == at:
            raise KeyboardInterrupt
        outcome = land(self, call)
        landed.append(outcome.counts[0])
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(Flights, "land", interrupted)
        with pytest.raises(KeyboardInterrupt):
            target.generate(prompt_of(9), assistant_model=draft, max_new_tokens=20, pad_token_id=0, **{CACHE: cache})
    known = 9 + sum(landed)
    assert cache.get_seq_length() == known
    fresh = DynamicCache()
    target(expected[:, :known], **{CACHE: fresh})
    for mine, theirs in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    assert_same(target, draft, prompt_of(9))


GROUNDED = {
    "a batch": {"input_ids": prompt_of(9).repeat(2, 1)},
    "a streamer": {"streamer": Streamed([])},
    "a criterion": {
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores: torch.zeros(len(ids), dtype=bool)])
    },
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("what", GROUNDED)
def test_what_needs_the_host_each_round(flights, target, what):
    draft = tiny_draft(target, tree_shape=SHAPE)
    target.generate(
        **{"input_ids": prompt_of(9), "max_new_tokens": 9, "pad_token_id": 0, "assistant_model": draft}
        | GROUNDED[what]
    )
    assert flights == []


def test_a_profile_is_of_phases(flights, target):
    assert_same(target, tiny_draft(target, tree_shape=SHAPE, profile=True), prompt_of(9))
    assert flights == []


@pytest.mark.parametrize("returned", [False, True])
def test_rings(flights, returned):
    """A ring forgets what came before it: a cache that is returned keeps pace with the host."""
    target = tiny_target("mistral")
    options = {"return_dict_in_generate": True} if returned else {}
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), prompt_of(30), max_new_tokens=30, **options)
    assert bool(flights) is not returned


@pytest.mark.parametrize(
    "tokens, counts, length, kept, ended",
    [
        ([1, 2, 3, 4], 4, 10, 4, False),
        ([1, 7, 3, 4], 4, 10, 2, True),  # an end of text
        ([1, 2, 3, 7], 3, 10, 3, False),  # behind the path
        ([1, 2, 3, 4], 4, 17, 3, True),  # the longest is 20
        ([1, 2, 3, 4], 3, 17, 3, True),
        ([1, -1, 3, 4], 4, 10, 2, True),  # no token
        ([1, 2, 3, 4], 0, 10, 0, False),  # the host has to pick
    ],
)
def test_up_to_the_end(tokens, counts, length, kept, ended):
    path, picked = torch.arange(4)[None], torch.tensor([tokens])
    walk = Walk(
        Accepted(path, torch.tensor([counts]), None), torch.cat([path, picked, torch.tensor([[counts]])], dim=1)
    )
    ends = Ends(torch.tensor([7, 9]), torch.tensor(20), torch.tensor(1))
    for stopped in (False, True):
        bounds = torch.tensor([[0], [length - 1]])
        call = SimpleNamespace(
            roots=SimpleNamespace(stopped=torch.tensor([stopped]), tokens=torch.tensor([11]), written=None),
            cache=SimpleNamespace(bounds_on=lambda device, bounds=bounds: bounds),
        )
        (accepted, table), over = up_to_the_end(call, walk, ends)
        now = 0 if stopped else kept
        assert accepted.counts.tolist() == [now] == table[:, -1].tolist()
        assert accepted.newest.tolist() == [max(tokens[now - 1], 0) if now else 11]
        assert stopped or over.tolist() == [ended]


@pytest.mark.parametrize("verify_tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("do_sample", [False, True])
def test_fewer_nodes_than_levels_are_verified(flights, monkeypatch, target, verify_tokens, do_sample):
    """A pruned tree has fewer levels, and a round fewer steps, than the draft has grown."""
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    draft = tiny_draft(target, tree_shape=SHAPE, verify_tokens=verify_tokens)
    for seed in range(2):
        assert_same(target, draft, prompt_of(9), seed, do_sample=do_sample)
    assert flights.count("up") > 6


@pytest.mark.parametrize("do_sample", [False, True])
def test_forms_that_change_from_round_to_round(flights, captures, monkeypatch, target, do_sample):
    """A round that lands tells the form that it was launched with, and reports what the round before it wrote."""
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    monkeypatch.setattr(choice_longspec, "LEAST", 0.0)
    dice, launched, learned = random.Random(do_sample), [], []
    launch, learn = Flights.launch, Chooser.learn
    monkeypatch.setattr(Chooser, "_choose", lambda self: self._take(dice.choice(self.ladder)))
    monkeypatch.setattr(
        Flights, "launch", lambda self, call, table: launched.append(call) or launch(self, call, table)
    )
    monkeypatch.setattr(
        Chooser, "learn", lambda self, outcome, *told: learned.append(outcome) or learn(self, outcome, *told)
    )
    draft = tiny_draft(target, tree_shape="auto")
    for seed in range(4):
        launched.clear()
        learned.clear()
        assert_same(target, draft, prompt_of(9, seed=seed), seed, do_sample=do_sample, max_new_tokens=40)
        assert [outcome.form for outcome in learned] == [call.form for call in launched][: len(learned)]
        ladder = launched[0].chooser.ladder
        for before, after in zip(learned, learned[1:], strict=False):
            (report,) = after.reports
            assert (report.wrote, ladder[report.rung]) == (before.counts[0], before.form)
    assert len({call.form for call in launched}) == len(ladder) == 5 and len(captures) == sum(captures) >= 5


@pytest.mark.parametrize("new", [16, 24])
@pytest.mark.parametrize("do_sample", [False, True])
def test_positions_of_the_users_own_near_the_end_of_a_table(flights, monkeypatch, new, do_sample):
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    target = tiny_model("gpt2")  # 256 positions
    draft = tiny_draft(target, tree_shape=SHAPE)
    inputs = {"position_ids": torch.arange(256 - 10 - new, 256 - new)[None], "max_new_tokens": new}
    assert_same(target, draft, prompt_of(10), do_sample=do_sample, **inputs)
    embeds = target.get_input_embeddings()(prompt_of(255 - new)).detach()
    plain = {"inputs_embeds": embeds, "max_new_tokens": new, "pad_token_id": 0, "do_sample": do_sample}
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(3)
        texts.append(target.generate(**plain, **assistant).tolist())
    assert texts[0] == texts[1] and flights == []


def test_a_streamer_that_draws(monkeypatch, target):
    """Random numbers of its own come between the sampler's, one step after the other."""
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)

    class Drawing:
        def put(self, value):
            torch.rand(1)

        def end(self):
            pass

    assert_same(target, tiny_draft(target, tree_shape=SHAPE), prompt_of(9), do_sample=True, streamer=Drawing())
