"""Guesses from the text itself: against what lists and loops say, and as branches of trees."""

from __future__ import annotations

import random

import pytest
import torch

from hf_longspec.modeling.copies_longspec import AGREEMENT, Report, Written, append, copy_branch, find, join_copy
from hf_longspec.modeling.tree_longspec import Level, TokenTree, TreeForm, best_children, levels_above

CPU = torch.device("cpu")
VOCAB = 7


def followed(text: list[int], count: int) -> tuple[list[int], int]:
    """Find by loops what followed the last place where most of the last eight tokens stand too, and how many do."""
    best, place = 0, -1
    for end in range(len(text) - 1):
        same = 0
        while same < 8 and same <= end and text[end - same] == text[len(text) - 1 - same]:
            same += 1
        if same and same >= best:
            best, place = same, end
    if place < 0:
        return [-1] * count, 0
    after = text[place + 1 :]
    return [after[step % len(after)] for step in range(count)], best


def texts_of(batch: int, length: int, letters: int, seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    texts = [[dice.randrange(letters) for _ in range(length)] for _ in range(batch)]
    if seed % 3 == 0:  # one that ends in a period
        texts[0] = (texts[0][: 1 + seed % 4] * length)[:length]
    return texts


def written_of(texts: list[list[int]], count: int) -> Written:
    return Written.of(torch.tensor(texts), 50, count, CPU)


@pytest.mark.parametrize("letters", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 40])
def test_what_followed(length, letters):
    for seed in range(12):
        texts = texts_of(3, length, letters, seed)
        found = find(torch.tensor(texts, dtype=torch.int32), torch.tensor([length] * 3), 6)
        for row, text in enumerate(texts):
            assert (found.tokens[row].tolist(), int(found.same[row])) == followed(text, 6)


def test_rows_of_different_lengths():
    texts = texts_of(4, 30, 2, 1)
    lengths = [30, 7, 1, 18]
    found = find(torch.tensor(texts, dtype=torch.int32), torch.tensor(lengths), 5)
    for row, length in enumerate(lengths):
        assert (found.tokens[row].tolist(), int(found.same[row])) == followed(texts[row][:length], 5)


@pytest.mark.parametrize("seed", range(6))
def test_texts_go_on(seed):
    """Round by round, rows by other numbers of tokens, some of them what a copy had guessed."""
    dice, texts, count = random.Random(seed), texts_of(3, 12, 2, seed), 5
    written = written_of(texts, count)
    for _ in range(8):
        guesses = [followed(text, count) for text in texts]
        # the nodes of a tree of 6: the root, then a chain of which the first tokens are the copy's
        chains = [guess[: dice.randrange(5)] + [dice.randrange(2) for _ in range(5)] for guess, _ in guesses]
        chains = [[token if token >= 0 else 0 for token in chain[:5]] for chain in chains]
        counts = [dice.randrange(6) for _ in texts]
        newest = [dice.randrange(2) for _ in texts]
        tokens = torch.tensor([[text[-1], *chain] for text, chain in zip(texts, chains, strict=True)])
        path = torch.arange(6).expand(3, -1)
        append(written, tokens, path, torch.tensor(counts), torch.tensor(newest), 4)
        for row, text in enumerate(texts):
            new = [*chains[row][: counts[row] - 1], newest[row]] if counts[row] else []
            guess, same = guesses[row]
            agreed = next((step for step, token in enumerate(new) if step == count or token != guess[step]), len(new))
            text += new
            after, now = followed(text, count)
            assert written.ids[row, : len(text)].tolist() == text and int(written.lengths[row]) == len(text)
            assert Report(*written.report[row].tolist()) == Report(4, same, agreed, counts[row], now)
            assert written.found.tokens[row].tolist() == after


def drafted(batch: int, shape: tuple[int, ...], seed: int, spoil: float = 0.0) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    level = Level.of_root(torch.zeros(batch, dtype=torch.long))
    levels = [level]
    for width in shape:
        logits = torch.randn(batch, level.tokens.shape[1], 4, generator=generator)
        logits[torch.rand(logits.shape, generator=generator) < spoil] = float("nan")
        level = best_children(logits, level.scores, width)
        levels.append(level)
    return TokenTree.from_levels(levels, torch.tensor(levels_above(shape)))


SHAPES = [(), (2,), (3, 6), (1, 1, 1), (4, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_branch(shape):
    """It begins below the deepest node whose path is the copy's, and goes on with the copy from there."""
    begun = set()
    for seed in range(12):
        tree = drafted(2, shape, seed)
        written = written_of(texts_of(2, 30, 2, seed), len(shape) + 6)
        joined = copy_branch(tree, written, 6, VOCAB)
        nodes = 1 + sum(shape)
        assert joined.levels == len(shape) + 6 and joined.tokens.shape == (2, nodes + 6)
        for row in range(2):
            tokens, parents, scores = (part[row].tolist() for part in joined[:3])
            copied, same = written.found.tokens[row].tolist(), int(written.found.same[row])
            node, depth = 0, 0
            while depth < len(shape):
                below = [
                    child for child in range(1, nodes) if (parents[child], tokens[child]) == (node, copied[depth])
                ]
                if not below:
                    break
                node, depth = below[0], depth + 1
            assert tokens[nodes:] == copied[depth : depth + 6]
            assert parents[nodes:] == [node, *range(nodes, nodes + 5)]
            assert all(parent < child for child, parent in enumerate(parents) if child)
            assert all(scores[parent] >= scores[child] for child, parent in enumerate(parents))
            likely = 1.0
            for step, token in enumerate(copied[:depth]):
                likely *= AGREEMENT[min(same + step, 8)]
                assert token >= 0
            assert depth == 0 or scores[node] >= torch.tensor(likely).log() - 1e-5
            begun.add(depth)
    assert not shape or len(begun) > 1


def test_a_copy_ends_where_no_token_can_be_embedded():
    written = written_of([[1, 2, 3, 9, 1, 2, 3, 9, 1, 2], [4, 5, 6, 0, 1, 2, 3, 8, 9, 10]], 6)
    joined = copy_branch(drafted(2, (), 0), written, 6, 9)
    assert (
        joined.tokens[0].tolist() == [0, 3, 0, 0, 0, 0, 0]
        and joined.scores[0].isfinite().tolist() == [True] * 2 + [False] * 5
    )
    assert joined.scores[1, 1:].eq(float("-inf")).all(), "nothing stands there twice"


@pytest.mark.parametrize("verified", [1, 2, 5, 9, None])
@pytest.mark.parametrize("spoil", [0.0, 0.3])
def test_what_is_verified_is_a_tree(spoil, verified):
    """The best nodes, whatever a draft that diverged has scored."""
    for seed in range(12):
        written = written_of(texts_of(2, 30, 2, seed), 9)
        form = TreeForm((3, 6, 6), 6, verified)
        tree = join_copy(drafted(2, form.shape, seed, spoil), written, form, VOCAB)
        assert tree.tokens.shape[1] == form.nodes and tree.levels <= form.levels
        assert (tree.parents[:, 1:] < torch.arange(1, form.nodes)).all() and (tree.parents >= 0).all()
        deepest = 0
        for parents in tree.parents.tolist():
            depths = [0]
            for parent in parents[1:]:
                depths.append(depths[parent] + 1)
            deepest = max(deepest, *depths)
        assert deepest <= tree.levels


def test_a_sure_copy_displaces_the_drafts_guesses():
    text = [5, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3] * 3
    written = written_of([text], 12)
    form = TreeForm((4, 8, 8), 9, 8)
    tree = join_copy(drafted(1, form.shape, 0), written, form, VOCAB)
    copied = written.found.tokens[0].tolist()
    path, node = [], 0
    for token in copied:
        below = [
            child
            for child in range(1, 8)
            if (int(tree.parents[0, child]), int(tree.tokens[0, child])) == (node, token)
        ]
        if not below:
            break
        node = below[0]
        path.append(token)
    assert int(written.found.same[0]) == 8 and len(path) >= 5


def test_nodes_that_are_worth_it():
    written = written_of([[5, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3] * 3, list(range(33))], 12)
    sizes = [
        join_copy(drafted(2, (), 0), written, TreeForm((), 10, None, least), VOCAB).tokens.shape[1]
        for least in (0.01, 0.5, 0.95)
    ]
    assert sizes[0] == 11 > sizes[1] > 1 == sizes[2], "the root alone where nothing is likely enough"
