"""Timing a pair, and the judgement on two texts that differ."""

import pytest
import torch
from helpers import tiny_draft, tiny_target
from transformers.generation.streamers import BaseStreamer

from hf_longspec.evaluation import report
from hf_longspec.evaluation.side_by_side import Run, Stopwatch, Verdict, judge, run, warm_up
from hf_longspec.modeling.tree_longspec import TreeForm


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


@pytest.fixture
def target():
    return tiny_target("llama")


@pytest.fixture
def inputs():
    return {"input_ids": torch.randint(2, 13, (1, 20)), "attention_mask": torch.ones(1, 20, dtype=torch.long)}


def test_stopwatch_takes_the_prompt_for_no_token():
    recorder = Recorder()
    watch = Stopwatch(recorder)
    watch.put(torch.zeros(1, 20))
    assert watch.times == []
    watch.put(torch.tensor([1]))
    watch.put(torch.tensor([2]))
    watch.end()
    first, last = watch.times
    assert first < last
    assert len(recorder.values) == 3 and recorder.ended


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_run_writes_the_same_with_and_without_draft(target, inputs, sampling):
    draft = tiny_draft(target, profile=True)
    warm_up(target, inputs, draft, max_new_tokens=24, **sampling)
    plain = run(target, inputs, max_new_tokens=24, **sampling)
    speculative = run(target, inputs, draft, max_new_tokens=24, **sampling)
    assert plain.tokens == speculative.tokens and len(plain.tokens) == 24
    assert plain.accept_length == 1.0 and plain.phase_seconds == {}
    assert sum(speculative.accept_lengths) == 23  # the prefill emits the first token
    assert speculative.accept_length == 23 / len(speculative.accept_lengths)
    assert {"prefill", "grow", "verify", "accept", "commit"} == set(speculative.phase_seconds)
    assert plain.prefill_seconds > 0 and plain.decode_seconds > 0
    assert judge(target, inputs, plain.tokens, speculative.tokens).equal


def test_tokens_per_second_counts_what_was_decoded():
    assert Run([1, 2, 3], prefill_seconds=5.0, decode_seconds=0.5).tokens_per_second == 4.0
    assert Run([1], prefill_seconds=5.0, decode_seconds=0.0).tokens_per_second == 0.0


def test_float32_difference_is_never_excused(target, inputs):
    verdict = judge(target, inputs, [3, 4, 5], [3, 4, 6])
    assert verdict == Verdict(position=2) and not verdict.equal and not verdict.tie


def test_text_that_ends_early_is_never_excused(target, inputs):
    assert judge(target.bfloat16(), inputs, [3, 4, 5], [3, 4]) == Verdict(position=2)


def test_sampled_difference_is_not_weighed(target, inputs):
    assert judge(target.bfloat16(), inputs, [3, 4], [3, 5], sampled=True) == Verdict(position=1)


def test_one_token_cannot_be_read_in_two_ways(target):
    inputs = {"input_ids": torch.tensor([[3]])}
    assert judge(target.bfloat16(), inputs, [3], [4]) == Verdict(position=0)


def test_bfloat16_difference_is_weighed(target, inputs):
    """The target's best token against its second best and its worst; the gap is recomputed here."""
    target.bfloat16()
    plain = run(target, inputs, max_new_tokens=3, do_sample=False).tokens
    text = torch.cat([inputs["input_ids"], torch.tensor([plain[:2]])], dim=1)
    with torch.no_grad():
        logits = target(text).logits[0, -1].float()
    worst = int(logits.argmin())
    verdict = judge(target, inputs, plain, [*plain[:2], worst])
    assert verdict.position == 2
    assert verdict.gap == pytest.approx(float((logits[plain[2]] - logits[worst]).abs()), abs=0.05)
    assert verdict.noise is not None and not verdict.tie


def test_tie_is_within_twice_the_noise():
    assert Verdict(3, gap=0.2, noise=0.1).tie
    assert not Verdict(3, gap=0.21, noise=0.1).tie
    assert not Verdict(3, gap=0.0, noise=None).tie


def test_what_was_chosen_is_told_in_one_line():
    forms = [TreeForm((2, 3), 4), TreeForm((2, 3), 4), TreeForm(()), TreeForm((1,)), TreeForm((), 5)]
    run = Run([1], 1.0, 1.0, accept_lengths=[3, 4, 1, 2, 6], trees=forms)
    told = report.chosen(run)
    assert told.endswith(
        "2 levels and copies in 2 rounds (τ 3.50), nothing in 1 round (τ 1.00), 1 level in 1 round (τ 2.00), "
        "copies in 1 round (τ 6.00)"
    )
    assert report.chosen(Run([1], 1.0, 1.0)) == "" and "\n" not in told
