"""The kernels of copies do as PyTorch does: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted

from hf_longspec.modeling.copies_longspec import Written, append, join_copy
from hf_longspec.modeling.tree_longspec import Level, TokenTree, TreeForm, best_children, levels_above

VOCAB = 7


def kernels():
    from hf_longspec.modeling import fast_triton_copies_longspec

    return fast_triton_copies_longspec


def text_of(batch: int, length: int, count: int, device: str, seed: int, more: int = 60) -> Written:
    """Return texts over few tokens, whose rows have gone on for other numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    written = Written.of(torch.randint(0, 3, (batch, length), generator=generator), more, count, torch.device("cpu"))
    ahead = torch.randint(0, 3, (batch, 5), generator=generator)
    path = torch.arange(5).expand(batch, -1)
    append(written, ahead, path, torch.arange(batch) % 5, ahead[:, 0], 0)
    return Written(*(part.to(device) if isinstance(part, torch.Tensor) else part._replace(
        tokens=part.tokens.to(device), same=part.same.to(device)) for part in written))  # fmt: skip


def copied(written: Written) -> Written:
    return Written(*(part.clone() if isinstance(part, torch.Tensor) else type(part)(*(t.clone() for t in part))
                     for part in written))  # fmt: skip


def drafted(written: Written, shape: tuple[int, ...], seed: int) -> TokenTree:
    """Grow trees from random logits over few tokens, so that many nodes carry what a copy has."""
    device, batch = written.ids.device, len(written.ids)
    generator = torch.Generator().manual_seed(seed)
    level = Level.of_root(torch.zeros(batch, dtype=torch.long, device=device))
    levels = [level]
    for width in shape:
        logits = torch.randn(batch, level.tokens.shape[1], 5, generator=generator).to(device)
        level = best_children(logits, level.scores, width)
        levels.append(level)
    return TokenTree.from_levels(levels, torch.tensor(levels_above(shape), device=device))


def check_append(device: str, batch: int, length: int, count: int) -> None:
    for seed in range(4):
        ours = text_of(batch, length, count, device, seed)
        theirs = copied(ours)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 3, (batch, 9), generator=generator)
        tokens[:, 1 : 1 + min(count, 4)] = ours.found.tokens[:, :4].cpu()  # which a copy had
        path = torch.arange(6).expand(batch, -1)
        counts = torch.randint(0, 7, (batch,), generator=generator)
        newest = tokens.gather(1, counts[:, None].clamp(max=8))[:, 0]
        inputs = [part.to(device) for part in (tokens, path, counts, newest)]
        append(ours, *inputs, 2)
        kernels().fused_append(theirs, *inputs, 2)
        end = int(ours.lengths.max())
        for row, last in enumerate(ours.lengths.tolist()):
            assert torch.equal(ours.ids[row, :last], theirs.ids[row, :last])
        assert end >= length and torch.equal(ours.lengths, theirs.lengths)
        assert torch.equal(ours.report, theirs.report)
        assert torch.equal(ours.found.same, theirs.found.same)
        assert torch.equal(ours.found.tokens, theirs.found.tokens)


def check_join(device: str, shape: tuple[int, ...], copies: int, verified: int | None) -> None:
    form, begun_below = TreeForm(shape, copies, verified), set()
    for seed in range(6):
        written = text_of(3, 20, form.levels, device, seed)
        tree = drafted(written, shape, seed)
        if seed % 2:  # of nodes with one score the first stay
            tree = tree._replace(scores=tree.scores.round())
        ours, theirs = join_copy(tree, written, form, VOCAB), kernels().fused_join(tree, written, form, VOCAB)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.parents, theirs.parents)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-5)
        assert ours.levels == theirs.levels
        whole = join_copy(tree, written, form._replace(verified=None), VOCAB)
        begun_below |= set(whole.parents[:, 1 + sum(shape)].tolist())
    assert not shape or len(begun_below) > 1, "branches begin at several nodes"


APPENDS = [(1, 5, 3), (4, 40, 8), (3, 1, 30)]
JOINS = [((), 6, None), ((), 20, 8), ((2, 3), 6, None), ((3, 6, 6), 10, 12), ((1, 1, 1), 24, 28)]


@interpreted
@pytest.mark.parametrize("batch, length, count", APPENDS)
def test_append(batch, length, count):
    check_append("cpu", batch, length, count)


@interpreted
@pytest.mark.parametrize("shape, copies, verified", JOINS)
def test_join(shape, copies, verified):
    check_join("cpu", shape, copies, verified)


@interpreted
def test_a_copy_ends_before_what_the_target_cannot_embed():
    form = TreeForm((2,), 5, None)
    written = text_of(2, 20, form.levels, "cpu", 0)
    written.found.tokens[0, 2], written.found.tokens[1, 0] = VOCAB, -1
    tree = drafted(written, form.shape, 0)
    ours, theirs = join_copy(tree, written, form, VOCAB), kernels().fused_join(tree, written, form, VOCAB)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.scores.isinf(), theirs.scores.isinf())
    assert ours.scores.isinf().any()


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length, count", [*APPENDS, (8, 9000, 29), (1, 131_072, 29)])
def test_append_on_a_gpu(batch, length, count):
    check_append("cuda", batch, length, count)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, copies, verified", [*JOINS, ((4, 16, 16, 16, 16), 24, 32)])
def test_join_on_a_gpu(shape, copies, verified):
    check_join("cuda", shape, copies, verified)
