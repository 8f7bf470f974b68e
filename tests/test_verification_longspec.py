"""`accept` on hand-made trees, and its distribution over texts by walking through every outcome of the sampler."""

import itertools
import random

import pytest
import torch
from tables import (
    PROCESSORS,
    PROMPT,
    TABLE,
    VOCAB,
    EveryOutcome,
    Recorder,
    logits_that_pick,
    make_text,
    make_tree,
    node_logits,
    table_logits,
    walk_row,
    write,
    write_plainly,
)
from transformers import LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from hf_longspec.modeling.sampling_longspec import IMPOSSIBLE
from hf_longspec.modeling.tree_longspec import TokenTree, ancestor_mask, node_depths
from hf_longspec.modeling.verification_longspec import Accepted, walk

# --- by hand -------------------------------------------------------------------------------------------------------

#   1 ─┬─ 4 ─┬─ 0
#      │     └─ 2 ─── 3
#      └─ 2 ─── 0
TREE = make_tree([1, 4, 2, 0, 2, 0, 3], [0, 0, 0, 1, 1, 2, 4])


@pytest.mark.parametrize(
    "choices, path, tokens",
    [
        ([3, 0, 0, 0, 0, 0, 0], [0], [3]),  # no child: the bonus alone
        ([4, 1, 0, 0, 0, 0, 0], [0, 1], [4, 1]),
        ([4, 0, 0, 2, 0, 0, 0], [0, 1, 3], [4, 0, 2]),
        ([4, 2, 0, 0, 3, 0, 1], [0, 1, 4, 6], [4, 2, 3, 1]),  # to a leaf, and on
        ([2, 0, 0, 0, 0, 4, 0], [0, 2, 5], [2, 0, 4]),
        ([1, 0, 0, 0, 0, 0, 0], [0], [1]),  # the root's own token is no child
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_greedy_walk(choices, path, tokens, recorded):
    text = make_text(10, return_dict_in_generate=recorded, output_scores=recorded)
    assert text.sampler.plan.by_argmax
    assert walk_row(TREE, logits_that_pick(*choices), text) == path
    assert text.sequences.tolist() == [PROMPT + tokens]
    assert not text.finished


def test_first_of_equal_logits_wins_as_in_plain_decoding():
    tree = make_tree([1, 2], [0, 0])
    logits = torch.zeros(1, 2, VOCAB, dtype=torch.bfloat16)
    logits[0, 0, 2:4] = 1.0
    for options in ({}, {"return_dict_in_generate": True, "output_logits": True}):
        text = make_text(10, **options)
        assert walk_row(tree, logits, text) == [0, 1]
        assert text.sequences.tolist() == [PROMPT + [2, 0]]


@pytest.mark.parametrize(
    "new_tokens, path", [(1, [0]), (2, [0, 1]), (3, [0, 1, 4]), (4, [0, 1, 4, 6]), (5, [0, 1, 4, 6])]
)
def test_walk_ends_where_the_length_does(new_tokens, path):
    text = make_text(new_tokens)
    assert walk_row(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text) == path
    assert text.sequences[0, len(PROMPT) :].tolist() == [4, 2, 3, 1][:new_tokens]
    assert text.finished is (new_tokens <= 4)


def test_walk_ends_at_the_end_of_text():
    text = make_text(10, criteria=[EosTokenCriteria(torch.tensor([2]))])
    assert walk_row(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text) == [0, 1]
    assert text.sequences.tolist() == [PROMPT + [4, 2]]
    assert text.finished


def test_streamer_and_criteria_see_every_token_once():
    recorder = Recorder()
    text = make_text(10, streamer=recorder, criteria=[recorder])
    walk_row(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text)
    assert recorder.streamed == [[4], [2], [3], [1]]
    assert recorder.texts == [PROMPT + [4, 2, 3, 1][:count] for count in (1, 2, 3, 4)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_of_every_token(do_sample):
    processors = [RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.7)]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    text = make_text(8, processors, do_sample, **options)
    tokens = write(text, seed=0)
    assert len(text.records.scores.values) == len(text.records.logits.values) == 8
    for step in range(8):
        ids = PROMPT + tokens[:step]
        assert torch.equal(text.records.logits.values[step], table_logits(ids)[None])
        scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids)[None].clone())
        assert torch.equal(text.records.scores.values[step], scores)


@pytest.mark.parametrize("options", [{"output_scores": True}, {"return_dict_in_generate": True}, {}])
def test_nothing_is_recorded_unasked(options):
    text = make_text(8, **options)
    write(text, seed=0)
    assert text.records.scores is None and text.records.logits is None and text.records.empty


def test_processor_that_writes_into_its_logits_spoils_nothing():
    def ban_in_place(ids, scores):
        scores[:, int(ids[0, -1])] = -float("inf")
        return scores

    tree = make_tree([1, 4], [0, 0])
    logits = node_logits(tree, PROMPT)
    before = logits.clone()
    walk_row(tree, logits, make_text(10, [ban_in_place]))
    assert torch.equal(logits, before)


# --- against plain decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_is_the_plain_one(processors, seed, drawn):
    assert write(make_text(30, processors, can_draw=drawn), seed) == write_plainly(30, processors)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(5))
def test_same_seed_same_text_and_the_generator_where_plain_decoding_leaves_it(processors, seed, drawn):
    torch.manual_seed(seed)
    expected = write_plainly(30, processors, do_sample=True)
    after = torch.rand(1)
    torch.manual_seed(seed)
    text = make_text(30, processors, do_sample=True, can_draw=drawn)
    assert text.sampler.plan.drawn is drawn
    assert write(text, seed) == expected
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(3))
def test_distribution_of_texts_is_exactly_the_targets(processors, seed, monkeypatch):
    """All 125 texts of three tokens, tokens of probability zero among them; each round has another tree."""
    table = TABLE.masked_fill(
        torch.rand(TABLE.shape, generator=torch.Generator().manual_seed(seed)) < 0.2, -float("inf")
    )
    outcomes = EveryOutcome()
    monkeypatch.setattr(torch, "multinomial", outcomes)
    found: dict[tuple[int, ...], float] = {}
    more = True
    while more:
        tokens = tuple(write(make_text(3, processors, do_sample=True), seed, table))
        found[tokens] = found.get(tokens, 0.0) + outcomes.weight
        more = outcomes.next_run()
    expected = {}
    for tokens in itertools.product(range(VOCAB), repeat=3):
        probability = 1.0
        for step, token in enumerate(tokens):
            ids = PROMPT + list(tokens[:step])
            scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids, table)[None].clone())
            probability *= scores.softmax(-1)[0, token].item()
        expected[tokens] = probability
    assert found == expected
    assert sum(found.values()) == pytest.approx(1.0, abs=VOCAB**3 * torch.finfo(torch.float32).eps)


# --- the walk of a device --------------------------------------------------------------------------------------------


def path_by_hand(tokens, parents, picks):
    """From the root to the first child that carries what is picked, as long as there is one."""
    path = [0]
    while True:
        heirs = [n for n in range(1, len(tokens)) if parents[n] == path[-1] and tokens[n] == picks[path[-1]]]
        if not heirs:
            return path
        path.append(heirs[0])


@pytest.mark.parametrize("seed", range(60))
def test_walk_finds_the_path_of_each_row(seed):
    """Any trees: siblings with one token, picks that are no token; few tokens, so that paths are long."""
    rng = random.Random(seed)
    batch, nodes, vocab = rng.choice([1, 3]), rng.choice([1, 2, 7, 30, 70]), rng.choice([1, 2, 4])
    parents = [[0] + [rng.randrange(max(0, n - 5), n) for n in range(1, nodes)] for _ in range(batch)]
    tokens, picks = ([[rng.randrange(vocab) for _ in range(nodes)] for _ in range(batch)] for _ in range(2))
    for row in picks:
        if rng.random() < 0.3:
            row[rng.randrange(nodes)] = IMPOSSIBLE
    mask = ancestor_mask(torch.tensor(parents), nodes - 1)
    tree = TokenTree(torch.tensor(tokens), torch.tensor(parents), torch.zeros(batch, nodes), nodes - 1)
    steps, table = walk(tree, mask, node_depths(mask), torch.tensor(picks))
    for row in range(batch):
        path = path_by_hand(tokens[row], parents[row], picks[row])
        picked = [picks[row][node] for node in path]
        count = int(steps.counts[row])
        assert steps.path[row].tolist() == path + [0] * (nodes - len(path)) and count == len(path)
        assert int(steps.newest[row]) == picked[-1]
        assert table[row, :nodes].tolist() == steps.path[row].tolist() and int(table[row, -1]) == count
        assert table[row, nodes : nodes + count].tolist() == picked


def test_steps_from_the_host():
    steps = Accepted.of([[0, 2, 5], [], [0]], [7, 8, 9], 3, torch.device("cpu"))
    assert steps.path.tolist() == [[0, 2, 5, 0], [0] * 4, [0] * 4]
    assert steps.counts.tolist() == [3, 0, 1] and steps.newest.tolist() == [7, 8, 9]
