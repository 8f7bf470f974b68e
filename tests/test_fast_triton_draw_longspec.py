"""The kernels that draw a token against transformers' processors and `largest`, and when they say they are unsure.

Triton's interpreter is slow: rows are few, and vocabularies are small or just larger than two chunks.
"""

import functools
import itertools
import math
import random

import pytest
import torch
from helpers import interpreted
from tables import drawing_call, make_text
from transformers import LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from tree_cases import rest_slow

from hf_longspec.modeling.fast_draw_longspec import Drawing, draw_paths
from hf_longspec.modeling.fast_processors_longspec import Penalty, Texts, on_device
from hf_longspec.modeling.sampling_longspec import IMPOSSIBLE, largest
from hf_longspec.modeling.tree_longspec import TokenTree, ancestor_mask, node_depths
from hf_longspec.modeling.verification_longspec import Verified

INF, NAN = math.inf, math.nan
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stable_sorts(monkeypatch):
    """Top-p keeps of equal scores those that a sort puts last: on a GPU the later ones, on a CPU any."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


def kernels():
    from hf_longspec.modeling import fast_triton_draw_longspec

    return fast_triton_draw_longspec


def ending_of(processors, device=CPU):
    """Return how many processors the kernels leave, and what they take over."""
    left, ending = kernels().Ending.of(processors, tuple(processors), device)
    return len(left), ending


def draw(scores, ending, noise, slots):
    """Draw from processed scores (B, vocab) with the noise of each row at `slots` (B,)."""
    td = kernels()
    state = torch.zeros(len(scores), td.FIELDS.value, dtype=torch.long, device=scores.device)
    state[:, td.LENGTH.value], state[:, td.ALIVE.value] = slots, 1
    nothing = td.Ending(None, 1.0, None)
    prompt = torch.zeros((), dtype=torch.long, device=scores.device)
    return td.pick_tokens(scores[:, None], state, ending or nothing, noise, prompt, by_node=False)


def noise_of(batch, vocab, device=CPU):
    """Return noise for some steps, and the step of each row."""
    return torch.empty(3, batch, vocab, device=device).exponential_(1), torch.randint(0, 3, (batch,), device=device)


def expected_tokens(cuts, scores, noise, slots):
    """Return what plain decoding draws, and how many tokens the first of the cuts keeps."""
    kept = LogitsProcessorList(cuts[:1])(None, scores.clone()) > -INF
    processed = LogitsProcessorList(cuts)(None, scores.clone())
    tokens = largest(processed.softmax(-1), noise[slots, torch.arange(len(scores), device=scores.device)])
    return tokens.tolist(), kept.sum(-1).tolist()


def chunk_of(tokens, vocab):
    """Return the chunks of tokens: as many as 1,024 fit into the vocabulary, dealt out four tokens at a time."""
    return tokens // 4 % -(-vocab // 1024)


def knows(scores, kept, best, most):
    """Return whether the kernels know all that is kept, and that nothing else is: no chunk's best are all kept."""
    if len(scores) <= 2048:
        return kept <= most
    order = scores.flip(0).sort(descending=True, stable=True).indices  # of equals the later
    first = (len(scores) - 1 - order)[:kept]
    return kept <= most and bool(torch.bincount(chunk_of(first, len(scores))).max() < best)


def check(cuts, scores, tries=1):
    """Draw from scores (B, vocab) some times. Returns whether the kernels were unsure of each row."""
    td = kernels()
    before, made = ending_of(cuts, scores.device)
    assert before == 0 and made is not None
    for _ in range(tries):
        noise, slots = noise_of(*scores.shape, scores.device)
        expected, kept = expected_tokens(cuts, scores, noise, slots)
        found = draw(scores, made, noise, slots).tolist()
        unsure = []
        for row, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            known = theirs == IMPOSSIBLE or knows(scores[row].cpu(), kept[row], td.BEST, td.MOST)
            unsure.append(not known)
            assert mine == (theirs if known else td.UNSURE), (row, kept[row])
    return unsure


def scores_of(kind, batch, vocab):
    scores = 3 * torch.randn(batch, vocab)
    if kind == "coarse":
        scores = scores.round()
        scores[:, 1::2] *= -1.0  # minus zeros
    elif kind == "one value":
        scores.fill_(-1.5)
    elif kind == "bfloat16":
        scores = scores.bfloat16().float()
    elif kind == "few possible":
        scores = scores.masked_fill(torch.rand(batch, vocab) < 0.8, -INF)
        scores[:, 2] = 0.5
    elif kind == "one possible":
        scores = torch.full_like(scores, -INF)
        scores[:, -2] = 0.5
    elif kind == "no numbers":
        scores[0, 3], scores[-1, 2] = NAN, INF
    elif kind == "impossible":
        scores[-1] = -INF
    return scores


KINDS = ["any", "coarse", "one value", "bfloat16", "few possible", "one possible", "no numbers", "impossible"]
MAKERS = {
    "k": lambda rng: TopKLogitsWarper(rng.choice([1, 4, 20, 50])),
    "p": lambda rng: TopPLogitsWarper(rng.choice([0.0, 0.3, 0.8, 0.95]), min_tokens_to_keep=rng.choice([1, 1, 3])),
    "m": lambda rng: MinPLogitsWarper(rng.choice([0.0, 0.02, 0.1, 0.5, 1.0])),
}
ORDERS = ["".join(order) for count in (1, 2, 3) for order in itertools.permutations("kpm", count)] + ["kk", "ppk"]
PAIRS = list(itertools.product(KINDS, ORDERS))
QUICK = list(zip(KINDS, ["kp", "p", "m", "pmk", "mk", "k", "kpm", "pk"], strict=True))


@interpreted
@pytest.mark.parametrize("kind, order", rest_slow(PAIRS, QUICK))
def test_top_k_top_p_and_min_p_in_all_orders(kind, order):
    """Ties, impossible tokens and scores that are no distribution; the sampled token is the one of plain decoding."""
    rng = random.Random(f"{kind} {order}")
    for batch, vocab in ((3, 5), (1, 13), (2, 60)):
        check([MAKERS[name](rng) for name in order], scores_of(kind, batch, vocab), tries=2)


@interpreted
@pytest.mark.parametrize("kind, order", rest_slow(PAIRS, [("any", "p"), ("bfloat16", "kp")]))
def test_a_vocabulary_in_chunks(kind, order):
    rng = random.Random(f"{kind} {order}")
    check([MAKERS[name](rng) for name in order], scores_of(kind, 1, 2100))


@interpreted
@pytest.mark.parametrize("vocab", [12, 2100])
def test_equals_at_the_last_place(vocab):
    """Top-k keeps all of them; of those that top-p keeps the later, and fewest of all the last."""
    scores = torch.full((1, vocab), -9.0)
    scores[0, [2, 5, 7, 11]], scores[0, 4] = 1.0, 3.0
    noise, slots = torch.full((1, 1, vocab), 1e9), torch.zeros(1, dtype=torch.long)

    def kept(cut):
        _, cuts = ending_of([cut])
        found = []
        for token in (0, 2, 4, 5, 7, 11):
            one = noise.clone()
            one[0, 0, token] = 1e-9  # drawn, if it is kept
            found += [token] if draw(scores, cuts, one, slots).item() == token else []
        return found

    assert kept(TopKLogitsWarper(2)) == [2, 4, 5, 7, 11]
    assert kept(TopPLogitsWarper(0.8)) == [4, 7, 11] and kept(TopPLogitsWarper(0.01)) == [4]
    assert kept(TopPLogitsWarper(0.01, min_tokens_to_keep=2)) == [4, 11]
    assert kept(MinPLogitsWarper(0.1)) == [2, 4, 5, 7, 11] and kept(MinPLogitsWarper(0.2)) == [4]


@interpreted
def test_minus_zero_is_zero():
    """Of the two, top-p keeps the later."""
    for scores in ([0.0, -0.0, -9.0], [-0.0, 0.0, -9.0]):
        _, cuts = ending_of([TopPLogitsWarper(0.4)])
        noise, slots = torch.tensor([[[1e-9, 1e9, 1e9]]]), torch.zeros(1, dtype=torch.long)
        assert draw(torch.tensor([scores]), cuts, noise, slots).tolist() == [1]


# --- unsure ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("kept, unsure", [(255, False), (256, False), (257, True), (290, True)])
def test_more_tokens_than_a_row_may_keep(kept, unsure):
    """In a small vocabulary too, of which every token is known."""
    scores = torch.full((1, 300), -50.0)
    scores[0, torch.randperm(300)[:kept]] = torch.randn(kept)
    assert check([MinPLogitsWarper(1e-4)], scores) == [unsure]


@interpreted
@pytest.mark.parametrize("together, unsure", [(6, False), (7, False), (8, True)])
def test_a_chunk_that_gives_up_too_few(together, unsure):
    """Of eleven tokens, so many in one chunk; of eight, the worst that it gives up, a ninth may be kept, too."""
    scores, tokens = -30 + torch.rand(1, 2100), torch.arange(2100)
    one, other, third = (tokens[chunk_of(tokens, 2100) == chunk] for chunk in range(3))
    scores[0, one[90 : 90 + together]] = torch.arange(together) + 2.0
    scores[0, other[: 11 - together]] = torch.arange(11 - together) + 2.5
    scores[0, third[-1]] = 0.0
    assert check([TopKLogitsWarper(11)], scores) == [unsure]


@interpreted
def test_one_row_that_is_unsure_leaves_the_others_sure():
    scores = 6 * torch.randn(3, 2100)
    scores[1, [40, 41, 42, 43, 52, 53, 54, 55, 64]] += 60
    assert check([TopKLogitsWarper(9)], scores) == [False, True, False]


@interpreted
def test_likely_tokens_may_follow_each_other():
    """As in the vocabularies of tokenizers, whose first tokens are bytes and the most frequent words."""
    scores = torch.randn(1, 5000)
    scores[0, 40:60] += 9
    assert check([TopKLogitsWarper(20)], scores) == [False]


@interpreted
def test_the_later_cuts_are_no_reason_to_be_unsure():
    """They act on what the first has kept, which is all known."""
    scores = 4 * torch.randn(1, 2100)
    later = [TopPLogitsWarper(1.0), MinPLogitsWarper(0.0), TopKLogitsWarper(2000)]
    assert check([TopKLogitsWarper(6), *later], scores) == [False]


# --- which cuts ------------------------------------------------------------------------------------------------------


@interpreted
def test_what_the_kernels_take_over():
    """Cuts at the end, a temperature before them, a penalty before that; what comes before is left."""
    texts = Texts(torch.zeros(1, 9, dtype=torch.long), torch.tensor([4]))
    k, p, m, t = TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1), TemperatureLogitsWarper(0.5)
    penalty, other = RepetitionPenaltyLogitsProcessor(1.3), SuppressTokensLogitsProcessor([3])
    sub, several = type("Sub", (TopKLogitsWarper,), {})(5), MinPLogitsWarper(0.1, min_tokens_to_keep=2)

    def taken(*processors):
        versions = tuple(on_device([each], 13, texts)[0] if each is penalty else each for each in processors)
        left, ending = kernels().Ending.of(list(processors), versions, CPU)
        if ending is None:
            return None
        cuts = 0 if ending.cuts is None else len(ending.cuts.kinds)
        return len(left), ending.penalty is not None, ending.temperature, cuts

    assert taken() == (0, False, 1.0, 0) and taken(t) == (0, False, 0.5, 0) and taken(penalty) == (0, True, 1.0, 0)
    assert taken(penalty, t, k, p) == (0, True, 0.5, 2) and taken(other, penalty, t, k, p) == (1, True, 0.5, 2)
    assert taken(k, t, m) == (1, False, 0.5, 1) and taken(penalty, other, k) == (2, False, 1.0, 1)
    assert taken(t, penalty) == (1, True, 1.0, 0) and taken(p, TopKLogitsWarper(5000)) == (0, False, 1.0, 2)
    assert taken(t, TopKLogitsWarper(5000)) == (2, False, 1.0, 0), "no room"
    for unknown in (sub, several):  # of equals, `topk` keeps any
        assert taken(unknown) == (1, False, 1.0, 0) and taken(k, unknown, p) == (2, False, 1.0, 1)
    assert taken(penalty, penalty) is None
    _, ending = ending_of([k, TopPLogitsWarper(0.75, min_tokens_to_keep=3), m])
    assert ending.cuts.limits.tolist() == pytest.approx([20.0, 0.25, 0.1]) and ending.cuts.least.tolist() == [1, 3, 1]


# --- without cuts ----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_any_token(kind):
    """Exactly `multinomial`, but for races that differ in the last bits."""
    for batch, vocab in ((3, 5), (1, 13), (2, 1024), (1, 2500)):
        scores = scores_of(kind, batch, vocab)
        for _ in range(3):
            noise, slots = noise_of(batch, vocab)
            expected = largest(scores.softmax(-1), noise[slots, torch.arange(batch)])
            assert draw(scores, None, noise, slots).tolist() == expected.tolist()


@interpreted
def test_chunks_that_are_far_apart():
    """A chunk of impossible tokens, one of tokens too unlikely for float32, and the sure one at the very end."""
    scores = torch.full((1, 3073), -INF)
    scores[0, 1024:2048], scores[0, 3072] = -200.0, 20.0
    noise, slots = torch.full((1, 1, 3073), 1e-6), torch.zeros(1, dtype=torch.long)
    noise[0, 0, 3072] = 1e6
    assert draw(scores, None, noise, slots).tolist() == [3072]


@interpreted
def test_noise_of_other_rows_and_steps_is_not_read():
    noise = torch.full((4, 2, 13), NAN)
    slots = torch.tensor([3, 1])
    noise[3, 0], noise[1, 1] = torch.empty(2, 13).exponential_(1)
    scores = torch.randn(2, 13)
    expected = largest(scores.softmax(-1), noise[slots, torch.arange(2)]).tolist()
    _, cuts = ending_of([TopKLogitsWarper(13)])
    for given in (None, cuts):
        assert draw(scores, given, noise, slots).tolist() == expected


# --- a walk ----------------------------------------------------------------------------------------------------------

CHAINS = {
    "nothing": [],
    "penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
    "all that the kernels know": [
        RepetitionPenaltyLogitsProcessor(0.6, prompt_ignore_length=2),
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(3),
        TopPLogitsWarper(0.9),
    ],
    "others before": [NoRepeatNGramLogitsProcessor(2), TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.1)],
    "top-p": [TopPLogitsWarper(0.3)],
    "a penalty before others": [RepetitionPenaltyLogitsProcessor(1.7), SuppressTokensLogitsProcessor([3])],
}
QUICK_CHAINS = [("all that the kernels know", True), ("top-p", False), ("penalty", False)]
QUICK_CHAINS += [("a penalty before others", True)]
# a chain, siblings with one token, rows that part; a level more than any of them has
PARENTS = [[0, 0, 1, 2, 0], [0, 0, 0, 1, 2], [0, 0, 1, 1, 0], [0, 0, 0, 2, 2]]


@interpreted
@pytest.mark.parametrize("name, do_sample", rest_slow(itertools.product(CHAINS, (False, True)), QUICK_CHAINS))
def test_a_walk_is_the_one_without_kernels(name, do_sample):
    """Rounds of four rows of other lengths, one of which has stopped: paths, tokens, texts, and what penalties saw."""
    batch, vocab, levels = 4, 5, 4
    text = make_text(
        30, CHAINS[name], do_sample, criteria=[EosTokenCriteria(4)], prompts=[[3, 1, 3]] * batch, can_draw=True
    )
    for row, tokens in enumerate(([1], [2, 3], [], [0, 1])):
        for token in tokens:
            text.write([row], [token])
    text.ends[3] = text.lengths[3]
    call = drawing_call(text)
    ours = Drawing.of(call, vocab, fused=False)
    call.backend.draw = kernels().fused_paths
    theirs = Drawing.of(call, vocab, fused=True)
    assert theirs.ending is not None and text.padding is not None
    for seed in range(2):
        torch.manual_seed(seed)
        noise = torch.empty(4, batch, vocab).exponential_(1) if do_sample else None
        tokens = torch.randint(0, 4, (batch, 5))
        tokens[:, 1:3] = tokens[:, 1:2]
        tree = TokenTree(tokens, torch.tensor(PARENTS), torch.zeros(batch, 5), levels)
        logits = 2 * torch.randn(batch, 5, vocab)
        logits.scatter_(2, tokens[:, 1:2, None].expand(-1, 3, -1), 5.0)  # paths of some length
        logits[:, 0, 1:3] = 5.0  # of equals the first is the largest, if top-p does not let it go
        ancestors = ancestor_mask(tree.parents, levels)
        verified = Verified(ancestors, node_depths(ancestors), logits, None)
        walks = [draw_paths(call, tree, verified, each._replace(noise=noise)) for each in (ours, theirs)]
        (mine, _), (other, _) = walks
        assert torch.equal(mine.counts, other.counts) and torch.equal(mine.newest, other.newest)
        assert [row[:2] for row in walks[0].on_host()] == [row[:2] for row in walks[1].on_host()]
        assert int(other.path.max()) < 5 and int(other.counts.max()) > 1
        for row, (length, count) in enumerate(zip(text.lengths, other.counts.tolist(), strict=True)):
            assert torch.equal(ours.ids[row, : length + count], theirs.ids[row, : length + count])
        penalties = [each for each in ours.processors if isinstance(each, Penalty)]
        fused = [each for each in (*theirs.processors, theirs.ending.penalty) if isinstance(each, Penalty)]
        assert all(torch.equal(mine.seen, other.seen) for mine, other in zip(penalties, fused, strict=True))
        call.cache.bounds_on(CPU)[1].add_(walks[0].accepted.counts)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def nearby(cut, by):
    """Return a cut that keeps about one part in 1 / `by` more or less."""
    if isinstance(cut, TopKLogitsWarper):
        return cut
    if isinstance(cut, MinPLogitsWarper):
        return MinPLogitsWarper(min(cut.min_p * (1 + by), 1.0))
    return TopPLogitsWarper(min(max(cut.top_p + by, 0.0), 1.0), min_tokens_to_keep=cut.min_tokens_to_keep)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", [13, 300, 2049, 50_257, 151_936])
def test_on_a_gpu(vocab, order):
    """Sums over a vocabulary are made in another order: a token at a cut's very edge may stay or go."""
    rng, td = random.Random(f"{vocab} {order}"), kernels()
    torch.manual_seed(0)
    for kind in KINDS:
        cuts = [MAKERS[name](rng) for name in order]
        scores = scores_of(kind, 8, vocab).cuda()
        _, made = ending_of(cuts, scores.device)
        noise, slots = noise_of(8, vocab, scores.device)
        moved = [[nearby(cut, by) for cut in cuts] for by in (0, 1e-5, -1e-5)]
        edges = [expected_tokens(chain, scores, noise, slots)[0] for chain in moved]
        for row, mine in enumerate(draw(scores, made, noise, slots).tolist()):
            assert mine in {td.UNSURE, *(tokens[row] for tokens in edges)}
