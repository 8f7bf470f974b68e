"""`accept` on hand-made trees, and its distribution over texts by walking through every outcome of the sampler.

The "target" is a table over five tokens: the logits of the next one depend on the last two.
"""

import itertools
import random

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hf_longspec.modeling.tree_longspec import TokenTree
from hf_longspec.modeling.verification_longspec import Text, accept

VOCAB = 5
PROMPT = [3, 1]
TABLE = 2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(5))


def walk(tree, logits, text):
    """The nodes `accept` goes through."""
    path = [0]
    accept(tree, logits, text, path)
    return path


def table_logits(tokens: list[int], table: torch.Tensor = TABLE) -> torch.Tensor:
    """The target's logits (vocab,) for what follows `tokens`."""
    return table[tokens[-2], tokens[-1]]


def node_logits(tree: TokenTree, ids: list[int], table: torch.Tensor = TABLE) -> torch.Tensor:
    """The target's logits (1, T, vocab) at every node of a tree whose root is the last of `ids`."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths = [ids]
    for node in range(1, len(tokens)):
        paths.append(paths[parents[node]] + [tokens[node]])
    return torch.stack([table_logits(path, table) for path in paths])[None]


def make_tree(tokens: list[int], parents: list[int]) -> TokenTree:
    return TokenTree(torch.tensor([tokens]), torch.tensor([parents]), torch.zeros(1, len(tokens)), len(tokens))


def random_tree(root: int, rng: random.Random) -> TokenTree:
    """Any tree at all: siblings may carry the same token, and most nodes are bad guesses."""
    nodes = rng.choice([1, 2, 4, 9, 20])
    return make_tree(
        [root] + [rng.randrange(VOCAB) for _ in range(nodes - 1)], [0] + [rng.randrange(n) for n in range(1, nodes)]
    )


def make_text(
    new_tokens: int, processors: list = (), do_sample: bool = False, streamer=None, criteria: list = (), **options
) -> Text:
    config = GenerationConfig(do_sample=do_sample, **options)
    stops = StoppingCriteriaList([MaxLengthCriteria(len(PROMPT) + new_tokens), *criteria])
    return Text(torch.tensor([PROMPT]), LogitsProcessorList(processors), stops, config, streamer)


def write(text: Text, seed: int, table: torch.Tensor = TABLE) -> list[int]:
    """Rounds over random trees until the text is finished. Returns the new tokens."""
    rng = random.Random(seed)
    while not text.finished:
        ids = text.ids[0].tolist()
        tree = random_tree(ids[-1], rng)
        path = walk(tree, node_logits(tree, ids, table), text)
        emitted = text.ids[0, len(ids) :].tolist()
        assert path[0] == 0 and len(path) == len(emitted)
        assert [int(tree.tokens[0, node]) for node in path[1:]] == emitted[:-1]
        assert all(int(tree.parents[0, node]) == parent for parent, node in itertools.pairwise(path))
    return text.ids[0, len(PROMPT) :].tolist()


def write_plainly(
    new_tokens: int, processors: list = (), do_sample: bool = False, table: torch.Tensor = TABLE
) -> list[int]:
    """What one token at a time gives."""
    ids = list(PROMPT)
    for _ in range(new_tokens):
        scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids, table)[None].clone())
        ids.append(int(torch.multinomial(scores.softmax(-1), 1) if do_sample else scores.argmax()))
    return ids[len(PROMPT) :]


# --- by hand -------------------------------------------------------------------------------------------------------

#   1 ─┬─ 4 ─┬─ 0
#      │     └─ 2 ─── 3
#      └─ 2 ─── 0
TREE = make_tree([1, 4, 2, 0, 2, 0, 3], [0, 0, 0, 1, 1, 2, 4])


def logits_that_pick(*choices: int) -> torch.Tensor:
    """Logits (1, T, vocab) whose argmax at node i is `choices[i]`."""
    return torch.nn.functional.one_hot(torch.tensor([choices]), VOCAB).float()


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
    assert text.is_argmax is not recorded
    assert walk(TREE, logits_that_pick(*choices), text) == path
    assert text.ids.tolist() == [PROMPT + tokens]
    assert not text.finished


def test_first_of_equal_logits_wins_as_in_plain_decoding():
    tree = make_tree([1, 2], [0, 0])
    logits = torch.zeros(1, 2, VOCAB, dtype=torch.bfloat16)
    logits[0, 0, 2:4] = 1.0
    for options in ({}, {"return_dict_in_generate": True, "output_logits": True}):
        text = make_text(10, **options)
        assert walk(tree, logits, text) == [0, 1]
        assert text.ids.tolist() == [PROMPT + [2, 0]]


@pytest.mark.parametrize(
    "new_tokens, path", [(1, [0]), (2, [0, 1]), (3, [0, 1, 4]), (4, [0, 1, 4, 6]), (5, [0, 1, 4, 6])]
)
def test_walk_ends_where_the_length_does(new_tokens, path):
    text = make_text(new_tokens)
    assert walk(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text) == path
    assert text.ids[0, len(PROMPT) :].tolist() == [4, 2, 3, 1][:new_tokens]
    assert text.finished is (new_tokens <= 4)


def test_walk_ends_at_the_end_of_text():
    text = make_text(10, criteria=[EosTokenCriteria(torch.tensor([2]))])
    assert walk(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text) == [0, 1]
    assert text.ids.tolist() == [PROMPT + [4, 2]]
    assert text.finished


class Recorder:
    """A streamer and a stopping criterion that note what they are shown."""

    def __init__(self):
        self.streamed, self.texts = [], []

    def put(self, token):
        self.streamed.append(token.tolist())

    def __call__(self, ids, scores, **kwargs):
        self.texts.append(ids[0].tolist())
        return torch.zeros(1, dtype=torch.bool)


def test_streamer_and_criteria_see_every_token_once():
    recorder = Recorder()
    text = make_text(10, streamer=recorder, criteria=[recorder])
    walk(TREE, logits_that_pick(4, 2, 0, 0, 3, 0, 1), text)
    assert recorder.streamed == [[4], [2], [3], [1]]
    assert recorder.texts == [PROMPT + [4, 2, 3, 1][:count] for count in (1, 2, 3, 4)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_of_every_token(do_sample):
    processors = [RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.7)]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    text = make_text(8, processors, do_sample, **options)
    tokens = write(text, seed=0)
    assert len(text.scores) == len(text.logits) == 8
    for step in range(8):
        ids = PROMPT + tokens[:step]
        assert torch.equal(text.logits[step], table_logits(ids)[None])
        scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids)[None].clone())
        assert torch.equal(text.scores[step], scores)


@pytest.mark.parametrize("options", [{"output_scores": True}, {"return_dict_in_generate": True}, {}])
def test_nothing_is_recorded_unasked(options):
    text = make_text(8, **options)
    write(text, seed=0)
    assert text.scores is None and text.logits is None


def test_processor_that_writes_into_its_logits_spoils_nothing():
    def ban_in_place(ids, scores):
        scores[:, int(ids[0, -1])] = -float("inf")
        return scores

    tree = make_tree([1, 4], [0, 0])
    logits = node_logits(tree, PROMPT)
    before = logits.clone()
    walk(tree, logits, make_text(10, [ban_in_place]))
    assert torch.equal(logits, before)


# --- against plain decoding ----------------------------------------------------------------------------------------

PROCESSORS = {
    "none": [],
    "temperature, top-k": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)],
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
}


@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_is_the_plain_one(processors, seed):
    assert write(make_text(30, processors), seed) == write_plainly(30, processors)


@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(5))
def test_same_seed_same_text_and_the_generator_where_plain_decoding_leaves_it(processors, seed):
    torch.manual_seed(seed)
    expected = write_plainly(30, processors, do_sample=True)
    after = torch.rand(1)
    torch.manual_seed(seed)
    assert write(make_text(30, processors, do_sample=True), seed) == expected
    assert torch.equal(torch.rand(1), after)


class EveryOutcome:
    """Stands in for `torch.multinomial`: run after run it takes the sampler through every sequence of outcomes."""

    def __init__(self):
        self.script: list[int] = []
        self.taken: list[int] = []
        self.weight = 1.0  # probability of what was taken in this run

    def __call__(self, probabilities, num_samples):
        assert probabilities.shape == (1, VOCAB) and num_samples == 1
        step = len(self.taken)
        choice = self.script[step] if step < len(self.script) else 0
        self.taken.append(choice)
        self.weight *= probabilities[0, choice].item()
        return torch.tensor([[choice]])

    def next_run(self) -> bool:
        """Moves on to the next sequence, as an odometer does. Returns whether there is one."""
        script = self.taken
        while script and script[-1] == VOCAB - 1:
            script.pop()
        if script:
            script[-1] += 1
        self.script, self.taken, self.weight = script, [], 1.0
        return bool(script)


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
