"""How texts of `hf-longspec bench text` are judged: equal to plain `generate`'s, parted at a tie, or different."""

import pytest
import torch
from helpers import VOCAB, tiny_target

from hf_longspec.benchmark import judging
from hf_longspec.benchmark.sampling import prepared
from hf_longspec.benchmark.text import padded_prompts, write

OPTIONS = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 0}
SEED = 5


def batch(target):
    torch.manual_seed(1)
    return padded_prompts(torch.randint(2, VOCAB, (60,)), [30, 55], 20, 0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5},
        SAMPLED,
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_picks_are_those_of_generate(sampling):
    target = tiny_target("llama")
    inputs, options = batch(target), OPTIONS | sampling
    text = write(target, inputs, SEED, **options)
    picking = judging.Picking(*prepared(target, inputs, options), SEED)
    logits = judging.plain_logits(target, inputs, SEED, **options)
    for step in range(10):
        picks = picking.picks(text[:, : 20 + step], logits[:, step], step)
        assert picks.tolist() == text[:, 20 + step].tolist()


def test_a_tie_of_sampled_tokens():
    """Counted by hand: at temperature T, the pick has the greatest logit + T x (-log of an exponential draw)."""
    target = tiny_target("llama")
    inputs, options = batch(target), OPTIONS | SAMPLED | {"temperature": 0.5}
    text = write(target, inputs, SEED, **options)
    logits = judging.plain_logits(target, inputs, SEED, **options)[:, 3]
    torch.manual_seed(SEED)
    draws = [torch.empty(2, VOCAB).exponential_() for _ in range(4)]
    best, second = (logits[1] - 0.5 * draws[3][1].log()).topk(2)
    pair, gap = tuple(second.tolist()), float(best[0] - best[1])
    assert pair[0] == text[1, 23]
    picking = judging.Picking(*prepared(target, inputs, options), SEED)
    assert picking.is_tie(text[:, :23], logits, 3, 1, pair, 0.51 * gap)
    assert not picking.is_tie(text[:, :23], logits, 3, 1, pair, 0.49 * gap)


@pytest.mark.parametrize(
    "cut, chances", [({"top_k": 2}, [0.5, 0.251, 0.249]), ({"top_p": 0.8}, [0.5, 0.305, 0.195])], ids=str
)
def test_a_tie_at_the_place_of_a_cut(cut, chances):
    """The last of three tokens is just cut off, or just kept by logits that differ a little: then it may be picked."""
    target = tiny_target("llama", vocab_size=3)
    ids = torch.tensor([[1, 2]])
    call = prepared(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, OPTIONS | SAMPLED | cut)
    cut_off = torch.tensor([chances]).log()
    kept = cut_off + torch.tensor([0, 0, 0.06])
    parted = 0
    for seed in range(100):
        picking = judging.Picking(*call, seed)
        tokens = [int(picking.picks(ids, logits, 0)) for logits in (cut_off, kept)]
        assert tokens[0] != 2
        if tokens[0] != tokens[1]:
            parted += 1
            for pair, logits in ((tokens, cut_off), (tokens[::-1], kept)):
                assert picking.is_tie(ids, logits, 0, 0, tuple(pair), 0.04)
                assert not picking.is_tie(ids, logits, 0, 0, tuple(pair), 0.0)
    assert parted > 10


@pytest.mark.parametrize("noise, verdict", [(None, "different"), (0.0, "different"), (100.0, "tie")])
def test_verdicts_of_sampled_rows(monkeypatch, noise, verdict):
    """One text of three is changed at its fifth token."""
    target = tiny_target("llama").to(torch.float32 if noise is None else torch.bfloat16)
    if noise is not None:
        judge = judging.side_by_side.judge
        monkeypatch.setattr(
            judging.side_by_side,
            "judge",
            lambda *args, **options: (
                found if (found := judge(*args, **options)).equal else judging.side_by_side.Verdict(4, 9.0, noise)
            ),
        )
    inputs, options = batch(target), OPTIONS | SAMPLED
    plain = write(target, inputs, SEED, **options)
    ours = plain.clone()
    ours[1, 24] = (ours[1, 24] + 1) % VOCAB
    assert judging.judged(target, inputs, plain, plain, options, SEED) == ["equal", "equal"]
    assert judging.judged(target, inputs, plain, ours, options, SEED) == ["equal", verdict]


def test_a_penalty_counts_in_a_greedy_tie():
    """The penalty alone parts two tokens of equal logits: rounding noise does not explain that the other is picked."""
    target = tiny_target("llama")
    inputs = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    options = OPTIONS | {"do_sample": False, "repetition_penalty": 2.0}
    picking = judging.Picking(*prepared(target, inputs, options), SEED)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 5] = 8.0, 7.9
    assert picking.picks(inputs["input_ids"], logits, 0).tolist() == [5]
    assert not picking.is_tie(inputs["input_ids"], logits, 0, 0, (5, 4), 1.0)
    assert picking.is_tie(inputs["input_ids"], logits, 0, 0, (5, 4), 5.0)
