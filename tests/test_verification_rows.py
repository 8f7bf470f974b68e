"""`accept` on batches: each row as plain decoding writes it, and the distribution of pairs of texts."""

import itertools
import random

import pytest
import torch
from tables import (
    PAD,
    PROCESSORS,
    TABLE,
    VOCAB,
    EveryOutcome,
    Recorder,
    extend,
    logits_that_pick,
    make_text,
    make_tree,
    node_logits,
    table_logits,
    walk_rows,
)
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from hf_longspec.modeling.text_longspec import Text
from hf_longspec.modeling.tree_longspec import TokenTree, ancestor_mask, node_depths

PROMPTS = [[3, 1], [2, 4], [1, 1], [0, 3]]


def stacked(trees: list[TokenTree]) -> TokenTree:
    parts = zip(*((tree.tokens, tree.parents, tree.scores) for tree in trees), strict=True)
    return TokenTree(*(torch.cat(part) for part in parts), levels=max(tree.levels for tree in trees))


def round_of_rows(text: Text, rng: random.Random, table: torch.Tensor = TABLE, vocab: int = VOCAB) -> list[list[int]]:
    """A random tree for each row, as the decoding loop verifies them. Returns what each row wrote."""
    ids = [row[:length] for row, length in zip(text.sequences.tolist(), text.lengths, strict=True)]
    nodes = rng.choice([1, 2, 4, 9, 20])
    parents = [[0] + [rng.randrange(node) for node in range(1, nodes)] for _ in ids]
    guesses = [[rng.randrange(vocab) for _ in range(nodes - 1)] for _ in ids]
    rows = zip(ids, guesses, parents, strict=True)
    tree = stacked([make_tree([row[-1], *guess], parent) for row, guess, parent in rows])
    if text.pad is not None:
        tree = tree.forced(torch.tensor(text.stopped), text.pad)
    singles = [
        tree._replace(tokens=tree.tokens[row : row + 1], parents=tree.parents[row : row + 1])
        for row in range(len(ids))
    ]
    logits = torch.cat([node_logits(single, row, table) for single, row in zip(singles, ids, strict=True)])
    depths = node_depths(ancestor_mask(tree.parents, tree.levels))
    lengths = torch.tensor(text.lengths)[:, None] + depths
    hidden_states = tuple(torch.stack([lengths, tree.tokens, layer + lengths], dim=-1).float() for layer in range(2))
    room = text.room()
    paths = walk_rows(tree, logits, text, hidden_states)
    written = []
    for row, path in enumerate(paths):
        new = text.sequences[row, len(ids[row]) : text.lengths[row]].tolist()
        assert len(path) == len(new) <= room[row]
        assert [int(tree.tokens[row, node]) for node in path[1:]] == new[:-1] and path[:1] in ([], [0])
        assert all(int(tree.parents[row, node]) == parent for parent, node in itertools.pairwise(path))
        written.append(new)
    return written


def plain_rows(
    prompts: list[list[int]], processors: list, do_sample: bool, criteria: StoppingCriteriaList, table=TABLE
) -> tuple[torch.Tensor, list, list, list]:
    """What `generate` does with a batch, a step at a time: sequences, scores, logits, hidden states."""
    ids, unfinished = torch.tensor(prompts), torch.ones(len(prompts), dtype=torch.long)
    padded = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    records = [], [], []
    while unfinished.max():
        logits = torch.stack([table_logits(row, table) for row in ids.tolist()])
        scores = LogitsProcessorList(processors)(ids, logits.clone())
        lengths = torch.full((len(ids), 1), ids.shape[1])
        hidden = [torch.stack([lengths, ids[:, -1:], layer + lengths], dim=-1).float() for layer in range(2)]
        for record, values in zip(records, (scores, logits, hidden), strict=True):
            record.append(values)
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)
        if padded:
            tokens = tokens * unfinished + PAD * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        unfinished = unfinished & ~criteria(ids, None)
    return ids, *records


class StopAfterTwo:
    """A criterion that nobody knows: it stops a row behind its second 4."""

    def __call__(self, ids, scores, **kwargs):
        return (ids[:, 2:] == 4).sum(-1) >= 2


CRITERIA = {
    "length": lambda: [],
    "end of text": lambda: [EosTokenCriteria(torch.tensor([2]))],
    "either of two ends": lambda: [EosTokenCriteria(torch.tensor([2, 4]))],
    "unknown": lambda: [StopAfterTwo()],
    "unknown, and the end of text": lambda: [EosTokenCriteria(torch.tensor([1])), StopAfterTwo()],
}


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("criteria", CRITERIA.values(), ids=CRITERIA)
def test_a_batch_is_written_as_plain_decoding_writes_it(criteria, processors, do_sample, drawn):
    """Texts, records and the generator's state, whatever the pace of the rows and the lead they may take.

    drawn: whether the device draws; scores are then not recorded.
    """
    parted = False
    for seed, recorded, lead in ((0, False, 3), (1, True, 1), (2, False, 84), (3, True, 20), (4, False, 1)):
        torch.manual_seed(seed)
        stops = StoppingCriteriaList([MaxLengthCriteria(2 + 25), *criteria()])
        expected = plain_rows(PROMPTS, processors, do_sample, stops)
        after = torch.rand(1)

        torch.manual_seed(seed)
        names = ("logits", "hidden_states") if drawn else ("scores", "logits", "hidden_states")
        asked = dict.fromkeys((f"output_{name}" for name in names), recorded)
        options = {"keeps_cache": seed == 4, "return_dict_in_generate": recorded, "can_draw": drawn} | asked
        text = make_text(25, processors, do_sample, criteria=criteria(), prompts=PROMPTS, **options)
        known = not any(isinstance(criterion, StopAfterTwo) for criterion in criteria())
        assert text.sampler.plan.drawn is (drawn and known and bool(processors or do_sample))
        text.lead = lead
        rng = random.Random(seed)
        while not text.finished:
            round_of_rows(text, rng)
            moving = [length for length, end in zip(text.lengths, text.ends, strict=True) if end is None]
            assert max(moving, default=0) - min(moving, default=0) <= lead
            parted |= len(set(moving)) > 1
        text.sampler.rewind(text.slowest)
        assert text.sequences.tolist() == expected[0].tolist()
        assert torch.equal(torch.rand(1), after)
        if recorded:
            records = text.records.as_dict()
            for name, values in zip(("scores", "logits"), expected[1:3], strict=True):
                if name not in names:
                    continue
                assert len(records[name]) == len(values)
                for mine, theirs in zip(records[name], values, strict=True):
                    assert torch.equal(mine, theirs)
            for mine, theirs in zip(records["hidden_states"], expected[3], strict=True):
                assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert parted or criteria(), "nothing was tested"
    assert not parted or known


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_of_a_batch_is_the_row_alone(do_sample):
    """Greedy, whatever the other rows; sampled, if the noise is that of the row."""
    processors = PROCESSORS["temperature, top-k"]
    eos = [EosTokenCriteria(torch.tensor([2]))]
    torch.manual_seed(0)
    text = make_text(30, processors, do_sample, criteria=eos, prompts=PROMPTS, keeps_cache=False)
    rng = random.Random(0)
    while not text.finished:
        round_of_rows(text, rng)
    torch.manual_seed(0)
    noise = [torch.empty(4, VOCAB).exponential_(1) for _ in range(30)]
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step in range(30):
            scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids)[None].clone())
            ids.append(int((scores.softmax(-1) / noise[step][row]).argmax() if do_sample else scores.argmax()))
            if ids[-1] == 2:
                break
        assert text.ends[row] == len(ids)
        assert text.sequences[row].tolist() == ids + [PAD] * (text.sequences.shape[1] - len(ids))


def test_a_streamer_is_shown_a_batch_step_by_step():
    recorder = Recorder()
    text = make_text(12, streamer=recorder, criteria=[EosTokenCriteria(torch.tensor([2]))], prompts=PROMPTS)
    assert text.together
    rng = random.Random(0)
    while not text.finished:
        round_of_rows(text, rng)
        assert len(set(text.lengths)) == 1
    assert recorder.streamed == text.sequences[:, 2:].T.tolist()


def test_a_walk_in_which_a_row_stops_ends_there_for_all_that_go_together():
    """All four could go four tokens on; the second row's end of text comes behind two."""
    tree = stacked([make_tree([prompt[-1], 1, 2, 3], [0, 0, 1, 2]) for prompt in PROMPTS])
    logits = torch.cat([logits_that_pick(1, 2, 3, 4)] * 4)
    logits[1] = logits_that_pick(1, 4, 3, 4)
    for together, counts in ((True, [2, 2, 2, 2]), (False, [4, 2, 4, 4])):
        criteria = [EosTokenCriteria(torch.tensor([4]))] + ([Recorder()] if together else [])
        text = make_text(9, criteria=criteria, prompts=PROMPTS)
        paths = walk_rows(tree, logits, text)
        assert [len(path) for path in paths] == counts
        assert text.ends == [None if together else 6, 4, None, None] if together else text.ends == [6, 4, 6, 6]


def test_paths_are_right_even_if_the_text_raises():
    """The cache must keep up with what was written before."""

    class Interrupt(Recorder):
        def __call__(self, ids, scores, **kwargs):
            if ids.shape[1] == 5:
                raise KeyboardInterrupt("here")
            return torch.zeros(len(ids), dtype=torch.bool)

    tree = stacked([make_tree([prompt[-1], 1, 2, 3], [0, 0, 1, 2]) for prompt in PROMPTS])
    text = make_text(9, criteria=[Interrupt()], prompts=PROMPTS)
    paths = [[0] for _ in PROMPTS]
    with pytest.raises(KeyboardInterrupt, match="here"):
        extend(tree, torch.cat([logits_that_pick(1, 2, 3, 4)] * 4), text, paths)
    assert paths == [[0, 1, 2]] * 4 and text.lengths == [5] * 4
    assert text.sequences[:, 2:].tolist() == [[1, 2, 3]] * 4


class EveryOutcomeOfRows(EveryOutcome):
    """Stands in for the noise of a batch: `probabilities / noise` takes each row asked for through its outcomes."""

    def __init__(self, rows: int, vocab: int):
        super().__init__()
        self.rows, self.vocab = rows, vocab
        self.start()

    def start(self):
        self.weights = [1.0] * self.rows
        self.asked: set[tuple[int, int]] = set()

    def at(self, rows, steps, vocab):
        assert vocab == self.vocab
        pairs = set(zip(rows, steps, strict=True))
        assert len(pairs) == len(rows) and not pairs & self.asked, "a draw may be used once"
        self.asked |= pairs
        self.now = rows
        return self

    def __rtruediv__(self, probabilities):
        assert probabilities.shape == (len(self.now), self.vocab)
        quotients = torch.zeros_like(probabilities)
        for index, row in enumerate(self.now):
            step = len(self.taken)
            choice = self.script[step] if step < len(self.script) else 0
            self.taken.append(choice)
            self.weights[row] *= probabilities[index, choice].item()
            quotients[index, choice] = 1.0
        return quotients

    def forget(self, step):
        pass

    def next_run(self) -> bool:
        script = self.taken
        while script and script[-1] == self.vocab - 1:
            script.pop()
        if script:
            script[-1] += 1
        self.script, self.taken = script, []
        self.start()
        return bool(script)


@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("seed", range(2))
def test_distribution_of_pairs_of_texts_is_exactly_the_targets(processors, seed):
    """All pairs of texts of up to three tokens out of three; each ends behind a 2, and neither row knows the other."""
    vocab, steps, end = 3, 3, 2
    table = TABLE[:vocab, :vocab, :vocab]
    hidden = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    table = table.masked_fill(hidden & (torch.arange(vocab) != 1), -float("inf"))
    prompts = [[0, 1], [2, 1]]
    outcomes = EveryOutcomeOfRows(2, vocab)
    found: dict[tuple[tuple[int, ...], ...], list[float]] = {}
    more = True
    while more:
        eos = [EosTokenCriteria(torch.tensor([end]))]
        text = make_text(steps, processors, do_sample=True, criteria=eos, prompts=prompts, keeps_cache=False)
        assert not text.together and not text.sampler.plan.drawn
        text.sampler.noise = outcomes
        rng = random.Random(seed)
        while not text.finished:
            round_of_rows(text, rng, table, vocab)
        rows = zip(text.sequences.tolist(), text.ends, strict=True)
        texts = tuple(tuple(row[2:stop]) for row, stop in rows)
        assert texts not in found
        found[texts] = outcomes.weights
        more = outcomes.next_run()
    expected = []
    for prompt in prompts:
        weights = {}
        for tokens in itertools.product(range(vocab), repeat=steps):
            tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            probability = 1.0
            for step, token in enumerate(tokens):
                ids = prompt + list(tokens[:step])
                scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids, table)[None].clone())
                probability *= scores.softmax(-1)[0, token].item()
            weights[tokens] = probability
        expected.append(weights)
    assert set(found) == set(itertools.product(*expected))
    for texts, weights in found.items():
        assert weights == [row[text] for row, text in zip(expected, texts, strict=True)]
    total = sum(first * second for first, second in found.values())
    assert total == pytest.approx(1.0, abs=len(found) * torch.finfo(torch.float32).eps)
