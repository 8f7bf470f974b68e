"""The chunked distillation loss against the same formula over all tokens at once, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hf_longspec.training.loss import IGNORED, LossWeights, distillation_loss, token_terms

HIDDEN, VOCAB, TOKENS = 6, 11, 21
WEIGHTS = LossWeights(kl=0.7, ce=0.1)


def random_inputs(dtype=torch.float64):
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype).requires_grad_(False)
    draft, target = torch.randn(2, 3, 7, HIDDEN, dtype=dtype)
    return head, draft.requires_grad_(), target, torch.randint(VOCAB, (3, 7))


def unchunked(head, draft, target, labels):
    draft_logp, target_logp = (log_softmax(head(x), dim=-1).flatten(0, 1) for x in (draft, target))
    kl = kl_div(draft_logp, target_logp, reduction="batchmean", log_target=True)
    return kl, cross_entropy(head(draft).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 100])
def test_value_and_gradient_equal_the_unchunked_ones(chunk):
    head, draft, target, labels = random_inputs()
    sums = distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, chunk)
    (gradient,) = torch.autograd.grad(3 * sums.loss, draft)
    kl, ce = unchunked(head, draft, target, labels)
    loss = 0.7 * kl + 0.1 * ce
    torch.testing.assert_close((sums.kl.sum() / TOKENS, sums.cross_entropy.sum() / TOKENS, sums.loss), (kl, ce, loss))
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * loss, draft)[0])
    agreements = (head(draft).argmax(-1) == head(target).argmax(-1)).sum(1)
    assert sums.agreements.tolist() == agreements.tolist(), "sample by sample"


def test_tokens_that_are_not_learned_are_as_if_they_were_not_there():
    head, draft, target, labels = random_inputs()
    labels = labels.where(torch.rand(labels.shape) < 0.5, IGNORED)
    learned = labels != IGNORED
    sums = distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, 4)
    kl, ce = unchunked(head, draft[learned][None], target[learned][None], labels[learned][None])
    torch.testing.assert_close(sums.loss, 0.7 * kl + 0.1 * ce)
    (gradient,) = torch.autograd.grad(sums.loss, draft)
    assert (gradient[~learned] == 0).all() and (gradient[learned] != 0).any(-1).all()
    agreements = (head(draft).argmax(-1) == head(target).argmax(-1))[learned].sum()
    assert sums.agreements.sum() == agreements


def test_parts_of_a_batch_add_up_to_the_whole():
    head, draft, target, labels = random_inputs()
    whole = distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, 5)
    items = torch.tensor(TOKENS)
    parts = [
        distillation_loss(token_terms(head), draft[rows], target[rows], labels[rows], WEIGHTS, 5, items).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_without_gradients_none_is_computed():
    head, draft, target, labels = random_inputs()
    with torch.no_grad():
        measured = distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, 5)
    assert not measured.loss.requires_grad
    torch.testing.assert_close(measured, distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, 5))


def test_a_draft_equal_to_its_target_has_no_kl():
    head, _, target, labels = random_inputs(torch.float32)
    weights = LossWeights(1.0, 0.0)
    sums = distillation_loss(token_terms(head), target.clone().requires_grad_(), target, labels, weights, 8)
    assert sums.kl.abs().sum() < 1e-5 and sums.agreements.sum() == TOKENS


def test_logits_never_exist_for_more_tokens_than_a_chunk():
    head, draft, target, labels = random_inputs()
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    distillation_loss(token_terms(head), draft, target, labels, WEIGHTS, 4).loss.backward()
    assert max(seen) == 4
    assert len(seen) == 2 * 6, "one pass for the target and one for the draft a chunk: nothing is recomputed"


def test_the_logits_function_is_used_whole():
    """A target's logit cap is part of the loss: it is a function, not a weight matrix."""
    head, draft, target, labels = random_inputs()

    def capped(hidden):
        return torch.tanh(head(hidden) / 2) * 2

    sums = distillation_loss(token_terms(capped), draft, target, labels, WEIGHTS, 5)
    kl, ce = unchunked(capped, draft, target, labels)
    torch.testing.assert_close(sums.loss, 0.7 * kl + 0.1 * ce)


def test_among_some_tokens_only():
    """The target's distribution is that among them; what goes on beyond them adds no cross-entropy."""
    head, draft, target, labels = random_inputs()
    rows = torch.tensor([7, 2, 9, 4])
    places = torch.full((VOCAB,), -1)
    places[rows] = torch.arange(4)
    some = nn.Linear(HIDDEN, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    some.weight.copy_(head.weight[rows])
    sums = distillation_loss(token_terms(some, places), draft, target, labels, WEIGHTS, 5)
    draft_p, target_p = (head(x).softmax(-1)[..., rows].flatten(0, 1) for x in (draft, target))
    draft_p, target_p = (p / p.sum(-1, keepdim=True) for p in (draft_p, target_p))
    kl = (target_p * (target_p / draft_p).log()).sum() / TOKENS
    ce = sum(-draft_p[n, places[t]].log() for n, t in enumerate(labels.flatten()) if places[t] >= 0) / TOKENS
    torch.testing.assert_close(sums.loss, 0.7 * kl + 0.1 * ce)
    (gradient,) = torch.autograd.grad(sums.loss, draft, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.7 * kl + 0.1 * ce, draft)[0])
