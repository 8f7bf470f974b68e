"""`hf-longspec bench latency`: filled caches, which rounds are counted, and the floors."""

import json

import pytest
import torch
from helpers import tiny_draft, tiny_target
from transformers import DynamicCache, StaticCache

from hf_longspec.benchmark import latency, shapes, tables
from hf_longspec.benchmark.timing import Replay, Speed

CPU = torch.device("cpu")
SPEED = Speed(bandwidth=1000.0, operations=1000.0)


@pytest.fixture
def pair():
    return shapes.random_pair("tiny", CPU, torch.float32, 1000, window=8, tree_shape=(2, 3))


def held(target, tokens):
    ids = torch.randint(1, target.config.vocab_size, (1, tokens + 1))
    return latency.Prompt(ids, shapes.filled(target, tokens))


def test_all_steps_of_all_contexts(pair):
    bench = latency.Bench(*pair, SPEED, rounds=3)
    results = [bench.measure(context, (3, 5), static=True) for context in (64, 128)]
    for result in results:
        names = [step.name for step in result.steps]
        assert names == [
            "generate",
            "generate, static cache",
            "one token",
            "verify 3",
            "verify 5",
            "level 1, 2 nodes",
            "level 2, 3 nodes",
            "round",
        ]
        steps = dict(zip(names, result.steps, strict=True))
        assert all(step.count >= 3 and step.host is None for step in result.steps)
        assert all(step.milliseconds > 0 for name, step in steps.items() if not name.startswith("level"))
        assert set(steps["round"].phases) == {"grow", "verify", "accept", "commit"}
        assert steps["round"].phases["verify"] == steps["verify 5"].milliseconds
        json.loads(json.dumps(result.as_dict()))
    # keys and values of 2 heads of 16 in a window of 8, a slot for padding, the root and the first level
    assert [result.draft_state_bytes for result in results] == [4 * 2 * 2 * 16 * (8 + 1 + 1 + 2)] * 2
    assert [result.cache_bytes for result in results] == [4 * 2 * 2 * 2 * 16 * context for context in (64, 128)]
    assert tables.latency_table(results).row_count == 8 + 4 + 5


def test_floors(pair):
    """Counted by hand from the shape: 2 layers, 32 wide, 48 inside, 4 and 2 heads of 16, 101 tokens; 4 bytes each."""
    attention, norm = 32 * 64 + 2 * 32 * 32 + 64 * 32, 32
    layer = attention + 3 * 32 * 48 + 2 * norm
    head, cached = 101 * 32, 2 * 2 * 16 * 70  # K and V of 70 tokens in one layer
    target = 2 * layer + norm + head  # of the embedding only a row
    # the draft's second attention has no K and V of its own; biases of its three projections and of the other query
    draft = layer + norm + 2 * 32 * 64 + (64 + 32 + 32) + 64
    pair[1].config.tree_shape = (2,)
    bench = latency.Bench(*pair, SPEED, rounds=1)
    floors = {step.name: step.floor for step in bench.measure(70, (3,), static=False).steps}
    assert (pair[1].config.tree_shape, pair[1].config.verify_tokens, pair[1].config.profile) == ((2,), None, False)
    assert floors["generate"] == floors["one token"] == floors["verify 3"] == 4 * (target + 2 * cached)
    assert floors["level 1, 2 nodes"] == 4 * (draft + head + cached)
    assert floors["round"] == floors["verify 3"] + floors["level 1, 2 nodes"]


def test_a_tied_embedding_is_read_as_the_head():
    untied, tied = (tiny_target("llama", tie_word_embeddings=value) for value in (False, True))
    assert shapes.read_bytes(untied) == shapes.read_bytes(tied)
    assert shapes.read_bytes(tied) == sum(parameter.nbytes for parameter in tied.parameters())


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_named_shapes(name):
    with torch.device("meta"):
        target, draft = shapes.random_pair(name, torch.device("meta"), torch.bfloat16, 2048)
    expected = {"smollm2-135m": 0.1345, "llama-1b": 1.236, "llama-8b": 8.030}  # billions
    expected |= {"qwen2.5-0.5b": 0.4940, "qwen2.5-1.5b": 1.544}
    parameters = sum(parameter.numel() for parameter in target.parameters())
    assert name == "tiny" or parameters / 1e9 == pytest.approx(expected[name], rel=1e-3)
    assert target.dtype == draft.dtype == torch.bfloat16 and not target.training
    assert draft.config.target_num_hidden_layers == target.config.num_hidden_layers


def test_a_shape_that_is_not_known():
    with pytest.raises(ValueError, match="expected a shape among tiny, .*llama-8b, got 'llama-9b'"):
        shapes.random_pair("llama-9b", CPU, torch.float32, 100)


@pytest.mark.parametrize("static", [False, True])
def test_caches_are_filled_and_cut(pair, static):
    target, _ = pair
    cache = StaticCache(config=target.config, max_cache_len=20) if static else DynamicCache(config=target.config)
    shapes.fill(cache, target, 10)
    assert int(cache.get_seq_length()) == 10
    first = [layer.keys[:, :, :10].clone() for layer in cache.layers]
    assert all(0.8 < keys.std() < 1.2 for keys in first) and not torch.equal(first[0], first[1])
    shapes.fill(cache, target, 3)
    shapes.cut(cache, 10)
    assert int(cache.get_seq_length()) == 10
    assert all(torch.equal(layer.keys[:, :, :10], keys) for layer, keys in zip(cache.layers, first, strict=True))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_reads_one_token_and_leaves_the_cache(pair, speculative):
    target, draft = pair
    draft.config.profile = True
    prompt = held(target, 40)
    keys = [layer.keys.clone() for layer in prompt.cache.layers]
    lengths = []
    hook = target.model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    rounds = latency.call(target, prompt, draft if speculative else None, 5)
    hook.remove()
    assert lengths[0] == 1 and max(lengths) == (6 if speculative else 1)
    assert len(rounds.seconds) >= 5 and len(rounds.ends) == len(rounds.seconds) + 1
    assert all(second > 0 for second in rounds.seconds)
    assert all(len(seconds) == len(rounds.seconds) for seconds in rounds.phases.values())
    assert all(torch.equal(layer.keys, own) for layer, own in zip(prompt.cache.layers, keys, strict=True))


def test_rounds_that_accept_much_are_as_many():
    """A draft that guesses every token of the vocabulary is right in every round, so that one call is not enough."""
    target = tiny_target("llama", max_position_embeddings=512)
    target.generation_config.pad_token_id = 0
    draft = tiny_draft(target, tree_shape=(13, 169))
    rounds = latency.call(target, held(target, 30), draft, 6)
    assert rounds.accept_length > 2.5 and len(rounds.seconds) >= 6


def test_replays_belong_to_the_round_in_which_they_were_launched():
    class Event:
        """Of a clock in milliseconds, as CUDA's tell it."""

        def __init__(self, at):
            self.at = at

        def elapsed_time(self, later):
            return later.at - self.at

    replays = [Replay(at, Event(0), Event(took)) for at, took in ((0.5, 100), (1.5, 3), (1.6, 4), (2.5, 9), (3.5, 50))]
    rounds = latency.Rounds([1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], {}, 1.0, replays)
    assert rounds.replayed() == 9  # of 7, 9 and 50
    assert rounds._replace(replays=[]).replayed() is None


@pytest.mark.gpu
def test_latency_on_a_gpu():
    pair = shapes.random_pair("tiny", torch.device("cuda"), torch.bfloat16, 4000, tree_shape=(4, 8))
    bench = latency.Bench(*pair, Speed(4e12, 8e14), rounds=8)
    result = bench.measure(1000, (8,), static=False)
    steps = {step.name: step for step in result.steps}
    for name in ("one token", "round"):
        assert steps[name].host < steps[name].milliseconds  # of two calls: below zero where they differ by more
    assert result.peak_bytes > result.cache_bytes
    # the phases are one line of time: they come to a round, but for what the host does between them
    assert sum(steps["round"].phases.values()) < 2 * steps["round"].milliseconds
