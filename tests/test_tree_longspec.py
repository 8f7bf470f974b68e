"""TokenTree against hand-drawn trees and against a derivation of everything from the parents in plain Python.

The best children of a level, by torch's operations, are checked against sorting everything.
"""

import random

import pytest
import torch
from level_cases import DTYPES, LEVELS, check, check_draft_vocabulary, check_impossible_tokens, check_rounding

from hf_longspec.modeling.tree_longspec import (
    Level,
    TokenTree,
    TreeForm,
    ancestor_mask,
    best_children,
    children,
    levels_above,
    node_depths,
)

#       0 ─┬─ 1 ─┬─ 3 ─── 6
#          │     └─ 4
#          └─ 2 ─── 5
BUSH = [0, 0, 0, 1, 1, 2, 3]
BUSH_MASK = """
x......
xx.....
x.x....
xx.x...
xx..x..
x.x..x.
xx.x..x
"""
CHAIN = [0, 0, 1, 2, 3, 4, 5]
CHAIN_MASK = """
x......
xx.....
xxx....
xxxx...
xxxxx..
xxxxxx.
xxxxxxx
"""


def drawn(picture: str) -> torch.Tensor:
    return torch.tensor([[cell == "x" for cell in row] for row in picture.split()])


def lineage(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors up to the root."""
    return [node] if node == 0 else [node, *lineage(parents, parents[node])]


def random_parents(nodes: int, rng: random.Random) -> list[int]:
    return [0] + [rng.randrange(node) for node in range(1, nodes)]


def random_scores(parents: list[int], rng: random.Random) -> list[float]:
    """Cumulative scores that never rise, with many ties and now and then a node of probability zero."""
    scores = [0.0]
    for parent in parents[1:]:
        scores.append(scores[parent] - rng.choice([0.0, 0.0, 0.5, 1.0, 3.0, float("inf")]))
    return scores


def make_tree(parents: list[list[int]], scores: list[list[float]]) -> TokenTree:
    depth = max(len(lineage(row, node)) - 1 for row in parents for node in range(len(row)))
    tokens = [[100 * row + node for node in range(len(parents[row]))] for row in range(len(parents))]
    return TokenTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(scores), depth)


def test_mask_and_depths_of_drawn_trees():
    mask = ancestor_mask(torch.tensor([BUSH, CHAIN]), levels=6)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.stack([drawn(BUSH_MASK), drawn(CHAIN_MASK)]))
    assert node_depths(mask).tolist() == [[0, 1, 1, 2, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6]]


def test_mask_needs_no_more_levels_than_the_tree_has():
    assert torch.equal(ancestor_mask(torch.tensor([BUSH]), levels=3)[0], drawn(BUSH_MASK))
    assert torch.equal(ancestor_mask(torch.tensor([BUSH]), levels=9)[0], drawn(BUSH_MASK))


def test_root_alone():
    tree = TokenTree.from_levels([Level.of_root(torch.tensor([7, 9]))], torch.tensor(levels_above(())))
    assert tree.tokens.tolist() == [[7], [9]]
    assert tree.scores.tolist() == [[0.0], [0.0]]
    mask = ancestor_mask(tree.parents, tree.levels)
    assert mask.tolist() == [[[True]], [[True]]]
    assert node_depths(mask).tolist() == [[0], [0]]
    assert tree.prune(1) is tree
    assert children([7], [0]) == [{}]


def test_levels_are_laid_one_behind_the_other():
    root = Level.of_root(torch.tensor([7]))
    first = Level(torch.tensor([[3, 4]]), torch.tensor([[0, 0]]), torch.tensor([[-0.5, -1.0]]))
    second = Level(torch.tensor([[5, 6, 8]]), torch.tensor([[1, 0, 1]]), torch.tensor([[-1.5, -1.6, -1.7]]))
    third = Level(torch.tensor([[9]]), torch.tensor([[2]]), torch.tensor([[-2.0]]))
    tree = TokenTree.from_levels([root, first, second, third], torch.tensor(levels_above((2, 3, 1))))
    assert tree.tokens.tolist() == [[7, 3, 4, 5, 6, 8, 9]]
    assert tree.parents.tolist() == [[0, 0, 0, 2, 1, 2, 5]]
    assert tree.scores.tolist() == [pytest.approx([0.0, -0.5, -1.0, -1.5, -1.6, -1.7, -2.0])]
    assert tree.levels == 3


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1), (4, 16, 16, 16, 16)])
def test_where_the_level_above_starts(shape):
    widths = [1, *shape]
    depths = [depth for depth, width in enumerate(widths) for _ in range(width)]
    assert levels_above(shape) == [depths.index(max(depth - 1, 0)) for depth in depths]


def test_children_of_a_drawn_tree():
    tokens = [50, 11, 12, 13, 14, 11, 16]
    assert children(tokens, BUSH) == [{11: 1, 12: 2}, {13: 3, 14: 4}, {11: 5}, {16: 6}, {}, {}, {}]


def test_children_with_the_same_token_go_by_the_first():
    assert children([5, 8, 8], [0, 0, 0])[0] == {8: 1}


def test_root_is_nobodys_child():
    """The root's parent is itself; a walk must not come back to it."""
    assert children([5, 5], [0, 0]) == [{5: 1}, {}]


def test_prune_drawn_tree():
    scores = [0.0, -2.0, -1.0, -2.5, -4.0, -1.5, -2.5]
    tree = make_tree([BUSH], [scores])
    kept = tree.prune(4)  # 0, 2, 5, 1
    assert kept.tokens.tolist() == [[0, 1, 2, 5]]
    assert kept.parents.tolist() == [[0, 0, 0, 2]]
    assert kept.scores.tolist() == [[0.0, -2.0, -1.0, -1.5]]
    kept = tree.prune(5)  # of the tie 3, 6 the parent
    assert kept.tokens.tolist() == [[0, 1, 2, 3, 5]]
    assert kept.parents.tolist() == [[0, 0, 0, 1, 2]]


def test_prune_rows_apart():
    first = [0.0, -2.0, -1.0, -2.5, -4.0, -1.5, -2.5]
    second = [0.0, -0.1, -0.2, -0.3, -0.4, -0.5, float("-inf")]
    kept = make_tree([BUSH, CHAIN], [first, second]).prune(4)
    assert kept.tokens.tolist() == [[0, 1, 2, 5], [100, 101, 102, 103]]
    assert kept.parents.tolist() == [[0, 0, 0, 2], [0, 0, 1, 2]]


@pytest.mark.parametrize("kept", range(2, 7))
def test_prune_of_scores_that_are_no_numbers_is_closed_under_parents(kept):
    """A draft that diverged scores so, and a node whose parent is gone would be verified as another's child."""
    nan, inf = float("nan"), float("inf")
    for scores in ([0.0] + [nan] * 6, [0.0, nan, -1.0, nan, nan, -1.5, nan], [0.0, -inf, nan, -inf, nan, nan, nan]):
        tree = make_tree([BUSH], [scores])
        pruned = tree.prune(kept)
        tokens, parents = pruned.tokens[0].tolist(), pruned.parents[0].tolist()
        assert len(tokens) == kept and tokens[0] == int(tree.tokens[0, 0])
        for node in range(1, kept):
            place = tree.tokens[0].tolist().index(tokens[node])
            assert tokens[parents[node]] == int(tree.tokens[0, BUSH[place]])


def test_forced_rows_are_chains_of_one_token():
    scores = [[0.0] * 7] * 3
    tree = make_tree([BUSH, BUSH, CHAIN], scores)._replace(levels=3)
    forced = tree.forced(torch.tensor([False, True, True]), 99)
    assert forced.tokens.tolist() == [tree.tokens[0].tolist(), [100] + [99] * 6, [200] + [99] * 6]
    # nodes beyond the levels hang on the root: nobody gets there, and no depth goes beyond the bound
    assert forced.parents.tolist() == [BUSH, [0, 0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 0, 0, 0]]
    assert node_depths(ancestor_mask(forced.parents, forced.levels)).amax(dim=1).tolist() == [3, 3, 3]
    assert forced.levels == 3 and torch.equal(forced.scores, tree.scores)
    for row in (1, 2):  # a walk for padding goes as deep as any
        table, node, steps = children(forced.tokens[row].tolist(), forced.parents[row].tolist()), 0, 0
        while (node := table[node].get(99)) is not None:
            steps += 1
        assert steps == 3


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("seed", range(4))
def test_forced_trees_of_any_size_are_walked_to_their_last_level(size, seed):
    rng = random.Random(seed)
    parents = [random_parents(20, rng) for _ in range(2)]
    pruned = make_tree(parents, [random_scores(row, rng) for row in parents]).prune(size)
    forced = pruned.forced(torch.tensor([True, False]), 7)
    assert torch.equal(forced.tokens[1], pruned.tokens[1]) and torch.equal(forced.parents[1], pruned.parents[1])
    assert all(parent < node for node, parent in enumerate(forced.parents[0].tolist()) if node)
    depths = node_depths(ancestor_mask(forced.parents, forced.levels))[0]
    assert depths[: forced.levels + 1].tolist() == list(range(forced.levels + 1))
    assert (depths[forced.levels + 1 :] <= 1).all()


@pytest.mark.parametrize("size", [None, 7, 8, 100])
def test_prune_leaves_a_small_tree_alone(size):
    tree = make_tree([BUSH], [[0.0] * 7])
    assert tree.prune(size) is tree


def test_prune_everything_tied_keeps_the_first_nodes():
    kept = make_tree([BUSH], [[0.0] * 7]).prune(4)
    assert kept.tokens.tolist() == [[0, 1, 2, 3]]
    assert kept.parents.tolist() == [[0, 0, 0, 1]]


def test_prune_prefers_any_node_to_an_impossible_one():
    impossible = float("-inf")
    kept = make_tree([BUSH], [[0.0, impossible, -9.0, impossible, impossible, -99.0, impossible]]).prune(4)
    assert kept.tokens.tolist() == [[0, 1, 2, 5]]  # one impossible node fills up, and it hangs on the root
    assert kept.parents.tolist() == [[0, 0, 0, 2]]


def test_pruned_tree_is_no_deeper_than_it_has_nodes():
    """An accepted path is padded to `levels` + 1 steps, and the cache has room for one token a node."""
    chain = make_tree([CHAIN], [[-float(node) for node in range(7)]])
    assert chain.levels == 6
    assert chain.prune(3).levels == 2
    assert chain.prune(1).levels == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_against_plain_python(seed):
    rng = random.Random(seed)
    nodes = rng.randrange(2, 30)
    parents = [random_parents(nodes, rng) for _ in range(2)]
    scores = [random_scores(row, rng) for row in parents]
    tree = make_tree(parents, scores)

    mask = ancestor_mask(tree.parents, tree.levels)
    for row in range(2):
        for node in range(nodes):
            assert mask[row, node].nonzero().flatten().tolist() == sorted(lineage(parents[row], node))
    depths = [[len(lineage(row, node)) - 1 for node in range(nodes)] for row in parents]
    assert node_depths(mask).tolist() == depths

    size = rng.randrange(1, nodes)
    pruned = tree.prune(size)
    for row in range(2):
        ranking = sorted(range(nodes), key=lambda node: (-scores[row][node], node))
        kept = sorted(ranking[:size])
        assert all(parents[row][node] in kept for node in kept), "the derivation itself must be closed under parents"
        assert pruned.tokens[row].tolist() == [100 * row + node for node in kept]
        assert pruned.parents[row].tolist() == [kept.index(parents[row][node]) for node in kept]
        assert pruned.scores[row].tolist() == [scores[row][node] for node in kept]
    pruned_mask = ancestor_mask(pruned.parents, pruned.levels)
    assert node_depths(pruned_mask).amax() <= pruned.levels
    for row in range(2):
        kept = pruned.tokens[row].tolist()
        for index, token in enumerate(kept):
            seen = [kept[other] for other in pruned_mask[row, index].nonzero().flatten().tolist()]
            assert seen == sorted(100 * row + node for node in lineage(parents[row], token - 100 * row))


@pytest.mark.parametrize(
    "form, levels, nodes, steps",
    [
        (TreeForm(()), 0, 1, 1),
        (TreeForm((), 6), 6, 7, 7),
        (TreeForm((4, 8)), 2, 13, 3),
        (TreeForm((4, 8), 6), 8, 19, 9),
        (TreeForm((4, 8), 6, 10), 8, 10, 9),
        (TreeForm((4, 8), 6, 5), 8, 5, 5),  # no path has more nodes than there are
        (TreeForm((4, 8), 6, 99), 8, 19, 9),
    ],
)
def test_forms(form, levels, nodes, steps):
    """Their sizes; and that forms within fewer levels are no deeper, for copies may begin below the last level."""
    assert (form.levels, form.nodes, form.steps) == (levels, nodes, steps)
    for most in range(12):
        within = form.within(most)
        assert within == form if most >= levels else within.levels <= most and within.shape == form.shape[:most]


# --- the best children of a level ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, vocab, width", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_children_against_sorting_everything(nodes, vocab, width, dtype):
    check(best_children, nodes, vocab, width, dtype)


def test_impossible_tokens_come_last():
    check_impossible_tokens(best_children)


def test_rounding_never_lifts_a_child_above_its_parent():
    check_rounding(best_children)


def test_tokens_of_a_draft_vocabulary():
    check_draft_vocabulary(best_children)
