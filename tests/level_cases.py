"""Checks of a level's best children and of moves of accepted nodes, for torch's operations and for the kernels."""

import math

import torch

LEVELS = [(1, 5, 3), (1, 5, 5), (4, 5, 20), (3, 70, 7), (6, 7, 9), (2, 70, 16), (1, 70, 60)]  # nodes, vocab, width
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(children, nodes, vocab, width, dtype, device="cpu"):
    """Check that `children`, as `best_children`, chooses a level of the best scores, exact to a few float32 units."""
    logits = (3 * torch.randn(2, nodes, vocab, device=device)).to(dtype)
    scores = -3 * torch.rand(2, nodes, device=device)
    tokens, parents, chosen = (part.cpu() for part in children(logits, scores, width))
    assert tokens.dtype == parents.dtype == torch.int64 and chosen.dtype == torch.float32
    everything = (scores.double()[:, :, None] + logits.double().log_softmax(-1)).cpu()
    units = 4 * torch.finfo(torch.float32).eps * everything.abs().max()
    for row in range(2):
        pairs = list(zip(parents[row].tolist(), tokens[row].tolist(), strict=True))
        assert len(set(pairs)) == width
        own = torch.stack([everything[row, parent, token] for parent, token in pairs])
        assert (chosen[row] - own).abs().max() <= units
        best = everything[row].flatten().sort(descending=True).values[:width]
        assert (chosen[row] - best).abs().max() <= units


def check_impossible_tokens(children):
    """Check that tokens of probability zero come last."""
    logits = torch.full((1, 2, 4), -math.inf)
    logits[0, 0, 2] = logits[0, 1, 1] = 0.0
    tokens, parents, scores = children(logits, torch.tensor([[-2.0, -1.0]]), 3)
    assert tokens[0, :2].tolist() == [1, 2] and parents[0, :2].tolist() == [1, 0]
    assert scores.tolist() == [[-1.0, -2.0, -math.inf]]


def check_rounding(children):
    """Check that no child outranks its parent, however sure the draft is: pruning relies on it."""
    logits = 3 * torch.randn(3, 4, 50)
    logits[..., 7] += 40
    scores = -20 * torch.rand(3, 4)
    _, parents, chosen = children(logits, scores, 4)
    assert (chosen <= scores.gather(1, parents)).all()


def check_draft_vocabulary(children):
    """Check that tokens are ids of the target's vocabulary."""
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 5.0]]])
    tokens, parents, _ = children(logits, torch.zeros(1, 2), 2, torch.tensor([7, 30, 90]))
    assert tokens.tolist() == [[90, 30]] and parents.tolist() == [[1, 0]]


def check_moves(move, dim, value_dim):
    """Check moves into slots that other nodes of the path leave, against moves of one element after another."""
    torch.manual_seed(0)
    # as in a cache with spare memory: rows and heads are further apart than they are long
    keys, values = torch.randn(2, 3, 20, dim)[:, :, :12], torch.randn(2, 3, 15, value_dim)[:, :, :12]
    source, target = torch.tensor([[4, 5, 9], [6, 7, 8]]), torch.tensor([[3, 4, 5], [5, 6, 7]])
    expected = []
    for store in (keys, values):
        moved = store.clone()
        for row in range(2):
            for begin, end in zip(source[row].tolist(), target[row].tolist(), strict=True):
                moved[row, :, end] = store[row, :, begin]
        expected.append(moved)
    move(keys, values, source, target)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
