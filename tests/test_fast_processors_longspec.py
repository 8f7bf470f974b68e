"""Logits processors on the device against transformers' own objects, on any scores and texts, walk after walk.

A text on the device is ids in a buffer and a length; behind it lies what is of no text. What is expected comes from
transformers' processor on the ids of each row alone.
"""

import functools
import inspect
import math
import random

import pytest
import torch
from helpers import quick_or_slow
from tapes import Tape
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from hf_longspec.modeling import fast_processors_longspec, sampling_longspec
from hf_longspec.modeling.fast_graphs_longspec import plain
from hf_longspec.modeling.fast_processors_longspec import Texts, are_on_device, begin, follow, on_device

VOCAB, ROOM = 13, 32
INF, NAN = math.inf, math.nan
FOR_EACH_ROW = "torch.Tensor" in str(inspect.signature(stock.RepetitionPenaltyLogitsProcessor.__init__))
# Sequences longer than most texts here, one in another, several with one last token, and one of every length.
SEQUENCES = [[5], [2, 6], [7, 1], [1], [1, 6], [3, 1, 6], [2, 2, 2, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
# By name: makers of processors that do something to texts of up to about twenty tokens.
MADE = {
    "EpsilonLogitsWarper": [lambda make: make(0.05), lambda make: make(0.3, min_tokens_to_keep=3)],
    "EtaLogitsWarper": [
        lambda make: make(0.2),
        lambda make: make(0.02, min_tokens_to_keep=1),
        lambda make: make(0.9, min_tokens_to_keep=50),
    ],
    "ExponentialDecayLengthPenalty": [lambda make: make((1, 1.4), 3, 4), lambda make: make((0, 0.9), [3, 5], 9)],
    "ForcedBOSTokenLogitsProcessor": [lambda make: make(5)],
    "ForcedEOSTokenLogitsProcessor": [lambda make: make(9, 3), lambda make: make(7, [3, 5])],
    "InfNanRemoveLogitsProcessor": [lambda make: make()],
    "LogitNormalization": [lambda make: make()],
    "MinLengthLogitsProcessor": [lambda make: make(9, 3), lambda make: make(7, [3, 5, 400])],
    "MinNewTokensLengthLogitsProcessor": [lambda make: make(4, 3, 3), lambda make: make(2, 6, [3, 5, 400])],
    "MinPLogitsWarper": [lambda make: make(0.2), lambda make: make(0.9, min_tokens_to_keep=3)],
    "NoBadWordsLogitsProcessor": [lambda make: make(SEQUENCES), lambda make: make([[2, 6], [3]], 3)],
    "NoRepeatNGramLogitsProcessor": [functools.partial(lambda size, make: make(size), size) for size in (1, 2, 3, 30)],
    "RepetitionPenaltyLogitsProcessor": [
        lambda make: make(1.7),
        lambda make: make(0.6),
        lambda make: make(1.7, prompt_ignore_length=6),
        lambda make: make(1.7, prompt_ignore_length=0),
    ],
    "SequenceBiasLogitsProcessor": [
        lambda make: make([[tokens, 0.7 * index - 2] for index, tokens in enumerate(SEQUENCES)]),
        lambda make: make({(5,): -INF, (2, 6): INF, (1, 2): -1.5}),
    ],
    "SuppressTokensAtBeginLogitsProcessor": [lambda make: make([2, 7, 400], 8), lambda make: make([1], 1)],
    "SuppressTokensLogitsProcessor": [lambda make: make([2, 7, 400])],
    "TemperatureLogitsWarper": [lambda make: make(0.7)],
    "TopHLogitsWarper": [lambda make: make(0.4), lambda make: make(1.0)],
    "TopKLogitsWarper": [lambda make: make(4), lambda make: make(1, min_tokens_to_keep=2), lambda make: make(500)],
    "TopPLogitsWarper": [lambda make: make(0.7), lambda make: make(0.1, min_tokens_to_keep=3)],
    "TypicalLogitsWarper": [lambda make: make(0.6), lambda make: make(0.1, min_tokens_to_keep=3)],
}
CASES = [(name, number) for name, makers in MADE.items() for number in range(len(makers))]
if FOR_EACH_ROW:
    CASES.append(("RepetitionPenaltyLogitsProcessor", "a length for each row"))
FIRST = [6, 0, 2, 40]  # the lengths of the last case, one a row


def processor(name, number, rows=slice(None)):
    """Make a fresh processor of transformers for some rows of a batch."""
    make = getattr(stock, name)
    if number == "a length for each row":
        return make(1.7, prompt_ignore_length=torch.tensor(FIRST[rows]))
    return MADE[name][number](make)


def stock_scores(makers, ids, lengths, scores):
    """Return what transformers' processors make of the scores of each row, its own text alone in view.

    None for a row which they refuse: `Categorical`, which measures entropy, checks that logits are a distribution.
    """
    rows = []
    for row, length in enumerate(lengths):
        alone = slice(row, row + 1)
        chain = LogitsProcessorList([make(alone) for make in makers])
        try:
            rows.append(chain(ids[alone, :length].clone(), scores[alone].clone())[0])
        except ValueError as error:
            assert "satisfy the constraint IndependentConstraint(Real(), 1)" in str(error)
            rows.append(None)
    return rows


def assert_same(found, expected, bits=True):
    """The same numbers, to the last bit unless sums are made in another order; the same infinities and NaN.

    What transformers refuses has no probabilities.
    """
    assert found.dtype == torch.float32
    tolerance = 0.0 if bits else 4 * torch.finfo(torch.float32).eps * 20  # of up to 20: a few additions of biases
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert mine.softmax(-1).isnan().all()
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, equal_nan=True)


def scores_of(kind, batch, vocab, generator):
    scores = 2 * torch.randn(batch, vocab, generator=generator)
    if kind == "coarse":  # ties, zeros and a minus zero
        scores = scores.round()
        scores[:, 1] = -0.0
    elif kind == "one value":
        scores.fill_(-1.5)
    elif kind == "bfloat16":
        scores = scores.bfloat16().float()
    elif kind == "few possible":
        scores = scores.masked_fill(torch.rand(batch, vocab, generator=generator) < 0.7, -INF)
        scores[:, 4] = 0.5
    elif kind == "infinite":
        scores[:, 3], scores[-1, 5], scores[0, 2] = -INF, INF, torch.finfo(torch.float32).max
    elif kind == "no numbers":
        scores[0, 3], scores[-1, 5] = NAN, INF
    elif kind == "impossible":
        scores[-1] = -INF
    return scores


KINDS = ["any", "coarse", "one value", "bfloat16", "few possible", "infinite", "no numbers", "impossible"]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name, number", CASES)
def test_scores_are_those_of_transformers(name, number, batch):
    """Whatever the scores; texts from one token on, in buffers that are full of others behind them."""
    generator = torch.Generator().manual_seed(batch)
    acted = False
    for lengths in (
        [1, 2, 5, 9],
        [8, 6, 3, 30],
        [7, 7, 7, 7],
        [4, 12, 10, 8],
        [9, 8, 1, 11],
        [6, 6, 5, 4],
        [3, 8, 2, 6],
    ):
        lengths = lengths[:batch]
        for kind in KINDS:
            ids = torch.randint(0, 8, (batch, ROOM), generator=generator)
            scores = scores_of(kind, batch, VOCAB, generator)
            texts, before = Texts(ids, torch.tensor(lengths)), scores.clone()
            assert are_on_device([processor(name, number)])
            (ours,) = begin(on_device([processor(name, number, slice(batch))], VOCAB, texts), texts, 4)
            found = ours(scores, texts)
            assert torch.equal(scores.nan_to_num(7.7), before.nan_to_num(7.7)), "others read the same scores"
            expected = stock_scores([functools.partial(processor, name, number)], ids, lengths, scores)
            assert_same(found, expected, bits=name != "SequenceBiasLogitsProcessor")
            pairs = zip(expected, scores, strict=True)
            acted |= any(row is not None and not torch.equal(row, given) for row, given in pairs)
    idle = [("NoRepeatNGramLogitsProcessor", 3), ("TopKLogitsWarper", 2), ("EtaLogitsWarper", 2)]
    assert acted or (name, number) in idle or batch == 1 and number == "a length for each row"


@pytest.mark.parametrize("name", ["EtaLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"])
@pytest.mark.parametrize("vocab", [99, 101, 3000])
def test_vocabularies_of_other_sizes(name, vocab):
    """Top-h looks at a hundred tokens at most."""
    generator = torch.Generator().manual_seed(vocab)
    ids, lengths = torch.randint(0, vocab, (4, ROOM), generator=generator), [3, 1, 9, 4]
    texts = Texts(ids, torch.tensor(lengths))
    for number in range(len(MADE[name])):
        for kind in ("any", "coarse", "one value", "few possible", "impossible"):
            scores = scores_of(kind, 4, vocab, generator)
            (ours,) = on_device([processor(name, number)], vocab, texts)
            expected = stock_scores([functools.partial(processor, name, number)], ids, lengths, scores)
            assert_same(ours(scores, texts), expected)


# --- walks -----------------------------------------------------------------------------------------------------------


def walk_along(chain, batch, seed, rounds=5, levels=3, rests=True):
    """Walk as drawing does, a part of each walk becoming text, and compare every level; `chain`: makers by row."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8, (batch, 48), generator=generator)
    lengths = torch.tensor([rng.randrange(1, 12) for _ in range(batch)])
    ours = on_device([make(slice(batch)) for make in chain], VOCAB, Texts(ids, lengths))
    for _ in range(rounds):
        here = lengths.clone()
        walking = begin(ours, Texts(ids, here), levels + 1)
        for level in range(levels + 1):
            scores = scores_of(rng.choice(KINDS[:6]), batch, VOCAB, generator)
            found = scores
            for each in walking:
                found = each(found, Texts(ids, here))
            assert_same(found, stock_scores(chain, ids, here.tolist(), scores), bits=False)
            token = torch.randint(0, 8, (batch,), generator=generator)
            ids.scatter_(1, here[:, None], token[:, None])
            if level == levels:
                break
            follow(walking, token, here)
            here = here + 1
        accepted = [rng.randrange(0 if rests else 1, levels + 2) for _ in range(batch)]
        lengths = lengths + torch.tensor(accepted)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name, number", CASES)
def test_walks_of_which_a_part_becomes_text(name, number, batch):
    """Tokens of a walk count in the walk, and what was not accepted never again; a row may rest."""
    for seed in range(3):
        walk_along([functools.partial(processor, name, number)], batch, seed)


@pytest.mark.parametrize("levels", [0, 1, 6])
def test_walks_of_other_depths(levels):
    chain = [("RepetitionPenaltyLogitsProcessor", 0), ("NoRepeatNGramLogitsProcessor", 2)]
    chain = [functools.partial(processor, *case) for case in chain]
    for seed in range(3):
        walk_along(chain, 4, seed, levels=levels)


@pytest.mark.parametrize("seed", quick_or_slow(range(60), range(12)))
def test_processors_one_after_the_other(seed):
    """Several in any order: each gets the scores of the one before it."""
    rng = random.Random(seed)
    # of equal scores transformers' sorts keep which they like where a processor before has made them equal
    chain = [functools.partial(processor, *case) for case in rng.sample(CASES, rng.randrange(2, 5))]
    walk_along(chain, rng.choice([1, 4]), seed, rounds=3)


def test_what_was_not_accepted_is_not_seen():
    """By hand: of a walk that drew 4, 5 and 6 the host keeps the 4, and writes a 7 behind it."""
    ids = torch.tensor([[1, 2, 2, 0, 0, 0, 0, 0, 0, 0]])
    (penalty,) = on_device([stock.RepetitionPenaltyLogitsProcessor(2.0)], 9, Texts(ids, torch.tensor([3])))
    scores, seen = torch.ones(1, 9), lambda each: (each(scores, None) < 1).nonzero()[:, 1].tolist()
    (first,) = begin((penalty,), Texts(ids, torch.tensor([3])), 4)
    for place, token in enumerate((4, 5, 6), start=3):
        ids[0, place] = token
        follow((first,), torch.tensor([token]), torch.tensor([place]))
    assert seen(first) == [1, 2, 4, 5, 6] and seen(penalty) == [1, 2]
    ids[0, 4] = 7
    (second,) = begin((penalty,), Texts(ids, torch.tensor([5])), 4)
    assert seen(second) == seen(penalty) == [1, 2, 4, 7]


# --- as part of a graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, number", CASES)
def test_nothing_is_asked_of_the_host_and_nothing_kept_from_it(name, number):
    """A tape, which is as strict as a capture, is right for other texts of other lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(0, 8, (4, ROOM), generator=generator), torch.tensor([3, 8, 1, 12])
    scores, token = scores_of("any", 4, VOCAB, generator), torch.tensor([1, 2, 3, 4])
    ours = on_device([processor(name, number)], VOCAB, Texts(ids, lengths))

    def two_levels():
        walking = begin(ours, Texts(ids, lengths), 2)
        first = walking[0](scores, Texts(ids, lengths))
        ids.scatter_(1, lengths[:, None], token[:, None])
        follow(walking, token, lengths)
        return first, walking[0](scores, Texts(ids, lengths + 1))

    with Tape() as tape:
        results = two_levels()
    tape.replay()
    for grown in ([1, 2, 0, 2], [2, 2, 1, 0], [0, 1, 2, 2]):
        lengths += torch.tensor(grown)
        token.copy_(torch.randint(0, 8, (4,), generator=generator))
        scores.copy_(scores_of("any", 4, VOCAB, generator))
        tape.replay()
        for level, found in enumerate(results):
            at = (lengths + level).tolist()
            expected = stock_scores([functools.partial(processor, name, number)], ids, at, scores)
            assert_same(found, expected, bits=name != "SequenceBiasLogitsProcessor")


@pytest.mark.parametrize("name, number", CASES)
def test_equal_settings_are_equal_for_a_graph(name, number):
    """All but the tensors, which are copied; and a processor that its owner changes later is not ours."""
    texts = Texts(torch.zeros(4, ROOM, dtype=torch.long), torch.full((4,), 3))
    first, second = (on_device([processor(name, number)], VOCAB, texts)[0] for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        assert isinstance(mine, (torch.Tensor, tuple)) or plain(mine) == plain(other)
    theirs = processor("TemperatureLogitsWarper", 0)
    (ours,) = on_device([theirs], VOCAB, texts)
    theirs.temperature = 5.0
    scores = torch.ones(4, VOCAB)
    assert torch.equal(ours(scores, texts), scores / 0.7)
    (changed,) = on_device([theirs], VOCAB, texts)
    assert torch.equal(changed(scores, texts), scores / 5.0) and plain(changed[0]) != plain(ours[0])


# --- which ones ------------------------------------------------------------------------------------------------------


def test_all_but_watermarks_are_on_the_device():
    names = set(fast_processors_longspec._ON_DEVICE)
    assert names == set(MADE) == sampling_longspec._BY_ROW - {"WatermarkLogitsProcessor"}
    assert are_on_device([processor(*case) for case in CASES]) and are_on_device([])


def test_what_is_not():
    class Tempered(stock.TemperatureLogitsWarper):
        pass

    TopKLogitsWarper = type("TopKLogitsWarper", (stock.LogitsProcessor,), {})  # the name alone says nothing
    known = processor("TopKLogitsWarper", 0)
    others = [Tempered(0.7), TopKLogitsWarper(), lambda ids, scores: scores]
    others += [stock.WatermarkLogitsProcessor(VOCAB, "cpu"), stock.TopKLogitsWarper(4, filter_value=-1e4)]
    for other in others:
        for processors in ([other], [known, other], [other, known]):
            assert not are_on_device(processors)
