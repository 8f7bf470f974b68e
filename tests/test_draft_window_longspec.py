"""The draft's own window against lists of tokens in plain Python."""

import random

import pytest
import torch
from serials import DIM, HEADS, serials_in, states, states_of_rows

from hf_longspec.modeling.candidate_generator_longspec import DraftWindow
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("prompt", [1, 4, 30])
@pytest.mark.parametrize("padding", [0, 3, 29])
def test_life_of_a_draft_window(window, prompt, padding, seed):
    """Two texts that grow at their own pace, the second's prompt shorter; row b's token p has number 1000·b + p."""
    rng = random.Random(seed)
    tree_size, ends = 6, [prompt, max(prompt - padding, 1)]
    store = DraftWindow(window, tree_size, (2, HEADS, DIM), torch.float32, torch.device("cpu"))
    size = store.nbytes
    assert size == store.keys.untyped_storage().nbytes() + store.values.untyped_storage().nbytes()

    firsts = [max(end - window, 0) for end in ends]
    back = min(window, prompt)
    positions = torch.tensor([range(end - back, end) for end in ends])
    serials = [[1000 * row + p for p in positions[row].tolist()] for row in range(2)]
    store.write(*states_of_rows(serials), positions, positions >= 0)
    store.first = torch.tensor(firsts)
    for _ in range(10):
        parents = [[0] + [rng.randrange(node) for node in range(1, tree_size)] for _ in range(2)]
        ancestry = ancestor_mask(torch.tensor(parents), tree_size)
        depths = node_depths(ancestry)
        tree = [[1000 * row + 500 + node for node in range(tree_size)] for row in range(2)]
        cut = rng.randrange(tree_size + 1)
        for start, end in ((0, cut), (cut, tree_size)):
            store.write_nodes(*states_of_rows([row[start:end] for row in tree]), start)
        roots = torch.tensor(ends)
        mask = store.mask(roots[:, None] + depths, roots, ancestry)
        for row in range(2):
            for node in range(tree_size):
                position = ends[row] + int(depths[row, node])
                slots = mask[row, node]
                seen = serials_in(store.keys[row : row + 1, :, slots], store.values[row : row + 1, :, slots])
                near = [1000 * row + p for p in range(firsts[row], ends[row]) if p > position - window]
                above = [tree[row][other] for other in range(tree_size) if ancestry[row, node, other]]
                assert sorted(seen) == near + above
        counts = [rng.randrange(7) for _ in range(2)]  # none: a row that rests
        steps = max(*counts, 1) + rng.randrange(2)
        positions = roots[:, None] + torch.arange(steps)
        real = torch.arange(steps) < torch.tensor(counts)[:, None]
        tokens = [[1000 * row + ends[row] + step for step in range(steps)] for row in range(2)]
        store.write(*states_of_rows(tokens), positions, real)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        assert store.nbytes == size


def test_draft_window_keeps_the_newest_tokens_in_whatever_order_they_are_written():
    """A scatter may write in any order, so no two tokens may go to one slot."""
    store = DraftWindow(2, 1, (1, HEADS, DIM), torch.float32, torch.device("cpu"))
    positions = [14, 13, 12, 11, 10]
    store.write(*states(positions), torch.tensor([positions]), torch.ones(1, 5, dtype=torch.bool))
    assert serials_in(store.keys[:, :, :2], store.values[:, :, :2]) == [14, 13]
